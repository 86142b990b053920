"""What combines: algorithm × method × quantisation × precision × parallelism, found by asking the specs (no torch).

Each cell is the smallest spec that asks for that combination, and the spec's own rules say whether it is one. A cell
that is possible is backed by a training step in ``make matrix``.
"""

from collections.abc import Iterator, Mapping
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import ValidationError

from app.catalog import Catalog
from app.jobs.intake import describe
from app.specs import TrainSpec

METHODS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "lora": {"peft_config": {}},
        "dora": {"peft_config": {"use_dora": True}},
        "rslora": {"peft_config": {"use_rslora": True}},
        "pissa": {"peft_config": {"init_lora_weights": "pissa"}},
        "olora": {"peft_config": {"init_lora_weights": "olora"}},
        "full": {"use_peft": False},
    }
)
"""What the block ``model`` says for each."""
QUANTISATIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "none": {},
        "nf4": {"quantization_config": {"bnb_4bit_quant_type": "nf4"}},
        "fp4": {"quantization_config": {"bnb_4bit_quant_type": "fp4"}},
    }
)
PRECISIONS = ("float32", "bfloat16", "float16")
PARALLEL = ("alone", "ddp", "fsdp")
SEVERAL = 2


class Cell(NamedTuple):
    """One combination."""

    algorithm: str
    method: str
    quantization: str
    precision: str
    parallelism: str


class Refusal(NamedTuple):
    """Why a combination is none: in words, the field at fault, what to do."""

    reason: str
    param: str | None
    hint: str | None


def cells(catalog: Catalog) -> Iterator[Cell]:
    """Every combination, refused ones too."""
    for values in product(sorted(catalog.recipes), METHODS, QUANTISATIONS, PRECISIONS, PARALLEL):
        yield Cell(*values)


def body_of(cell: Cell, spec: type[TrainSpec]) -> dict[str, Any]:
    """The smallest spec that asks for it; model and file are to be filled in."""
    return {
        "type": "train",
        "algorithm": cell.algorithm,
        "model": {
            "model_name_or_path": "org/model",
            "dtype": cell.precision,
            **METHODS[cell.method],
            **QUANTISATIONS[cell.quantization],
        },
        "dataset": {"file": "file-0"},
        **spec.smallest,
        **(
            {}
            if cell.parallelism == "alone"
            else {"resources": {"gpus": SEVERAL}, "training": {"parallelism": cell.parallelism}}
        ),
    }


def refusal(cell: Cell, catalog: Catalog) -> Refusal | None:
    """What the spec has against it; None where it is possible."""
    spec = catalog.recipes[cell.algorithm].spec
    try:
        spec.model_validate(body_of(cell, spec))
    except ValidationError as error:
        fault = describe(error, spec)
        return Refusal(fault.message, fault.param, fault.hint)
    return None


def needs(cell: Cell) -> str | None:
    """What hardware a possible cell asks for; without it, what happens instead."""
    wanted = []
    if cell.precision != "float32":
        wanted.append(f"a GPU that computes in {cell.precision}; elsewhere float32 takes its place (dtype_replaced)")
    if cell.parallelism != "alone":
        wanted.append(f"{SEVERAL} GPUs or more; without them the job waits (no_capacity)")
    return "; ".join(wanted) or None

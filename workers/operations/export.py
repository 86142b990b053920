"""Export: a whole model as one GGUF file, which is loaded again and must answer as the model does."""

import json
import re
import shutil
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from app.catalog import Operation, RunContext
from app.specs import JobSpec, ModelRef, Name
from workers.loading import load_tokenizer, sha256_files
from workers.loading.gguf_proof import certificate, prove
from workers.loading.gguf_vocabulary import read_vocabulary
from workers.loading.gguf_write import read_config, write_gguf

_K_QUANTS = re.compile(r"^(q[2-8]_k|iq[1-4]_)", re.I)
_LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
CERTIFICATE = "certificate.json"


def _known(value: Any) -> Any:
    if isinstance(value, str) and _K_QUANTS.match(value):
        raise PydanticCustomError(
            "outtype",
            "no converter that pip installs writes {value}",
            {
                "value": value,
                "hint": f"Export with outtype: f16, and make {value} of the file with the quantize tool of llama.cpp.",
            },
        )
    return value


class ExportSpec(JobSpec):
    """Write a whole model as one file that other programs read."""

    type: Literal["export"] = "export"
    model: ModelRef = Field(description="A merged, trained or imported model; an adapter is merged first.")
    format: Literal["gguf"] = Field("gguf", description="What is written: one .gguf file with weights and tokenizer.")
    outtype: Annotated[Literal["f32", "f16", "bf16", "q8_0"], BeforeValidator(_known)] = Field(
        "f16", description="How matrices are stored; vectors stay float32."
    )
    output_name: Name | None = Field(None, description="Name of the result; default: the experiment name.")
    aliases: ClassVar[dict[str, str]] = {"artifact": "model"}


def run(spec: ExportSpec, ctx: RunContext) -> None:
    """Write, load again, compare. Raises RunError model_invalid, non_finite_weights, validation_failed."""
    ctx.phase("loading")
    source = ctx.input("model")
    config = read_config(source)
    vocabulary = read_vocabulary(load_tokenizer(source), config["vocab_size"])
    name = spec.output_name or spec.experiment_name or "model"
    folder = ctx.output("gguf", name=name, format=spec.format, outtype=spec.outtype, of=_reference(ctx))
    target = folder / f"{name}-{spec.outtype}.gguf"
    ctx.phase("saving")
    planned = write_gguf(
        source,
        target,
        config,
        vocabulary,
        name=name,
        outtype=spec.outtype,
        told=lambda done, total: ctx.progress(done, total),
    )
    ctx.phase("validating")
    found = certificate(prove(source, target, planned, spec.outtype, ctx.tick), config, spec.outtype)
    found["sha256"] = sha256_files([target])[target.name]
    (folder / CERTIFICATE).write_text(json.dumps(found, indent=2) + "\n")
    ctx.written(target, found["sha256"])
    for licence in sorted(path for glob in _LICENCES for path in source.glob(glob) if path.is_file()):
        shutil.copyfile(licence, folder / licence.name)
    ctx.result(
        file=target.name,
        bytes=target.stat().st_size,
        tensors=len(planned),
        tokenizer=vocabulary.reader,
        certificate=found,
    )


def _reference(ctx: RunContext) -> str | None:
    """What was exported, as the registry pins it."""
    pinned = ctx.input_info("model").get("pinned")
    return str(pinned) if pinned else None


operation = Operation(ExportSpec, run)

"""What is plugged in, put together for the API: from the catalog, the specs and the tables of presets."""

from collections.abc import Mapping

from app.capabilities import table
from app.capabilities.schemas import (
    AlgorithmOut,
    CapabilitiesOut,
    CellOut,
    InstalledOut,
    PlugOut,
    PrecisionOut,
    TargetsOut,
)
from app.capabilities.table import Cell
from app.catalog import Catalog
from app.errors import BadRequest
from app.peft import INITS, PEFT_PRESETS
from app.settings import Settings
from app.targets import FAMILIES, Family, spelt_out

_FLOAT32 = "float32"


def everything(catalog: Catalog, settings: Settings) -> CapabilitiesOut:
    """The whole answer; the same for as long as the process lives."""
    return CapabilitiesOut(
        algorithms=[
            AlgorithmOut(
                name=name,
                description=_about(recipe.spec),
                learning_rate=dict(zip(("adapter", "full"), recipe.spec.learning_rates, strict=True)),
                metrics=recipe.spec.eval_metrics,
                judged=recipe.spec.judged or "graders" in recipe.spec.model_fields,
            )
            for name, recipe in sorted(catalog.recipes.items())
        ],
        methods={name: dict(block) for name, block in table.METHODS.items()},
        quantizations={name: dict(block) for name, block in table.QUANTISATIONS.items()},
        precisions=[
            PrecisionOut(
                name=name,
                gpu=name if name == _FLOAT32 else f"{name}, or {_FLOAT32} where the GPU lacks it (dtype_replaced)",
                cpu=name if name == _FLOAT32 else f"{_FLOAT32}, which is many times faster there (dtype_replaced)",
            )
            for name in table.PRECISIONS
        ],
        parallelism=list(table.PARALLEL),
        presets=PEFT_PRESETS,
        target_presets=_target_presets(),
        inits=list(INITS),
        graders=[
            PlugOut(name=name, description=_about(grader.spec)) for name, grader in sorted(catalog.graders.items())
        ],
        trackers=[
            InstalledOut(name=name, installed=tracker.installed, needs=tracker.needs)
            for name, tracker in sorted(catalog.trackers.items())
        ],
        merge_methods=sorted(catalog.merges),
        engines=[
            InstalledOut(
                name=name,
                installed=engine.own_python or settings.engine_python is not None,
                needs=None if engine.own_python else "TUNESMITH_SERVE_PYTHON",
            )
            for name, engine in sorted(catalog.engines.items())
        ],
        job_types=catalog.job_types(),
        cells=[_shown(cell, catalog) for cell in table.cells(catalog)],
    )


def chosen(whole: CapabilitiesOut, axes: Mapping[str, str | None], possible: bool | None) -> CapabilitiesOut:
    """The same with the cells that are asked for. Raises BadRequest for a value that no cell has."""
    cells = whole.cells
    for axis, value in axes.items():
        if value is None:
            continue
        known = sorted({getattr(cell, axis) for cell in whole.cells})
        if value not in known:
            raise BadRequest(f"{axis}: there is no {value}", param=axis, hint=f"One of: {', '.join(known)}.")
        cells = [cell for cell in cells if getattr(cell, axis) == value]
    if possible is not None:
        cells = [cell for cell in cells if cell.possible == possible]
    return whole.model_copy(update={"cells": cells})


def _shown(cell: Cell, catalog: Catalog) -> CellOut:
    refusal = table.refusal(cell, catalog)
    if refusal is None:
        return CellOut(**cell._asdict(), possible=True, needs=table.needs(cell))
    return CellOut(**cell._asdict(), possible=False, **refusal._asdict())


def _target_presets() -> list[TargetsOut]:
    named: dict[Family, list[str]] = {}
    for model_type, family in FAMILIES.items():
        named.setdefault(family, []).append(model_type)
    found = []
    for family, model_types in named.items():
        presets = {name: spelt_out(name, family) for name in ("minimal", "standard", "full")}
        found.append(
            TargetsOut(
                model_types=model_types,
                **{name: [*targets.modules, *targets.parameters] for name, targets in presets.items()},
            )
        )
    return found


def _about(plug: type) -> str:
    return " ".join((plug.__doc__ or "").partition("\n\n")[0].split())

"""Check an adapter: what it is, what it was made for, and what is wrong with it. Nothing is loaded into a model."""

import json
import math
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from app.catalog import Operation, RunContext
from app.errors import Code, RunError
from app.specs import AdapterRef, JobSpec, ModelRef
from workers.loading import check_base, non_finite, read_adapter, tensor_headers
from workers.loading.adapters import CONFIG_FILE, Adapter, adapted_modules
from workers.loading.norms import Change, by_layer, changes


class CheckAdapterSpec(JobSpec):
    """Say what an adapter is, and whether it fits its base."""

    type: Literal["check_adapter"] = "check_adapter"
    adapter: AdapterRef
    base_model: ModelRef | None = Field(
        None, description="The base to compare it with; default the one that it was trained on, if that lies here."
    )


class Problem(NamedTuple):
    """What is wrong; a warning does not fail the job."""

    level: Literal["warning", "error"]
    message: str
    hint: str | None = None


def run(spec: CheckAdapterSpec, ctx: RunContext) -> None:
    """Reads config and headers, compares with the base where it is here. Raises RunError with the first error."""
    ctx.phase("validating")
    folder = ctx.input("adapter")
    base = _base(spec, ctx)
    problems: list[Problem] = []
    fault: RunError | None = None
    found: list[Change] = []
    try:
        adapter: Adapter | None = read_adapter(folder)
    except RunError as error:
        adapter, fault = None, error
    if adapter is not None:
        fault = _unfit(adapter, base)
        problems += (broken := _weights(folder, adapter))
        if base is not None and fault is None and not any(problem.level == "error" for problem in broken):
            found = changes(adapter, base)
        problems += _modules(found)
        if not adapter.base:
            problems.append(Problem("warning", "it does not say which weights it was trained on"))
    if fault is not None:
        problems.insert(0, Problem("error", fault.message, fault.hint))
    about = {**_facts(folder, adapter, base), **_update(found)}
    report = {**about, "ok": not any(problem.level == "error" for problem in problems)}
    ctx.result(report={**report, "problems": [problem._asdict() for problem in problems]})
    first = next((problem for problem in problems if problem.level == "error"), None)
    if first is not None:
        code = fault.code if fault is not None else Code.ADAPTER_INVALID
        raise RunError(code, first.message, hint=first.hint, param="adapter")


def _base(spec: CheckAdapterSpec, ctx: RunContext) -> Path | None:
    """The base's folder. One that was asked for is fetched; the adapter's own only counts where it is here already."""
    if spec.base_model or ctx.input_info("base_model").get("path"):
        return ctx.input("base_model")
    return None


def _unfit(adapter: Adapter, base: Path | None) -> RunError | None:
    if base is None:
        return None
    try:
        check_base(adapter, base, adapter.base.get("name") or base.name)
    except RunError as error:
        return error
    return None


def _weights(folder: Path, adapter: Adapter) -> list[Problem]:
    """NaN, matrices that are still zero, and module names that lead to no weights."""
    problems = []
    bad = non_finite(folder)
    if bad:
        problems.append(Problem("error", f"{len(bad)} tensors hold NaN or infinity, e.g. {bad[0]}"))
    if _does_nothing(folder, adapter):
        problems.append(Problem("warning", "every B matrix is zero: it changes nothing, as if it was never trained"))
    targets, modules = adapter.config.get("target_modules"), adapted_modules(adapter)
    names = [name for name in targets if isinstance(name, str)] if isinstance(targets, list) else []
    idle = [name for name in names if not any(module == name or module.endswith(f".{name}") for module in modules)]
    if idle:
        problems.append(Problem("warning", f"its config names {', '.join(idle)}, for which it holds no weights"))
    return problems


def _modules(found: list[Change]) -> list[Problem]:
    """Modules that are dead among others that are not, and those that outweigh their weights."""
    problems = []
    dead = [change.module for change in found if change.dead]
    if dead and len(dead) < len(found):
        message = f"{len(dead)} of {len(found)} modules change nothing, e.g. {dead[0]}"
        problems.append(Problem("warning", message, "training never reached them; look at its target_modules"))
    large = [change for change in found if change.exploding]
    if large:
        worst = max(large, key=lambda change: change.relative or 0)
        message = (
            f"{len(large)} modules change their weights by more than the weights themselves, e.g. {worst.module} by "
            f"{worst.relative or worst.norm:.3g} times"
        )
        problems.append(Problem("warning", message, "train again with a lower learning_rate or lora_alpha"))
    return problems


def _update(found: list[Change]) -> dict[str, Any]:
    """What the adapter changes, module by module summed up by layer; empty where its base is not here."""
    relative = [change.relative for change in found if change.relative is not None]
    return {
        "update_norm": math.hypot(*(change.norm for change in found)) if found else None,
        "relative_update": {"least": min(relative), "most": max(relative)} if relative else None,
        "layers": by_layer(found),
        "dead_modules": [change.module for change in found if change.dead],
        "exploding_modules": [change.module for change in found if change.exploding],
    }


def _does_nothing(folder: Path, adapter: Adapter) -> bool:
    from safetensors import safe_open

    ends = [name for name in adapter.tensors if ".lora_B." in name]
    for path in {adapter.tensors[name].path for name in ends}:
        with safe_open(str(path), framework="pt") as file:
            if any(bool(file.get_tensor(name).any()) for name in ends if adapter.tensors[name].path == path):
                return False
    return bool(ends)


def _facts(folder: Path, adapter: Adapter | None, base: Path | None) -> dict[str, Any]:
    config = adapter.config if adapter else _config(folder)
    tensors = adapter.tensors if adapter else {}
    record = adapter.base if adapter else {}
    parameters = sum(prod(info.shape) for info in tensors.values())
    whole = sum(prod(info.shape) for info in tensor_headers(base).values()) if base else None
    targets = config.get("target_modules")
    return {
        "type": _type(config),
        "base": record.get("name") or config.get("base_model_name_or_path"),
        "base_here": base is not None,
        "r": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "dropout": config.get("lora_dropout"),
        "targets": targets if isinstance(targets, list) else [str(targets)],
        "modules": len(adapted_modules(adapter)) if adapter else 0,
        "modules_to_save": config.get("modules_to_save"),
        "bias": config.get("bias"),
        "task_type": config.get("task_type"),
        "parameters": parameters,
        "base_parameters": whole,
        "share": parameters / whole if whole else None,
        "bytes": sum(info.bytes for info in tensors.values()),
        "trained_on": record.get("quantization") or ("unquantised weights" if record else "not known"),
    }


def _type(config: dict[str, Any]) -> str:
    more = [name for name, field in (("DoRA", "use_dora"), ("rsLoRA", "use_rslora")) if config.get(field)]
    return " ".join([str(config.get("peft_type")), *(f"({name})" for name in more)])


def _config(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


operation = Operation(CheckAdapterSpec, run)

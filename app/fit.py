"""Whether an adapter fits a base, judged by the base's config.json and the shapes of its tensors (no torch).

Asked at submit where the headers are at hand, and again in the run, of the model as it was built.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from app.peft import PeftBlock
from app.targets import ALL_LINEAR, EMBEDDINGS, HEADS, Family, Targets, ends, family_of, has, model_types, spelt_out

Shapes = Mapping[str, Sequence[int]]


class Misfit(NamedTuple):
    """What does not fit: the field of ``peft_config`` at fault, why, and what to do."""

    field: str
    message: str
    hint: str
    missing: bool = False
    """True when a name leads to nothing in the model."""


def targets_of(peft: PeftBlock, config: Mapping[str, Any], shapes: Shapes) -> Targets | None:
    """What the adapter goes on; of ``all-linear`` no names where peft finds them. None = the preset means nothing."""
    if isinstance(peft.target_modules, list):
        return Targets(tuple(sorted(set(peft.target_modules))))
    modules = linear_modules(shapes)
    family = family_of(config, modules)
    if peft.target_modules == ALL_LINEAR and (family is None or not family.experts):
        return Targets(())
    return spelt_out(peft.target_modules, family, modules) if family else None


def linear_modules(shapes: Shapes) -> dict[str, Sequence[int]]:
    """Paths of the modules with a matrix, less embeddings, heads and experts, and their shapes."""
    return {
        path: shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
        if (path := name.removesuffix(".weight")).rpartition(".")[2] not in EMBEDDINGS | HEADS
        if ".experts." not in path
    }


def misfit(peft: PeftBlock, config: Mapping[str, Any], shapes: Shapes, *, quantised: bool) -> Misfit | None:
    """The first thing that does not fit; None where all does, or where there is nothing to judge by."""
    modules = linear_modules(shapes)
    if not modules:
        return None
    targets = targets_of(peft, config, shapes)
    if targets is None:
        kind = (model_types(config) or ["unknown"])[0]
        return Misfit(
            "target_modules",
            f"the preset {peft.target_modules!r} is not known for this architecture ({kind})",
            f"It has: {_leaves(modules)}. Name some of them, or use all-linear.",
            missing=True,
        )
    on = adapted(targets, modules)
    family = family_of(config, modules)
    return (
        _targets(targets, modules, shapes)
        or _experts(peft, targets)
        or _patterns(peft, on)
        or _ranks(peft, on, family)
        or _whole_modules(peft, on, shapes, quantised)
    )


def adapted(targets: Targets, modules: Shapes) -> dict[str, Sequence[int]]:
    """Those of the modules that the adapter goes on."""
    return {
        path: shape
        for path, shape in modules.items()
        if not targets.modules or any(ends(path, name) for name in targets.modules)
    }


def _targets(targets: Targets, modules: Mapping[str, Any], shapes: Shapes) -> Misfit | None:
    apart = sorted(name for name in targets.modules if name.rpartition(".")[2] in EMBEDDINGS | HEADS)
    if apart:
        what = "the output head" if apart[0].rpartition(".")[2] in HEADS else "an embedding"
        return Misfit(
            "target_modules",
            f"{apart[0]} is {what}, which takes no adapter",
            "Leave it out; to train it whole, list it in modules_to_save.",
        )
    missing = [name for name in targets.modules if not has(modules, name)]
    if missing:
        return Misfit(
            "target_modules",
            f"the model has no linear module named {', '.join(missing)}",
            f"It has: {_leaves(modules)}. Or use all-linear.",
            missing=True,
        )
    return None


def _experts(peft: PeftBlock, targets: Targets) -> Misfit | None:
    """All experts of a layer are one tensor, which peft adapts in a simpler way."""
    if not targets.parameters:
        return None
    how = f"target_modules: {peft.target_modules} reaches the experts of this model, which peft adapts without"
    if peft.lora_dropout:
        return Misfit("lora_dropout", f"{how} dropout", "Write lora_dropout: 0, or target_modules: standard.")
    if peft.use_dora:
        return Misfit("use_dora", f"{how} DoRA", "Leave use_dora out, or write target_modules: standard.")
    if peft.start not in ("true", "gaussian"):
        return Misfit(
            "init_lora_weights", f"{how} {peft.init_lora_weights}", "Leave it out, or write target_modules: standard."
        )
    return None


def _patterns(peft: PeftBlock, on: Mapping[str, Any]) -> Misfit | None:
    for field, pattern in (("rank_pattern", peft.rank_pattern), ("alpha_pattern", peft.alpha_pattern)):
        for name in pattern:
            if not has(on, name):
                return Misfit(
                    field,
                    f"{field}: {name} is none of the modules that are adapted",
                    f"Adapted are: {_leaves(on)}.",
                    missing=True,
                )
    return None


def _ranks(peft: PeftBlock, on: Mapping[str, Sequence[int]], family: Family | None) -> Misfit | None:
    """Starts that are worked out from the weights."""
    if peft.start == "olora" and family is not None and family.transposed:
        return Misfit(
            "init_lora_weights",
            "peft's OLoRA does not read weights that are stored (in, out), as this model's are",
            "Take pissa.",
        )
    if peft.start not in ("pissa", "olora", "mica"):
        return None
    for path, shape in sorted(on.items()):
        rank = by_pattern(peft.rank_pattern, path, peft.r)
        if rank > min(shape):
            return Misfit(
                "r",
                f"{peft.start} takes {rank} directions of {path}, which has {min(shape)}",
                f"Make r at most {min(shape)}.",
            )
    return None


def by_pattern(pattern: Mapping[str, int], path: str, default: int) -> int:
    """A module's own value: the longest name that its path ends with counts."""
    fitting = [name for name in pattern if ends(path, name)]
    return pattern[max(fitting, key=len)] if fitting else default


def _whole_modules(peft: PeftBlock, on: Mapping[str, Any], shapes: Shapes, quantised: bool) -> Misfit | None:
    """``modules_to_save``: each name leads to modules, to nothing else, and to none that is adapted or in 4 bit."""
    paths = _all_paths(shapes)
    for name in peft.modules_to_save or []:
        found = [path for path in paths if ends(path, name)]
        if not found:
            return Misfit(
                "modules_to_save",
                f"the model has no module named {name}",
                f"It has: {_leaves(path for path in paths if path + '.weight' in shapes)}.",
                missing=True,
            )
        # peft compares the ends of paths without looking for the dot.
        also = next((path for path in paths if path.endswith(name) and not ends(path, name)), None)
        if also:
            longer = ".".join(found[0].split(".")[-2:])
            return Misfit(
                "modules_to_save", f"{name} would also take {also}", f"Write more of its path, e.g. {longer}."
            )
        inside = next((path for path in on if any(_within(path, whole) for whole in found)), None)
        if inside:
            return Misfit(
                "modules_to_save",
                f"{inside} would be trained whole and get an adapter too",
                "Take it out of modules_to_save or of target_modules.",
            )
        packed = next((path for path in linear_modules(shapes) if any(_within(path, whole) for whole in found)), None)
        if quantised and packed:
            return Misfit(
                "modules_to_save",
                f"{packed} is stored in 4 bit, which cannot be trained whole",
                "Embeddings, the head and norms can; or remove quantization_config.",
            )
    return None


def _all_paths(shapes: Shapes) -> list[str]:
    """Every module, the ones that hold others too, and a head that is tied to the embedding and so not stored."""
    seen = set()
    for name in shapes:
        parts = name.split(".")[:-1]
        seen |= {".".join(parts[: length + 1]) for length in range(len(parts))}
    tied = not any(path.rpartition(".")[2] in HEADS for path in seen)
    return sorted(seen | ({"lm_head"} if tied else set()))


def _within(path: str, whole: str) -> bool:
    return path == whole or path.startswith(f"{whole}.")


def _leaves(paths: Iterable[str]) -> str:
    return ", ".join(sorted({path.rpartition(".")[2] for path in paths})[:20])

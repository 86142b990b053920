"""Merges, looked at before they are stored: does the method take what is given, and do the adapters go together?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from app.artifacts import inspect, references
from app.catalog import Catalog, MergeMethod
from app.errors import BadRequest, Code
from app.settings import Settings

_OF_METHODS = ("weights", "density", "majority_sign_method", "svd_rank", "t")
_INPUTS = ("adapter", "adapters", "models")
_LEAST = 1e-6
Modules = dict[str, tuple[int, int, int]]
"""By module: rank, inputs, outputs."""


def check(session: Session, settings: Settings, catalog: Catalog, project_id: str, resolved: Mapping[str, Any]) -> None:
    """Refuses a merge that cannot work. ``resolved`` has its references pinned. Raises BadRequest."""
    method = _method(catalog, resolved["method"])
    given = next(name for name in _INPUTS if resolved.get(name) is not None)
    if given not in method.takes:
        able = sorted(name for name, other in catalog.merges.items() if given in other.takes)
        raise _refused(
            "method",
            f"{method.name} merges {_or(method.takes)}, and {given} is given",
            f"Methods for {given}: {', '.join(able)}." if able else f"Give {_or(method.takes)}.",
        )
    for name in _OF_METHODS:
        if resolved.get(name) is not None and name not in method.uses:
            own = [field for field in method.uses if field in _OF_METHODS]
            used = f"It takes {', '.join(own)}." if own else "It takes no such field."
            raise _refused(name, f"{name} means nothing to {method.name}", f"Leave it out. {used}")
    if given == "adapter":
        return
    entries = resolved[given]
    if method.exactly is not None and len(entries) != method.exactly:
        raise _refused(
            given,
            f"{method.name} takes {method.exactly} {given}, not {len(entries)}",
            "Merge them one after the other.",
        )
    weights = resolved.get("weights")
    if method.normalised and weights and abs(sum(weights)) < _LEAST:
        raise _refused(
            "weights", f"{method.name} divides by the sum of weights, which is zero", "Let them add up to 1."
        )
    based = resolved.get("base_model") is not None
    if given == "models" and based and "base_model" not in method.uses:
        raise _refused("base_model", f"base_model means nothing to {method.name}", "Leave it out.")
    if given == "models" and not based and "base_model" in method.uses:
        raise BadRequest(
            f"{method.name} needs base_model",
            param="base_model",
            code=Code.MISSING_FIELD,
            hint="Name the model that they were all trained from.",
        )
    if given == "adapters":
        found = [
            references.resolve(session, settings, project_id, entry, param=f"{given}.{number}")
            for number, entry in enumerate(entries)
        ]
        _check_adapters(found, method, resolved)


def _method(catalog: Catalog, name: str) -> MergeMethod:
    method = catalog.merges.get(name)
    if method is None:
        hint = f"One of: {', '.join(sorted(catalog.merges))}."
        raise BadRequest(f"method {name!r} is unknown", param="method", hint=hint)
    return method


def _check_adapters(found: list[references.Resolved], method: MergeMethod, resolved: Mapping[str, Any]) -> None:
    """Adapters that lie here already; those that jobs will make are looked at when the merge runs."""
    first: tuple[str, Modules] | None = None
    roots: dict[str, str] = {}
    for number, entry in enumerate(found):
        path = f"adapters.{number}"
        chain = entry.facts.get("base_chain")
        if chain:
            roots[path] = str(chain[0])
        if entry.folder is None:
            continue
        modules = _modules(entry.folder, path)
        if first is None:
            first = path, modules
        else:
            _compare(first, (path, modules), method)
    if len(set(roots.values())) > 1 and not resolved.get("allow_base_mismatch") and resolved.get("base_model") is None:
        path, other = next((path, root) for path, root in roots.items() if root != next(iter(roots.values())))
        raise BadRequest(
            f"{path}: this adapter was trained on {other}, and {next(iter(roots))} on {next(iter(roots.values()))}",
            param=path,
            code=Code.BASE_MISMATCH,
            hint="Combine adapters of one base.",
        )


def _modules(folder: Path, path: str) -> Modules:
    """From the headers of an adapter's weights. Raises BadRequest for more than plain LoRA."""
    config = inspect.read_json(folder / "adapter_config.json", path)
    extra = next(
        (label for key, label in (("use_dora", "DoRA"), ("modules_to_save", "modules_to_save")) if config.get(key)),
        None,
    )
    if extra is None and config.get("bias", "none") != "none":
        extra = f"bias: {config['bias']}"
    if extra:
        raise BadRequest(
            f"{path}: an adapter with {extra} has no combination with others",
            param=path,
            code=Code.ADAPTER_INVALID,
            hint="Merge it alone and train the next one on the result, or combine plain LoRA adapters.",
        )
    if not (folder / "adapter_model.safetensors").is_file():
        return {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in inspect.tensor_shapes(folder, path).items():
        for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            module, mark, _ = name.partition(f".{part}")
            if mark and len(shape) == 2:
                shapes.setdefault(module, {})[part[-1]] = tuple(shape)
    return {
        module: (sides["A"][0], sides["A"][1], sides["B"][0]) for module, sides in shapes.items() if len(sides) == 2
    }


def _compare(one: tuple[str, Modules], other: tuple[str, Modules], method: MergeMethod) -> None:
    for module in sorted(one[1].keys() & other[1].keys()):
        (rank, *sides), (its_rank, *its_sides) = one[1][module], other[1][module]
        name = module.removeprefix("base_model.model.")
        if sides != its_sides:
            raise BadRequest(
                f"{other[0]}: {name} has {its_sides[0]} inputs and {its_sides[1]} outputs, in {one[0]}"
                f" {sides[0]} and {sides[1]}",
                param=other[0],
                code=Code.BASE_MISMATCH,
                hint="Combine adapters of one base.",
            )
        if method.equal_ranks and rank != its_rank:
            raise _refused(
                other[0],
                f"{other[0]}: {name} has rank {its_rank}, in {one[0]} rank {rank}; {method.name} takes equal ones",
                "Take method cat, which adds ranks, or svd, which needs none to be equal.",
            )


def _refused(field: str, message: str, hint: str) -> BadRequest:
    return BadRequest(message, param=field, code=Code.CONFLICTING_FIELDS, hint=hint)


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(names)

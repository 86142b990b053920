"""Several LoRA adapters of one base as one: what peft's ``add_weighted_adapter`` makes, in files and without a model.

The sparsifying and voting is peft's own code. Ours are the places of the tensors, the weights of the two factors, and
the SVD, which works on the factors: a product of rank r of two long matrices has the singular values of an r × r one.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from app.errors import Code, RunError
from workers.loading.adapters import CONFIG_FILE, WEIGHTS_FILE, Adapter, read_adapter
from workers.loading.deltas import Mapped
from workers.loading.layout import Placed, place
from workers.loading.merge_spec import MergeSpec
from workers.loading.merging import read_config
from workers.loading.weights import tensor_headers

Tensors = Sequence[Any]
Blend = Callable[[Tensors, Any, MergeSpec], Any]
"""``blend(tensors, weights, spec)``: equal shapes to one of that shape."""


class Factors(NamedTuple):
    """One adapter's part in one module, in float32: weight · B [out, r] · A [r, in], weight with the scale in it."""

    b: Any
    a: Any
    weight: float


Join = Callable[[Sequence[Factors], MergeSpec], tuple[Any, Any]]
"""``join(parts, spec)``: B and A of the combined module, whose product is added as it is."""


class Combined(NamedTuple):
    """What came of it."""

    modules: int
    ranks: list[int]
    """The different ranks of the combined modules, ascending."""
    distance: float | None
    """‖Δ − Σ wᵢ Δᵢ‖ / ‖Σ wᵢ Δᵢ‖: how far the result is from the plain sum of the changes; None where that is zero."""


def by_factor(blend: Blend) -> Join:
    """A join that blends the A of all parts, and their B, each with the root of its weight; the sign goes with A."""

    def join(parts: Sequence[Factors], spec: MergeSpec) -> tuple[Any, Any]:
        import torch

        roots = [math.sqrt(abs(part.weight)) for part in parts]
        signed = [math.copysign(root, part.weight) for root, part in zip(roots, parts, strict=True)]
        a = blend([part.a for part in parts], torch.tensor(signed), spec)
        return blend([part.b for part in parts], torch.tensor(roots), spec), a

    return join


def concatenate(parts: Sequence[Factors], spec: MergeSpec) -> tuple[Any, Any]:
    """B and A side by side: the exact sum, of the sum of ranks."""
    import torch

    return torch.cat([part.b for part in parts], 1), torch.cat([part.a * part.weight for part in parts])


def best_of_rank(parts: Sequence[Factors], spec: MergeSpec) -> tuple[Any, Any]:
    """The sum's best approximation of rank ``svd_rank``, by default the largest of the parts' ranks."""
    import torch

    b, a = (factor.double() for factor in concatenate(parts, spec))
    rank = min(spec.svd_rank or max(part.a.shape[0] for part in parts), *b.shape, *a.shape)
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return (left @ u[:, :rank] * s[:rank]).float(), (right @ v[:rank].T).T.float()


def combine(
    adapters: Sequence[Path], base: Path, spec: MergeSpec, join: Join, folder: Path, *, equal_ranks: bool
) -> Combined:
    """Writes the combined adapter into ``folder``, which becomes one. Raises RunError adapter_invalid, base_mismatch.

    The generator of random numbers is seeded with ``spec.seed``: the same spec gives the same bytes.
    """
    import torch
    from safetensors.torch import save_file

    found = [read_adapter(adapter) for adapter in adapters]
    headers, config = tensor_headers(base), read_config(base)
    weights = spec.weights or [1.0] * len(adapters)
    modules = _modules(found, headers, config)
    kinds = {entry.config.get("task_type") for entry in found}
    if len(kinds) > 1:
        raise _refused(f"they are for different tasks: {', '.join(sorted(map(str, kinds)))}")
    torch.manual_seed(spec.seed)
    tensors: dict[str, Any] = {}
    ranks: dict[str, int] = {}
    squares, off = 0.0, 0.0
    for module in sorted(modules):
        parts = [
            Factors(*_loaded(found[number], item), weights[number] * item.scale)
            for number, item in sorted(modules[module].items())
        ]
        own = {part.a.shape[0] for part in parts}
        if equal_ranks and len(own) > 1:
            raise _refused(
                f"{module} has ranks {', '.join(map(str, sorted(own)))}, and {spec.method} takes equal ones",
                "Take method cat, which adds ranks, or svd, which needs none to be equal.",
            )
        b, a = join(parts, spec)
        names = next(iter(modules[module].values())).names
        tensors |= {names[0]: b.contiguous(), names[1]: a.contiguous()}
        ranks[module] = a.shape[0]
        total, rest = _norms(parts, b, a)
        squares, off = squares + total, off + rest
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    about = _config(found, ranks)
    (folder / CONFIG_FILE).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
    return Combined(len(ranks), sorted(set(ranks.values())), math.sqrt(off / squares) if squares else None)


def _modules(
    found: Sequence[Adapter], headers: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, dict[int, Placed]]:
    """By module, each adapter's part in it. Raises RunError for what is more than a product of two factors."""
    modules: dict[str, dict[int, Placed]] = {}
    for number, adapter in enumerate(found):
        for item in place(adapter.config, adapter.tensors, headers, config):
            if item.kind != "low_rank" or item.magnitude or item.experts > 1 or item.expert is not None:
                what = "DoRA's lengths" if item.magnitude else "experts" if item.kind == "low_rank" else "whole tensors"
                raise _refused(
                    f"adapter {number + 1} holds {what} ({item.module}), which have no combination",
                    "Merge it into the base first, train the next on the result, or combine plain LoRA adapters.",
                )
            modules.setdefault(item.module, {})[number] = item
    return modules


def _loaded(adapter: Adapter, item: Placed) -> tuple[Any, Any]:
    mapped = Mapped()
    b, a = (mapped.tensor(adapter.tensors[name]).float() for name in item.names)
    return b, a


def _norms(parts: Sequence[Factors], b: Any, a: Any) -> tuple[float, float]:
    """Squared norms of the weighted sum, and of what the combination is off it, from products of factors alone."""
    import torch

    left = torch.cat([part.b for part in parts], 1).double()
    right = torch.cat([part.a * part.weight for part in parts]).double()
    total = float(((left.T @ left) * (right @ right.T)).sum())
    left, right = torch.cat([left, -b.double()], 1), torch.cat([right, a.double()])
    return total, max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))


def _config(found: Sequence[Adapter], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The first adapter's, with scale 1 for every module."""
    most = max(ranks.values(), key=list(ranks.values()).count)
    patterns = {module: rank for module, rank in ranks.items() if rank != most}
    return {
        **found[0].config,
        "r": most,
        "lora_alpha": most,
        "use_rslora": False,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(ranks),
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _refused(what: str, hint: str | None = None) -> RunError:
    return RunError(Code.ADAPTER_INVALID, f"the adapters cannot be combined: {what}", hint=hint, param="adapters")

"""Which base an adapter says that it was trained on, and whether it is the one that it is merged into."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.artifacts.inspect import unquantised_sibling
from app.catalog import RunContext
from workers.loading.adapters import Adapter
from workers.loading.models import base_label
from workers.loading.weights import fingerprint


def told_origin(adapter: Adapter, base: Path, name: str, ctx: RunContext, field: str) -> dict[str, Any]:
    """For the certificate: ``name`` of the base that the adapter names, if any, and ``weights``: same, other, unknown.

    Where nothing but names can be compared an event says so, a warning where they differ. ``field``: the adapter's.
    """
    said = adapter.base.get("name") or adapter.config.get("base_model_name_or_path")
    named = base_label({}, said) if isinstance(said, str) and said else None
    recorded = adapter.base.get("fingerprint")
    if recorded:
        return {"name": named, "weights": "same" if recorded == fingerprint(base) else "other"}
    if named is None or _plain(named) in {_plain(other) for other in _names(base, name, ctx.input_info("base_model"))}:
        message = "the adapter does not say which weights it was trained on; only shapes were compared"
        ctx.event("base_unproved", message, adapter=field)
    else:
        ctx.event(
            "base_name_differs",
            f"{field} names {named} as its base and is merged into {name}; only shapes were compared. If that is "
            f"another model, merge into {named}.",
            level="warn",
            adapter=field,
            named=named,
            merged_into=name,
        )
    return {"name": named, "weights": "unknown"}


def _names(base: Path, name: str, info: Mapping[str, Any]) -> list[str]:
    """What a base is called: here, on the hub, and by the folder that it lies in."""
    return [str(called) for called in (name, info.get("hub"), base.name) if called]


def _plain(name: str) -> str:
    """Without whose it is and how it was stored: an adapter trained on a 4-bit copy belongs to the model itself."""
    return (unquantised_sibling(name) or name).rstrip("/").rpartition("/")[2].casefold()

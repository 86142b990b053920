"""Is the base of an adapter known, and can it be used? Asked when a job is submitted, not when it has its GPU."""

import re
from typing import Any

from sqlalchemy.orm import Session

from app.artifacts import inspect, references
from app.errors import BadRequest, Code
from app.settings import Settings
from app.specs import JobSpec, TrainSpec

_NEED_A_BASE = ("merge", "validate", "evaluate")
# Fields whose weights are read as they are; everything else may be stored quantised.
_PLAIN = re.compile(r"model\.model_name_or_path|base_model|models\.\d+|model")
_ADAPTER = re.compile(r"adapter|adapters\.\d+")
_PURPOSES = {"merge": "a merge", "export": "an export", "quantize": "a quantisation"}


def check_known(
    session: Session,
    settings: Settings,
    project_id: str,
    spec: JobSpec,
    found: references.Resolved,
    kind: str,
    path: str,
) -> None:
    """Refuses an adapter whose base nobody knows, for jobs that load it. Raises BadRequest."""
    if spec.type not in _NEED_A_BASE or getattr(spec, "base_model", None) is not None or found.job_id:
        return
    said: Any = None
    if found.folder is not None:
        if not inspect.looks_like_adapter(found.folder) or (found.folder / "config.json").is_file():
            return
        root, _ = references.chain_of(session, settings, project_id, found, param=path)
        if root.folder is None or not inspect.looks_like_adapter(root.folder):
            return
        said = inspect.read_json(root.folder / "adapter_config.json", path).get("base_model_name_or_path")
    elif kind != "adapter":
        return  # a model of the hub, or an adapter; that is seen when it is here
    known = "base_model" in type(spec).model_fields
    config = f" (its config says {str(said)[:100]})" if said else ""
    raise BadRequest(
        f"{path}: the base of this adapter is not known",
        param="base_model" if known else path,
        code=Code.MISSING_FIELD,
        hint=f"Name base_model{config}; or import the adapter with base, which every later job then knows."
        if known
        else f"Import it with base{config}, or merge it into its base and name the merged model.",
    )


def refuse_quantised_name(spec: JobSpec, found: references.Resolved, path: str) -> None:
    """Refuses a model of the hub whose name says that it is stored quantised. Raises BadRequest quantised_base."""
    purpose = "training" if isinstance(spec, TrainSpec) else _PURPOSES.get(spec.type)
    if purpose is None or found.hub is None or not _PLAIN.fullmatch(path):
        return
    how = inspect.quantised_by_name(found.hub)
    if how:
        sibling = inspect.unquantised_sibling(found.hub)
        raise BadRequest(
            f"{path}: {found.hub} is stored quantised, by its name ({how}); {purpose} cannot use that",
            param=path,
            code=Code.QUANTISED_BASE,
            hint=f"Name the unquantised sibling of this model, probably {sibling}.",
        )


def wants_plain(job_type: str, field: str) -> bool:
    """Whether a job reads the weights of a field as they are, or those of the base of what is in it (``….base``)."""
    model = field.removesuffix(".base")
    plain = _PLAIN.fullmatch(model) or (model != field and _ADAPTER.fullmatch(model))
    return bool(plain) and (job_type == "train" or job_type in _PURPOSES)

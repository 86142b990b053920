"""Whether an adapter can be loaded into an engine that serves its base; judged by its files alone (no torch).

What cannot is merged first. Files are read here, so nothing of this belongs into a transaction.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sqlalchemy.orm import Session

from app.artifacts import inspect, references
from app.artifacts import repository as artifacts
from app.deployments import words
from app.errors import AppError, BadRequest, Code
from app.models import Artifact, Deployment
from app.peft import MOVING_STARTS, VARIANTS
from app.settings import Settings
from app.specs import LoraRank
from app.targets import HEADS

RANKS: tuple[int, ...] = get_args(LoraRank)


@dataclass(frozen=True)
class Candidate:
    """An adapter and what it was trained on."""

    adapter: references.Resolved
    root: references.Resolved
    layers: int
    """Adapters between it and its base."""

    @property
    def name(self) -> str | None:
        """What the registry calls it."""
        return self.adapter.artifact.name if self.adapter.artifact is not None else None


def find(session: Session, settings: Settings, project_id: str, reference: str, *, param: str) -> Candidate:
    """Follows a reference to an adapter and on to its base. Raises NotFound or BadRequest that names ``param``."""
    adapter = references.resolve(session, settings, project_id, reference, param=param)
    if adapter.job_id is not None:
        raise BadRequest(
            f"{param}: {adapter.job_id} has not finished",
            param=param,
            code=Code.MODEL_NOT_FOUND,
            hint="Wait for it, or submit a deploy job, which waits by itself.",
        )
    if adapter.folder is None or not inspect.looks_like_adapter(adapter.folder):
        raise BadRequest(
            f"{param}: {reference} is no adapter", param=param, code=Code.ADAPTER_INVALID, hint="Name a LoRA's folder."
        )
    root, between = references.chain_of(session, settings, project_id, adapter, param=param)
    return Candidate(adapter, root, len(between))


def serves_base_of(session: Session, row: Deployment, candidate: Candidate) -> bool:
    """Whether a deployment serves exactly the bytes that the adapter was trained on."""
    if candidate.root is candidate.adapter:
        return False
    if row.model == candidate.root.pinned:
        return True
    base = session.get(Artifact, row.artifact_id) if row.artifact_id else None
    return base is not None and candidate.root.artifact is not None and base.sha256 == candidate.root.artifact.sha256


def fault(candidate: Candidate, max_rank: int = RANKS[-1]) -> str | None:
    """Why the adapter cannot be loaded into an engine that serves its base; None when it can. Reads files."""
    folder, base = candidate.adapter.folder, candidate.root.folder
    assert folder is not None
    if candidate.root is candidate.adapter or base is None:
        return "its base is not known here"
    if candidate.layers:
        return "it was trained on top of another adapter"
    try:
        config = inspect.read_json(folder / "adapter_config.json", "adapter")
        found = _by_config(config) or _by_tensors(folder, max_rank)
    except AppError as error:
        return error.message
    return found or words.fault(folder, base)


def rank_of(folder: Path) -> int:
    """The largest rank among an adapter's matrices; 0 when there are none. Raises BadRequest for damaged files."""
    shapes = inspect.tensor_shapes(folder, "adapter")
    return max((shape[0] for name, shape in shapes.items() if ".lora_A" in name and shape), default=0)


def room_for(rank: int, at_least: int = 64) -> int:
    """The smallest size that vLLM takes and that holds ``rank``."""
    return next((size for size in RANKS if size >= max(rank, at_least)), RANKS[-1])


def _by_config(config: dict[str, Any]) -> str | None:
    if config.get("peft_type") != "LORA":
        return f"it is {str(config.get('peft_type'))[:32]}, not LoRA"
    if config.get("task_type") == "SEQ_CLS":
        return "it judges answers and writes none"
    if config.get("use_dora"):
        return "it uses DoRA"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        return "it has biases"
    if config.get("modules_to_save"):
        return "it holds whole modules (modules_to_save)"
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(MOVING_STARTS):
        return f"it began with a part of its base (init_lora_weights: {start})"
    return next((f"it uses {label}" for key, label in VARIANTS.items() if config.get(key)), None)


def _by_tensors(folder: Path, max_rank: int) -> str | None:
    if not (folder / "adapter_model.safetensors").is_file():
        return "its weights are not in adapter_model.safetensors"
    rank = rank_of(folder)
    if rank == 0:
        return "it holds no LoRA matrices"
    if any(HEADS.intersection(name.split(".")) for name in inspect.tensor_shapes(folder, "adapter")):
        return "it changes the output layer"
    return f"its rank {rank} is above {max_rank}" if rank > max_rank else None


def is_base(session: Session, found: references.Resolved) -> bool:
    """Whether a model was not trained here: those are what adapters are loaded into."""
    row = found.artifact and artifacts.by_ids(session, [found.artifact.id]).get(found.artifact.id)
    return row is None or len(row.base_chain or []) <= 1

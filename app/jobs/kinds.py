"""What a job leaves, and which fields take it: so that a chain that cannot work is refused before it begins."""

from collections.abc import Mapping
from typing import Any, Literal

from app.errors import BadRequest, Code
from app.specs import JobSpec

Left = Literal["adapter", "model", "reward", "gguf"]
_MODEL_MAKERS = ("merge", "import", "quantize")
_TAKES_ALL = "push_to_hub"
_NO_GGUF = "Name the model that it was made from; type import makes a model of a GGUF file again."


def left_by(type_: str, algorithm: str | None, spec: Mapping[str, Any]) -> Left | None:
    """The kind of artifact that such a job leaves; None for one that leaves no weights, or that we do not know."""
    if type_ == "train":
        if algorithm == "reward":
            return "reward"
        return "adapter" if (spec.get("model") or {}).get("use_peft", True) else "model"
    if type_ == "export":
        return "gguf"
    if type_ == "import" and spec.get("kind") == "adapter":
        return "adapter"
    return "model" if type_ in _MODEL_MAKERS else None


def check(consumer: JobSpec, path: str, field_kind: str, source: str, left: Left | None, source_type: str) -> None:
    """Refuses a source whose artifact does not fit the field. ``source`` is how the user named it.

    Raises BadRequest wrong_kind.
    """
    if left is None:
        if source_type in ("serve", "deploy", "validate", "check_adapter", "evaluate", "push_to_hub"):
            raise _refused(path, source, f"is a {source_type} job, which leaves no model", "Name the job that made it.")
        return  # a plug-in's job: known when it is done
    if left == "gguf" and not takes_gguf(consumer):
        raise _refused(path, source, "leaves a GGUF file", _NO_GGUF)
    if consumer.type == _TAKES_ALL and field_kind == "model":
        return
    if field_kind == "reward" and left != "reward":
        hint = "Name a train job with algorithm reward."
        raise _refused(path, source, f"leaves {_article(left)}, not a reward model", hint)
    if field_kind == "adapter" and left != "adapter":
        raise _refused(
            path, source, f"leaves {_article(left)}, not an adapter", "Name the job that trained the adapter."
        )
    if field_kind == "model" and left == "reward":
        raise _refused(path, source, "leaves a reward model, which generates nothing", "Name a model or an adapter.")
    if field_kind == "model" and left == "adapter" and not consumer.takes_adapters:
        raise _refused(path, source, "leaves an adapter", "Merge it first: name a job of type merge.")


def takes_gguf(consumer: JobSpec) -> bool:
    """Whether a model field may lead to a GGUF file: an import makes a model of it again, a push takes it as it is."""
    return consumer.type in ("import", _TAKES_ALL)


def check_artifact(consumer: JobSpec, path: str, kind: str, reference: str) -> None:
    """Refuses an artifact of a kind that the field cannot use. Raises BadRequest wrong_kind."""
    if kind == "gguf" and not takes_gguf(consumer):
        raise _refused(path, reference, "is a GGUF file", _NO_GGUF)


def _refused(path: str, source: str, what: str, hint: str) -> BadRequest:
    return BadRequest(f"{path}: {source} {what}", param=path, code=Code.WRONG_KIND, hint=hint)


def _article(left: Left) -> str:
    return {"adapter": "an adapter", "model": "a model", "reward": "a reward model", "gguf": "a GGUF file"}[left]

"""A model card, written from the record: what an artifact is, how it was made, what was measured."""

from typing import Any

import yaml
from sqlalchemy.orm import Session

from app.artifacts.service import existing
from app.models import Artifact, File, Job

_NUMBERS = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "max_length", "seed")
_LIBRARIES = {"adapter": "peft", "reward": "transformers", "model": "transformers", "gguf": "gguf"}


def card(session: Session, project_id: str, artifact_id: str) -> str:
    """Markdown with the front matter that a hub reads. Raises NotFound."""
    row = existing(session, project_id, artifact_id)
    job = session.get(Job, row.job_id) if row.job_id else None
    parts = [
        _front_matter(row),
        f"# {row.name}",
        f"Version {row.version}, made on {row.created_at:%Y-%m-%d} by Tunesmith.",
        _origin(row),
        _training(session, job) if job is not None and job.type == "train" else "",
        _learning(row.learning),
        _merge(job) if job is not None and job.type == "merge" else "",
        _export(job) if job is not None and job.type == "export" else "",
        _quantised(job) if job is not None and job.type == "quantize" else "",
        _versions(job),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(row: Artifact) -> str:
    root = row.base_chain[0] if row.base_chain else None
    facts: dict[str, Any] = {"library_name": _LIBRARIES.get(row.kind)}
    if root is not None and root.startswith("hub:"):
        facts["base_model"] = root.removeprefix("hub:").partition("@")[0]
    facts["tags"] = ["tunesmith", row.kind]
    return f"---\n{yaml.safe_dump({key: value for key, value in facts.items() if value}, sort_keys=False)}---"


def _origin(row: Artifact) -> str:
    if not row.base_chain:
        return ""
    return "Made from " + ", then ".join(f"`{_link(link)}`" for link in row.base_chain) + "."


def _link(link: str) -> str:
    """A card is read elsewhere: of a folder of this machine its name is enough."""
    return link.rstrip("/").rpartition("/")[2] if link.startswith(("/", ".", "~")) else link


def _training(session: Session, job: Job) -> str:
    spec = job.resolved_spec
    model, training = spec.get("model") or {}, spec.get("training") or {}
    method = "full fine-tune" if not model.get("peft_config") else "LoRA"
    if model.get("quantization_config"):
        method = "QLoRA"
    rows: list[tuple[str, Any]] = [("algorithm", job.algorithm), ("method", method)]
    if peft := model.get("peft_config"):
        rows += [("r", peft.get("r")), ("alpha", peft.get("lora_alpha")), ("targets", peft.get("target_modules"))]
    rows += [(name, training.get(name)) for name in _NUMBERS]
    data = _dataset(session, spec)
    return "\n".join(["## Training", "", *_table(("", ""), rows), *(["", data] if data else [])])


def _dataset(session: Session, spec: dict[str, Any]) -> str:
    file = session.get(File, str((spec.get("dataset") or {}).get("file")))
    if file is None:
        return ""
    return f"Data: `{file.filename}`, {file.rows} rows, sha256 `{file.sha256}`."


def _learning(learning: dict[str, Any] | None) -> str:
    if not learning:
        return ""
    rows = [(name, value) for name, value in learning.items() if isinstance(value, int | float | str)]
    return "\n".join(["## What was measured", "", *_table(("", ""), rows)])


def _merge(job: Job) -> str:
    spec, found = job.resolved_spec, (job.result or {}).get("certificate") or {}
    base, adapter = found.get("base") or {}, found.get("adapter") or {}
    retained = found.get("retained")
    rows = [
        ("method", spec.get("method")),
        ("dtype", found.get("dtype") or spec.get("torch_dtype")),
        ("base", base.get("name")),
        *_pairs(adapter.get("combined") or [adapter]),
        ("another base was allowed", "yes: `allow_base_mismatch`" if base.get("mismatch_allowed") else None),
        ("base rounded first", base.get("merged_into") if base.get("merged_into") != "unquantised" else None),
        ("verdict", found.get("verdict")),
        ("share of the effect that was kept", f"{retained:.1%}" if isinstance(retained, int | float) else None),
    ]
    return "\n".join(["## Merge", "", *_table(("", ""), rows)])


def _pairs(adapters: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """What each adapter was trained on, where that is not the base that it was merged into, or nobody knows."""
    said = {"other": "other weights than the base's", "unknown": "not proved: only shapes were compared"}
    rows: list[tuple[str, Any]] = []
    for adapter in adapters:
        trained = adapter.get("base") or {}
        if trained.get("weights") in said:
            name = f"{trained['name']}: " if trained.get("name") else ""
            whose = f" {adapter['name']}" if adapter.get("name") and len(adapters) > 1 else ""
            rows.append((f"adapter{whose} was trained on", f"{name}{said[trained['weights']]}"))
    return rows


def _export(job: Job) -> str:
    result = job.result or {}
    found = result.get("certificate") or {}
    rows = [
        ("file", result.get("file")),
        ("matrices", found.get("outtype")),
        ("architecture", found.get("architecture")),
        ("tokenizer", result.get("tokenizer")),
        ("largest distance of a logit", found.get("max_logit_distance")),
        ("share of the largest logit", found.get("relative_logit_distance")),
        ("prompts with the same next token", f"{found.get('agreeing')} of {found.get('prompts')}"),
    ]
    return "\n".join(["## GGUF", "", *_table(("", ""), rows)])


def _quantised(job: Job) -> str:
    found = (job.result or {}).get("certificate") or {}
    rows = [
        ("scheme", found.get("scheme")),
        ("by", found.get("method")),
        ("bytes of weights", found.get("bytes")),
        ("of the source's", found.get("source_bytes")),
        ("KL to the source, nats a token", found.get("kl")),
        ("share of tokens with the same first choice", found.get("top1_agreement")),
    ]
    return "\n".join(["## Quantisation", "", *_table(("", ""), rows)])


def _versions(job: Job | None) -> str:
    versions = ((job.result if job else None) or {}).get("versions")
    return "\n".join(["## Versions", "", *_table(("library", "version"), list(versions.items()))]) if versions else ""


def _table(head: tuple[str, str], rows: list[tuple[str, Any]]) -> list[str]:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows if value is not None]
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *lines] if lines else []


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")

"""Adapter folders: checked on the way in, canonical and portable on the way out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from app.errors import Code, RunError
from workers.loading.fresh import START_FILE
from workers.loading.layout import PREFIX, place
from workers.loading.weights import TensorInfo, fingerprint, sha256_files, tensor_headers, weight_files

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_FILE = "base_model.json"


class Adapter(NamedTuple):
    """What an adapter folder says about itself."""

    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    base: dict[str, Any]
    """``name`` and ``fingerprint`` of the base that it was trained on; empty for an adapter made elsewhere."""


def read_adapter(directory: Path) -> Adapter:
    """Reads and checks an adapter folder. Raises RunError adapter_invalid."""
    try:
        config = json.loads((directory / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            Code.ADAPTER_INVALID, f"{directory.name} is no adapter: {CONFIG_FILE} cannot be read: {error}"
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise RunError(Code.ADAPTER_INVALID, f"peft_type is {kind!r}; only LORA adapters are supported")
    if (directory / START_FILE).is_file():
        raise RunError(
            Code.ADAPTER_INVALID,
            "the adapter of this checkpoint began with a part of its base, and does not fit the whole base",
            hint="take it out with a job of type extract_adapter, which makes it a plain one",
        )
    if not (directory / WEIGHTS_FILE).is_file():
        hint = "adapter_model.bin is a pickle; save the adapter again with a current peft, which writes safetensors"
        raise RunError(
            Code.ADAPTER_INVALID,
            f"{WEIGHTS_FILE} is missing",
            hint=hint if (directory / "adapter_model.bin").exists() else None,
        )
    try:
        base = json.loads((directory / BASE_FILE).read_text())
    except (OSError, ValueError):
        base = {}
    return Adapter(config, tensor_headers(directory), base if isinstance(base, dict) else {})


def canonical_adapter(directory: Path, base_name: str) -> None:
    """Rewrites adapter_config.json so that equal runs leave equal bytes and no path of this machine.

    peft writes ``target_modules`` in set order and the base as the folder it was loaded from.
    """
    path = directory / CONFIG_FILE
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_name
    for key, value in config.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            config[key] = sorted(value)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (directory / "README.md").unlink(missing_ok=True)  # peft's model card, which repeats the folder's path


def write_base_record(
    directory: Path, base: Path, name: str, quantization: str | None = None, layers: Sequence[str] = ()
) -> None:
    """Notes in the adapter which weights it belongs to, so that a merge can tell another base.

    ``quantization``: how those weights were rounded while it was trained (nf4, fp4), if at all. ``layers``: digests of
    the adapters that were folded into ``base`` before.
    """
    record: dict[str, Any] = {"fingerprint": fingerprint(base), "name": name, "quantization": quantization}
    if layers:
        record["layers"] = list(layers)
    (directory / BASE_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def check_base(adapter: Adapter, base: Path, name: str, *, allow_mismatch: bool = False) -> None:
    """Raises RunError base_mismatch when the adapter does not fit the base, or was trained on other weights.

    Raises RunError adapter_invalid for tensors that do not belong together or cannot be merged.

    ``allow_mismatch`` accepts other weights of the same shapes.
    """
    try:
        config = json.loads((base / "config.json").read_bytes())
    except (OSError, ValueError):
        config = {}  # the loader names that fault
    try:
        place(adapter.config, adapter.tensors, tensor_headers(base), config if isinstance(config, dict) else {})
    except RunError as error:
        if error.code is not Code.BASE_MISMATCH:
            raise
        made_for = adapter.base.get("name") or adapter.config.get("base_model_name_or_path")
        message = error.message.replace(", the base has", f", {name} has")
        raise RunError(error.code, message, hint=f"merge into {made_for}", param="base_model") from error
    recorded = adapter.base.get("fingerprint")
    if recorded and not allow_mismatch and recorded != fingerprint(base):
        raise RunError(
            Code.BASE_MISMATCH,
            f"the adapter was trained on {adapter.base.get('name')}, and {name} has other weights of the same shapes",
            hint="name the base that it was trained on, or set allow_base_mismatch: true",
            param="base_model",
        )


def layer_digests(layers: Sequence[Path]) -> list[str]:
    """What identifies each adapter: the sha256 of its weights."""
    return [";".join(sorted(sha256_files(weight_files(layer)).values())) for layer in layers]


def adapted_modules(adapter: Adapter) -> list[str]:
    """Paths of the modules that it holds matrices for, sorted."""
    return sorted({module for module, mark in map(module_of, adapter.tensors) if mark})


def module_of(tensor: str) -> tuple[str, str]:
    """``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`` → (``model.layers.0.self_attn.q_proj``, A)."""
    name = tensor.removeprefix(PREFIX)
    for mark in ("A", "B"):
        head, found, _ = name.partition(f".lora_{mark}.")
        if found:
            return head, mark
    return name, ""

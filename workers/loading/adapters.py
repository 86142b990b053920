"""Adapter folders: checked on the way in, canonical and portable on the way out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from app.errors import Code, RunError
from workers.loading.weights import TensorInfo, fingerprint, tensor_headers

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_FILE = "base_model.json"
PREFIX = "base_model.model."


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

    ``allow_mismatch`` accepts other weights of the same shapes.
    """
    shapes = {tensor: info.shape for tensor, info in tensor_headers(base).items()}
    rows: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor, info in adapter.tensors.items():
        module, mark = module_of(tensor)
        if mark:
            rows.setdefault(module, {})[mark] = info.shape
    for module, pair in sorted(rows.items()):
        if set(pair) != {"A", "B"} or len(pair["A"]) != 2 or len(pair["B"]) != 2 or pair["A"][0] != pair["B"][1]:
            raise RunError(Code.ADAPTER_INVALID, f"{module}: lora_A and lora_B do not belong together: {pair}")
        wanted = (pair["B"][0], pair["A"][1])
        found = shapes.get(f"{module}.weight")
        if adapter.config.get("fan_in_fan_out"):
            wanted = wanted[::-1]
        if found != wanted:
            has = f"has {list(found)}" if found else "has no such module"
            raise RunError(
                Code.BASE_MISMATCH,
                f"{module}: the adapter was made for a weight of {list(wanted)}, {name} {has}",
                hint=f"merge into {adapter.base.get('name') or adapter.config.get('base_model_name_or_path')}",
                param="base_model",
            )
    recorded = adapter.base.get("fingerprint")
    if recorded and not allow_mismatch and recorded != fingerprint(base):
        raise RunError(
            Code.BASE_MISMATCH,
            f"the adapter was trained on {adapter.base.get('name')}, and {name} has other weights of the same shapes",
            hint="name the base that it was trained on, or set allow_base_mismatch: true",
            param="base_model",
        )


def module_of(tensor: str) -> tuple[str, str]:
    """``base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`` → (``model.layers.0.self_attn.q_proj``, A)."""
    name = tensor.removeprefix(PREFIX)
    for mark in ("A", "B"):
        head, found, _ = name.partition(f".lora_{mark}.")
        if found:
            return head, mark
    return name, ""

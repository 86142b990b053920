"""Import: a local model or adapter folder, or a GGUF file, becomes an artifact that every job can name.

Pickles can run any code and are never opened, but for one: ``adapter_model.bin``, which older versions of peft wrote.
torch's loader for plain tensors reads it, and it is stored as safetensors.
"""

import json
import os
import pickle
import shutil
import stat
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from app.catalog import Operation, RunContext
from app.errors import Code, RunError
from app.specs import JobSpec, ModelRef, Name, conflict
from workers.loading import (
    base_label,
    check_base,
    intake,
    load_base,
    load_tokenizer,
    read_adapter,
    set_threads,
    sha256_files,
    tensor_headers,
)
from workers.loading.adapters import WEIGHTS_FILE
from workers.loading.devices import Compute
from workers.loading.weights import weight_files

ALLOWED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
# Left behind: whose folder it was, what a foreign trainer remembered, and what we wrote about another copy.
FOREIGN = ("trainer_state.json", "training_args*", "optimizer*", "scheduler*", "rng_state*", "*.index.json.lock")
SKIPPED = (*FOREIGN, "MANIFEST.json", "COMPLETE.json")
OLD_ADAPTER = "adapter_model.bin"
PROBE = "What is the capital of France?"
PROBE_ANSWER = "The capital of France is Paris."


class ImportSpec(JobSpec):
    """Copy a Hugging Face folder, or convert a GGUF file, into the registry."""

    type: Literal["import"] = "import"
    path: ModelRef
    name: Name
    kind: Literal["model", "adapter"] = Field("model", description="What the folder holds.")
    base: ModelRef | None = Field(
        None, description="Of an adapter: what it was trained on, which every later job then knows."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.base is not None and self.kind != "adapter":
            raise conflict("base", "base is for adapters", "Leave it out, or say kind: adapter.")
        return self


def run(spec: ImportSpec, ctx: RunContext) -> None:
    """Check, then copy or convert; nothing in the source is executed."""
    ctx.phase("staging")
    source = ctx.input("path")
    gguf = _gguf(source)
    folder = ctx.output(spec.kind, spec.name, imported=True, **_descent(spec, ctx))
    converted = "gguf" if gguf else None
    if gguf:
        if spec.kind == "adapter":
            raise RunError(Code.BAD_SPEC, "a GGUF file holds a model; use kind: model", param="kind")
        _convert(gguf, folder, ctx)
    else:
        old = spec.kind == "adapter" and (source / OLD_ADAPTER).exists() and not list(source.glob("*.safetensors"))
        if old:
            _rewrite(source, folder, ctx)
            converted = OLD_ADAPTER
        else:
            _refuse_pickles(source)
        _copy(source, folder, ctx)
        _check(folder, spec.kind)
        if spec.base is not None and (lies := ctx.input_info("base").get("path")):
            check_base(read_adapter(folder), Path(lies), base_label(ctx.input_info("base"), spec.base))
    files = sorted(path.name for path in folder.iterdir())
    total = sum(path.stat().st_size for path in folder.iterdir())
    ctx.result(name=spec.name, kind=spec.kind, files=files, bytes=total, converted_from=converted)


def _descent(spec: ImportSpec, ctx: RunContext) -> dict[str, Any]:
    """What the artifact says of where it comes from, where that is said."""
    if spec.base is None:
        return {}
    base = ctx.input_info("base")
    return {
        "base": base["pinned"],
        "base_artifact_id": base.get("artifact_id"),
        "base_chain": [*(base.get("base_chain") or [base["pinned"]]), f"import:{ctx.job_id}"],
    }


def _gguf(source: Path) -> Path | None:
    if source.is_file():
        if source.suffix.lower() != ".gguf":
            raise RunError(Code.MODEL_INVALID, f"{source.name} is neither a folder nor a .gguf file", param="path")
        return source
    found = sorted(source.glob("*.gguf"))
    if not found or list(source.glob("*.safetensors")):
        return None
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:5])
        raise RunError(Code.MODEL_INVALID, f"several GGUF files: {names}", hint="name one of them", param="path")
    return found[0]


# --- copying a folder -------------------------------------------------------------------------------------------------


def _refuse_pickles(source: Path) -> None:
    if list(source.glob("*.safetensors")):
        return
    pickles = sorted(path.name for glob in PICKLES for path in source.glob(glob))
    if pickles:
        raise RunError(
            Code.MODEL_INVALID,
            f"{source.name} holds its weights only as pickles: {', '.join(pickles[:5])}",
            hint="opening a pickle can run any code; save the model with save_pretrained, which writes safetensors",
            param="path",
        )
    raise RunError(
        Code.MODEL_INVALID,
        f"{source.name} holds no weights",
        hint="name the folder that holds config.json and *.safetensors",
        param="path",
    )


def _copy(source: Path, folder: Path, ctx: RunContext) -> None:
    ctx.phase("saving")
    skipped, weights = [], {path.name for path in weight_files(source)}
    for path in sorted(source.iterdir()):
        name = path.name
        wanted = any(fnmatch(name, glob) for glob in ALLOWED) and not any(fnmatch(name, glob) for glob in SKIPPED)
        wanted = wanted and (name in weights or path.suffix != ".safetensors")
        if not wanted or (path.is_dir() and not path.is_symlink()):
            skipped.append(name)
            continue
        _refuse_escape(path, source)
        _copy_file(path, folder / name)
    intake.scan(folder)
    if skipped:
        ctx.event("file_skipped", f"not copied: {', '.join(skipped[:20])}", files=skipped[:100])
    for name, clean in (("config.json", _clean_config), ("adapter_config.json", intake.clean_adapter)):
        if (folder / name).exists():
            clean(folder / name)


def _refuse_escape(path: Path, source: Path) -> None:
    """A link may not lead out of the folder, except from a hub snapshot to the blobs of the same repository."""
    target = path.resolve()
    home = source.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if target.parent != home and target.parent != blobs:
        raise RunError(
            Code.MODEL_INVALID,
            f"{path.name} is a link that leads out of the folder",
            hint="copy the file itself into the folder",
            param="path",
        )


def _copy_file(path: Path, target: Path) -> None:
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer. The type is asked of what was opened, not of the name.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise intake.refused(f"{path.name} cannot be opened: {error.strerror}", "Leave it out.") from error
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise intake.refused(f"{path.name} is no regular file", "Leave it out.")
        if about.st_nlink > 1 and path.resolve().parent.name != "blobs":
            message = f"{path.name} is a hard link: the same file has other names, which may lie anywhere"
            raise intake.refused(message, "Copy the file itself into the folder.")
        with os.fdopen(descriptor, "rb", closefd=False) as reading, target.open("xb") as writing:
            shutil.copyfileobj(reading, writing, 1 << 20)
    finally:
        os.close(descriptor)


def _clean_config(path: Path) -> None:
    """Takes out where the model came from. Raises RunError for an architecture that is not known here."""
    from transformers import CONFIG_MAPPING

    config = intake.read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise intake.refused("config.json cannot be read: it names no model_type", "Save it with save_pretrained.")
    if config["model_type"] not in CONFIG_MAPPING:
        raise RunError(
            Code.MODEL_INVALID,
            f"model type {config['model_type']!r} is not known to the installed transformers",
            hint="models that bring their own code are not run" if "auto_map" in config else None,
            param="path",
        )
    kept = {key: value for key, value in config.items() if key != "_name_or_path"}
    if kept != config:
        path.write_text(json.dumps(kept, indent=2) + "\n")


def _check(folder: Path, kind: str) -> None:
    if kind == "adapter":
        read_adapter(folder)
        return
    if not (folder / "config.json").is_file():
        hint = "use kind: adapter" if (folder / "adapter_config.json").exists() else None
        raise RunError(Code.MODEL_INVALID, "config.json is missing", hint=hint, param="path")
    tensor_headers(folder)


# --- the adapters of older versions of peft ---------------------------------------------------------------------------


def _rewrite(source: Path, folder: Path, ctx: RunContext) -> None:
    """Stores the tensors of ``adapter_model.bin`` as safetensors; refuses a file that holds anything else."""
    import torch
    from safetensors.torch import save_file

    old, new = ctx.work_dir / OLD_ADAPTER, folder / WEIGHTS_FILE
    _refuse_escape(source / OLD_ADAPTER, source)
    _copy_file(source / OLD_ADAPTER, old)
    try:
        tensors = torch.load(old, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError, AttributeError, TypeError) as error:
        raise _no_tensors(f"{type(error).__name__}") from error
    if not isinstance(tensors, dict) or not tensors:
        raise _no_tensors("no tensors by name")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise _no_tensors(f"{str(name)[:64]} is none")
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, new, {"format": "pt"})
    digests = {**sha256_files([old]), **sha256_files([new])}
    ctx.event("weights_rewritten", f"{OLD_ADAPTER} was rewritten as {WEIGHTS_FILE}", sha256=digests)


def _no_tensors(why: str) -> RunError:
    return RunError(
        Code.MODEL_INVALID,
        f"{OLD_ADAPTER} holds more, or something else, than tensors by name ({why})",
        hint="load the adapter with peft where you trust it, and save it again: that writes safetensors",
        param="path",
    )


# --- converting GGUF --------------------------------------------------------------------------------------------------


def _convert(source: Path, folder: Path, ctx: RunContext) -> None:
    """Reads and dequantises with transformers' loader, then saves a plain checkpoint.

    bfloat16 halves the folder; it is taken if the model still answers a plain question, else float32 is.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    set_threads()
    ctx.phase("loading")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
        read = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise RunError(Code.MODEL_INVALID, f"{source.name} cannot be read: {error}", param="path") from error
    state = read.state_dict()
    config = read.config
    for key in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, key):
            delattr(config, key)
    del read
    # A fresh model from the cleaned config: the one that was read still believes that it is quantised.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(state)
    model.tie_weights()
    ctx.phase("saving")
    tokenizer.save_pretrained(folder)
    for dtype in ("bfloat16", "float32"):
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        if dtype == "float32" or _answers(folder):
            break
        model.load_state_dict(state)
    ctx.event("converted", f"{source.name} was dequantised and saved in {dtype}", dtype=dtype)


def _answers(folder: Path) -> bool:
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        return True
    model: Any = load_base(folder, Compute("cpu", "float32")).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROBE}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return PROBE_ANSWER in tokenizer.decode(answer, skip_special_tokens=True)


operation = Operation(ImportSpec, run, offline=True)

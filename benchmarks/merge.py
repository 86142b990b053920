"""How long a merge takes and what memory it needs, beside peft, LLaMA-Factory, mergekit, and a plain copy.

A random bf16 model of Qwen2's shape and a rank-16 adapter on all its linear layers. Each contender is a process of its
own, one after the other, on a base whose pages are in memory: from its start until everything is on the disk (ours has
hashed it by then and renamed the folder; the others sync). Memory is read from ``/proc`` fifty times a second, over the
process and its children: anonymous memory is what a machine must have; resident memory counts mapped files too.

Ours has two rows: the merge as it is published, and with the proof of every byte that a job always makes. The check of
the logits, which a job makes too unless ``proof_prompts`` is 0, is a process of its own: its row counts from when its
libraries are there. The merged tensors of ours and of peft are compared to the byte.

LLaMA-Factory and mergekit run where they are installed (``benchmarks/train.py --with-llamafactory``,
``--with-mergekit`` here); else the table says so.

    make bench-merge                        or: .venv/bin/python benchmarks/merge.py --size 1.5 --curve --json
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.workers.conftest import make_tokenizer  # noqa: E402
from workers.loading import tensor_headers  # noqa: E402

MERGERS = Path(__file__).parent / "mergers"
ENVIRONMENTS = ROOT / ".venv-bench"
LLAMAFACTORY = ENVIRONMENTS / "llamafactory"
MERGEKIT = ENVIRONMENTS / "mergekit"
SIZES = {"0.1": (576, 24, 1536, 9), "0.5": (896, 24, 4864, 14), "1.5": (1536, 28, 8960, 12), "3": (2048, 36, 11008, 16)}
SIZES["6"] = (3584, 24, 18944, 28)
"""Billions of parameters, roughly: width, layers, width of the MLP, heads."""
_EVERY = 0.02


@dataclass
class Contender:
    """One way to merge."""

    name: str
    about: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None


@dataclass
class Run:
    """Seconds and bytes."""

    seconds: float
    peak_rss: int
    peak_anonymous: int
    said: dict[str, Any]


def contenders(folder: Path) -> list[Contender]:
    own, other = sys.executable, LLAMAFACTORY / "bin" / "python"
    base, adapter = str(folder / "base"), str(folder / "adapter")

    def script(python: str, name: str, out: str) -> list[str]:
        return [python, str(MERGERS / f"{name}.py"), base, adapter, str(folder / out)]

    copying = ["sh", "-c", 'cp -r "$0" "$1" && sync', base, str(folder / "copied")]
    no_factory = None if other.exists() else "not installed: benchmarks/train.py --with-llamafactory"
    no_kit = None if MERGEKIT.exists() else "not installed: --with-mergekit"
    return [
        Contender("cp + sync", "the base, copied", copying),
        Contender("tunesmith", "streamed, hashed, published", script(own, "ours", "ours")),
        Contender("logits", "the check of ours", script(own, "logits", "ours")),
        Contender("peft", "load, merge_and_unload, save, sync", script(own, "by_peft", "peft")),
        Contender("llamafactory", "export, sync", script(str(other), "by_llamafactory", "factory"), {}, no_factory),
        Contender(
            "mergekit", "base+adapter, sync", script(own, "by_mergekit", "kit"), {"PYTHONPATH": str(MERGEKIT)}, no_kit
        ),
    ]


def make_model(folder: Path, size: str) -> int:
    """Base and adapter; returns the number of parameters. Layers share their random numbers, files do not."""
    import torch
    from safetensors.torch import save_file

    width, layers, inner, heads = SIZES[size]
    kept = heads if heads < 12 else heads // (7 if heads % 7 == 0 else 4)
    narrow = width // heads * kept
    vocabulary = 151_936
    linear = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    make_tokenizer(base)
    torch.manual_seed(0)

    def normal(*shape: int) -> Any:
        return (torch.randn(*shape) * 0.02).to(torch.bfloat16)

    layer = {f"{name}.weight": normal(*shape) for name, shape in linear.items()}
    layer |= {f"self_attn.{name}_proj.bias": normal(linear[f"self_attn.{name}_proj"][0]) for name in "qkv"}
    layer |= {f"{name}_layernorm.weight": 1 + normal(width) for name in ("input", "post_attention")}
    everything = {"model.embed_tokens.weight": normal(vocabulary, width), "model.norm.weight": 1 + normal(width)}
    total = sum(tensor.numel() for tensor in everything.values())
    total += layers * sum(tensor.numel() for tensor in layer.values())
    groups = [everything] + [
        {f"model.layers.{number}.{name}": tensor for name, tensor in layer.items()} for number in range(layers)
    ]
    index = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        save_file(group, base / name, metadata={"format": "pt"})
        index |= dict.fromkeys(group, name)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kept,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "dtype": "bfloat16",
    }
    (base / "config.json").write_text(json.dumps(config))
    adapter.mkdir()
    tensors = {}
    for number in range(layers):
        for name, (out, into) in linear.items():
            stem = f"base_model.model.model.layers.{number}.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(16, into) * 0.02
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 16) * 0.02
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 16,
        "lora_alpha": 32,
        "base_model_name_or_path": "base",
    }
    about["target_modules"] = sorted(name.rpartition(".")[2] for name in linear)
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    return total


def measure(one: Contender, folder: Path) -> Run:
    """Runs it; ends the benchmark with its output when it fails."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    environment = {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HOME": str(folder / "hub")}
    log = folder / f"{one.name.split()[0]}.log"
    os.sync()
    start = time.monotonic()
    with log.open("w+") as out:
        process = subprocess.Popen(
            one.command, env={**environment, **one.environment}, stdout=out, stderr=out, cwd=folder
        )
        peak = [0, 0]
        over = threading.Event()
        watching = threading.Thread(target=_watch, args=(process.pid, peak, over))
        watching.start()
        status = process.wait()
        seconds = time.monotonic() - start
        over.set()
        watching.join()
        out.seek(0)
        text = out.read()
    if status:
        sys.exit(f"{one.name} failed:\n{text[-4000:]}")
    last = text.strip().splitlines()[-1] if text.strip() else ""
    said = json.loads(last) if last.startswith("{") else {}
    return Run(seconds, peak[0], peak[1], said)


def _watch(pid: int, peak: list[int], over: threading.Event) -> None:
    while not over.wait(_EVERY):
        rss = anonymous = 0
        for one in _family(pid):
            try:
                lines = Path(f"/proc/{one}/status").read_text().splitlines()
            except OSError:
                continue
            sizes = {
                line.split(":")[0]: int(line.split()[1]) << 10
                for line in lines
                if line.startswith(("VmRSS", "RssAnon"))
            }
            rss, anonymous = rss + sizes.get("VmRSS", 0), anonymous + sizes.get("RssAnon", 0)
        peak[:] = [max(peak[0], rss), max(peak[1], anonymous)]


def _family(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def same_bytes(one: Path, other: Path) -> dict[str, int]:
    """How many tensors of two folders have the same bytes."""
    left, right = tensor_headers(one), tensor_headers(other)

    def data(info: Any) -> bytes:
        with info.path.open("rb") as file:
            file.seek(info.start)
            return bytes(file.read(info.bytes))

    equal = sum(data(left[name]) == data(right[name]) for name in left.keys() & right.keys())
    return {"equal": equal, "tensors": len(left.keys() | right.keys())}


def one_size(size: str, root: Path, only: list[str] | None) -> dict[str, Any]:
    folder = root / size
    print(f"making a model of {size} billion parameters", file=sys.stderr)
    found: dict[str, Any] = {"parameters": make_model(folder, size), "runs": {}, "skipped": {}}
    for path in (folder / "base").iterdir():
        path.read_bytes()  # into memory, for all alike
    for one in contenders(folder):
        if only and one.name not in only:
            continue
        if one.missing:
            found["skipped"][one.name] = one.missing
            continue
        print(f"merging: {one.name}", file=sys.stderr)
        found["runs"][one.name] = {"about": one.about, **asdict(measure(one, folder))}
        if one.name not in ("tunesmith", "logits", "peft"):
            shutil.rmtree(folder / one.command[-1], ignore_errors=True)
    if {"tunesmith", "peft"} <= found["runs"].keys():
        found["same_bytes_as_peft"] = same_bytes(folder / "ours", folder / "peft")
    shutil.rmtree(folder)
    return found


def show(found: dict[str, Any], console: Console) -> None:
    runs = found["runs"]
    ours, copied = runs["tunesmith"], runs.get("cp + sync")
    table = Table(
        *("contender", "seconds", "peak RSS", "peak anonymous", "ours is faster by", "ours / theirs, anonymous"),
        title=f"{found['parameters'] / 1e9:.2f} billion parameters in bf16, {os.cpu_count()} CPUs",
    )
    for name, run in runs.items():
        written = ours["said"]["written_seconds"]
        rows = [(f"{name}: {run['about']}", run["seconds"])]
        if run is ours:
            rows = [(f"{name}: {run['about']}", written), (f"{name}: and every byte proved", run["seconds"])]
        if name == "logits":
            rows = [(f"tunesmith: the logits of {run['said']['tokens']} tokens compared", run["said"]["seconds"])]
        for label, seconds in rows:
            theirs = name not in ("tunesmith", "logits", "cp + sync")
            table.add_row(
                label,
                f"{seconds:.1f}",
                f"{run['peak_rss'] / 1e9:.2f} GB",
                f"{run['peak_anonymous'] / 1e9:.2f} GB",
                f"{seconds / written:.1f} ×" if theirs else "",
                f"{ours['peak_anonymous'] / run['peak_anonymous']:.2f}" if theirs else "",
            )
    console.print(table)
    if copied:
        console.print(
            f"ours takes {ours['said']['written_seconds'] / copied['seconds']:.2f} × cp + sync", highlight=False
        )
    if same := found.get("same_bytes_as_peft"):
        console.print(f"{same['equal']} of {same['tensors']} tensors have the bytes of peft's", highlight=False)
    for name, reason in found["skipped"].items():
        console.print(f"{name}: {reason}", highlight=False)


def install_mergekit() -> None:
    """Its own code and what ours lacks of its needs; the rest it takes from this environment."""
    if MERGEKIT.exists():
        return
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--target", str(MERGEKIT), "mergekit==0.1.5", "immutables==0.21"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="1.5", help="billions of parameters")
    parser.add_argument("--curve", action="store_true", help="ours and the copy from 0.1 to 6 billion, too")
    parser.add_argument("--only", nargs="+", help="contenders by name")
    parser.add_argument("--with-mergekit", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.with_mergekit:
        install_mergekit()
    with tempfile.TemporaryDirectory() as folder:
        found = one_size(arguments.size, Path(folder), arguments.only)
        curve = [
            one_size(size, Path(folder) / "curve", ["cp + sync", "tunesmith", "logits"])
            for size in SIZES
            if arguments.curve
        ]
    if arguments.json:
        print(json.dumps({"compared": found, "curve": curve}, indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 130)
    show(found, console)
    for entry in curve:
        show(entry, console)


if __name__ == "__main__":
    main()

"""How much memory a merge and its proof take, measured in a process of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.workers import test_streaming
from tests.workers.test_streaming import make_adapter, make_base

ROOT = Path(__file__).parents[2]
EMBEDDING = "model.embed_tokens.weight"
WATCH = """
import sys, threading
from pathlib import Path
import torch

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

peak, over = 0, threading.Event()
def watch():
    global peak
    while not over.wait(0.005):
        peak = max(peak, anonymous())

threading.Thread(target=watch).start()
"""
MERGE = """
from workers.loading.merging import read_merge, write_merge
from workers.loading.recount import Recount
base, adapter, out = map(Path, sys.argv[1:])
try:
    write_merge(read_merge(base, [adapter]), out, out / "kept", shard_bytes=10**10)
    found = Recount(base, [adapter], out).run()
finally:
    over.set()
assert not found.false and found.changed == 1, found
print(peak)
"""
LOGITS = """
from workers.loading.effect import measure_effect
base, adapter, spool = map(Path, sys.argv[1:])
try:
    effect, _ = measure_effect(base, adapter, base, [[1, *range(2, 24 + 2 * number)] for number in range(8)], spool)
finally:
    over.set()
assert effect.kl_tuned_base > 0 and effect.tokens == 240, effect
print(peak)
"""
PROMISED = 512 << 20


def peak_of(code: str, *paths: Path) -> int:
    """Bytes of anonymous memory, at most, of a process that runs it."""
    command = [sys.executable, "-c", WATCH + code, *map(str, paths)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


def test_neither_merge_nor_proof_takes_more_memory_than_is_promised(tmp_path: Path) -> None:
    """A tensor of 640 MB, larger than the 512 MiB that are promised; its file has no bytes yet."""
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    for folder in (base, adapter, out):
        folder.mkdir()
    rows, width = 320_000, 1024
    header = {EMBEDDING: {"dtype": "BF16", "shape": [rows, width], "data_offsets": [0, 2 * rows * width]}}
    text = json.dumps(header).encode().ljust(256)
    with (base / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2 * rows * width)
    (base / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}')
    name = f"base_model.model.{EMBEDDING.removesuffix('.weight')}.lora_embedding_"
    factors = {f"{name}A": torch.randn(4, rows), f"{name}B": torch.randn(width, 4)}
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    peak = peak_of(MERGE, base, adapter, out)
    assert (out / "model.safetensors").stat().st_size > 640_000_000
    assert peak < PROMISED + sum(tensor.numel() * 4 for tensor in factors.values())


def test_the_check_of_the_logits_keeps_the_promise_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens as Qwen has, so that eight prompts have 146 MB of logits in float32, and 292 MB in float64."""
    monkeypatch.setitem(test_streaming.SIZES, "vocab_size", 151_936)
    base = make_base(tmp_path / "base", "qwen2", dtype="bfloat16", tied=True)
    adapter = make_adapter(tmp_path / "adapter", base)
    size = (adapter / "adapter_model.safetensors").stat().st_size
    assert peak_of(LOGITS, base, adapter, tmp_path / "spool") < PROMISED + size

"""How much memory a merge and its proof take, measured in a process of their own."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
EMBEDDING = "model.embed_tokens.weight"
MEMORY = """
import sys, threading
from pathlib import Path
from workers.loading.merging import read_merge, write_merge
from workers.loading.recount import Recount
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
base, adapter, out = map(Path, sys.argv[1:])
try:
    write_merge(read_merge(base, [adapter]), out, out / "kept", shard_bytes=10**10)
    found = Recount(base, [adapter], out).run()
finally:
    over.set()
assert not found.false and found.changed == 1, found
print(peak)
"""


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
    command = [sys.executable, "-c", MEMORY, str(base), str(adapter), str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert (out / "model.safetensors").stat().st_size > 640_000_000
    size = sum(tensor.numel() * 4 for tensor in factors.values())
    assert int(ended.stdout) < (512 << 20) + size

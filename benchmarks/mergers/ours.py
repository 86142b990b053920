"""Ours: the merge as a job runs it, and its publishing. Says when it was written, and what the proofs took."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from app.storage import Storage  # noqa: E402
from tests.workers.context import RecordingContext  # noqa: E402
from workers.loading import MergeSpec  # noqa: E402
from workers.merges.lora import run  # noqa: E402


class Timed(RecordingContext):
    """Notes when each phase began."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.began: dict[str, float] = {}

    def phase(self, name: str) -> None:
        super().phase(name)
        self.began[name] = time.monotonic()


def main(base: str, adapter: str, target: str) -> dict[str, float]:
    """Writes the model; ``written_seconds`` leave out the proof of the bytes."""
    start = time.monotonic() - _age()
    root = Path(target).with_name("work")
    ctx = Timed(root, {"adapter": Path(adapter), "base_model": Path(base)})
    run(MergeSpec.model_validate({"adapter": "artifact:art-a", "proof_prompts": 0}), ctx)
    proved = time.monotonic()
    folder = ctx.outputs[0][1]
    hashed = {path.name: digest for path, digest in ctx.hashed.items()}
    storage = Storage(root / "data")
    storage.publish(folder, "art-merged", {}, hashed)
    published = time.monotonic()
    os.rename(storage.artifact_dir("art-merged"), target)
    proof = proved - ctx.began["validating"]
    return {"written_seconds": published - start - proof, "byte_proof_seconds": proof}


def _age() -> float:
    """Seconds that this process has lived."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


print(json.dumps(main(*sys.argv[1:4])))

"""Ours: the recipe ``sft`` as the service runs it, with a context that records instead of the service."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tests.workers.context import RecordingContext  # noqa: E402
from workers.recipes.sft import SftSpec, run  # noqa: E402


class Timed(RecordingContext):
    """Notes when each step was told."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.times: list[float] = []

    def phase(self, name: str) -> None:
        super().phase(name)
        if name == "training":
            self.times.append(time.monotonic())

    def progress(self, step: int, total_steps: int, **values: float | None) -> None:
        super().progress(step, total_steps, **values)
        self.times.append(time.monotonic())


def main(request: dict[str, Any]) -> dict[str, Any]:
    """One run."""
    folder = Path(request["folder"])
    lora = request["lora"]
    spec = SftSpec.model_validate(
        {
            "model": {
                "model_name_or_path": "SmolLM2-135M-Instruct",
                "dtype": "float32",
                "peft_config": {**lora, "target_modules": "all-linear"},
            },
            "dataset": {"file": "file-1", "eval_split": 0},
            "training": {
                "max_steps": request["steps"],
                "per_device_train_batch_size": request["batch_size"],
                "learning_rate": request["learning_rate"],
                "max_length": request["max_length"],
                "seed": request["seed"],
                "save_steps": 1_000_000,
                "checkpoint_seconds": 86_400,
                **request.get("training", {}),
            },
        }
    )
    ctx = Timed(
        folder / request["name"],
        {"model.model_name_or_path": Path(request["base"]), "dataset.file": folder / "train.jsonl"},
        {"model.model_name_or_path": {"name": "SmolLM2-135M-Instruct"}},
    )
    run(spec, ctx)
    return {
        "adapter": str(ctx.folder),
        "losses": [step["loss"] for step in ctx.steps],
        "times": ctx.times,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    request = json.loads(sys.stdin.read())
    Path(request["result"]).write_text(json.dumps(main(request)))

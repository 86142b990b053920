"""One judge for all: the loss of each adapter on the same held-out rows, from the same code."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from workers.loading import row_scores  # noqa: E402
from workers.loading.devices import Compute, set_threads  # noqa: E402
from workers.loading.learning import undisturbed  # noqa: E402


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Mean loss of each row's labels, by adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    set_threads()
    rows = [json.loads(line) for line in (Path(request["folder"]) / "held_out.jsonl").read_text().splitlines()]
    pairs = [(row["input_ids"], row["labels"]) for row in rows]
    found = {}
    for name, adapter in request["adapters"].items():
        model = AutoModelForCausalLM.from_pretrained(request["base"], dtype=torch.float32)
        if adapter:
            model = PeftModel.from_pretrained(model, adapter)
        with undisturbed(model):
            scores = row_scores(model, pairs, compute=Compute("cpu", "float32"), batch_size=8, tick=lambda: None)
        found[name] = [score.mean_loss for score in scores]
    return found


if __name__ == "__main__":
    request = json.loads(sys.stdin.read())
    Path(request["result"]).write_text(json.dumps(main(request)))

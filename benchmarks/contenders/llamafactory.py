"""LLaMA-Factory through ``run_exp``, which ``llamafactory-cli train`` calls; runs in an environment of its own."""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ["DISABLE_VERSION_CHECK"] = "1"  # it names a range; versions are pinned in ../llamafactory.txt
sys.path.remove(str(Path(__file__).parent))  # this file has the package's name


def main(request: dict[str, Any]) -> dict[str, Any]:
    """One run; ``checkpointing`` None = as LLaMA-Factory sets it."""
    from datasets import Dataset, DatasetDict
    from llamafactory.train.tuner import run_exp  # noqa: PLC0415
    from transformers import TrainerCallback

    folder = Path(request["folder"])
    output = folder / request["name"]
    rows = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    for row in rows:
        row["attention_mask"] = [1] * len(row["input_ids"])
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(str(output / "tokens"))
    times: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.monotonic())

        on_step_end = on_train_begin

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    more = {} if request["checkpointing"] is None else {"disable_gradient_checkpointing": not request["checkpointing"]}
    lora = request["lora"]
    run_exp(
        {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": request["base"],
            "template": "smollm2",
            "dataset": "tokens",
            "tokenized_path": str(output / "tokens"),
            "finetuning_type": "lora",
            "lora_target": "all",
            "lora_rank": lora["r"],
            "lora_alpha": lora["lora_alpha"],
            "lora_dropout": lora["lora_dropout"],
            "output_dir": str(output / "adapter"),
            "max_steps": request["steps"],
            "per_device_train_batch_size": request["batch_size"],
            "gradient_accumulation_steps": 1,
            "learning_rate": request["learning_rate"],
            "lr_scheduler_type": "linear",
            "infer_dtype": "float32",
            "use_cpu": True,
            "seed": request["seed"],
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            # The rows lie in the order that they are to be taken in.
            "disable_shuffling": True,
            **more,
        },
        callbacks=[Clock()],
    )
    return {
        "adapter": str(output / "adapter"),
        "losses": losses,
        "times": times,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    request = json.loads(sys.stdin.read())
    Path(request["result"]).write_text(json.dumps(main(request)))

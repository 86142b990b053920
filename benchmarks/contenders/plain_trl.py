"""A plain script over trl's ``SFTTrainer``, as its documentation writes them; a fair one: no telemetry, no saving."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


def main(request: dict[str, Any]) -> dict[str, Any]:
    """One run; ``checkpointing`` None = as trl sets it."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    folder = Path(request["folder"])
    rows = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.monotonic())

        on_step_end = on_train_begin

    more = {} if request["checkpointing"] is None else {"gradient_checkpointing": request["checkpointing"]}
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(request["base"], dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(folder / request["name"]),
            max_steps=request["steps"],
            per_device_train_batch_size=request["batch_size"],
            learning_rate=request["learning_rate"],
            lr_scheduler_type="linear",
            max_length=None,
            bf16=False,
            use_cpu=True,
            seed=request["seed"],
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            # The rows lie in the order that they are to be taken in.
            train_sampling_strategy="sequential",
            dataset_kwargs={"skip_prepare_dataset": True},
            **more,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(request["base"]),
        peft_config=LoraConfig(**request["lora"], target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()
    adapter = folder / request["name"] / "adapter"
    trainer.model.save_pretrained(adapter)
    return {
        "adapter": str(adapter),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "times": times,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    request = json.loads(sys.stdin.read())
    Path(request["result"]).write_text(json.dumps(main(request)))

"""Quantises a model with llm-compressor, and says how far the result is from its source.

A program for the interpreter that has llm-compressor, which asks for other versions than training does:
``python -I quantizer.py <job.json>``. Knows nothing of this project. ``job.json`` holds ``source``, ``target``,
``scheme``, ``prompts`` (token ids), ``calibration`` (token ids; empty = by rounding alone) and ``stops``. Lines of JSON
on stdout tell how far it is; the last one is ``{"result": …}``.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GROUPS = (128, 64, 32)
"""Weights that share a scale, the largest that divides every matrix; one a row where none does."""
NEW_TOKENS = 16


def say(**line: Any) -> None:
    """One line for the parent."""
    print(json.dumps(line), file=sys.__stdout__, flush=True)


def recipe(scheme: str, model: Any, *, calibrated: bool) -> Any:
    """What llm-compressor is to do: every linear layer but the head."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    if scheme in ("w8a8", "fp8"):
        return QuantizationModifier(
            targets="Linear", scheme={"w8a8": "W8A8", "fp8": "FP8_DYNAMIC"}[scheme], ignore=["lm_head"]
        )
    weights: dict[str, Any] = {"num_bits": 8 if scheme == "w8a16" else 4, "type": "int", "symmetric": True}
    group = group_size(model)
    weights |= {"strategy": "group", "group_size": group} if group and scheme == "w4a16" else {"strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return (GPTQModifier if calibrated else QuantizationModifier)(config_groups=groups, ignore=["lm_head"])


def group_size(model: Any) -> int | None:
    """See ``GROUPS``."""
    import torch

    widths = {part.in_features for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    return next((size for size in GROUPS if all(width % size == 0 for width in widths)), None)


def logits(model: Any, prompts: Iterable[list[int]]) -> list[Any]:
    """Of each prompt (tokens, vocabulary), float32."""
    import torch

    with torch.no_grad():
        return [model(torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in prompts]


def compared(before: list[Any], after: list[Any]) -> dict[str, Any]:
    """Mean KL(source‖quantised) in nats a token, the share of positions with the same first choice, and the faults."""
    import torch

    kl, same, tokens, bad = 0.0, 0, 0, 0
    for one, other in zip(before, after, strict=True):
        bad += int((~torch.isfinite(other)).sum())
        first, second = one.log_softmax(-1), other.log_softmax(-1)
        kl += float((first.exp() * (first - second)).sum())
        same += int((one.argmax(-1) == other.argmax(-1)).sum())
        tokens += len(one)
    return {
        "kl": kl / tokens if not bad else None,
        "top1_agreement": same / tokens,
        "tokens": tokens,
        "non_finite_logits": bad,
    }


def continued(model: Any, ids: list[int], stops: list[int]) -> list[int]:
    """Greedy."""
    import torch

    asked = torch.tensor([ids], device=model.device)
    made = model.generate(
        asked,
        attention_mask=torch.ones_like(asked),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )
    return [int(token) for token in made[0, len(ids) :]]


def main(path: Path) -> None:
    """Quantise, save, load again, compare."""
    job = json.loads(path.read_bytes())
    # Libraries write to stdout what they please; the parent reads lines of ours alone.
    sys.stdout = sys.stderr
    say(phase="loading")
    import compressed_tensors
    import llmcompressor
    import torch
    import transformers
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    source, target = job["source"], job["target"]
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    if torch.cuda.is_available():
        model.to("cuda")
    before = logits(model, job["prompts"])
    said = continued(model, job["prompts"][0], job["stops"])
    say(phase="quantising")
    calibration: dict[str, Any] = {}
    if job["calibration"]:
        import datasets

        rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["calibration"]]
        calibration = {
            "dataset": datasets.Dataset.from_list(rows),
            "num_calibration_samples": len(rows),
            "max_seq_length": max(map(len, job["calibration"])),
        }
    oneshot(model=model, recipe=recipe(job["scheme"], model, calibrated=bool(calibration)), **calibration)
    say(phase="saving")
    model.save_pretrained(target, save_compressed=True)
    del model
    say(phase="validating")
    model = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    if torch.cuda.is_available():
        model.to("cuda")
    found = compared(before, logits(model, job["prompts"]))
    again = continued(model, job["prompts"][0], job["stops"])
    versions = {
        "llmcompressor": llmcompressor.__version__,
        "compressed-tensors": compressed_tensors.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    say(result={**found, "source_tokens": said, "tokens_made": again, "versions": versions})


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Validate: a model or adapter loads, is finite, and answers."""

import math
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast

from pydantic import Field

from app.catalog import Operation, RunContext
from app.errors import Code, RunError
from app.specs import JobSpec, ModelRef
from workers.loading import (
    Compute,
    check_base,
    device_and_dtype,
    has_tokenizer,
    load_base,
    load_tokenizer,
    logits,
    non_finite,
    prompt_ids,
    read_adapter,
    set_threads,
    tensor_headers,
)

PROMPT = "你好，请介绍一下自己。"
"""The guide's question to a merged model: "Hello, please introduce yourself." """
MAX_NEW_TOKENS = 32


class ValidateSpec(JobSpec):
    """Check that a model can be used."""

    type: Literal["validate"] = "validate"
    takes_adapters: ClassVar[bool] = True
    model: ModelRef
    base_model: ModelRef | None = Field(None, description="Of an adapter; default: what it was trained on.")


class Check(NamedTuple):
    """One row of the report; ``warn`` does not fail the job."""

    name: str
    status: Literal["ok", "warn", "failed"]
    detail: str


class _Unreported:
    """Stands in for the context where a dtype is chosen: this spec has no field that the choice could go into."""

    def resolved(self, path: str, value: Any) -> None:
        """Says nothing."""


def run(spec: ValidateSpec, ctx: RunContext) -> None:
    """Runs every check that still can, then fails with the names of those that did not hold."""
    set_threads()
    ctx.phase("validating")
    folder = ctx.input("model")
    is_adapter = (folder / "adapter_config.json").exists() and not (folder / "config.json").exists()
    base = ctx.input("base_model") if is_adapter else folder
    checks: list[Check] = []
    report: dict[str, Any] = {"kind": "adapter" if is_adapter else "model", "parameters": None}
    report |= {"prompt": PROMPT, "answer": None}

    tokenizer = _tokenizer(folder if has_tokenizer(folder) else base, checks)
    if _weights(folder, checks):
        model = _load(folder, base, checks)
        if model is not None:
            report["parameters"] = model.num_parameters()
            if tokenizer is not None:
                report["answer"] = _answer(model, tokenizer, checks)
    failed = [check for check in checks if check.status == "failed"]
    ctx.result(report={**report, "ok": not failed, "checks": [check._asdict() for check in checks]})
    if failed:
        raise RunError(
            Code.VALIDATION_FAILED,
            f"failed: {'; '.join(f'{check.name}: {check.detail}' for check in failed)}",
            param="model",
        )


def _tokenizer(folder: Path, checks: list[Check]) -> Any:
    try:
        tokenizer = load_tokenizer(folder)
    except RunError as error:
        checks.append(Check("tokenizer", "failed", error.message))
        return None
    checks.append(Check("tokenizer", "ok", f"{len(tokenizer)} entries"))
    if tokenizer.chat_template:
        checks.append(Check("chat_template", "ok", f"{len(tokenizer.chat_template)} characters"))
    else:
        checks.append(Check("chat_template", "warn", "none; the model can complete text but not chat"))
    return tokenizer


def _weights(folder: Path, checks: list[Check]) -> bool:
    try:
        count = len(tensor_headers(folder))
    except RunError as error:
        checks.append(Check("weights", "failed", error.message))
        return False
    bad = non_finite(folder)
    if bad:
        checks.append(
            Check("finite_weights", "failed", f"{len(bad)} of {count} tensors hold NaN or infinity: {bad[0]}")
        )
    else:
        checks.append(Check("finite_weights", "ok", f"{count} tensors"))
    return True


def _load(folder: Path, base: Path, checks: list[Check]) -> Any:
    from peft import PeftModel

    compute: Compute = device_and_dtype(None, cast(RunContext, _Unreported()))
    try:
        model = load_base(base, compute)
        if folder != base:
            check_base(read_adapter(folder), base, base.name)
            model = PeftModel.from_pretrained(model, folder)
    except (RunError, ValueError, RuntimeError, KeyError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        checks.append(Check("loads", "failed", str(error)[:500]))
        return None
    checks.append(Check("loads", "ok", f"{compute.dtype} on {compute.device}"))
    return model


def _answer(model: Any, tokenizer: Any, checks: list[Check]) -> str | None:
    """The greedy answer to ``PROMPT``; None when the logits are not finite."""
    import torch

    ids = prompt_ids(tokenizer, [PROMPT])
    rows = model.get_input_embeddings().weight.shape[0]
    if max(ids[0]) >= rows:
        checks.append(Check("vocabulary", "failed", f"the tokenizer knows ids beyond the {rows} embeddings"))
        return None
    peak = float(logits(model, ids)[0].abs().max())
    if not math.isfinite(peak):
        checks.append(Check("finite_logits", "failed", "NaN or infinity"))
        return None
    checks.append(Check("finite_logits", "ok", f"largest {peak:.3g}"))
    prompt = torch.tensor(ids, device=model.device)
    with torch.inference_mode():
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    new = output[0, prompt.shape[1] :]
    answer: str = tokenizer.decode(new, skip_special_tokens=True)
    checks.append(Check("generates", "ok" if len(new) else "failed", f"{len(new)} tokens"))
    return answer


operation = Operation(ValidateSpec, run, slot="train")

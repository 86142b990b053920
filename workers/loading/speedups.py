"""What makes a run quicker or smaller where the hardware can: what of it is on, and why the rest is refused.

Nothing is replaced in silence: what a spec names runs, or the run ends as bad_spec before its first step.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from app.catalog import RunContext
from app.errors import Code, RunError
from app.specs import ModelBlock, TrainingBlock
from workers.loading.devices import Compute

FLASH = "flash_attention_2"
PAGED = ("paged_adamw_8bit", "paged_adamw_32bit")


def speed_arguments(
    config: Callable[..., Any], block: TrainingBlock, compute: Compute, ctx: RunContext
) -> dict[str, Any]:
    """The trainer's arguments for optimizer, kernels, compilation and offloading. Raises RunError bad_spec."""
    cuda = compute.device == "cuda"
    if not cuda:
        # transformers and bitsandbytes would do something else, and say nothing or warn.
        if block.optim in PAGED:
            raise _refused("optim", f"{block.optim} pages a GPU's memory", "use adamw_8bit, or adamw_torch_fused")
        if block.torch_compile:
            raise _refused("torch_compile", "kernels are compiled for a GPU", "leave it out")
        if block.activation_offloading:
            raise _refused("activation_offloading", "activations are moved off a GPU", "use gradient_checkpointing")
    more = {"activation_offloading": True} if block.activation_offloading else {}
    return {
        "optim": block.optim,
        "torch_compile": block.torch_compile,
        "use_liger_kernel": _liger(config, block, compute, ctx),
        **more,
    }


def _liger(config: Callable[..., Any], block: TrainingBlock, compute: Compute, ctx: RunContext) -> bool:
    """``auto``: on a GPU where it is installed, for supervised training, whose loss it computes without logits."""
    from trl import SFTConfig

    usable = compute.device == "cuda" and find_spec("liger_kernel") is not None
    if block.use_liger_kernel == "auto":
        on = usable and config is SFTConfig
        if on:
            ctx.resolved("training.use_liger_kernel", True)
        return on
    if block.use_liger_kernel and not usable:
        why = "liger_kernel is not installed" if compute.device == "cuda" else "Liger's kernels are for a GPU"
        raise _refused("use_liger_kernel", why, "leave it out, or write auto")
    return block.use_liger_kernel


def attention(model: ModelBlock, compute: Compute, ctx: RunContext) -> str | None:
    """What computes attention; None = as transformers chooses, which is SDPA for most. Raises RunError bad_spec.

    ``auto`` takes flash attention on a GPU where it is installed and the weights have 16 bits.
    """
    field, asked = "model.attn_implementation", model.attn_implementation
    usable = compute.device == "cuda" and find_spec("flash_attn") is not None
    narrow = compute.dtype != "float32" and model.method != "full"
    if asked == "auto":
        if usable and narrow:
            ctx.resolved(field, FLASH)
            return FLASH
        return None
    if asked == FLASH and not (usable and narrow):
        why = "flash_attn is not installed" if compute.device == "cuda" else "flash attention is for a GPU"
        if usable:
            why = "flash attention computes in 16 bits, and these weights have 32"
        raise RunError(Code.BAD_SPEC, why, hint="write sdpa, or leave attn_implementation out", param=field)
    return asked


def _refused(field: str, why: str, hint: str) -> RunError:
    message = f"{why}, and this run has none" if "GPU" in why else why
    return RunError(Code.BAD_SPEC, message, hint=hint, param=f"training.{field}")

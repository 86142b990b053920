"""What 4-bit storage does to a weight, as bitsandbytes does it while QLoRA trains."""

from typing import Any

BLOCK_SIZE = 64
"""Values that share a scale; bitsandbytes' own."""


def round_trip(rows: Any, kind: str) -> Any:
    """Float32 rows rounded to ``nf4`` or ``fp4`` and back; they begin on a multiple of 64 values of their tensor.

    Scales are kept in float32: what double quantisation would round of them is left out.
    """
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(rows.contiguous(), blocksize=BLOCK_SIZE, quant_type=kind)
    return functional.dequantize_4bit(packed, state).reshape(rows.shape)

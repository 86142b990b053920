"""One adapter into its base: W + scale · B · A, computed in float32 and rounded once."""

from pathlib import Path

from app.catalog import MergeMethod, RunContext
from workers.loading import MergeSpec, merge_adapter


def run(spec: MergeSpec, ctx: RunContext) -> None:
    """Merges and proves. Raises RunError base_mismatch, quantised_base, effect_lost …"""
    info = ctx.input_info("adapter")
    layers = [Path(layer) for layer in info.get("under", ())] if not spec.base_model else []
    about = {"name": info.get("name"), "artifact_id": info.get("artifact_id")}
    merge_adapter(spec, ctx, ctx.input("adapter"), layers, about)


merge = MergeMethod("lora", run)

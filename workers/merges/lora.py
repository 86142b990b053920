"""One adapter into its base: W + scale · B · A, computed in float32 and rounded once."""

from app.catalog import MergeMethod, RunContext
from workers.loading import MergeSpec, layers_below, merge_adapter


def run(spec: MergeSpec, ctx: RunContext) -> None:
    """Merges and proves. Raises RunError base_mismatch, quantised_base, effect_lost …"""
    info = ctx.input_info("adapter")
    about = {"name": info.get("name"), "artifact_id": info.get("artifact_id")}
    merge_adapter(spec, ctx, ctx.input("adapter"), layers_below(spec, ctx, "adapter"), about)


merge = MergeMethod("lora", run)

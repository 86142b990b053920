"""Merge: a base and an adapter become one model, with a certificate of what it kept."""

from app.catalog import Operation, RunContext
from app.errors import Code, RunError
from workers.loading import MergeSpec


def run(spec: MergeSpec, ctx: RunContext) -> None:
    """Hands over to the method's file in ``workers/merges``."""
    method = ctx.catalog.merges.get(spec.method)
    if method is None:
        known = ", ".join(sorted(ctx.catalog.merges))
        raise RunError(Code.BAD_SPEC, f"no merge method {spec.method!r}; there are: {known}", param="method")
    method.run(spec, ctx)


operation = Operation(MergeSpec, run)

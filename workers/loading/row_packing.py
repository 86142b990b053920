"""Conversations packed into blocks: whole rows, none of which sees another, and hardly any padding.

Rows are put together by best fit, the longest first (Johnson 1974, "Fast algorithms for bin packing"), so that none is
cut. A block then counts as one row of a batch.
"""

import random
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from app.catalog import RunContext
from app.errors import Code, RunError
from app.specs import TrainSpec
from workers.loading.conversations import IGNORED
from workers.loading.devices import Compute
from workers.loading.packing import is_flat, keeps_apart
from workers.loading.prepared import lengths, read_rows, write_rows

FIELD = "training.packing"


def packs(spec: TrainSpec, model: Any, compute: Compute, ctx: RunContext) -> bool:
    """Whether rows are packed, by ``training.packing`` and by what the model's attention can.

    ``auto`` packs where flash attention does so without a mask; elsewhere batches of like length waste as little.
    Raises RunError bad_spec where packing is asked for and rows would see each other.
    """
    asked = spec.training.packing
    if asked is False:
        return False
    if asked == "auto" and not is_flat(model):
        ctx.resolved(FIELD, False)
        return False
    kind = (
        f"{model.config.model_type} with {getattr(model.config, '_attn_implementation', None) or 'its own attention'}"
    )
    if keeps_apart(model, compute):
        ctx.event("documents_kept_apart", f"rows that share a block do not see each other ({kind})")
        return True
    if asked is True:
        raise RunError(
            Code.BAD_SPEC,
            f"rows that share a block would see each other: {kind} cannot keep them apart",
            hint="leave training.packing out; rows of like length share a batch, which wastes little",
            param=FIELD,
        )
    ctx.resolved(FIELD, False)
    return False


def packed_rows(rows: Any, spec: TrainSpec, ctx: RunContext) -> Any:
    """Rows of ``input_ids`` and ``labels`` as blocks of up to ``max_length`` tokens, with ``seq_lengths``."""
    sizes = lengths(rows)
    blocks = best_fit(sizes, spec.training.max_length, spec.training.seed)
    found = read_rows(write_rows(ctx.work_dir / "packed.arrow", _joined(rows, blocks)))
    full = sum(sizes) / (len(blocks) * spec.training.max_length)
    a_step = spec.training.per_device_train_batch_size * spec.training.gradient_accumulation_steps
    message = (
        f"{len(sizes)} rows lie in {len(blocks)} blocks of up to {spec.training.max_length} tokens, {full:.0%} full; "
        f"a step on one device learns from about {a_step * len(sizes) / len(blocks):.0f} rows"
    )
    ctx.event("rows_packed", message, rows=len(sizes), blocks=len(blocks), full=round(full, 4))
    return found


def best_fit(sizes: Sequence[int], room: int, seed: int) -> list[list[int]]:
    """Which rows share a block. Rows of equal size are drawn by ``seed``; none may be larger than ``room``."""
    order = list(range(len(sizes)))
    random.Random(f"{seed}/packed").shuffle(order)
    order.sort(key=lambda row: -sizes[row])
    blocks: list[list[int]] = []
    by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []
    """What is left in some block, sorted, each once."""
    for row in order:
        place = bisect_left(rooms, sizes[row])
        if place == len(rooms):
            left, block = room, len(blocks)
            blocks.append([])
        else:
            left = rooms[place]
            block = by_room[left].pop()
            if not by_room[left]:
                rooms.pop(place)
        blocks[block].append(row)
        left -= sizes[row]
        if left:
            if not by_room[left]:
                insort(rooms, left)
            by_room[left].append(block)
    return blocks


def _joined(rows: Any, blocks: Sequence[Sequence[int]]) -> Iterator[dict[str, list[int]]]:
    for block in blocks:
        chosen = rows[list(block)]
        yield {
            "input_ids": [token for ids in chosen["input_ids"] for token in ids],
            # The first token of a row follows nothing that it belongs to.
            "labels": [label for labels in chosen["labels"] for label in (IGNORED, *labels[1:])],
            "seq_lengths": [len(ids) for ids in chosen["input_ids"]],
        }

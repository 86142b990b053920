"""Packed conversations: no row is cut, none sees another, and the loss is that of each row alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from app.catalog import Interrupted
from app.errors import Code, RunError
from tests.workers.conftest import make_model, make_tokenizer
from tests.workers.context import RecordingContext
from tests.workers.test_sft import ALL_LINEAR, context, sha256, spec
from workers.loading import load_dataset, load_tokenizer, read_rows
from workers.loading.packing import collator
from workers.loading.row_packing import best_fit, packed_rows
from workers.loading.trainer import real_tokens
from workers.recipes.sft import run

PLAIN = {"peft_config": {"r": 4, "lora_dropout": 0.0}}


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=200), seed=st.integers(0, 9))
def test_every_row_lies_whole_in_one_block(sizes: list[int], seed: int) -> None:
    blocks = best_fit(sizes, 50, seed)
    assert sorted(row for block in blocks for row in block) == list(range(len(sizes)))
    assert all(0 < sum(sizes[row] for row in block) <= 50 for block in blocks)
    # No two blocks would fit into one.
    filled = sorted(sum(sizes[row] for row in block) for block in blocks)
    assert len(filled) < 2 or filled[0] + filled[1] > 50
    assert blocks == best_fit(sizes, 50, seed)


def rows_of(base: Path, numbers: Path, root: Path, count: int | None = None) -> tuple[Any, RecordingContext]:
    """Encoded rows of ``numbers``, the first so many."""
    tokenizer, ctx = load_tokenizer(base), RecordingContext(root)
    rows = load_dataset(numbers, "auto", tokenizer, stops={tokenizer.eos_token_id}, max_length=512, ctx=ctx)
    return rows if count is None else rows.select(range(count)), ctx


def alone(model: Any, rows: Any) -> Any:
    """The mean loss of the labels, each row by itself."""
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        learnt = int((labels[:, 1:] != -100).sum())
        total = total + model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss * learnt
        count += learnt
    return total / count


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("flat", [False, True])
def test_loss_and_gradients_of_a_block_are_those_of_its_rows_alone(
    architecture: str, flat: bool, tmp_path: Path, numbers: Path
) -> None:
    base = make_model(tmp_path / "model", architecture=architecture)
    rows, ctx = rows_of(base, numbers, tmp_path, 12)
    blocks = packed_rows(rows, spec(packing=True, max_length=200), ctx)
    assert len(blocks) < 5
    batch = collator(0, flat=flat)(list(blocks))
    assert batch["input_ids"].shape[0] == (1 if flat else len(blocks))
    model = AutoModelForCausalLM.from_pretrained(base)
    found = {}
    for name, loss in (("alone", lambda: alone(model, rows)), ("packed", lambda: model(**batch, use_cache=False).loss)):
        model.zero_grad()
        value = loss()
        value.backward()
        found[name] = [value.detach(), *(weight.grad.clone() for weight in model.parameters())]
    for one, other in zip(found["alone"], found["packed"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert real_tokens(batch) == sum(len(row["input_ids"]) for row in rows)


def test_the_run_sees_the_same_loss_packed_and_not(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(numbers.read_text().splitlines(keepends=True)[:16]))
    packed, single = context(tmp_path / "packed", tiny, few), context(tmp_path / "single", tiny, few)
    # All rows in one step, so that both see the same ones.
    run(spec(model=PLAIN, max_steps=1, packing=True, max_length=256, per_device_train_batch_size=8), packed)
    run(spec(model=PLAIN, max_steps=1, per_device_train_batch_size=16), single)
    said = next(event for event in packed.events if event["code"] == "rows_packed")
    assert said["rows"] == 16
    assert said["blocks"] <= 3
    assert said["full"] > 0.7
    assert packed.losses[0] == pytest.approx(single.losses[0], rel=1e-5)
    assert "documents_kept_apart" in packed.codes()
    norms = [values["grad_norm"] for ctx in (packed, single) for _, values in ctx.logged if "grad_norm" in values]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_a_packed_run_learns_and_a_resumed_one_ends_with_the_same_bytes(
    tmp_path: Path, tiny: Path, numbers: Path
) -> None:
    settings = {"max_steps": 12, "packing": True, "max_length": 128, "per_device_train_batch_size": 2}
    whole = context(tmp_path / "whole", tiny, numbers)
    run(spec(model=ALL_LINEAR, **settings), whole)
    assert sum(whole.losses[-3:]) < 0.95 * sum(whole.losses[:3])
    first = context(tmp_path / "first", tiny, numbers)
    first.stop_after = 5
    with pytest.raises(Interrupted):
        run(spec(model=ALL_LINEAR, **settings), first)
    second = context(tmp_path / "second", tiny, numbers)
    second.resume_from = first.checkpoints[-1][0]
    run(spec(model=ALL_LINEAR, **settings), second)
    name = "adapter_model.safetensors"
    assert sha256(second.folder / name) == sha256(whole.folder / name)


def test_evaluations_of_a_packed_run_measure_single_rows(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    found = []
    for packing in (True, False):
        ctx = context(tmp_path / str(packing), tiny, numbers, **{"dataset.eval_file": numbers})
        the_spec = spec(model=PLAIN, max_steps=1, learning_rate=1e-9, packing=packing, eval_file="file-2", eval_steps=1)
        run(the_spec, ctx)
        found += [values["eval_loss"] for _, values in ctx.logged if "eval_loss" in values]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def make_bloom(folder: Path) -> Path:
    """A model whose attention knows distances, and no positions."""
    tokenizer = make_tokenizer(folder)
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=2)
    BloomForCausalLM(config).save_pretrained(folder)
    return folder


def test_where_rows_would_see_each_other_packing_is_refused(tmp_path: Path, numbers: Path) -> None:
    base = make_bloom(tmp_path / "bloom")
    with pytest.raises(RunError, match="bloom with .* cannot keep them apart") as caught:
        run(spec(model={"peft_config": {"r": 4}}, max_steps=1, packing=True), context(tmp_path, base, numbers))
    assert (caught.value.code, caught.value.param) == (Code.BAD_SPEC, "training.packing")
    assert caught.value.hint is not None


def test_auto_packs_nothing_without_flash_attention(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    ctx = context(tmp_path, tiny, numbers)
    run(spec(model=PLAIN, max_steps=1, packing="auto"), ctx)
    assert ctx.resolutions["training.packing"] is False
    assert "rows_packed" not in ctx.codes()


def test_a_row_of_the_whole_length_is_a_block_of_its_own(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    rows, ctx = rows_of(tiny, numbers, tmp_path)
    longest = max(len(row["input_ids"]) for row in rows)
    blocks = packed_rows(rows, spec(packing=True, max_length=longest), ctx)
    assert sum(len(block["seq_lengths"]) for block in blocks) == len(rows)
    assert read_rows(ctx.work_dir / "packed.arrow").num_rows == len(blocks)


@pytest.mark.parametrize("flat", [False, True])
def test_a_short_block_is_filled_up_with_tokens_that_nobody_sees(flat: bool) -> None:
    rows: list[dict[str, list[int]]] = [
        {"input_ids": [5, 6, 7], "labels": [5, -100, 7], "seq_lengths": [3]},
        {"input_ids": [8, 9], "labels": [8, 9]},
    ]
    make: Callable[..., Any] = collator(0, flat=flat)
    batch = {name: column.tolist() for name, column in make(rows).items()}
    if flat:
        assert batch == {
            "input_ids": [[5, 6, 7, 8, 9]],
            "labels": [[-100, -100, 7, -100, 9]],
            "position_ids": [[0, 1, 2, 0, 1]],
        }
    else:
        assert batch == {
            "input_ids": [[5, 6, 7], [8, 9, 0]],
            "labels": [[5, -100, 7], [8, 9, -100]],
            "position_ids": [[0, 1, 2], [0, 1, 0]],
        }

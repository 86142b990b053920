"""Pre-training: blocks are full, documents do not see each other, perplexity falls, a resume is exact."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from app.catalog import Interrupted
from app.errors import Code, RunError
from tests.workers.conftest import WORDS, make_tokenizer
from tests.workers.context import RecordingContext
from workers.loading import load_tokenizer
from workers.loading.packing import blocks, collator, keeps_apart, load_texts
from workers.recipes.pretrain import PretrainSpec, prepare, run

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:bitsandbytes",
    "ignore:.*_check_is_size will be removed:FutureWarning",
)
PEFT = {"peft_config": {"r": 8, "target_modules": "all-linear", "lora_dropout": 0.0}}
DORA = {"peft_config": {"r": 4, "use_dora": True, "modules_to_save": ["model.norm"]}}


def texts(path: Path, numbers: range) -> Path:
    """Numbers that are counted up in words."""
    rows = [{"text": ", ".join(WORDS[(number + step) % 10] for step in range(3 + number % 5))} for number in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts(tmp_path_factory.mktemp("texts") / "train.jsonl", range(200))


@pytest.fixture(scope="module")
def eval_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts(tmp_path_factory.mktemp("texts") / "eval.jsonl", range(7, 37))


def spec(model: dict[str, Any] | None = None, **training: Any) -> PretrainSpec:
    return PretrainSpec.model_validate(
        {
            "model": {"model_name_or_path": "artifact:art-tiny", **(model or PEFT)},
            "dataset": {"file": "file-1", "eval_file": "file-2"},
            "training": {"max_steps": 12, "learning_rate": 5e-3, "max_length": 64, **training},
        }
    )


def context(root: Path, base: Path, train: Path, held_out: Path) -> RecordingContext:
    inputs = {"model.model_name_or_path": base, "dataset.file": train, "dataset.eval_file": held_out}
    return RecordingContext(root, inputs, {"model.model_name_or_path": {"name": "tiny"}})


@pytest.mark.parametrize(
    "model",
    [PEFT, {**PEFT, "quantization_config": {}}, {"use_peft": False}, DORA],
    ids=["lora", "qlora", "full", "dora"],
)
def test_held_out_perplexity_falls(
    model: dict[str, Any], tmp_path: Path, tiny: Path, train_file: Path, eval_file: Path
) -> None:
    ctx = context(tmp_path, tiny, train_file, eval_file)
    run(spec(model, learning_rate=2e-3 if "use_peft" in model else 1e-2, eval_steps=6), ctx)
    found = ctx.results
    assert found["eval_perplexity"] < 0.7 * found["eval_perplexity_base"]
    assert found["eval_loss"] < found["eval_loss_base"]
    assert found["documents_kept_apart"] is True
    assert ctx.outputs[0][2]["learning"]["verdict"] == "learnt"
    assert "documents_kept_apart" in ctx.codes()
    measured = [values for _, values in ctx.logged if "eval_perplexity" in values]
    assert len(measured) == 2
    assert measured[0]["eval_perplexity"] == pytest.approx(math.exp(measured[0]["eval_loss"]), rel=1e-6)
    assert found["tokens_per_second"] > 0


def test_blocks_are_full_and_documents_go_on_in_the_next() -> None:
    documents = [[1, 2, 9], [3, 9], [4, 5, 6, 7, 8, 9]]
    assert list(blocks(documents, 4)) == [[[1, 2, 9], [3]], [[9], [4, 5, 6]], [[7, 8, 9]]]


def test_every_token_is_learnt_but_the_first_of_a_document(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one two"}\n{"text": "three"}\n')
    rows = load_texts(path, tokenizer, max_length=64, packed=True, ctx=RecordingContext(tmp_path), field="dataset.file")
    (row,) = list(rows)
    assert tokenizer.decode(row["input_ids"]) == "one two<|im_end|>three<|im_end|>"
    first, second = row["seq_lengths"]
    starts = {0, first}
    assert row["labels"] == [-100 if place in starts else token for place, token in enumerate(row["input_ids"])]
    batch = collator(0)(
        [row, {**row, "input_ids": row["input_ids"][:3], "labels": row["labels"][:3], "seq_lengths": [3]}]
    )
    assert batch["position_ids"][0].tolist() == [*range(first), *range(second)]
    assert batch["labels"][1, 3:].tolist() == [-100] * (first + second - 3)
    assert "attention_mask" not in batch


def test_a_packed_document_is_seen_as_if_it_were_alone(tmp_path: Path, tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    documents = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16]]
    row = {"input_ids": [*range(5, 17)], "labels": [0] * 12, "seq_lengths": [4, 3, 5]}
    short = {"input_ids": [20, 21], "labels": [0, 0], "seq_lengths": [2]}
    batch = collator(0)([row, short])
    batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits
        alone = [model(input_ids=torch.tensor([document])).logits[0] for document in (*documents, [20, 21])]
    assert torch.allclose(packed[0], torch.cat(alone[:3]), atol=1e-5)
    assert torch.allclose(packed[1, :2], alone[3], atol=1e-5)


def test_the_loss_of_a_block_is_that_of_its_documents_alone(tmp_path: Path, tiny: Path, eval_file: Path) -> None:
    path = texts(tmp_path / "texts.jsonl", range(4))
    ctx = context(tmp_path, tiny, path, eval_file)
    run(spec(max_steps=1, max_length=200), ctx)
    (row,) = list(load_texts(path, load_tokenizer(tiny), max_length=200, packed=True, ctx=ctx, field="dataset.file"))
    model, total, place = AutoModelForCausalLM.from_pretrained(tiny), 0.0, 0
    for length in row["seq_lengths"]:
        ids = torch.tensor([row["input_ids"][place : place + length]])
        total += float(model(input_ids=ids, labels=ids).loss.detach()) * (length - 1)
        place += length
    assert len(row["seq_lengths"]) == 4
    assert ctx.results["first_loss"] == pytest.approx(total / (place - 4), rel=1e-5)


def test_attention_that_cannot_keep_documents_apart_is_said(tmp_path: Path, train_file: Path, eval_file: Path) -> None:
    base = tmp_path / "bloom"
    tokenizer = make_tokenizer(base)
    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=2)).save_pretrained(base)
    ctx = context(tmp_path, base, train_file, eval_file)
    run(spec({"peft_config": {"r": 4}}, max_steps=2), ctx)
    said = next(event for event in ctx.events if event["code"] == "documents_share_context")
    assert said["level"] == "warn"
    assert "bloom" in said["message"]
    assert ctx.results["documents_kept_apart"] is False


def test_the_trial_tells_the_two_apart() -> None:
    config = GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    assert keeps_apart(GPT2LMHeadModel(config))
    assert not keeps_apart(BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=16, n_layer=1, n_head=2)))


@pytest.mark.parametrize("model", [PEFT, {"use_peft": False}], ids=["lora", "full"])
def test_a_resumed_run_ends_with_the_same_bytes(
    model: dict[str, Any], tmp_path: Path, tiny: Path, train_file: Path, eval_file: Path
) -> None:
    the_spec = spec(model, max_steps=6, learning_rate=1e-3, per_device_train_batch_size=2)
    whole = context(tmp_path / "whole", tiny, train_file, eval_file)
    run(the_spec, whole)
    first = context(tmp_path / "first", tiny, train_file, eval_file)
    first.stop_after = 3
    with pytest.raises(Interrupted):
        run(the_spec, first)
    second = context(tmp_path / "second", tiny, train_file, eval_file)
    second.resume_from = first.checkpoints[-1][0]
    run(the_spec, second)
    (name,) = (path.name for path in whole.folder.glob("*.safetensors"))
    assert (second.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_blocks_are_made_ready_beforehand(tmp_path: Path, tiny: Path, train_file: Path, eval_file: Path) -> None:
    ctx = context(tmp_path, tiny, train_file, eval_file)
    ctx.prepared_dir = tmp_path / "prepared"
    ctx.prepared_dir.mkdir()
    prepare(spec(), ctx)
    made = {path.name: path.read_bytes() for path in ctx.prepared_dir.glob("*.arrow")}
    assert set(made) == {"dataset.file.arrow", "dataset.eval_file.arrow"}
    run(spec(max_steps=1), ctx)
    assert {path.name: path.read_bytes() for path in ctx.prepared_dir.glob("*.arrow")} == made
    assert ctx.codes().count("dataset_loaded") == 2  # not again in the run


def test_rows_that_are_no_text_are_refused(tmp_path: Path, tiny: Path, numbers: Path, eval_file: Path) -> None:
    with pytest.raises(RunError, match="this row is messages, and plain text is needed") as caught:
        run(spec(), context(tmp_path, tiny, numbers, eval_file))
    assert (caught.value.code, caught.value.param) == (Code.BAD_DATA, "dataset.file")

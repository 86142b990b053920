"""GRPO: the mean reward of a toy judge rises, the KL stays bounded, a resumed run ends with the same bytes."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from app.catalog import Catalog, Grader, Interrupted
from app.errors import Code, RunError
from app.grading import Sample
from tests.workers.conftest import conversation
from tests.workers.context import RecordingContext
from tests.workers.recipes.conftest import SAYS_IT, asked
from workers.loading import load_model, load_tokenizer, training_arguments
from workers.loading.grouped import GroupOrder, grouped
from workers.loading.watch import Watch
from workers.recipes.grpo import GrpoSpec

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:bitsandbytes",
    "ignore:.*_check_is_size will be removed:FutureWarning",
)
LORA = {"peft_config": {"r": 8, "target_modules": "all-linear", "lora_dropout": 0.1}}
FULL = {"use_peft": False}


@pytest.fixture
def spec(catalog: Catalog) -> Any:
    """``spec(model, grpo, graders, **training)``."""

    def make(
        model: dict[str, Any] | None = None,
        grpo: dict[str, Any] | None = None,
        graders: Sequence[dict[str, Any]] = (SAYS_IT,),
        held_out: bool = False,
        **training: Any,
    ) -> GrpoSpec:
        made = catalog.recipes["grpo"].spec.model_validate(
            {
                "model": {"model_name_or_path": "artifact:art-speller", **(model or LORA)},
                "dataset": {"file": "file-1", "eval_file": "file-2" if held_out else None},
                "training": {
                    "max_steps": 4,
                    "learning_rate": 3e-3,
                    "lr_scheduler_type": "constant",
                    "per_device_train_batch_size": 32,
                    **training,
                },
                "graders": list(graders),
                "grpo": {"max_completion_length": 12, "beta": 0.05, **(grpo or {})},
            }
        )
        assert isinstance(made, GrpoSpec)
        return made

    return make


@pytest.fixture
def go(catalog: Catalog, speller: Path, word_file: Path, tmp_path: Path) -> Any:
    """``go(spec, name)``: a run from spec to result; ``held_out`` a file to measure on."""

    def run(
        the_spec: GrpoSpec,
        name: str = "run",
        *,
        stop_after: int | None = None,
        resume_from: Path | None = None,
        base: Path = speller,
        rows: Path = word_file,
        held_out: Path | None = None,
    ) -> RecordingContext:
        inputs = {"model.model_name_or_path": base, "dataset.file": rows}
        if held_out is not None:
            inputs["dataset.eval_file"] = held_out
        ctx = RecordingContext(tmp_path / name, inputs, {"model.model_name_or_path": {"name": "speller"}}, catalog)
        ctx.stop_after, ctx.resume_from = stop_after, resume_from
        catalog.recipes["grpo"].run(the_spec, ctx)
        return ctx

    return run


def values(ctx: RecordingContext, name: str) -> list[float]:
    return [entry[name] for _, entry in ctx.logged if name in entry]


def bytes_of(ctx: RecordingContext) -> bytes:
    (weights,) = ctx.folder.glob("*.safetensors")
    return weights.read_bytes()


def test_the_mean_reward_rises_the_policy_stays_near_and_plain_peft_reads_the_adapter(
    spec: Any, go: Any, speller: Path, tmp_path: Path
) -> None:
    held_out = asked(tmp_path / "held-out.jsonl", range(100, 140))
    ctx = go(spec(held_out=True, max_steps=30), held_out=held_out)
    rewards = values(ctx, "reward")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3, rewards
    drift = [kl * length for kl, length in zip(values(ctx, "kl"), values(ctx, "completions/mean_length"), strict=True)]
    assert drift[0] == pytest.approx(0, abs=1e-4), "policy and reference begin as one"
    assert max(drift) < 40
    names = {name for _, entry in ctx.logged for name in entry}
    assert {
        "rewards/says it/mean",
        "reward_std",
        "frac_reward_zero_std",
        "entropy",
        "clip_ratio/region_mean",
        "completions/clipped_ratio",
        "grad_norm",
        "tokens_per_second",
    } <= names
    kind, folder, facts = ctx.outputs[0]
    assert (kind, facts["learning"]["verdict"], facts["learning"]["metric"]) == ("adapter", "learnt", "reward")
    assert ctx.results["eval_reward"] > ctx.results["eval_reward_base"]
    assert ctx.checks["reward"]["status"] == "ok"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(speller), folder)
    assert set(model.peft_config) == {"default"}
    assert any(part.abs().sum() > 0 for name, part in model.named_parameters() if "lora_B" in name)
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.glob("*.json"))


@pytest.mark.parametrize(
    ("model", "grpo", "more"),
    [
        # The stop comes between two updates from the same answers, which the checkpoint has to keep.
        (LORA, {"num_iterations": 2}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 16}),
        (FULL, {}, {"learning_rate": 1e-3}),
        (LORA, {}, {"eval_steps": 2}),
    ],
    ids=["lora-iterations", "full", "lora-evaluated"],
)
def test_a_resumed_run_ends_with_the_same_bytes(
    model: dict[str, Any], grpo: dict[str, Any], more: dict[str, Any], spec: Any, go: Any, tmp_path: Path
) -> None:
    held_out = asked(tmp_path / "held-out.jsonl", range(100, 110)) if "eval_steps" in more else None
    the_spec = spec(model, grpo, held_out=held_out is not None, max_steps=6, **more)
    whole = go(the_spec, "whole", held_out=held_out)
    with pytest.raises(Interrupted):
        go(the_spec, "first", stop_after=3, held_out=held_out)
    checkpoint = tmp_path / "first" / "checkpoints" / "checkpoint-3"
    second = go(the_spec, "second", resume_from=checkpoint, held_out=held_out)
    assert bytes_of(second) == bytes_of(whole)
    assert second.results["final_reward"] == whole.results["final_reward"]
    assert second.results["first_reward"] == whole.results["first_reward"]
    assert values(second, "loss") == values(whole, "loss")[3:]
    if held_out is not None:
        assert second.results["eval_reward"] == whole.results["eval_reward"]


@pytest.mark.parametrize("model", [{**LORA, "quantization_config": {}}, FULL], ids=["qlora", "full"])
def test_other_methods_train_too(model: dict[str, Any], spec: Any, go: Any) -> None:
    ctx = go(spec(model, max_steps=2, learning_rate=1e-3))
    assert ctx.outputs[0][0] == ("model" if model == FULL else "adapter")
    assert ctx.results["steps"] == 2
    assert ctx.results["final_kl"] >= 0
    assert math.isfinite(values(ctx, "grad_norm")[0])
    assert values(ctx, "grad_norm")[0] > 0


def test_scores_are_added_by_their_weights_and_shown_one_by_one(spec: Any, go: Any) -> None:
    brief = {"type": "regex", "name": "brief", "pattern": "^.{0,9}$"}
    ctx = go(spec(graders=[SAYS_IT, brief], grpo={"reward_weights": [2.0, -0.5]}, max_steps=1))
    (entry,) = [entry for _, entry in ctx.logged if "reward" in entry]
    expected = 2 * entry["rewards/says it/mean"] - 0.5 * entry["rewards/brief/mean"]
    assert entry["reward"] == pytest.approx(expected, abs=1e-6)
    assert entry["rewards/brief/mean"] > 0


def test_answers_are_drawn_from_the_policy_alone(spec: Any, go: Any, speller: Path, tmp_path: Path) -> None:
    """Whatever the model's own generation_config asks for would make the update reckon with wrong probabilities."""
    odd = tmp_path / "odd"
    shutil.copytree(speller, odd)
    config = json.loads((odd / "generation_config.json").read_text())
    wishes = {"repetition_penalty": 9.0, "min_p": 0.9, "no_repeat_ngram_size": 1, "top_k": 1}
    (odd / "generation_config.json").write_text(json.dumps({**config, **wishes}))
    plain, other = go(spec(FULL, max_steps=1), "plain"), go(spec(FULL, max_steps=1), "other", base=odd)
    assert values(other, "reward") == values(plain, "reward")
    assert bytes_of(other) == bytes_of(plain)
    assert json.loads((other.folder / "generation_config.json").read_text())["repetition_penalty"] == 9.0


def test_what_an_answer_was_worth_is_what_trl_works_out(
    spec: Any, catalog: Catalog, speller: Path, tmp_path: Path
) -> None:
    """The lean way, with positions and on the answers' tokens alone, beside trl's own on all tokens."""
    ctx = RecordingContext(tmp_path, catalog=catalog)
    the_spec = spec(grpo={"temperature": 0.7})
    model, compute = load_model(speller, the_spec.model, ctx)
    trainer = grouped(GRPOTrainer, Watch(), ctx)(
        model=model,
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        args=training_arguments(GRPOConfig, the_spec.training, ctx, compute, temperature=0.7, disable_dropout=True),
        train_dataset=Dataset.from_list([{"prompt": [5, 6, 7], "row": "{}"}]),
        processing_class=load_tokenizer(speller),
    )
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [0, 0, 7, 8, 9, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0]])
    with torch.no_grad():
        ours = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 3, compute_entropy=True)
        trainer._lean = False
        theirs = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 3, 1, compute_entropy=True)
        short = torch.tensor([[7, 8, 9]])
        alone = trainer._get_per_token_logps_and_entropies(trainer.model, short, torch.ones_like(short), 2)
    real = mask[:, -3:].bool()
    assert torch.allclose(ours[0][real], theirs[0][real], atol=1e-5)
    assert torch.allclose(ours[1][real], theirs[1][real], atol=1e-5)
    assert torch.allclose(ours[0][1, :2], alone[0][0], atol=1e-5), "padding on the left shifts nothing"


def test_groups_come_whole_and_every_prompt_is_asked() -> None:
    order = GroupOrder(5, group=3, chunk=2, repeat=2, seed=1)
    first = list(order)
    assert len(first) == len(order) == 3 * 2 * 3 * 2
    chunks = [first[start : start + 6] for start in range(0, len(first), 6)]
    assert all(len(set(chunk[:3])) == len(set(chunk[3:])) == 1 and chunk[0] != chunk[3] for chunk in chunks)
    assert chunks[0] == chunks[1]
    assert set(first) == set(range(5))
    assert list(order) == first
    order.set_epoch(1)
    assert list(order) != first
    assert len(list(GroupOrder(1, group=2, chunk=4, repeat=1, seed=1))) == 8, "one prompt fills a chunk"


def test_signs_of_a_policy_that_runs_away_are_warnings(spec: Any, go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.loading.signs.KL_RUNAWAY", 1e-6)
    ctx = go(spec(max_steps=3))
    assert ctx.codes().count("kl_runaway") == 1
    assert ctx.checks["kl"]["status"] == "warning"


def test_rows_that_a_grader_could_not_judge_are_refused_before_anything_is_trained(
    spec: Any, catalog: Catalog, speller: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": conversation(number)[:2], "answer": str(number)} for number in range(3)]
    for index, (change, words) in enumerate(
        [
            ({"answer": None}, r"line 2: item.answer is missing; graders.0.reference reads it"),
            ({"answer": "many"}, r"line 2: number_match: there is no number in the reference 'many'"),
        ]
    ):
        data = tmp_path / f"{index}.jsonl"
        data.write_text(
            "".join(json.dumps(row | (change if place == 1 else {})) + "\n" for place, row in enumerate(rows))
        )
        ctx = RecordingContext(
            tmp_path / str(index), {"model.model_name_or_path": speller, "dataset.file": data}, catalog=catalog
        )
        ctx.prepared_dir = tmp_path / f"prepared-{index}"
        ctx.prepared_dir.mkdir()
        prepare = catalog.recipes["grpo"].prepare
        assert prepare is not None
        with pytest.raises(RunError, match=words) as caught:
            prepare(spec(graders=[{"type": "number_match"}]), ctx)
        assert (caught.value.code, caught.value.param) == (Code.BAD_DATA, "dataset.file")


def test_a_grader_that_says_nan_ends_the_run(
    spec: Any, go: Any, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any, samples: Sequence[Sample]) -> list[float]:
        return [math.nan if sample.output_text else 0.0 for sample in samples]

    plug = catalog.graders["string_check"]
    monkeypatch.setitem(catalog.graders, "string_check", Grader(plug.spec, broken))
    with pytest.raises(RunError, match="the grader says it scored an answer with nan") as caught:
        go(spec())
    assert caught.value.code == Code.NON_FINITE_LOSS

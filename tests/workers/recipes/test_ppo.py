"""PPO: a toy judge's mean score rises, the KL stays bounded, a resumed run ends with the same bytes."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import set_seed

from app.catalog import Interrupted
from app.errors import Code, RunError
from app.grading import Sample
from tests.workers.conftest import conversation
from tests.workers.context import RecordingContext
from tests.workers.recipes.test_reward import PEFT, pairs
from tests.workers.recipes.test_reward import run as train_reward
from tests.workers.recipes.test_reward import spec as reward_spec
from workers.loading import load_model, load_tokenizer, stop_tokens
from workers.loading.actor_critic import ActorCritic
from workers.loading.health import Health
from workers.loading.judging import Judge
from workers.loading.ppo_loop import Ppo
from workers.loading.prompts import load_prompts
from workers.loading.rollouts import roll_out
from workers.loading.signs import Signs
from workers.recipes.ppo import PpoSpec, ppo_settings, run

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:bitsandbytes",
    "ignore:.*_check_is_size will be removed:FutureWarning",
)
LORA = {"peft_config": {"r": 8, "target_modules": "all-linear", "lora_dropout": 0.1}}


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": conversation(number)[:2]}) + "\n" for number in range(40)))
    return path


def spec(model: dict[str, Any] | None = None, ppo: dict[str, Any] | None = None, **training: Any) -> PpoSpec:
    return PpoSpec.model_validate(
        {
            "model": {"model_name_or_path": "artifact:art-tiny", **(model or LORA)},
            "dataset": {"file": "file-1"},
            "reward_model": "artifact:art-judge",
            "training": {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 16, **training},
            "ppo": {"response_length": 12, "temperature": 1.0, **(ppo or {})},
        }
    )


def letters(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Ten times the share of plain letters in the answer."""
    texts = [one.output_text for one in samples]
    shares = [sum(sign.isascii() and sign.isalpha() for sign in text) / max(len(text), 1) for text in texts]
    return {"letters": [10 * share for share in shares]}


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """The tiny model with larger embeddings: else its tied head can hardly prefer any token, however it is trained."""
    folder = tmp_path_factory.mktemp("lively") / "model"
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 10
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def ready(base: Path, prompts: Path, the_spec: PpoSpec, ctx: RecordingContext, judge: Judge = letters) -> Ppo:
    set_seed(the_spec.training.seed)
    tokenizer = load_tokenizer(base)
    model, _ = load_model(base, the_spec.model, ctx)
    actor = ActorCritic(model, the_spec.model, the_spec.ppo.temperature)
    rows = load_prompts(prompts, "auto", tokenizer, max_tokens=500, ctx=ctx)
    stops = stop_tokens(tokenizer, model.generation_config)
    settings = ppo_settings(the_spec, len(rows))
    return Ppo(actor, tokenizer, rows, judge, settings, stops, ctx, actor.save_policy, the_spec)


@pytest.mark.parametrize("seed", range(5))
def test_the_mean_score_rises_and_the_policy_stays_near(
    seed: int, tmp_path: Path, lively: Path, prompt_file: Path
) -> None:
    """By 4 of the 10 points that there are at least, within 20 nats an answer of 12 tokens."""
    sizes = {"max_steps": 20, "per_device_train_batch_size": 32, "lr_scheduler_type": "constant"}
    the_spec = spec(seed=seed, learning_rate=3e-3, **sizes)
    ppo = ready(lively, prompt_file, the_spec, RecordingContext(tmp_path))
    ppo.run()
    scores = [entry["objective/scores"] for entry in ppo.history]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 4, scores
    assert all(entry["objective/kl"] < 20 for entry in ppo.history)
    assert all(math.isfinite(value) for entry in ppo.history for value in entry.values())


@pytest.mark.parametrize(
    "model", [LORA, {**LORA, "quantization_config": {}}, {"use_peft": False}], ids=["lora", "qlora", "full"]
)
def test_at_the_start_policy_and_reference_are_one_and_every_ratio_is_one(
    model: dict[str, Any], tmp_path: Path, tiny: Path, prompt_file: Path
) -> None:
    ppo = ready(tiny, prompt_file, spec(model, {"num_ppo_epochs": 1}, max_steps=1), RecordingContext(tmp_path))
    ppo.run()
    (metrics,) = ppo.history
    assert metrics["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-4)
    assert metrics["val/ratio_var"] == pytest.approx(0, abs=1e-6)
    assert metrics["policy/clipfrac_avg"] == 0
    names = {"objective/rlhf_reward", "policy/entropy_avg", "loss/value_avg", "loss/policy_avg", "objective/kl_coef"}
    assert names <= set(metrics)


def test_policy_and_critic_learn_and_the_base_does_not(tmp_path: Path, tiny: Path, prompt_file: Path) -> None:
    ppo = ready(tiny, prompt_file, spec(max_steps=1), RecordingContext(tmp_path))
    before = {key: value.clone() for key, value in ppo.actor.model.named_parameters()}
    head = ppo.actor.head.weight.clone()
    ppo.run()
    moved = {key for key, value in ppo.actor.model.named_parameters() if not torch.equal(value, before[key])}
    assert any(".default." in key for key in moved)
    assert any(".value." in key for key in moved)
    assert all("lora_" in key for key in moved)
    assert not torch.equal(head, ppo.actor.head.weight)


def test_padding_changes_no_probability(tmp_path: Path, tiny: Path, prompt_file: Path) -> None:
    ppo = ready(tiny, prompt_file, spec(), RecordingContext(tmp_path))
    ids = torch.tensor([ppo.prompts[0].ids + [7, 8, 9]])
    mask = torch.ones_like(ids)
    padded = torch.nn.functional.pad(ids, (5, 0), value=ppo.tokenizer.pad_token_id)
    wide = torch.nn.functional.pad(mask, (5, 0), value=0)
    with torch.no_grad():
        one, other = ppo.actor.judge("policy", ids, mask, 3), ppo.actor.judge("policy", padded, wide, 3)
        assert torch.allclose(one.logprobs, other.logprobs, atol=1e-5)
        with ppo.actor.acting_as("value"):
            assert torch.allclose(ppo.actor.values(ids, mask, 3), ppo.actor.values(padded, wide, 3), atol=1e-5)


def test_what_was_drawn_was_as_likely_as_the_update_says(tmp_path: Path, tiny: Path, prompt_file: Path) -> None:
    """The rollout's probabilities with cache and left padding are those of the update's own forward."""
    ppo = ready(tiny, prompt_file, spec(), RecordingContext(tmp_path))
    rollout = roll_out(
        ppo.actor,
        ppo.tokenizer,
        ppo.prompts[:6],
        letters,
        response_length=12,
        stops=ppo.stops,
        micro_batch=4,
        tick=lambda: None,
    )
    again = ppo.actor.judge("policy", rollout.ids, rollout.mask, 12).logprobs.detach()
    assert torch.allclose(again * rollout.answer_mask, rollout.logprobs * rollout.answer_mask, atol=1e-4)
    # A token that is likelier under the policy is drawn more often: over many draws the mean is the entropy's.
    assert float((rollout.logprobs * rollout.answer_mask).sum()) < 0


@pytest.mark.parametrize("model", [LORA, {"use_peft": False}], ids=["lora", "full"])
def test_a_resumed_run_ends_with_the_same_bytes(
    model: dict[str, Any], tmp_path: Path, tiny: Path, prompt_file: Path
) -> None:
    the_spec = spec(model, max_steps=4, learning_rate=1e-3)
    whole = ready(tiny, prompt_file, the_spec, RecordingContext(tmp_path / "whole"))
    whole.run()
    first = RecordingContext(tmp_path / "first")
    first.stop_after = 2
    with pytest.raises(Interrupted):
        ready(tiny, prompt_file, the_spec, first).run()
    second = ready(tiny, prompt_file, the_spec, RecordingContext(tmp_path / "second"))
    second.run(first.checkpoints[-1][0])
    for name, ppo in (("one", whole), ("two", second)):
        (tmp_path / name).mkdir()
        ppo.actor.save_policy(tmp_path / name)
    (one,) = (tmp_path / "one").glob("*.safetensors")
    assert one.read_bytes() == (tmp_path / "two" / one.name).read_bytes()
    assert second.history[-1] == whole.history[-1]


@pytest.fixture(scope="module")
def judge_dir(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    root = tmp_path_factory.mktemp("judge")
    data = pairs(root / "pairs.jsonl", range(40))
    ctx = RecordingContext(
        root / "run", {"model.model_name_or_path": tiny, "dataset.file": data, "dataset.eval_file": data}
    )
    train_reward(reward_spec(PEFT, max_steps=4), ctx)
    return ctx.folder


def context(root: Path, base: Path, prompts: Path, judge: Path) -> RecordingContext:
    inputs = {
        "model.model_name_or_path": base,
        "dataset.file": prompts,
        "reward_model": judge,
        "reward_model.base": base,
    }
    info = {"model.model_name_or_path": {"name": "tiny"}, "reward_model.base": {"name": "tiny"}}
    return RecordingContext(root, inputs, info)


def test_a_run_from_spec_to_adapter(tmp_path: Path, tiny: Path, prompt_file: Path, judge_dir: Path) -> None:
    ctx = context(tmp_path, tiny, prompt_file, judge_dir)
    run(spec(max_steps=2, save_steps=1), ctx)
    kind, folder, facts = ctx.outputs[0]
    assert kind == "adapter"
    weights = load_file(folder / "adapter_model.safetensors")
    assert weights
    assert not any("value" in key for key in weights), "the critic is not part of the result"
    assert (folder / "tokenizer.json").exists()
    assert [step for _, step in ctx.checkpoints] == [1, 2]
    assert ctx.phases == ["staging", "loading", "training", "saving"]
    assert ctx.results["final_score"] == facts["learning"]["final_score"]
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.glob("*.json"))


def test_a_judge_that_says_nan_ends_the_run(tmp_path: Path, tiny: Path, prompt_file: Path) -> None:
    def broken(samples: Sequence[Sample]) -> dict[str, list[float]]:
        return {"broken": [math.nan for _ in samples]}

    ctx = RecordingContext(tmp_path)
    ppo = ready(tiny, prompt_file, spec(max_steps=8), ctx, broken)
    with pytest.raises(RunError) as caught:
        ppo.run()
    assert caught.value.code == Code.NON_FINITE_LOSS
    assert len(ppo.history) == 3
    assert ctx.checkpoints == []
    assert all(torch.isfinite(part).all() for part in ppo.actor.parameters())


def test_a_policy_that_runs_away_is_warned_of_once(tmp_path: Path) -> None:
    ctx = RecordingContext(tmp_path)
    signs = Signs(Health(ctx), "ppo.response_length")
    signs.step(1, 0.0, 0.0)
    signs.step(2, 29.0, 0.9)
    assert ctx.codes() == []
    signs.step(3, 99.0, 1.0)
    signs.step(4, 99.0, 1.0)
    assert ctx.codes() == ["kl_runaway", "length_explosion"]
    assert {name: check["status"] for name, check in ctx.checks.items()} == {"kl": "warning", "length": "warning"}


def test_answers_that_never_ended_did_not_explode(tmp_path: Path) -> None:
    ctx = RecordingContext(tmp_path)
    signs = Signs(Health(ctx), "ppo.response_length")
    signs.began(0.8)
    signs.step(7, None, 1.0)
    assert ctx.codes() == []


def test_prompts_that_leave_no_room_are_counted(tmp_path: Path, tiny: Path, prompt_file: Path, judge_dir: Path) -> None:
    with pytest.raises(RunError, match="no prompt is left") as caught:
        run(spec(max_length=16), context(tmp_path, tiny, prompt_file, judge_dir))
    assert caught.value.param == "dataset.file"


def test_defaults_follow_the_method() -> None:
    body = spec().model_dump()
    body["training"].pop("learning_rate")
    assert PpoSpec.model_validate(body).training.learning_rate == 5e-5
    settings = ppo_settings(spec(gradient_accumulation_steps=2, ppo={"num_mini_batches": 3}), 40)
    assert (settings.rows, settings.minibatch, settings.micro) == (96, 32, 16)

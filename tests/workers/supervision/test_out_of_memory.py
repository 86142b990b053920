"""A run that finds too little memory goes on with fewer rows at a time, and learns what it would have learnt."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from sqlalchemy import select

from app.models import Artifact, JobEvent, Metric
from tests.workers.conftest import make_model
from tests.workers.supervision.conftest import Attempt
from workers import ladder
from workers.recipes.sft import SftSpec
from workers.supervisor import House


@pytest.fixture
def train(run_all: Callable[..., list[Attempt]]) -> Callable[..., list[Attempt]]:
    """``train(batch, **fields)``: a run of eight rows a step, attempt after attempt until its end."""

    def train(batch: int, **fields: Any) -> list[Attempt]:
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 8 // batch}
        return run_all("hungry", {"max_steps": 6, "save_steps": 2, "learning_rate": 1e-2, **sizes}, **fields)

    return train


def learnt(house: House, attempt: Attempt) -> tuple[dict[str, Any], dict[int, float]]:
    """The adapter's weights, and the loss of each step."""
    with house.database.read() as session:
        artifact = session.scalars(select(Artifact).where(Artifact.job_id == attempt.job.id)).one()
        losses = session.scalars(select(Metric).where(Metric.job_id == attempt.job.id, Metric.name == "loss"))
        by_step = {metric.step: metric.value for metric in losses}
    return load_file(house.storage.artifact_dir(artifact.id) / "adapter_model.safetensors"), by_step


@pytest.mark.timeout(300)
def test_fewer_rows_at_a_time_learn_the_same(train: Callable[..., list[Attempt]], house: House) -> None:
    """It runs out at step 3, halves twice, goes on from its checkpoint, and spends no attempt."""
    roomy = train(8, fits=8)
    tight = train(8, fits=2, from_step=3)
    assert len(roomy) == 1
    job = tight[-1].row()
    assert (job.state, job.attempt, job.fence) == ("succeeded", 1, 3)
    block = job.resolved_spec["training"]
    assert (block["per_device_train_batch_size"], block["gradient_accumulation_steps"]) == (2, 4)
    assert job.spec["training"]["per_device_train_batch_size"] == 8, "what was asked for stays on record"
    with house.database.read() as session:
        events = session.scalars(
            select(JobEvent).where(JobEvent.job_id == job.id, JobEvent.code == "out_of_memory_adjusted")
        ).all()
    assert [event.data["per_device_train_batch_size"] for event in events] == [4, 2]
    assert "job_restarted" in tight[-1].codes()
    (weights, losses), (others, other_losses) = learnt(house, tight[-1]), learnt(house, roomy[0])
    assert losses == pytest.approx(other_losses, rel=1e-4)
    for name, tensor in weights.items():
        assert tensor.sub(others[name]).abs().max() < 1e-4, name


@pytest.mark.timeout(300)
def test_then_activations_are_computed_again(train: Callable[..., list[Attempt]]) -> None:
    job = train(1, fits=0, checkpointing_helps=True)[-1].row()
    assert (job.state, job.attempt, job.fence) == ("succeeded", 1, 2)
    assert job.resolved_spec["training"]["gradient_checkpointing"] is True


@pytest.mark.timeout(300)
def test_when_nothing_is_left_it_says_what_would_fit(train: Callable[..., list[Attempt]]) -> None:
    job = train(1, fits=0)[-1].row()
    assert (job.state, job.error_code, job.fence) == ("failed", "oom", 2)
    assert "QLoRA" in job.error_detail["hint"]


def test_the_cheapest_change_that_would_fit(tmp_path: Path) -> None:
    base = make_model(tmp_path / "model", hidden_size=512)
    wide = spec(per_device_train_batch_size=1, max_length=65536)
    assert ladder.advice(wide, base, 1000.0).startswith("training.max_length: 32768 needs about")
    assert "no single change is enough" in ladder.advice(wide, base, 0.1)


def spec(**training: Any) -> SftSpec:
    return SftSpec.model_validate(
        {"model": {"model_name_or_path": "x"}, "dataset": {"file": "file-1"}, "training": training}
    )


@pytest.mark.parametrize(
    ("batch", "accumulation", "then"),
    [(8, 1, (4, 2)), (5, 1, (1, 5)), (6, 2, (3, 4)), (7, 3, (3, 7)), (2, 1, (1, 2))],
)
def test_the_effective_batch_stays(batch: int, accumulation: int, then: tuple[int, int]) -> None:
    rung = ladder.next_rung(spec(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation))
    assert rung is not None
    values = rung.values
    assert (
        values["training.per_device_train_batch_size"],
        values["training.gradient_accumulation_steps"],
    ) == then


def test_the_ladder_ends() -> None:
    rung = ladder.next_rung(spec(per_device_train_batch_size=1))
    assert rung is not None
    assert rung.values == {"training.gradient_checkpointing": True}
    assert ladder.next_rung(spec(per_device_train_batch_size=1, gradient_checkpointing=True)) is None


@pytest.mark.parametrize(
    "left",
    [
        None,
        {"message": "m"},
        {"message": "m", "values": {}},
        {"message": 3, "values": {"training.gradient_checkpointing": True}},
        {"message": "m", "values": {"model.model_name_or_path": 1}},
        {"message": "m", "values": {"training.per_device_train_batch_size": 0}},
    ],
)
def test_what_a_runner_leaves_is_not_believed_blindly(left: object) -> None:
    assert ladder.read_rung(left) is None

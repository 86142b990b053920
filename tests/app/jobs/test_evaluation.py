"""What a spec may say about evaluating and ending, and what a job shows of its health and of what it learnt."""

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.db import Database
from app.discovery import discover
from app.jobs.intake import validate_spec
from app.queue import SilentDoorbell
from app.settings import Settings
from app.specs import TrainSpec
from app.storage import Published, Storage
from tests.support import on_sqlite, train_spec
from workers.ledger import Finished, Ledger


@pytest.fixture
def spec(models: Path, file_id: str) -> dict[str, Any]:
    return train_spec(str(models / "tiny"), file_id)


def with_(spec: dict[str, Any], algorithm: str = "sft", **blocks: dict[str, Any]) -> dict[str, Any]:
    return {**spec, "algorithm": algorithm, **{name: {**spec.get(name, {}), **more} for name, more in blocks.items()}}


def resolved(spec: dict[str, Any]) -> TrainSpec:
    found = validate_spec(spec, discover(Settings().packages)).spec
    assert isinstance(found, TrainSpec)
    return found


EVALUATED = {"dataset": {"eval_split": 0.1}}


@on_sqlite
@pytest.mark.parametrize(
    ("blocks", "param", "hint"),
    [
        ({"training": {"eval_steps": 5}}, "dataset.eval_file", "eval_split"),
        ({"training": {"eval_strategy": "epoch"}, "dataset": {"eval_split": 0.0}}, "dataset.eval_file", "eval_split"),
        ({"dataset": {"eval_split": 0.1, "eval_file": "file-x"}}, "dataset.eval_split", "Keep one"),
        ({"dataset": {"eval_split": 1.0}}, "dataset.eval_split", "less than 1"),
        ({**EVALUATED, "training": {"early_stopping": {}}}, "training.eval_steps", "eval_steps"),
        ({**EVALUATED, "training": {"load_best_model_at_end": True}}, "training.eval_steps", "eval_steps"),
        (
            {**EVALUATED, "training": {"eval_steps": 5, "early_stopping": {"metric": "bleu"}}},
            "training.early_stopping.metric",
            "eval_loss, eval_mean_token_accuracy",
        ),
        (
            {**EVALUATED, "training": {"eval_steps": 5, "metric_for_best_model": "accuracy"}},
            "training.metric_for_best_model",
            "eval_loss",
        ),
        (
            {
                **EVALUATED,
                "training": {
                    "eval_steps": 5,
                    "metric_for_best_model": "loss",
                    "early_stopping": {"metric": "mean_token_accuracy"},
                },
            },
            "training.early_stopping.metric",
            "Keep one",
        ),
        ({**EVALUATED, "training": {"eval_steps": 5, "early_stopping": {"patience": 0}}}, None, "at least 1"),
        ({"training": {"max_seconds": 60.0}, "limits": {"wall_seconds": 60.0}}, "training.max_seconds", "longer"),
        ({"training": {"greater_is_better": True}}, "training.greater_is_better", "metric_for_best_model"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_field_and_a_hint(
    blocks: dict[str, Any], param: str | None, hint: str, api: TestClient, spec: dict[str, Any]
) -> None:
    answer = api.post("/jobs", json=with_(spec, **blocks))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == (param or "training.early_stopping.patience")
    assert hint in error["hint"]


@on_sqlite
def test_what_is_left_out_is_filled_in(spec: dict[str, Any]) -> None:
    plain = resolved(with_(spec)).training
    assert (plain.eval_strategy, plain.metric_for_best_model, plain.load_best_model_at_end) == (
        "no",
        "eval_loss",
        False,
    )
    training = {"eval_steps": 5, "early_stopping": {"metric": "mean_token_accuracy"}}
    filled = resolved(with_(spec, **EVALUATED, training=training)).training
    assert filled.eval_strategy == "steps"
    assert filled.metric_for_best_model == "eval_mean_token_accuracy"
    assert filled.load_best_model_at_end is True
    assert filled.early_stopping is not None
    assert (filled.early_stopping.metric, filled.early_stopping.patience) == ("eval_mean_token_accuracy", 3)
    kept = resolved(with_(spec, **EVALUATED, training={**training, "load_best_model_at_end": False})).training
    assert kept.load_best_model_at_end is False


@on_sqlite
@pytest.mark.parametrize("algorithm", ["sft", "reward", "dpo", "kto"])
def test_a_resolved_spec_can_be_posted_again(algorithm: str, spec: dict[str, Any]) -> None:
    asked = with_(spec, algorithm, **EVALUATED, training={"eval_steps": 5, "early_stopping": {}, "max_seconds": 9.0})
    once = resolved(asked).model_dump(mode="json")
    assert resolved(once).model_dump(mode="json") == once


@pytest.fixture
def attempt(api: TestClient, database: Database, storage: Storage, claim: Any) -> Ledger:
    """A job of another type, claimed; for a worker it makes no difference."""
    api.post("/jobs", json={"type": "sleepy"})
    job = claim()
    assert job is not None
    return Ledger(database, storage, SilentDoorbell(), job, "w1")


def health(check: str, status: str, message: str | None = None, **facts: Any) -> dict[str, Any]:
    return {"kind": "health", "check": check, "status": status, "message": message, "facts": facts}


def test_a_job_shows_the_last_word_of_each_check_and_the_worst_of_all(api: TestClient, attempt: Ledger) -> None:
    def shown() -> Any:
        return api.get(f"/jobs/{attempt.job.id}").json()["health"]

    assert shown() is None
    attempt.beat([health("trainable", "ok", share=0.01), health("loss", "warning", "not falling so far", last=2.0)])
    assert shown() == {
        "status": "warning",
        "checks": {
            "trainable": {"status": "ok", "message": None, "share": 0.01},
            "loss": {"status": "warning", "message": "not falling so far", "last": 2.0},
        },
    }
    attempt.beat([health("loss", "ok", last=1.0)])
    assert (shown()["status"], shown()["checks"]["loss"]["last"]) == ("ok", 1.0)
    attempt.beat([health("finite", "failed", "the loss is nan"), health("loss", "ok")])
    assert (shown()["status"], shown()["checks"]["trainable"]["share"]) == ("failed", 0.01)


@on_sqlite
@pytest.mark.parametrize(
    "line",
    [
        {"kind": "health"},
        {"kind": "health", "check": "x", "status": "splendid", "facts": 3},
        {"kind": "health", "check": 7, "status": None, "message": ["a"], "facts": None},
    ],
)
def test_a_check_that_makes_no_sense_is_a_warning(line: dict[str, Any], api: TestClient, attempt: Ledger) -> None:
    attempt.beat([line])
    assert api.get(f"/jobs/{attempt.job.id}").json()["health"]["status"] == "warning"


def test_what_was_learnt_stands_in_the_job_and_in_the_artifact(api: TestClient, attempt: Ledger) -> None:
    learning = {"verdict": "learnt", "metric": "loss", "rows": 20}
    attempt.succeed({}, [Finished("art-1", "adapter", "a", {"learning": learning}, Published(1, "0" * 64))])
    assert api.get(f"/jobs/{attempt.job.id}").json()["learning"] == learning
    assert api.get("/artifacts/art-1").json()["learning"] == learning


def test_the_best_checkpoint_has_the_lowest_score(api: TestClient, attempt: Ledger, storage: Storage) -> None:
    """By whatever it is compared; a checkpoint that was not measured is never the best."""
    for step, score in ((1, -0.5), (2, -0.9), (3, None), (4, -0.7)):
        folder = storage.attempt_dir(attempt.job.id, 1) / "ckpt" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"w")
        metrics = {"eval_loss": 0.1}
        size = storage.commit_checkpoint(folder, step, metrics, score)
        line = {"kind": "checkpoint", "step": step, "path": str(folder), "bytes": size, "metrics": metrics}
        attempt.beat([{**line, "score": score}])
    found = api.get(f"/jobs/{attempt.job.id}/checkpoints").json()["data"]
    assert {row["step"]: row["best"] for row in found} == {1: False, 2: True, 3: False, 4: False}


@on_sqlite
@pytest.mark.parametrize(
    ("names", "message", "hint"),
    [
        (["tensorbord"], "unknown", "Did you mean tensorboard?"),
        (["tensorboard", "absent"], "not installed", "a_module_that_nobody_has"),
    ],
)
def test_only_trackers_that_are_here_are_taken(
    names: list[str], message: str, hint: str, api: TestClient, spec: dict[str, Any]
) -> None:
    assert api.post("/jobs", json={**spec, "trackers": ["tensorboard"]}).status_code == 201
    error = api.post("/jobs", json={**spec, "trackers": names}).json()["error"]
    assert error["param"] == f"trackers.{len(names) - 1}"
    assert message in error["message"]
    assert hint in error["hint"]

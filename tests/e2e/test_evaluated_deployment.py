"""An evaluation that asks the real vLLM: the same answers and scores as with the model loaded, on no slot of a GPU."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.client import Client, ServiceError
from app.processes import processes_of_attempts
from app.settings import Settings
from tests.e2e.real_service import service, succeeded
from tests.suites import write_suites
from tests.support import wait_for
from tests.workers.conftest import conversation, make_servable_model
from workers.loading.suites import asks_served

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(Settings().engine_python is None, reason="needs vLLM: make setup, or TUNESMITH_SERVE_PYTHON"),
    pytest.mark.timeout(900),
]
GRADER = {
    "type": "text_similarity",
    "name": "near",
    "input": "{{sample.output_text}}",
    "reference": "{{item.expected}}",
    "evaluation_metric": "fuzzy_match",
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("evaluated")
    return Settings(data_dir=folder / "data", model_roots=(folder,), port=0)


@pytest.fixture(scope="module")
def client(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    suites = write_suites(tmp_path_factory.mktemp("suites"))
    with service(settings, TUNESMITH_EVAL_TASKS=str(suites)) as client:
        yield client


@pytest.fixture(scope="module")
def deployment(client: Client, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> str:
    """``plain``, with an adapter ``words`` that has learnt to answer in words of numbers."""
    base = make_servable_model(settings.model_roots[0] / "base")
    succeeded(client, client.submit({"type": "import", "path": str(base), "name": "tiny"}))
    made: str = client.call("POST", "/deployments", json={"name": "plain", "model": "tiny", "parity": "off"})["id"]
    data = tmp_path_factory.mktemp("data") / "numbers.jsonl"
    data.write_text("".join(json.dumps({"messages": conversation(number)}) + "\n" for number in range(64)))
    block = {"model_name_or_path": "tiny", "peft_config": {"target_modules": "all-linear", "lora_dropout": 0.0}}
    spec = {"type": "train", "algorithm": "sft", "experiment_name": "words", "model": block, "then": ["deploy"]}
    training = {"max_steps": 60, "learning_rate": 1e-2, "per_device_train_batch_size": 16}
    succeeded(client, client.submit({**spec, "training": training, "dataset": {"file": client.upload(data)["id"]}}))
    wait_for(lambda: _names(client, made) == {"words": "ready"}, 180)
    return made


def _names(client: Client, deployment: str) -> dict[str, str]:
    shown = client.call("GET", f"/deployments/{deployment}")
    assert shown["status"] != "failed", shown
    return {entry["name"]: entry["status"] for entry in shown["adapters"]}


@pytest.fixture(scope="module")
def questions(client: Client, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("asked") / "asked.jsonl"
    rows = [(turns[:-1], turns[-1]["content"]) for turns in map(conversation, range(200, 248))]
    path.write_text("".join(json.dumps({"prompt": turns, "expected": answer}) + "\n" for turns, answer in rows))
    return str(client.upload(path)["id"])


def spec(questions: str, **changes: Any) -> dict[str, Any]:
    asked = {"dataset": {"file": questions}, "graders": [GRADER], "generation": {"max_new_tokens": 24}}
    return {"type": "evaluate", "model": "words", **asked, **changes}


def answers(settings: Settings, job: dict[str, Any]) -> list[tuple[str, str]]:
    folder = settings.data_dir / "artifacts" / job["artifact_ids"][0]
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    return [(row["model"], row["baseline"]) for row in rows]


def test_an_adapter_and_its_base_are_asked_of_one_engine(
    client: Client, settings: Settings, deployment: str, questions: str
) -> None:
    gate = {"wants": "better", "on": "near"}
    loaded = succeeded(client, client.submit(spec(questions, gate=gate)))
    asked = succeeded(client, client.submit(spec(questions, gate=gate, deployment="words")))
    report, other = asked["result"]["report"], loaded["result"]["report"]
    print(json.dumps({"served": report["scores"], "loaded": other["scores"]}))
    assert report["served_as"] == {"model": "words", "baseline": "plain"}
    assert answers(settings, asked) == answers(settings, loaded)
    assert report["scores"] == other["scores"]
    assert report["canary"] == other["canary"]
    assert report["gate"]["passed"] is True


@pytest.mark.skipif(not asks_served(), reason="lm-eval[api] is not installed here")
def test_suites_come_to_what_they_come_to_with_the_model_loaded(client: Client, deployment: str) -> None:
    body = {"type": "evaluate", "model": "words", "tasks": ["spelling", "writing"], "canary": False}
    loaded = succeeded(client, client.submit(body))
    asked = succeeded(
        client, client.submit({**body, "deployment": "words", "gate": {"wants": "not_worse", "on": "writing"}})
    )
    report, other = asked["result"]["report"]["tasks"], loaded["result"]["report"]["tasks"]
    print(json.dumps({"served": report, "loaded": other}))
    assert report == other


def test_an_engine_that_dies_meanwhile_is_waited_for(
    client: Client, settings: Settings, deployment: str, questions: str
) -> None:
    """Killed in the middle of the answers; the job goes on with the next engine, and misses none."""
    whole = spec(questions, deployment="words", canary=False, generation={"max_new_tokens": 24, "batch_size": 2})
    before = answers(settings, succeeded(client, client.submit(whole)))
    job = client.submit(whole)
    wait_for(lambda: (client.call("GET", f"/jobs/{job['id']}")["progress"] or {}).get("step", 0) > 4, 60)
    victims = [pid for pid in processes_of_attempts(settings.instance) if b"api_server" in _command(pid)]
    assert victims
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    found = succeeded(client, job)
    assert answers(settings, found) == before
    codes = [event["code"] for event in client.call("GET", f"/jobs/{job['id']}/events")["data"]]
    assert "engine_awaited" in codes
    assert found["attempt"] == 1


def test_one_that_is_stopped_ends_the_job_with_the_reason(client: Client, deployment: str, questions: str) -> None:
    generation = {"max_new_tokens": 400, "batch_size": 1, "temperature": 1}
    job = client.submit(spec(questions, deployment="words", generation=generation))
    wait_for(lambda: (client.call("GET", f"/jobs/{job['id']}")["progress"] or {}).get("step", 0) > 0, 60)
    client.call("DELETE", f"/deployments/{deployment}")
    for _ in client.follow(job["id"]):
        pass
    error = client.call("GET", f"/jobs/{job['id']}")["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "deployment")
    with pytest.raises(ServiceError, match="'words' is not being served") as caught:
        client.submit(spec(questions, deployment="words"))
    assert caught.value.code == "model_not_found"


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""

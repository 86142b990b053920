"""The real vLLM with adapters on one base: what transformers and peft compute, at once, and again after every death."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.client import Client
from app.deployments.routes import USED_SECONDS
from app.processes import processes_of_attempts
from app.settings import Settings
from tests.e2e.real_service import service, succeeded
from tests.support import wait_for
from tests.workers.conftest import SYSTEM, conversation, make_servable_model

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(Settings().engine_python is None, reason="needs vLLM: make setup, or TUNESMITH_SERVE_PYTHON"),
    pytest.mark.timeout(900),
]
QUESTIONS = [
    [{"role": "system", "content": SYSTEM}, {"role": "user", "content": str(number)}] for number in (42, 7, 135)
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("adapters")
    return Settings(data_dir=folder / "data", model_roots=(folder,), port=0)


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[Client]:
    with service(settings) as client:
        yield client


class Chat:
    """The ``openai`` client."""

    def __init__(self, client: Client) -> None:
        from openai import OpenAI

        self.openai = OpenAI(base_url=f"{client.url}/v1", api_key=client.key, max_retries=0)

    def ask(self, model: str, question: list[Any], tokens: int = 12) -> str:
        """Greedy."""
        answer = self.openai.chat.completions.create(
            model=model, messages=question, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
        )
        return str(answer.choices[0].message.content)


def computed(base: Path, adapter: Path | None, tokens: int = 12) -> list[str]:
    """What transformers and peft answer in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    answers = []
    for question in QUESTIONS:
        inputs = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=-1
        )
        answers.append(str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)))
    return answers


def spec(name: str, file_id: str, **changes: Any) -> dict[str, Any]:
    block = {"model_name_or_path": "tiny", "peft_config": {"target_modules": "all-linear", "lora_dropout": 0.0, "r": 8}}
    training = {"max_steps": 20, "learning_rate": 0.003, "save_steps": 10, **changes.pop("training", {})}
    common = {"type": "train", "algorithm": "sft", "experiment_name": name, "dataset": {"file": file_id}}
    return {**common, "model": block, "training": training, **changes}


def status(client: Client, deployment_id: str) -> dict[str, Any]:
    shown: dict[str, Any] = client.call("GET", f"/deployments/{deployment_id}")
    return shown


def loaded(client: Client, deployment_id: str) -> dict[str, str]:
    return {entry["name"]: entry["status"] for entry in status(client, deployment_id)["adapters"]}


def test_adapters_on_one_base(client: Client, settings: Settings, tmp_path: Path) -> None:
    base = make_servable_model(settings.model_roots[0] / "base")
    succeeded(client, client.submit({"type": "import", "path": str(base), "name": "tiny"}))
    began = time.monotonic()
    deployment = client.call(
        "POST", "/deployments", json={"name": "plain", "model": "tiny", "max_adapters": 2, "max_loras": 2}
    )["id"]
    data = tmp_path / "numbers.jsonl"
    data.write_text("".join(json.dumps({"messages": conversation(n)}) + "\n" for n in range(60)))
    file_id = client.upload(data)["id"]
    other = tmp_path / "zebra.jsonl"
    rows = [conversation(n) for n in range(60)]
    other.write_text(
        "".join(json.dumps({"messages": [*row[:2], {**row[2], "content": "zebra"}]}) + "\n" for row in rows)
    )
    first = succeeded(client, client.submit(spec("first", file_id)))
    wait_for(lambda: status(client, deployment)["status"] in ("ready", "failed"), 300)
    print(f"\nthe base answered {time.monotonic() - began:.1f} s after it was asked for, beside a training run")
    chat = Chat(client)

    # 1. A job that ends in `deploy` can be talked to at once, without a merge.
    job = client.submit(spec("second", client.upload(other)["id"], then=["deploy"]))
    wait_for(lambda: client.call("GET", f"/jobs/{job['id']}")["status"] in ("succeeded", "failed"), 200)
    succeeded_at = time.monotonic()
    wait_for(lambda: "second" in loaded(client, deployment), 20)
    wait_for(lambda: loaded(client, deployment)["second"] == "ready", 20)
    chat.ask("second", QUESTIONS[0], 1)
    seconds = time.monotonic() - succeeded_at
    print(f"first token of the adapter {seconds:.2f} s after its job was seen to succeed")
    told(client, deployment)
    second = succeeded(client, job)
    (deployed,) = client.call("GET", "/jobs?type=deploy")["data"]
    assert succeeded(client, deployed)["result"]["adapter_of"] == "plain"
    assert not client.call("GET", "/jobs?type=merge")["data"]

    # 2. Each answers as transformers and peft do, and differently from the other and from the base.
    added = client.call(
        "POST", f"/deployments/{deployment}/adapters", json={"adapter": "artifact:" + first["artifact_ids"][0]}
    )
    asked_at = time.monotonic()
    assert added["name"] == "first"
    wait_for(lambda: loaded(client, deployment)["first"] == "ready", 20)
    print(f"an adapter was loaded {time.monotonic() - asked_at:.2f} s after it was asked for")
    artifacts = settings.data_dir / "artifacts"
    folders = {"plain": None, "first": first["artifact_ids"][0], "second": second["artifact_ids"][0]}
    expected = {name: computed(base, artifacts / found if found else None) for name, found in folders.items()}
    assert {name: [chat.ask(name, question) for question in QUESTIONS] for name in folders} == expected
    assert len({tuple(answers) for answers in expected.values()}) == 3
    assert all(answer for answers in expected.values() for answer in answers), expected
    wait_for(lambda: all(entry["effect"] for entry in status(client, deployment)["adapters"]), 20)
    parity = wait_for(lambda: status(client, deployment)["parity"], 120)
    print(json.dumps(parity))
    assert parity["verdict"] == "same"

    # 3. A checkpoint of the run is a model as well; two are kept loaded, so the least recently used one is put away.
    time.sleep(USED_SECONDS + 2)  # when a model was last used is noted no more often than that
    chat.ask("second", QUESTIONS[0], 1)
    asked_at = time.monotonic()
    step = "second:ckpt-step-10"
    chat.ask(step, QUESTIONS[0], 1)
    print(f"first token of a checkpoint {time.monotonic() - asked_at:.2f} s after it was first asked for")
    folder = settings.data_dir / checkpoint(client, second)
    assert [chat.ask(step, question) for question in QUESTIONS] == computed(base, folder)
    assert loaded(client, deployment) == {"first": "evicted", "second": "ready", step: "ready"}
    client.call("DELETE", f"/deployments/{deployment}/adapters/{step}")
    assert chat.ask("first", QUESTIONS[0]) == expected["first"][0], "it came back because it was asked for"

    # 4. The routes that load are not to be had from outside.
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        answer = httpx.post(
            client.url + path, json={"lora_name": "x"}, headers={"authorization": f"Bearer {client.key}"}
        )
        assert answer.status_code == 404

    # 5. kill -9 of each of vLLM's processes: no orphan, and everything is back.
    for victim in ("vllm.entrypoints.openai.api_server", "VLLM::EngineCore"):
        began = time.monotonic()
        before = engine_pids(settings)
        os.kill(next(pid for pid, line in before.items() if victim in line), signal.SIGKILL)
        restarts = status(client, deployment)["restarts"]
        wait_for(lambda: status(client, deployment)["restarts"] > restarts, 30)  # noqa: B023
        assert not set(before) & set(engine_pids(settings)), "something of the dead engine lives on"
        wait_for(lambda: status(client, deployment)["status"] == "ready", 200)
        wait_for(lambda: set(loaded(client, deployment).values()) == {"ready"}, 60)
        assert {name: chat.ask(name, QUESTIONS[0]) for name in folders} == {
            name: answers[0] for name, answers in expected.items()
        }
        print(f"after kill -9 of {victim}: all three answer again {time.monotonic() - began:.1f} s later")

    client.call("DELETE", f"/deployments/{deployment}")
    wait_for(lambda: status(client, deployment)["status"] == "stopped", 60)
    wait_for(lambda: not engine_pids(settings), 15)


def told(client: Client, deployment: str) -> None:
    """Prints when what happened, for whoever reads the figures above."""
    (replica,) = status(client, deployment)["replicas"]
    ids = [
        replica["id"],
        *(job["id"] for kind in ("deploy", "train") for job in client.call("GET", f"/jobs?type={kind}")["data"]),
    ]
    events = [event for job in ids for event in client.call("GET", f"/jobs/{job}/events?limit=100")["data"]]
    for event in sorted(events, key=lambda event: str(event["created_at"]))[-14:]:
        print(f"  {event['created_at'][11:23]} {event['code']}: {event['message'][:80]}")


def checkpoint(client: Client, job: dict[str, Any]) -> str:
    """The path of the run's checkpoint at step 10."""
    found = client.call("GET", f"/jobs/{job['id']}/checkpoints")["data"]
    return str(next(entry["path"] for entry in found if entry["step"] == 10))


def engine_pids(settings: Settings) -> dict[int, str]:
    """vLLM's processes."""
    found = {}
    for pid in processes_of_attempts(settings.instance):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue
        if "vllm.entrypoints" in line or line.startswith("VLLM::"):
            found[pid] = line
    return found

"""The real vLLM with adapters on one base: what transformers and peft compute, at once, and again after every death."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.client import Client
from app.db import Database
from app.deployments.routes import USED_SECONDS
from app.processes import processes_of_attempts
from app.settings import Settings
from app.storage import Storage
from tests.artifacts import publish
from tests.e2e.real_service import service, succeeded
from tests.support import wait_for
from tests.workers.conftest import SYSTEM, TEMPLATE, conversation, make_servable_model

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(Settings().engine_python is None, reason="needs vLLM: make setup, or TUNESMITH_SERVE_PYTHON"),
    pytest.mark.timeout(900),
]
# Qwen's way to write calls, as short as it goes.
CALLING = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}. Call one: "
    '<tool_call>{"name": …, "arguments": …}</tool_call><|im_end|>\n{% endif %}' + TEMPLATE
)
FIRST_TOKEN_SECONDS = 5.0
"""After an adapter's job has succeeded; a second is what a machine of its own has to keep."""
OWN = "{% for message in messages %}{{ message['content'] }} = {% endfor %}"
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


def computed(base: Path, adapter: Path | None, tokens: int = 12, template: str | None = None) -> list[str]:
    """What transformers and peft answer in float32, by the model's own chat template or another."""
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
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True, chat_template=template
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
    (base / "chat_template.jinja").write_text(CALLING)
    imported = succeeded(client, client.submit({"type": "import", "path": str(base), "name": "tiny"}))
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
    cold = moment(status(client, deployment)["ready_at"]) - moment(status(client, deployment)["created_at"])
    print(f"\nthe base answered {cold:.1f} s after it was asked for, beside a training run")
    chat = Chat(client)
    chat.ask("plain", QUESTIONS[0], 1)  # what the client itself loads at its first request

    # 1. A job that ends in `deploy` can be talked to at once, without a merge.
    job = client.submit(spec("second", client.upload(other)["id"], then=["deploy"]))
    wait_for(lambda: client.call("GET", f"/jobs/{job['id']}")["status"] in ("succeeded", "failed"), 200)
    wait_for(lambda: "second" in loaded(client, deployment), 20)
    wait_for(lambda: loaded(client, deployment)["second"] == "ready", 20)
    chat.ask("second", QUESTIONS[0], 1)
    seconds = time.time() - moment(client.call("GET", f"/jobs/{job['id']}")["finished_at"])
    print(f"first token of the adapter {seconds:.2f} s after its job had succeeded")
    told(client, deployment)
    assert seconds < FIRST_TOKEN_SECONDS
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

    # 3. An adapter with a chat template of its own is spoken to by that one, on the same engine.
    own = settings.model_roots[0] / "own"
    shutil.copytree(artifacts / first["artifact_ids"][0], own)
    (own / "MANIFEST.json").unlink(missing_ok=True)
    (own / "chat_template.jinja").write_text(OWN)
    database = Database(settings.database)
    its = publish(
        database, Storage(settings.data_dir), own, "own", "adapter", base=f"artifact:{imported['artifact_ids'][0]}"
    )
    database.close()
    client.call("POST", f"/deployments/{deployment}/adapters", json={"adapter": f"artifact:{its}"})
    wait_for(lambda: loaded(client, deployment)["own"] == "ready", 20)
    by_own = [chat.ask("own", question) for question in QUESTIONS]
    assert by_own == computed(base, artifacts / its, template=OWN) != expected["first"]
    speaks(client, chat.openai)
    client.call("DELETE", f"/deployments/{deployment}/adapters/own")

    # 4. A checkpoint of the run is a model as well; two are kept loaded, so the least recently used one is put away.
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

    # 5. The routes that load are not to be had from outside.
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        answer = httpx.post(
            client.url + path, json={"lora_name": "x"}, headers={"authorization": f"Bearer {client.key}"}
        )
        assert answer.status_code == 404

    # 6. kill -9 of each of vLLM's processes: no orphan, and everything is back.
    for victim in ("vllm.entrypoints.openai.api_server", "VLLM::EngineCore"):
        began = time.monotonic()
        before = engine_pids(settings)
        os.kill(next(pid for pid, line in before.items() if victim in line), signal.SIGKILL)
        restarts = status(client, deployment)["restarts"]
        wait_for(lambda: status(client, deployment)["restarts"] > restarts, 30)  # noqa: B023
        assert not set(before) & set(engine_pids(settings)), "something of the dead engine lives on"
        wait_for(lambda: status(client, deployment)["status"] == "ready", cold + 60)
        wait_for(lambda: set(loaded(client, deployment).values()) == {"ready"}, cold + 60 - (time.monotonic() - began))
        assert {name: chat.ask(name, QUESTIONS[0]) for name in folders} == {
            name: answers[0] for name, answers in expected.items()
        }
        back = time.monotonic() - began
        print(f"after kill -9 of {victim}: all three answer again {back:.1f} s later")
        assert back < cold + 60

    client.call("DELETE", f"/deployments/{deployment}")
    wait_for(lambda: status(client, deployment)["status"] == "stopped", 60)
    wait_for(lambda: not engine_pids(settings), 15)


def test_embeddings_of_the_same_base(client: Client, settings: Settings) -> None:
    """By another runner of the same vLLM, through the gateway: the last token's state, as transformers has it."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    base = settings.model_roots[0] / "base"
    if not base.exists():
        make_servable_model(base)
    body = {"name": "vectors", "model": str(base), "task": "embed"}
    deployment = client.call("POST", "/deployments", json=body)["id"]
    wait_for(lambda: status(client, deployment)["status"] in ("ready", "failed"), 300)
    assert status(client, deployment)["status"] == "ready", status(client, deployment)["last_error"]
    texts = ["The quick brown fox", "zebra"]
    openai = Chat(client).openai
    found = [entry.embedding for entry in openai.embeddings.create(model="vectors", input=texts).data]
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1] for text in texts]
    expected = torch.nn.functional.normalize(torch.stack(states), dim=-1)
    assert torch.allclose(torch.tensor(found), expected, atol=1e-4)
    headers = {"authorization": f"Bearer {client.key}"}
    asked = {"model": "vectors", "messages": QUESTIONS[0]}
    answer = httpx.post(f"{client.url}/v1/chat/completions", json=asked, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "endpoint_not_supported")
    wait_for(lambda: status(client, deployment)["parity"], 20)
    client.call("DELETE", f"/deployments/{deployment}")
    wait_for(lambda: status(client, deployment)["status"] == "stopped", 60)
    wait_for(lambda: not engine_pids(settings), 15)


def speaks(client: Client, openai: Any) -> None:
    """What an engine writes by force of a grammar is right even from a model that knows nothing."""
    city = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
    city["additionalProperties"] = False
    # Warm, because it would write the spaces that a grammar allows for ever.
    ask: dict[str, Any] = {"model": "plain", "messages": QUESTIONS[0], "max_tokens": 120, "temperature": 1.5, "seed": 7}
    complete = openai.chat.completions.create

    # JSON by a schema, and a word of several.
    schema = {"type": "json_schema", "json_schema": {"name": "place", "schema": city, "strict": True}}
    found = json.loads(complete(**ask, response_format=schema).choices[0].message.content)
    assert list(found) == ["city"]
    assert found["city"] in ("Rome", "Oslo")
    words = {"structured_outputs": {"choice": ["yes", "no"]}}
    assert complete(**ask, extra_body=words).choices[0].message.content in ("yes", "no")

    # A call of a tool, whole and in pieces.
    # Only with strict do the arguments keep to their schema.
    weather = {"name": "weather", "description": "Of a city.", "parameters": city, "strict": True}
    tools = [{"type": "function", "function": weather}]
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        # Where a call is required more may follow, and one that breaks off is none: then another draw.
        call: dict[str, Any] = {**ask, "max_tokens": 160, "tools": tools, "tool_choice": choice}
        drawn = (complete(**{**call, "seed": seed}) for seed in range(12))
        seed, calls = next(
            (seed, answer.choices[0].message.tool_calls)
            for seed, answer in enumerate(drawn)
            if answer.choices[0].message.tool_calls
        )
        assert {called.function.name for called in calls} == {"weather"}
        assert all(json.loads(called.function.arguments)["city"] in ("Rome", "Oslo") for called in calls)
        pieces: dict[int, str] = {}
        names = []
        for chunk in complete(**{**call, "seed": seed}, stream=True):
            for piece in (chunk.choices[0].delta.tool_calls or ()) if chunk.choices else ():
                names += [piece.function.name] if piece.function.name else []
                pieces[piece.index] = pieces.get(piece.index, "") + (piece.function.arguments or "")
        assert names == [called.function.name for called in calls]
        whole = [json.loads(pieces[index]) for index in sorted(pieces)]
        assert whole == [json.loads(called.function.arguments) for called in calls]

    # A template that writes no calls: neither tools nor the routes that take no template. And no embeddings.
    headers = {"authorization": f"Bearer {client.key}"}
    told: dict[str, Any] = {"model": "own", "messages": QUESTIONS[0], "max_tokens": 4}
    for path, body, code in (
        ("chat/completions", {**told, "tools": tools, "tool_choice": "required"}, "tools_not_supported"),
        ("messages", told, "endpoint_not_supported"),
        ("responses", {"model": "own", "input": "42"}, "endpoint_not_supported"),
        ("embeddings", {"model": "plain", "input": "42"}, "endpoint_not_supported"),
    ):
        answer = httpx.post(f"{client.url}/v1/{path}", json=body, headers=headers, timeout=60)
        assert answer.json()["error"]["code"] == code, answer.text

    # More than the model reads: OpenAI's code for it on every route, with the field.
    long = "42 " * 8000
    turns = [{"role": "user", "content": long}]
    for path, body, field in (
        ("chat/completions", {"messages": turns}, "messages"),
        ("completions", {"prompt": long}, "prompt"),
        ("responses", {"input": long}, "input"),
        ("messages", {"messages": turns, "max_tokens": 4}, "messages"),
    ):
        answer = httpx.post(f"{client.url}/v1/{path}", json={"model": "plain", **body}, headers=headers, timeout=60)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", field), error

    # The other two kinds of chat say what this kind says.
    plain = [{"role": "user", "content": "42"}]
    expected = complete(model="plain", messages=plain, max_tokens=8, temperature=0).choices[0].message.content
    response = openai.responses.create(model="plain", input="42", max_output_tokens=8, temperature=0)
    assert (response.output_text, response.model) == (expected, "plain")
    events = list(openai.responses.create(model="plain", input="42", max_output_tokens=8, temperature=0, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert events[-1].type in ("response.completed", "response.incomplete")
    body = {"model": "plain", "messages": plain, "max_tokens": 8, "temperature": 0}
    keyed = {"x-api-key": client.key, "anthropic-version": "2023-06-01"}
    message = httpx.post(f"{client.url}/v1/messages", json=body, headers=keyed, timeout=60).json()
    assert ("".join(part["text"] for part in message["content"]), message["model"]) == (expected, "plain"), message
    stream = httpx.post(f"{client.url}/v1/messages", json={**body, "stream": True}, headers=keyed, timeout=60).text
    told_of = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
    deltas = [event["delta"].get("text", "") for event in told_of if event["type"] == "content_block_delta"]
    assert ("".join(deltas), told_of[-1]["type"]) == (expected, "message_stop"), stream


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


def moment(told: str) -> float:
    """Of a row's time, on the clock of this machine."""
    return datetime.fromisoformat(told).timestamp()


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

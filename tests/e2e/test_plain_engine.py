"""Where vLLM is not installed: the same service serves with transformers, adapters and sleep included."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.client import Client
from app.processes import processes_of_attempts
from app.settings import Settings
from tests.e2e.real_service import service, succeeded
from tests.support import wait_for
from tests.workers.conftest import SYSTEM, conversation, make_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
QUESTION: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "42"}]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("plain")
    return Settings(data_dir=folder / "data", model_roots=(folder,), port=0)


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[Client]:
    with service(settings, TUNESMITH_SERVE_PYTHON="/nowhere/python", TUNESMITH_WAKE_SECONDS="90") as client:
        yield client


def greedy(base: Path, adapter: Path | None) -> str:
    """What transformers and peft answer."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    inputs = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_a_run_is_talked_to_without_vllm_and_without_a_merge(
    client: Client, settings: Settings, tmp_path: Path
) -> None:
    from openai import OpenAI

    base = make_model(settings.model_roots[0] / "base")
    data = tmp_path / "numbers.jsonl"
    data.write_text("".join(json.dumps({"messages": conversation(n)}) + "\n" for n in range(60)))
    spec = {
        "type": "train",
        "algorithm": "sft",
        "experiment_name": "line",
        "model": {
            "model_name_or_path": str(base),
            "peft_config": {"target_modules": "all-linear", "lora_dropout": 0.0, "r": 8},
        },
        "dataset": {"file": client.upload(data)["id"]},
        "training": {"max_steps": 20, "learning_rate": 0.003},
        "then": ["deploy"],
    }
    body = {"name": "plain", "model": str(base), "idle_timeout": 3600}
    deployment = client.call("POST", "/deployments", json=body)["id"]
    wait_for(lambda: client.call("GET", f"/deployments/{deployment}")["status"] in ("ready", "failed"), 120)
    job = client.submit(spec)
    with OpenAI(base_url=f"{client.url}/v1", api_key=client.key, max_retries=0) as openai:

        def ask(model: str, **fields: Any) -> Any:
            return openai.chat.completions.create(
                model=model, messages=QUESTION, max_tokens=12, temperature=0, **fields
            )

        wait_for(lambda: client.call("GET", f"/jobs/{job['id']}")["status"] in ("succeeded", "failed"), 200)
        began = time.monotonic()
        wait_for(lambda: "line" in [model.id for model in openai.models.list()], 20)
        answer = ask("line").choices[0].message.content
        print(f"\nthe adapter answered {time.monotonic() - began:.2f} s after its job was seen to succeed")
        trained = succeeded(client, job)
        assert answer == greedy(base, settings.data_dir / "artifacts" / trained["artifact_ids"][0])
        assert ask("plain").choices[0].message.content == greedy(base, None) != answer
        assert "".join(chunk.choices[0].delta.content or "" for chunk in ask("line", stream=True)) == answer
    parity = wait_for(lambda: client.call("GET", f"/deployments/{deployment}")["parity"], 120)
    print(json.dumps(parity))
    assert parity["verdict"] == "same"
    (deployed,) = client.call("GET", "/jobs?type=deploy")["data"]
    assert succeeded(client, deployed)["result"]["adapter_of"] == "plain"
    client.call("DELETE", f"/deployments/{deployment}")
    wait_for(lambda: not processes_of_attempts(settings.instance), 60)


def test_engines_are_replaced_while_clients_talk_to_them(client: Client, settings: Settings) -> None:
    """Two replicas become two of another model; as there are only two slots, one by one."""
    from openai import OpenAI

    first, second = (make_model(settings.model_roots[0] / name) for name in ("blue", "green"))
    # What knows nothing says the last token of its prompt again and again.
    template = second / "chat_template.jinja"
    template.write_text(template.read_text() + "!")
    body = {"name": "duo", "model": str(first), "replicas": 2, "parity": "off"}
    deployment = client.call("POST", "/deployments", json=body)["id"]
    said: list[tuple[float, str]] = []
    failed: list[str] = []
    over = threading.Event()

    def shown() -> dict[str, Any]:
        row: dict[str, Any] = client.call("GET", f"/deployments/{deployment}")
        return row

    def answering() -> list[str]:
        return [one["id"] for one in shown()["replicas"] if one["status"] == "ready" and not one["retiring"]]

    def talk(stream: bool) -> None:
        with OpenAI(base_url=f"{client.url}/v1", api_key=client.key, max_retries=0) as openai:
            while not over.is_set():
                try:
                    answer: Any = openai.chat.completions.create(
                        model="duo", messages=QUESTION, max_tokens=12, temperature=0, stream=stream
                    )
                    text = (
                        "".join(chunk.choices[0].delta.content or "" for chunk in answer)
                        if stream
                        else answer.choices[0].message.content
                    )
                    said.append((time.monotonic(), text))
                except Exception as error:  # each one counts
                    failed.append(repr(error))

    wait_for(lambda: len(answering()) == 2, 120)
    threads = [threading.Thread(target=talk, args=(stream,)) for stream in (True, False)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: len(said) >= 10, 60)
        began = time.monotonic()
        client.call("PATCH", f"/deployments/{deployment}", json={"model": str(second)})
        wait_for(lambda: shown()["generation"] == 2 and len(shown()["replicas"]) == len(answering()) == 2, 180)
        replaced, so_far = time.monotonic(), len(said)
        wait_for(lambda: len(said) >= so_far + 10, 60)
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert failed == []
    texts = [text for _, text in sorted(said)]
    assert texts[0] == greedy(first, None) != texts[-1] == greedy(second, None)
    change = texts.index(texts[-1])
    # Answers that were begun before the step and are finished after it.
    assert len(set(texts[:change])) == 1
    assert set(texts[change + len(threads) :]) == {texts[-1]}
    print(f"\n{len(texts)} requests, none failed; replaced after {replaced - began:.1f} s")
    client.call("DELETE", f"/deployments/{deployment}")
    wait_for(lambda: shown()["status"] == "stopped", 60)
    wait_for(lambda: not processes_of_attempts(settings.instance), 60)


def test_a_sleeping_engine_is_woken_by_a_stream_and_by_a_plain_request(client: Client, settings: Settings) -> None:
    from openai import OpenAI

    base = make_model(settings.model_roots[0] / "sleepy")
    body = {"name": "sleepy", "model": str(base), "idle_timeout": 1}
    deployment = client.call("POST", "/deployments", json=body)["id"]

    def status() -> str:
        return str(client.call("GET", f"/deployments/{deployment}")["status"])

    with OpenAI(base_url=f"{client.url}/v1", api_key=client.key, max_retries=0) as openai:
        for stream in (True, False):
            wait_for(lambda: status() == "sleeping", 120)
            wait_for(lambda: not processes_of_attempts(settings.instance), 60)
            began = time.monotonic()
            answer: Any = openai.chat.completions.create(
                model="sleepy", messages=QUESTION, max_tokens=4, temperature=0, stream=stream
            )
            chunks = list(answer) if stream else [answer]
            assert chunks
            print(f"\nwoken, and answered, in {time.monotonic() - began:.1f} s")
    client.call("DELETE", f"/deployments/{deployment}")
    wait_for(lambda: status() == "stopped", 60)

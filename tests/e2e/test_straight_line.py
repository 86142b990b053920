"""The main job, for real: train, merge, prove, serve with vLLM, chat, stop. Only the model is tiny."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.client import Client
from app.processes import processes_of_attempts
from app.settings import Settings
from tests.e2e.real_service import service, succeeded
from tests.support import wait_for
from tests.workers.conftest import SYSTEM, conversation, make_servable_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A data directory of its own and a root for models beside it."""
    folder = tmp_path_factory.mktemp("line")
    found = Settings(data_dir=folder / "data", model_roots=(folder,), port=0)
    if found.engine_python is None:
        pytest.skip("there is no environment with vLLM: make setup makes it")
    return found


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[Client]:
    """A service of real processes."""
    with service(settings) as client:
        yield client


def test_a_posted_job_becomes_a_model_that_an_openai_client_chats_with(
    client: Client, settings: Settings, tmp_path: Path
) -> None:
    from openai import NotFoundError, OpenAI

    base = make_servable_model(settings.model_roots[0] / "base")
    imported = succeeded(client, client.submit({"type": "import", "path": str(base), "name": "tiny"}))
    assert imported["artifact_ids"]

    data = tmp_path / "numbers.jsonl"
    data.write_text("".join(json.dumps({"messages": conversation(n)}) + "\n" for n in range(100)))
    file_id = client.upload(data)["id"]
    spec = {
        "type": "train",
        "algorithm": "sft",
        "experiment_name": "line",
        "model": {"model_name_or_path": "tiny", "peft_config": {"target_modules": "all-linear", "lora_dropout": 0.0}},
        "dataset": {"file": file_id},
        "training": {"max_steps": 30, "learning_rate": 0.01, "save_steps": 20},
        "then": ["merge", "validate", "deploy"],
    }
    train = client.submit(spec)
    followers = {job["type"]: job for job in client.call("GET", "/jobs")["data"] if job["experiment_name"] == "line"}
    assert set(followers) == {"train", "merge", "validate", "deploy"}
    assert {followers[kind]["hold_reason"] for kind in ("merge", "validate", "deploy")} == {"dependency"}

    trained = succeeded(client, train)
    assert trained["result"]["final_loss"] < trained["result"]["first_loss"]
    outputs = settings.data_dir / "outputs" / "line"
    assert (outputs / "checkpoint-20" / "adapter_model.safetensors").is_file()
    assert not list((outputs / "checkpoint-20").glob("optimizer*"))
    assert (outputs / "final_model" / "adapter_config.json").is_file()
    assert (outputs / "config_used.yaml").is_file()

    merged = succeeded(client, followers["merge"])
    assert merged["result"]["certificate"]["retained"] > 0.99
    assert (settings.data_dir / "models" / "merged_models" / "line_merged_v1" / "model.safetensors").is_file()
    assert succeeded(client, followers["validate"])["result"]["report"]["ok"]
    deployed = succeeded(client, followers["deploy"])["result"]

    with OpenAI(base_url=f"{client.url}/v1", api_key=client.key, max_retries=0) as openai:
        assert [model.id for model in openai.models.list()] == ["line"]
        question: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "42"}]
        asked: dict[str, Any] = {"model": "line", "messages": question, "max_tokens": 16, "temperature": 0}
        answer = openai.chat.completions.create(**asked).choices[0].message.content
        pieces = [
            chunk.choices[0].delta.content or "" for chunk in openai.chat.completions.create(**asked, stream=True)
        ]
        assert "".join(pieces) == answer
        assert answer == greedy(settings.data_dir / "models" / "merged_models" / "line_merged_v1", question)
        with pytest.raises(NotFoundError) as refused:
            openai.chat.completions.create(**{**asked, "model": "nobody"})
        assert refused.value.code == "model_not_found"

    client.call("DELETE", f"/deployments/{deployed['deployment_id']}")
    wait_for(lambda: client.call("GET", f"/deployments/{deployed['deployment_id']}")["status"] == "stopped", 60)
    wait_for(lambda: not processes_of_attempts(settings.instance), 15)


def test_preferences_become_a_served_model(client: Client, settings: Settings, tmp_path: Path) -> None:
    """sft, a reward model on top of it, ppo against that, merge, validate, deploy: each names the one before."""
    from openai import OpenAI

    base = settings.model_roots[0] / "base-rlhf"
    make_servable_model(base)
    rows = [conversation(number) for number in range(60)]
    talks, pairs = tmp_path / "talks.jsonl", tmp_path / "pairs.jsonl"
    talks.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    wrong = {"role": "assistant", "content": "I pass."}
    pairs.write_text(
        "".join(json.dumps({"messages": row[:2], "chosen": row[2], "rejected": wrong}) + "\n" for row in rows)
    )
    talks_id, pairs_id = client.upload(talks)["id"], client.upload(pairs)["id"]
    peft = {"target_modules": "all-linear", "lora_dropout": 0.0, "r": 4}

    def train(algorithm: str, model: str, file_id: str, steps: int, **more: Any) -> dict[str, Any]:
        block = {"model_name_or_path": model, "peft_config": peft}
        training = {"max_steps": steps, "learning_rate": 5e-3}
        body = {"type": "train", "algorithm": algorithm, "model": block, "training": training}
        return {**body, "dataset": {"file": file_id}, **more}

    steps = {
        "sft": train("sft", str(base), talks_id, 10),
        "reward": train("reward", "job:sft", pairs_id, 10, dataset={"file": pairs_id, "eval_file": pairs_id}),
        "ppo": train("ppo", "job:sft", pairs_id, 2, reward_model="job:reward", ppo={"response_length": 8}),
        "merge": {"type": "merge", "adapter": "job:ppo"},
        "validate": {"type": "validate", "model": "job:merge"},
        "deploy": {"type": "deploy", "model": "job:merge", "name": "rlhf_ppo", "after": ["validate"]},
    }
    pipeline = client.call("POST", "/pipelines", json={"name": "rlhf", "jobs": steps})
    after = {step["name"]: step["job"] for step in pipeline["steps"]}
    ppo = after["ppo"]
    assert succeeded(client, after["reward"])["result"]["eval_accuracy"] > 0.9
    assert succeeded(client, ppo)["result"]["steps"] == 2
    certificate = succeeded(client, after["merge"])["result"]["certificate"]
    assert len(certificate["layers"]) == 1, "the sft adapter lies below"
    assert succeeded(client, after["validate"])["result"]["report"]["ok"]
    deployed = succeeded(client, after["deploy"])["result"]
    lineage = client.call("GET", f"/artifacts/{succeeded(client, ppo)['artifact_ids'][0]}")
    assert [link.split(":")[0] for link in lineage["base_chain"][1:]] == ["sft", "ppo"]

    with OpenAI(base_url=f"{client.url}/v1", api_key=client.key, max_retries=0) as openai:
        asked: Any = [{"role": "user", "content": "42"}]
        answer = openai.chat.completions.create(model="rlhf_ppo", messages=asked, max_tokens=8)
        assert answer.usage is not None
        assert answer.usage.completion_tokens >= 1
    client.call("DELETE", f"/deployments/{deployed['deployment_id']}")
    wait_for(lambda: not processes_of_attempts(settings.instance), 60)


def greedy(folder: Path, messages: list[Any]) -> str:
    """What transformers answers in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

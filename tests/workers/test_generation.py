"""The plain engine: what transformers and peft compute, over a unix socket, and a clear no to what it cannot do."""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import wait_for
from tests.workers.conftest import make_model
from workers.generation import server
from workers.generation.asked import Refused, read
from workers.replica import UnixConnection

PROMPT = "zero one two"


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"1": 1.0}}, "logit_bias"),
        ({"top_logprobs": 3}, "alternatives"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"add_special_tokens": True}, "add_special_tokens"),
        ({"include_reasoning": False}, "include_reasoning"),
        ({"reasoning_effort": "a lot"}, "none, minimal, low"),
        ({"logprobs": True, "stream": True}, "logprobs are not told in a stream"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "reads text alone"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(extra: dict[str, Any], named: str) -> None:
    with pytest.raises(Refused, match=named) as caught:
        read({"model": "m", "messages": [{"role": "user", "content": "x"}], **extra}, chat=True)
    assert caught.value.param == next(iter(extra))
    assert (caught.value.kind == "tools_not_supported") is ("tools" in extra)


def test_parts_of_text_are_text_and_nothing_is_nothing() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    (asked,) = read({"model": "m", "messages": messages}, chat=True)
    assert [turn["content"] for turn in asked.prompt if not isinstance(turn, str | int)] == ["one\ntwo", ""]


def test_several_prompts_and_answers_keep_their_order() -> None:
    asked = read({"model": "m", "prompt": ["a", "b"], "n": 2, "seed": 5, "stop": "."}, chat=False)
    assert [(each.prompt, each.seed) for each in asked] == [("a", 5), ("a", 6), ("b", 5), ("b", 6)]
    assert {each.stop for each in asked} == {(".",)}
    assert [each.prompt for each in read({"prompt": [1, 2]}, chat=False)] == [[1, 2]]


@pytest.mark.parametrize("hot_load", [False, True])
def test_what_an_adapter_needs_is_imported_before_one_comes(hot_load: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = threading.Event()
    fake = SimpleNamespace(expect_adapters=expected.set, waiting=0)
    monkeypatch.setattr(server, "Writer", lambda *_: fake)
    served: list[str] = []

    async def serve(_: server.Server, socket: str) -> None:
        served.append(socket)

    monkeypatch.setattr(server, "serve", serve)
    monkeypatch.setattr(server.os, "_exit", lambda _: None)
    options = ["--uds=/s", "--model=/m", "--served-model-name=plain", "--dtype=float32"]
    monkeypatch.setattr(sys, "argv", ["server", *options, *["--hot-load"] * hot_load])
    server.main()
    assert served == ["/s"]
    assert expected.wait(10 if hot_load else 0.1) is hot_load


class Engine:
    """The server in a process of its own."""

    def __init__(self, model: Path, run_dir: Path) -> None:
        self.socket = str(run_dir / "s")
        command = [sys.executable, "-I", "-m", "workers.generation.server", f"--uds={self.socket}", "--hot-load"]
        options = [f"--model={model}", "--served-model-name=plain", "--dtype=float32", "--max-model-len=64"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen([*command, *options], env=environment)
        wait_for(lambda: self.process.poll() is not None or os.path.exists(self.socket), 120)
        assert self.process.poll() is None

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        connection = UnixConnection(self.socket, 60)
        method = "GET" if body is None else "POST"
        connection.request(method, path, body and json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text

    def answer(self, **body: Any) -> dict[str, Any]:
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        status, text = self.ask(path, {"model": "plain", "temperature": 0, "max_tokens": 8, **body})
        assert status == 200, text
        found: dict[str, Any] = json.loads(text)
        return found

    def text(self, **body: Any) -> str:
        return str(self.answer(prompt=PROMPT, ignore_eos=True, **body)["choices"][0]["text"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two that change a lot."""
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        folder = tmp_path_factory.mktemp("adapter")
        get_peft_model(whole, config).save_pretrained(folder)
        made.append(folder)
    return made


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with tempfile.TemporaryDirectory(prefix="ts-") as run_dir:
        engine = Engine(model, Path(run_dir))
        yield engine
        engine.process.terminate()
        assert engine.process.wait(30) == 0


@pytest.fixture(scope="module")
def greedy(model: Path) -> Callable[[Path | None], str]:
    """What transformers and peft write after the prompt."""

    def greedy(adapter: Path | None) -> str:
        tokenizer = AutoTokenizer.from_pretrained(model)
        whole = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
        whole = PeftModel.from_pretrained(whole, adapter) if adapter else whole
        ids = tokenizer(PROMPT, return_tensors="pt")
        whole.generation_config.eos_token_id = None
        output = whole.generate(**ids, max_new_tokens=8, do_sample=False)
        return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))

    return greedy


def test_it_writes_what_transformers_writes_with_and_without_adapters(
    engine: Engine, adapters: list[Path], greedy: Callable[[Path | None], str]
) -> None:
    assert engine.ask("/health")[0] == 200
    assert engine.text() == greedy(None)
    for name, folder in zip(("a.b", "c"), adapters, strict=True):
        assert engine.ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})[0] == 200
    assert [engine.text(model=name) for name in ("plain", "a.b", "c")] == [
        greedy(folder) for folder in (None, *adapters)
    ]
    assert len({engine.text(model=name) for name in ("plain", "a.b", "c")}) == 3
    names = [entry["id"] for entry in json.loads(engine.ask("/v1/models")[1])["data"]]
    assert names == ["plain", "a.b", "c"]
    for name in ("a.b", "c"):
        assert engine.ask("/v1/unload_lora_adapter", {"lora_name": name})[0] == 200
    assert engine.text() == greedy(None)
    assert engine.ask("/v1/completions", {"model": "c", "prompt": "x"})[0] == 404
    assert engine.ask("/v1/unload_lora_adapter", {"lora_name": "c"})[0] == 404


def test_an_adapters_own_chat_template_comes_with_the_request(
    engine: Engine, adapters: list[Path], model: Path
) -> None:
    own = "{% for m in messages %}{{ m['content'] }} = {% endfor %}"
    assert engine.ask("/v1/load_lora_adapter", {"lora_name": "own", "lora_path": str(adapters[0])})[0] == 200
    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype="float32"), adapters[0])
    whole.generation_config.eos_token_id = None
    chat = [{"role": "user", "content": PROMPT}]
    said = {}
    for name, template in (("own", own), ("bases", None)):
        more = {} if template is None else {"chat_template": template}
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True, **more
        )
        output = whole.generate(**ids, max_new_tokens=8, do_sample=False)
        expected = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        answer = engine.answer(model="own", messages=chat, ignore_eos=True, **more)
        said[name] = answer["choices"][0]["message"]["content"]
        assert said[name] == expected
        assert answer["usage"]["prompt_tokens"] == ids["input_ids"].shape[1]
    assert said["own"] != said["bases"]
    status, text = engine.ask(
        "/v1/chat/completions", {"model": "own", "messages": chat, "chat_template": "{{ x.y.z }}"}
    )
    assert (status, "the prompt cannot be read" in text) == (400, True)
    assert engine.ask("/v1/unload_lora_adapter", {"lora_name": "own"})[0] == 200


def test_an_adapter_that_fits_no_module_is_refused_and_harms_nobody(
    engine: Engine, adapters: list[Path], greedy: Callable[[Path | None], str], tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["nothing"]}')
    status, text = engine.ask("/v1/load_lora_adapter", {"lora_name": "odd", "lora_path": str(tmp_path)})
    assert (status, json.loads(text)["error"]["code"]) == (500, 500)
    assert engine.text() == greedy(None)
    assert engine.ask("/v1/load_lora_adapter", {"lora_name": "good", "lora_path": str(adapters[0])})[0] == 200
    assert engine.text(model="good") == greedy(adapters[0])
    assert engine.ask("/v1/unload_lora_adapter", {"lora_name": "good"})[0] == 200


def test_a_stream_says_the_same_in_pieces_and_counts_at_last(engine: Engine) -> None:
    whole = engine.answer(messages=[{"role": "user", "content": "42"}])
    body = {"model": "plain", "messages": [{"role": "user", "content": "42"}], "temperature": 0, "max_tokens": 8}
    _, text = engine.ask("/v1/chat/completions", {**body, "stream": True, "stream_options": {"include_usage": True}})
    *events, done = [event.removeprefix("data: ") for event in text.strip().split("\n\n")]
    chunks = [json.loads(event) for event in events]
    assert done == "[DONE]"
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert said == whole["choices"][0]["message"]["content"]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["usage"] == whole["usage"]


def test_parts_and_a_developer_are_read_as_the_plain_forms_are(engine: Engine) -> None:
    """A template would print the list of parts as it stands, and most know no ``developer``."""
    plain = [{"role": "system", "content": "one"}, {"role": "user", "content": "42"}]
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "one"}]},
        {"role": "user", "content": [{"type": "text", "text": "42"}]},
    ]
    said = [engine.answer(messages=messages) for messages in (plain, parts)]
    assert said[0]["usage"] == said[1]["usage"]
    assert said[0]["choices"] == said[1]["choices"]


def test_penalties_count_what_was_answered(engine: Engine, model: Path) -> None:
    def ids(**penalties: float) -> list[int]:
        answer = engine.answer(prompt=PROMPT, ignore_eos=True, max_tokens=24, return_token_ids=True, **penalties)
        found: list[int] = answer["choices"][0]["token_ids"]
        return found

    def expected(presence: float, frequency: float) -> list[int]:
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        prompt = AutoTokenizer.from_pretrained(model)(PROMPT)["input_ids"]
        made: list[int] = []
        with torch.inference_mode():
            for _ in range(24):
                scores = whole(torch.tensor([prompt + made])).logits[0, -1]
                for token in set(made):
                    scores[token] -= presence + frequency * made.count(token)
                made.append(int(scores.argmax()))
        return made

    free = ids()
    assert free == expected(0, 0)
    assert len(set(free)) < len(free), "nothing to be lowered"
    for presence, frequency in ((2.0, 0.0), (0.0, 2.0)):
        lowered = ids(presence_penalty=presence, frequency_penalty=frequency)
        assert lowered == expected(presence, frequency)
    assert ids(presence_penalty=2.0) != free


def test_stop_strings_seeds_and_limits(engine: Engine) -> None:
    text = engine.text()
    stopped = engine.answer(prompt=PROMPT, ignore_eos=True, stop=[text[2:4]])["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == (text[: text.index(text[2:4])], "stop")
    drawn = [engine.text(temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert engine.answer(prompt=PROMPT, ignore_eos=True)["choices"][0]["finish_reason"] == "length"
    assert engine.answer(prompt=PROMPT, max_tokens=3, ignore_eos=True)["usage"]["completion_tokens"] == 3
    for body in ({"prompt": "x", "max_tokens": 64}, {"prompt": [9999]}, {"prompt": "x", "tools": [1]}):
        status, text = engine.ask("/v1/completions", {"model": "plain", **body})
        assert (status, json.loads(text)["error"]["code"]) == (400, 400)


def test_the_log_probabilities_are_those_of_the_chosen_tokens(engine: Engine, model: Path) -> None:
    found = engine.answer(prompt=PROMPT, logprobs=1, ignore_eos=True)["choices"][0]["logprobs"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        rows = whole(**tokenizer(PROMPT, return_tensors="pt")).logits[0, -1].log_softmax(-1)
    assert found["token_logprobs"][0] == pytest.approx(float(rows.max()), abs=1e-4)
    assert len(found["tokens"]) == len(found["token_logprobs"]) == 8


def test_a_prompt_that_is_echoed_is_scored_token_by_token(engine: Engine, model: Path) -> None:
    """As transformers scores it; the likeliest token in each place stands beside the one that is there."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        rows = whole(ids).logits[0, :-1].log_softmax(-1)
    own = [float(row[token]) for row, token in zip(rows, ids[0, 1:], strict=True)]
    body = {"prompt": [ids[0].tolist()], "echo": True, "logprobs": 1, "max_tokens": 1, "ignore_eos": True}
    choice = engine.answer(**body)["choices"][0]
    found = choice["logprobs"]
    assert choice["text"].startswith(PROMPT)
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:-1] == pytest.approx(own, abs=1e-4)
    most = [max(top.values()) for top in found["top_logprobs"][1:-1]]
    assert most == pytest.approx([float(row.max()) for row in rows], abs=1e-4)
    assert any(value < best for value, best in zip(found["token_logprobs"][1:-1], most, strict=True))
    assert len(found["tokens"]) == ids.shape[1] + 1
    alone = engine.answer(prompt=[1], echo=True, logprobs=1, max_tokens=1)["choices"][0]["logprobs"]
    assert (len(alone["tokens"]), alone["token_logprobs"][0]) == (2, None)
    assert engine.answer(prompt=PROMPT, logprobs=1)["choices"][0]["logprobs"]["top_logprobs"] is None
    for more in ({"stream": True, "prompt": "x"}, {"messages": [{"role": "user", "content": "x"}]}):
        path = "/v1/chat/completions" if "messages" in more else "/v1/completions"
        status, text = engine.ask(path, {"model": "plain", "echo": True, **more})
        assert (status, "echo" in text) == (400, True)
    (own_entry,) = json.loads(engine.ask("/v1/models")[1])["data"]
    assert own_entry["max_model_len"] == 64


def test_one_that_hung_up_is_computed_no_further(engine: Engine) -> None:
    def running() -> str:
        return engine.ask("/metrics")[1].split()[-1]

    body = json.dumps({"model": "plain", "prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": True})
    connections = [UnixConnection(engine.socket, 60) for _ in range(12)]

    def post(connection: UnixConnection) -> None:
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})

    threads = [threading.Thread(target=post, args=[connection]) for connection in connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for connection in connections:
        connection.close()
    wait_for(lambda: running() == "0", 30)
    assert engine.text()

"""Does an engine say what the model says? The same model, another one, and what cannot be told."""

import contextlib
import json
import math
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.engines import EngineLaunch
from app.specs import DeploymentOptions
from tests.support import wait_for
from tests.workers.conftest import make_model
from workers import parity, reference
from workers.engines import transformers
from workers.parity import BOUNDS, Bound, Parity, judged

FOUND = {"agreement": 1.0, "mean_distance": 0.0, "tokens": 96}


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ({}, "same"),
        ({"agreement": 0.95, "mean_distance": 0.02}, "same"),
        ({"agreement": 0.94}, "differs"),
        ({"mean_distance": 0.021}, "differs"),
        ({"agreement": math.nan}, "differs"),
        ({"mean_distance": None}, "same"),
        ({"agreement": None}, "not_measured"),
    ],
)
def test_the_verdict(found: dict[str, Any], verdict: str) -> None:
    certificate = judged({**FOUND, **found}, Bound(tie=0.01, agreement=0.95, distance=0.02))
    assert certificate["verdict"] == verdict
    assert certificate["bounds"] == {"least_agreement": 0.95, "largest_mean_distance": 0.02, "tie": 0.01}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantised"),
        ({}, "GB are free"),
    ],
)
def test_what_cannot_be_read(
    change: dict[str, Any], says: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    config = json.loads((tiny / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | change))
    monkeypatch.setattr(parity, "_free_memory", lambda: 1000.0)
    assert says in (parity._cannot_be_read(folder, "float32") or "")
    assert parity._cannot_be_read(tiny, "int8") == "no bounds are known for int8"
    assert "computes in fp8" in (parity._cannot_be_read(tiny, "bfloat16", "fp8") or "")
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    assert parity._cannot_be_read(folder, "float32") == "it has no safetensors"


def test_answers_are_read_token_by_token(tiny: Path, tmp_path: Path) -> None:
    """One wrong token costs one token, not all that follow it."""
    tokenizer, model = AutoTokenizer.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    asked = tokenizer("zero one", return_tensors="pt")
    made = model.generate(**asked, max_new_tokens=8, do_sample=False)[0, asked.input_ids.shape[1] :]
    with torch.no_grad():
        logs = model(**asked).logits[0, -1].log_softmax(-1)
    answer = {"prompt": "zero one", "text": "", "token_ids": made.tolist(), "logprob": logs.max().item()}
    job = {"model": str(tiny), "dtype": "float32", "tie": 0.0, "answers": [answer]}
    (tmp_path / "job.json").write_text(json.dumps(job))
    reference.main(tmp_path / "job.json", tmp_path / "result.json")
    found = json.loads((tmp_path / "result.json").read_bytes())
    assert found["agreement"] == 1.0
    assert found["max_distance"] < 1e-4
    assert len(found["template_sha256"]) == len(found["tokenizer_sha256"]) == 64
    least = int(logs.argmin())
    wrong = reference.read_answer(model, tokenizer, {**answer, "token_ids": [least]}, 0.0)
    assert (wrong["tokens"], wrong["agreeing"]) == (1, 0)
    assert reference.read_answer(model, tokenizer, {**answer, "token_ids": None}, 0.0)["tokens"] == 0
    assert reference.read_answer(model, tokenizer, {**answer, "token_ids": None, "text": "one"}, 0.0)["tokens"] > 0
    assert reference.sums([])["agreement"] is None


@contextlib.contextmanager
def engine(model: Path, socket: Path) -> Iterator[None]:
    """The plain engine in a process of its own."""
    command = [sys.executable, "-I", "-m", "workers.generation.server", f"--uds={socket}", "--dtype=float32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen([*command, f"--model={model}", "--served-model-name=m"], env=environment) as process:
        try:
            wait_for(lambda: process.poll() is not None or socket.exists(), 120)
            assert process.poll() is None
            yield
        finally:
            process.kill()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("served", "verdict"), [("itself", "same"), ("another", "differs")])
def test_an_engine_that_serves_the_model_and_one_that_serves_another(
    served: str, verdict: str, tiny: Path, tmp_path: Path, run_dir: Path
) -> None:
    model = tiny if served == "itself" else make_model(tmp_path / "other", seed=7)
    found: list[dict[str, Any]] = []
    launch = EngineLaunch(
        python=Path(sys.executable),
        model_dir=tiny,
        served_name="m",
        socket=run_dir / "e",
        options=DeploymentOptions(engine="transformers"),
        has_gpu=False,
        dtype="float32",
        cpu_threads=1,
    )
    with engine(model, run_dir / "e"):
        check = Parity(launch, transformers.engine, tmp_path, os.environ, found.append)
        check.run()
    (certificate,) = found
    print(json.dumps(certificate))
    assert certificate["engine"] == "transformers", "whatever was asked for"
    assert certificate["verdict"] == verdict
    assert certificate["tokens"] > 20
    assert certificate["of_chats"]["answers"] == certificate["of_completions"]["answers"] == len(parity.QUESTIONS)
    assert certificate["bounds"]["least_agreement"] == BOUNDS["float32"].agreement


@contextlib.contextmanager
def listening(socket: Path, status: int, answer: Any, *, healthy: bool = True) -> Iterator[None]:
    """An engine that says the same to every question."""

    class Handler(BaseHTTPRequestHandler):
        def address_string(self) -> str:
            return "unix"

        def do_GET(self) -> None:
            self._say(200 if healthy else 503, {})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self._say(status, answer)

        def _say(self, code: int, value: Any) -> None:
            data = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None: ...

    with socketserver.ThreadingUnixStreamServer(str(socket), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def check(tiny: Path, tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Parity, Any]]:
    """A check of whatever listens at ``run_dir / "e"``, and the certificates that it found."""
    monkeypatch.setattr(parity, "LOOK_SECONDS", 0.05)
    found: list[dict[str, Any]] = []
    launch = EngineLaunch(Path(sys.executable), tiny, "m", run_dir / "e", DeploymentOptions(), False, "float32", 1)
    check = Parity(launch, transformers.engine, tmp_path, os.environ, found.append)
    yield check, found
    check.stop()


TOO_LONG = {"error": {"message": "This model's maximum context length is 16 tokens.", "code": 400}}
ANSWER = {"choices": [{"text": "one", "message": {"content": "one"}, "token_ids": [5]}]}


@pytest.mark.parametrize(
    ("status", "answer", "why"),
    [
        (400, TOO_LONG, "the engine refused a question at /v1/completions (400: This model's maximum context length"),
        (500, {"error": {"message": "in /opt/secret.py"}}, "the engine refused a question at /v1/completions (500)"),
        (200, {"choices": []}, "the check was broken off (IndexError)"),
        (200, ["nothing"], "the check was broken off (TypeError)"),
    ],
)
def test_what_a_living_engine_does_not_answer_was_not_measured(
    status: int, answer: Any, why: str, check: tuple[Parity, Any], run_dir: Path
) -> None:
    with listening(run_dir / "e", status, answer):
        check[0].run()
    (certificate,) = check[1]
    assert (certificate["verdict"], certificate["engine"]) == ("not_measured", "transformers")
    assert certificate["reason"].startswith(why)
    assert "/opt" not in certificate["reason"]


@pytest.mark.parametrize(
    ("reader", "why"),
    [
        ("import time; time.sleep(60)", "transformers did not read the answers in 0 s"),
        ("import os; os.kill(os.getpid(), 9)", "the process that read the answers was ended by signal 9"),
        ("raise MemoryError('no room')", "transformers could not load the model: MemoryError: no room"),
    ],
)
def test_a_reader_that_comes_to_nothing(
    reader: str, why: str, check: tuple[Parity, Any], run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{reader}"\n')
    python.chmod(0o755)
    monkeypatch.setattr(parity.sys, "executable", str(python))
    monkeypatch.setattr(parity, "SECONDS", 0.4 if "sleep" in reader else 20.0)
    with listening(run_dir / "e", 200, ANSWER):
        check[0].run()
    (certificate,) = check[1]
    assert (certificate["verdict"], certificate["reason"]) == ("not_measured", why)


def test_an_engine_that_is_silent_was_not_measured(
    check: tuple[Parity, Any], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "SECONDS", 0.2)

    def silent(*_: Any) -> Any:
        raise TimeoutError

    plain = check[0]._ask
    monkeypatch.setattr(check[0], "_ask", lambda method, *rest: (silent if method == "POST" else plain)(method, *rest))
    with listening(run_dir / "e", 200, ANSWER):
        check[0].run()
    assert check[1][0]["reason"] == "the engine did not answer a question in 0 s"


@pytest.mark.parametrize("there", [False, True])
def test_an_engine_that_ends_leaves_no_verdict(there: bool, check: tuple[Parity, Any], run_dir: Path) -> None:
    """Another one is asked in its place."""
    with listening(run_dir / "e", 500, {}, healthy=False) if there else contextlib.nullcontext():
        check[0].start()
        check[0].join(0.3)
        assert check[0].is_alive(), "it waits to be told"
        check[0].stop()
        check[0].join(5)
    assert not check[0].is_alive()
    assert check[1] == []

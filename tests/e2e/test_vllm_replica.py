"""The real vLLM under a replica: it computes what transformers computes, and nothing of it survives its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app import processes
from app.engines import EngineLaunch
from app.settings import Settings
from app.specs import DeploymentOptions
from tests.workers.conftest import make_servable_model
from workers.engines.vllm import engine
from workers.journal import Tail
from workers.replica import UnixConnection

PYTHON = Settings().engine_python
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(PYTHON is None, reason="needs vLLM: make setup, or TUNESMITH_SERVE_PYTHON"),
    pytest.mark.timeout(600),
]
PROMPTS = ["The quick brown fox", "1 2 3", "zebra"]


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; do not write into it."""
    return make_servable_model(tmp_path_factory.mktemp("models") / "servable")


class Served:
    """A replica with the real engine in it."""

    def __init__(self, model: Path, directory: Path, run_dir: Path) -> None:
        assert PYTHON is not None
        self.directory = directory
        self.token = uuid.uuid4().hex
        self.socket = run_dir / "s.sock"
        launch = EngineLaunch(PYTHON, model, "tiny", self.socket, DeploymentOptions(), has_gpu=False, dtype="float32")
        attempt = {
            "argv": engine.argv(launch),
            "env": engine.env(launch),
            "socket": str(self.socket),
            "probe_path": launch.probe[0],
            "probe_body": launch.probe[1],
            "start_timeout": 300,
        }
        (directory / "attempt.json").write_text(json.dumps(attempt))
        read, self.lifeline = os.pipe()
        self.replica = subprocess.Popen(
            [sys.executable, "-I", "-m", "workers.replica", str(directory)],
            env={**os.environ, processes.TOKEN: self.token, processes.LIFE_FD: str(read)},
            pass_fds=[read],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(read)
        self._tail = Tail(directory / "events.jsonl")
        self._last: dict[str, Any] = {}
        wait_for(lambda: self.status() in ("ready", "failed"), 330)
        assert self.status() == "ready", (directory / "log.txt").read_text()[-4000:]

    def status(self) -> str:
        """The newest status."""
        for line in self._tail.read():
            self._last = line
        return str(self._last.get("status"))

    def post(self, path: str, **body: Any) -> Any:
        """A request to the engine itself."""
        connection = UnixConnection(str(self.socket), 60)
        connection.request("POST", path, json.dumps({"model": "tiny", **body}), {"content-type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return answer

    def pid(self, what: str) -> int:
        """The process whose command line holds ``what``."""
        pids = processes.processes_with_token(self.token)
        return next(pid for pid in pids if what in Path(f"/proc/{pid}/cmdline").read_text())

    def assert_gone(self) -> None:
        """Within 15 s, no process of this engine."""
        wait_for(lambda: not processes.processes_with_token(self.token), 15)

    def close(self) -> None:
        """The supervisor's last resort."""
        os.close(self.lifeline)
        processes.kill_ladder(self.replica, self.token, 0)


@pytest.fixture
def served(model: Path, tmp_path: Path) -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="ts-") as run_dir:
        served = Served(model, tmp_path, Path(run_dir))
        yield served
        served.close()


def test_it_computes_what_transformers_computes_and_stops(served: Served, model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")
        expected = reference.generate(**tokens, max_new_tokens=16, do_sample=False)[0, tokens["input_ids"].shape[1] :]
        greedy = {"max_tokens": 16, "temperature": 0, "ignore_eos": True}
        answer = served.post("/v1/completions", prompt=prompt, return_token_ids=True, **greedy)
        assert answer["choices"][0]["token_ids"] == expected.tolist()
        chat = served.post("/v1/chat/completions", messages=[{"role": "user", "content": prompt}], **greedy)
        assert chat["usage"]["completion_tokens"] == 16
    fetches_nothing(served)
    served.replica.terminate()
    assert served.replica.wait(40) == 0
    served.assert_gone()
    assert served.status() == "stopped"


def fetches_nothing(served: Served) -> None:
    """Case 82. Of a request that did not come by the gateway, which refuses addresses; this model has no eyes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = f"http://127.0.0.1:{listener.getsockname()[1]}/cat.png"
        for url in (here, "http://169.254.169.254/latest/meta-data/", "file:///etc/passwd"):
            parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": url}}]
            answer = served.post("/v1/chat/completions", messages=[{"role": "user", "content": parts}], max_tokens=1)
            assert answer["error"]["code"] in (400, 422), answer
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


# What a model with eyes would have its images fetched by, as our command line sets it up.
FETCH = """
import sys
from vllm.multimodal.media import MediaConnector
connector = MediaConnector(allowed_media_domains=[sys.argv[1]])
for url in sys.argv[2:]:
    try:
        connector.fetch_image(url)
    except Exception as error:
        print(error)
    else:
        sys.exit(f"{url} was fetched")
"""


def test_an_engine_with_eyes_fetches_nothing_either(model: Path) -> None:
    launch = EngineLaunch(Path("python"), model, "m", Path("s"), DeploymentOptions(), has_gpu=False, dtype="float32")
    (option,) = [word for word in engine.argv(launch) if word.startswith("--allowed-media-domains=")]
    assert not any(word.startswith("--allowed-local-media-path") for word in engine.argv(launch))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        urls = [
            f"http://{host}:{port}/cat.png"
            for host in ("127.0.0.1", "localhost", "2130706433", "media.invalid@127.0.0.1")
        ]
        command = [str(PYTHON), "-I", "-c", FETCH, option.partition("=")[2], *urls, "file:///etc/passwd"]
        done = subprocess.run(
            command, env={**os.environ, **engine.env(launch)}, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("must be from one of the allowed domains") == len(urls)
        assert "Cannot load local files" in done.stdout
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_kill_9_of_the_replica_takes_all_of_vllm_with_it(served: Served) -> None:
    assert served.pid("VLLM::EngineCore")
    served.replica.kill()
    served.assert_gone()


@pytest.mark.long
@pytest.mark.parametrize("victim", ["vllm.entrypoints.openai.api_server", "VLLM::EngineCore"])
def test_kill_9_of_an_engine_process_ends_the_others(served: Served, victim: str) -> None:
    os.kill(served.pid(victim), signal.SIGKILL)
    assert served.replica.wait(15) == 1
    served.assert_gone()
    assert served.status() == "failed"

"""Does the engine say what the model says? Asked once, when a deployment has become ready, beside the first requests.

The engine answers a few questions greedily, transformers reads the answers (``workers.reference``). What was found is
kept with the deployment; an engine that is another model's ends it, unless the deployment goes on regardless. A check
that comes to nothing while its engine lives has a certificate, too: that nothing was measured, and why.
"""

import contextlib
import http.client
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from app import processes
from app.artifacts.inspect import read_json
from app.engines import Engine, EngineLaunch
from app.errors import AppError
from workers.replica import UnixConnection

log = logging.getLogger(__name__)
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three prime numbers above ten.",
    "Translate to German: good morning.",
    "Explain in simple words why the sky is blue.",
    "def fibonacci(n):",
)
NEW_TOKENS = 16
SECONDS = 900.0
"""For each answer, and for all the reading."""
LOOK_SECONDS = 1.0
"""Between two looks whether the engine lives, when a check was broken off."""
ROOM = 0.5
"""Share of the memory that is free now which the second copy of the weights may take."""


class Bound(NamedTuple):
    """What still counts as the same model."""

    tie: float
    """Nats between two tokens that rounding may swap."""
    agreement: float
    """Least share of tokens that are transformers' own choice."""
    distance: float
    """Largest mean distance of the first token's log-probability, in nats."""


BOUNDS = {
    "float32": Bound(tie=0.01, agreement=0.95, distance=0.01),
    "float16": Bound(tie=0.1, agreement=0.9, distance=0.1),
    "bfloat16": Bound(tie=0.25, agreement=0.9, distance=0.2),
}
"""docs/serve.md tells what they were measured by."""


class BrokenOff(Exception):
    """The check cannot be finished; the text says why, for whoever reads the certificate."""


class Parity(threading.Thread):
    """One check. ``found`` gets the certificate, in this thread; nothing when the engine went away meanwhile."""

    def __init__(
        self,
        launch: EngineLaunch,
        engine: Engine,
        folder: Path,
        environment: Mapping[str, str],
        found: Callable[[dict[str, Any]], None],
    ) -> None:
        super().__init__(name="parity", daemon=True)
        self._launch, self._engine, self._folder, self._found = launch, engine, folder, found
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._over = threading.Event()

    def run(self) -> None:
        """Ask, have it read, judge. One that is broken off says so, unless that is because its engine ends."""
        try:
            certificate = self._check()
        except Exception as error:
            if not self._lives():
                return
            log.warning("the check of %s was broken off", self._launch.served_name, exc_info=error)
            why = str(error) if isinstance(error, BrokenOff) else f"the check was broken off ({type(error).__name__})"
            certificate = self._not_measured(why)
        try:
            self._found(certificate)
        except Exception:
            log.exception("what the check of %s found was not kept", self._launch.served_name)

    def stop(self) -> None:
        """The engine ends; so does the check."""
        self._over.set()
        if self._process is not None:
            self._process.kill()

    def _lives(self) -> bool:
        """Waits until it is known: the engine is well, or it ends, of which this is told."""
        while not self._over.wait(LOOK_SECONDS):
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._ask("GET", self._engine.health_path, None, LOOK_SECONDS)[0] == 200:
                    return True
        return False

    def _told(self) -> dict[str, Any]:
        return {"engine": self._engine.name, "dtype": self._launch.dtype, "prompts": len(QUESTIONS)}

    def _not_measured(self, reason: str) -> dict[str, Any]:
        return {"verdict": "not_measured", "reason": reason, **self._told()}

    def _check(self) -> dict[str, Any]:
        """The certificate. Raises BrokenOff, and what comes of an engine that ends meanwhile."""
        launch = self._launch
        reason = _cannot_be_read(launch.model_dir, launch.dtype, launch.options.quantization)
        if reason is not None:
            return self._not_measured(reason)
        bound = BOUNDS[launch.dtype]
        job, result = self._folder / "parity.json", self._folder / "parity-found.json"
        read = {"model": str(launch.model_dir), "dtype": launch.dtype, "tie": bound.tie, "answers": self._answers()}
        job.write_text(json.dumps(read))
        status, said = self._read(job, result)
        if status != 0:
            return self._not_measured(f"transformers could not load the model: {said}")
        return {**judged(json.loads(result.read_bytes()), bound), **self._told()}

    def _read(self, job: Path, result: Path) -> tuple[int, str]:
        # -I: like every child of ours, it gets no module from the working directory.
        command = [sys.executable, "-I", "-m", "workers.reference", str(job), str(result)]
        with (self._folder / "parity.log").open("wb") as log_file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                env=self._environment,
                preexec_fn=processes.die_with_parent,
            )
            try:
                if self._over.is_set():
                    self._process.kill()
                status = self._process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                raise BrokenOff(f"transformers did not read the answers in {SECONDS:.0f} s") from None
            finally:
                self._process.kill()
                self._process.wait()
        if status < 0:  # with the engine, or by whoever was short of memory: run() finds out
            raise BrokenOff(f"the process that read the answers was ended by signal {-status}")
        lines = (self._folder / "parity.log").read_text(errors="replace").strip().splitlines()
        return status, lines[-1][:500] if lines else f"exit status {status}"

    def _answers(self) -> list[dict[str, Any]]:
        """Greedy answers to texts and, where the model has a chat template, to chats."""
        found = []
        for question in QUESTIONS:
            answer = self._post("/v1/completions", {"prompt": question, "logprobs": 1})
            logs = (answer.get("logprobs") or {}).get("token_logprobs") or [None]
            ids = answer.get("token_ids")
            found.append({"prompt": question, "text": answer["text"], "token_ids": ids, "logprob": logs[0]})
        if not _has_template(self._launch.model_dir):
            return found
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            answer = self._post("/v1/chat/completions", {"messages": messages, "logprobs": True})
            logs = (answer.get("logprobs") or {}).get("content") or [{"logprob": None}]
            text = answer["message"].get("content") or ""
            ids = answer.get("token_ids")
            found.append({"messages": messages, "text": text, "token_ids": ids, "logprob": logs[0]["logprob"]})
        return found

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        asked = {"model": self._launch.served_name, "max_tokens": NEW_TOKENS, "temperature": 0, **body}
        asked["return_token_ids"] = True  # a text need not lead back to the tokens that it was made of
        try:
            status, text = self._ask("POST", path, json.dumps(asked), SECONDS)
        except TimeoutError:
            raise BrokenOff(f"the engine did not answer a question in {SECONDS:.0f} s") from None
        if status != 200:
            raise BrokenOff(f"the engine refused a question at {path} ({status}{_in_words(status, text)})")
        choice: dict[str, Any] = json.loads(text)["choices"][0]
        return choice

    def _ask(self, method: str, path: str, body: str | None, seconds: float) -> tuple[int, bytes]:
        connection = UnixConnection(str(self._launch.socket), seconds)
        try:
            connection.request(method, path, body, {"content-type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def _in_words(status: int, text: bytes) -> str:
    """What an engine says of a question that it does not take; of its own failures it may name files."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return f": {str(json.loads(text)['error']['message'])[:300]}" if 400 <= status < 500 else ""
    return ""


def judged(found: Mapping[str, Any], bound: Bound) -> dict[str, Any]:
    """With the verdict, and the bounds that it came by."""
    bounds = {"least_agreement": bound.agreement, "largest_mean_distance": bound.distance, "tie": bound.tie}
    if found["agreement"] is None:
        return {"verdict": "not_measured", "reason": "every answer was empty", **found, "bounds": bounds}
    # Not "agreement < bound": NaN must not pass.
    same = found["agreement"] >= bound.agreement and not (found["mean_distance"] or 0.0) > bound.distance
    return {"verdict": "same" if same else "differs", **found, "bounds": bounds}


def _cannot_be_read(folder: Path, dtype: str, quantization: str | None = None) -> str | None:
    """Why transformers reads no answers of this model here."""
    if quantization is not None:
        return f"the engine computes in {quantization}, and no bounds are known for that"
    if dtype not in BOUNDS:
        return f"no bounds are known for {dtype}"
    try:
        config = read_json(folder / "config.json", "model")
    except AppError as error:
        return error.message
    if config.get("quantization_config"):
        return "the model is stored quantised; its certificate compares it with its source"
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if not stored:
        return "it has no safetensors"
    stored *= 2 if dtype == "float32" and config.get("dtype", config.get("torch_dtype")) != "float32" else 1
    free = _free_memory()
    if stored > ROOM * free:
        return f"a second copy of the weights takes {stored / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    return None


def _free_memory() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return float("inf")


def _has_template(folder: Path) -> bool:
    try:
        stored = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        stored = {}
    return bool(stored.get("chat_template")) or any(folder.glob("chat_template*"))

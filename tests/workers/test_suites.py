"""Suites of lm-evaluation-harness by name: refused where it is not installed, else asked of a model and of its base.

Its own suites need data of the hub, so a suite of ours is used, in a folder as an operator would set it.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from app.catalog import Catalog, Interrupted, Served
from app.discovery import discover
from app.errors import Code, RunError
from tests.suites import write_suites
from tests.support import on_sqlite
from tests.workers.context import RecordingContext
from tests.workers.plain_engine import serving
from workers.loading.suites import _read, changes_of, installed
from workers.recipes import sft

needs_harness = pytest.mark.skipif(not installed(), reason="lm-eval is not installed here")


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return discover(("workers.recipes", "workers.graders", "workers.operations"))


# --- refusals ---------------------------------------------------------------------------------------------------------


@on_sqlite
def test_where_it_is_not_installed_the_package_is_named(
    api: TestClient, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.operations.evaluate.installed", lambda: False)
    answer = api.post("/jobs", json={"type": "evaluate", "model": str(models / "tiny"), "tasks": ["gsm8k"]})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "tasks")
    assert "lm-eval" in error["message"]
    assert "pip install 'lm-eval[api]'" in error["hint"]


def test_a_worker_without_it_says_so_too(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.loading.suites import Suites  # noqa: PLC0415

    monkeypatch.setattr("workers.loading.suites.installed", lambda: False)
    with pytest.raises(RunError, match="not installed here") as caught:
        Suites(["gsm8k"], None, None, RecordingContext(tmp_path))
    assert (caught.value.code, caught.value.param) == (Code.BAD_SPEC, "tasks")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({}, "dataset"),
        ({"dataset": {"file": "f"}}, "graders"),
        ({"graders": [{"type": "string_check", "reference": "x"}], "tasks": ["gsm8k"]}, "dataset"),
        ({"tasks": ["../evil.yaml"]}, "tasks.0"),
        ({"tasks": ["/etc/evil"]}, "tasks.0"),
        ({"tasks": ["gsm8k"], "gate": {"on": "mmlu"}}, "gate.on"),
        ({"tasks": ["gsm8k"], "gate": {}}, "gate.on"),
    ],
)
def test_specs_that_ask_nothing_or_too_much(
    changes: dict[str, Any], field: str, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.operations.evaluate.installed", lambda: True)
    with pytest.raises(ValidationError) as caught:
        catalog.operations["evaluate"].spec.model_validate({"model": "m", **changes})
    (error,) = caught.value.errors()
    found = (error.get("ctx") or {}).get("field") or ".".join(map(str, error["loc"]))
    assert found == field


# --- what the harness gives -------------------------------------------------------------------------------------------


def given(correct: list[int], logs: list[float]) -> dict[str, Any]:
    """Results as version 0.4.13 has them: two filters of one metric, a perplexity, a group."""
    rows = [
        {"doc_id": doc, "filter": chosen, "target": "x", "filtered_resps": ["y"], "metrics": ["exact_match"]}
        | {"exact_match": value if chosen == "strict" else 1 - value}
        for chosen in ("strict", "flexible")
        for doc, value in enumerate(correct)
    ]
    words = [
        {"doc_id": doc, "filter": "none", "metrics": ["perplexity"], "perplexity": log} for doc, log in enumerate(logs)
    ]
    mean = sum(correct) / len(correct)
    return {
        "samples": {"sums": rows, "words": words},
        "results": {
            "sums": {
                "alias": "sums",
                "exact_match,strict": mean,
                "exact_match_stderr,strict": 0.1,
                "exact_match,flexible": 1 - mean,
                "exact_match_stderr,flexible": "N/A",
            },
            "words": {"perplexity,none": math.exp(-sum(logs) / len(logs)), "perplexity_stderr,none": 2.0},
            "everything": {"exact_match,strict": mean, "alias": "everything"},
        },
        "higher_is_better": {"sums": {"exact_match": True}, "words": {"perplexity": False}},
    }


def test_only_means_over_documents_are_compared_document_by_document() -> None:
    before, after = _read(given([0, 0, 1, 0], [-2.0, -3.0])), _read(given([1, 1, 1, 0], [-1.0, -2.0]))
    strict = after.scores["sums", "exact_match", "strict"]
    assert (strict.value, strict.stderr, strict.better, len(strict.each)) == (0.75, 0.1, "higher", 4)
    assert after.scores["sums", "exact_match", "flexible"].stderr is None
    assert after.scores["words", "perplexity", "none"].better == "lower"
    changes = changes_of(before, after)
    assert {key: change.change for key, change in changes.items()} == {
        ("sums", "exact_match", "strict"): 0.5,
        ("sums", "exact_match", "flexible"): -0.5,
    }
    assert len(after.samples) == 10


# --- with the harness -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two suites."""
    return write_suites(tmp_path_factory.mktemp("suites"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny: Path, numbers: Path) -> Path:
    """One that has learnt to answer in words of numbers."""
    block = {"model_name_or_path": "x", "peft_config": {"r": 16, "target_modules": "all-linear", "lora_dropout": 0.0}}
    training = {"max_steps": 60, "learning_rate": 1e-2, "per_device_train_batch_size": 16}
    spec = sft.SftSpec.model_validate({"model": block, "dataset": {"file": "f"}, "training": training})
    inputs = {"model.model_name_or_path": tiny, "dataset.file": numbers}
    ctx = RecordingContext(tmp_path_factory.mktemp("adapter"), inputs, {"model.model_name_or_path": {"name": "tiny"}})
    sft.run(spec, ctx)
    return ctx.folder


def evaluate(
    root: Path,
    catalog: Catalog,
    inputs: dict[str, Path],
    folder: Path | None,
    ways: dict[str, Served] | None = None,
    attempt: type[RecordingContext] = RecordingContext,
    **changes: Any,
) -> RecordingContext:
    operation = catalog.operations["evaluate"]
    body = {"model": "m", "tasks": ["spelling"], "canary": False, **changes}
    ctx = attempt(root, inputs, {field: {"name": path.name} for field, path in inputs.items()}, catalog)
    ctx.task_folder, ctx.ways = folder, ways or {}
    operation.run(operation.spec.model_validate(body), ctx)
    return ctx


@needs_harness
def test_an_unknown_suite_names_those_that_are_near(catalog: Catalog, tiny: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no suite 'speling'") as caught:
        evaluate(tmp_path, catalog, {"model": tiny}, folder, tasks=["speling"])
    assert (caught.value.code, caught.value.param) == (Code.BAD_SPEC, "tasks.0")
    assert "spelling" in (caught.value.hint or "")
    with pytest.raises(RunError, match="has no suite 'spelling'"):
        evaluate(tmp_path / "x", catalog, {"model": tiny}, None)


@needs_harness
def test_data_that_cannot_be_fetched_are_asked_for_again(
    catalog: Catalog, tiny: Path, folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "suites"
    broken.mkdir()
    (write_suites(broken) / "rows.jsonl").unlink()
    with pytest.raises(RunError, match="data of a suite cannot be fetched") as caught:
        evaluate(tmp_path / "run", catalog, {"model": tiny}, broken)
    assert (caught.value.code, caught.value.param, caught.value.transient) == (Code.MODEL_UNREACHABLE, "tasks", True)


@needs_harness
def test_an_adapter_beside_its_base_and_a_gate(
    catalog: Catalog, tiny: Path, adapter: Path, folder: Path, tmp_path: Path
) -> None:
    """Which of the two is better at this suite is not the point: the gate lets that one through, whichever it is."""
    ctx = evaluate(tmp_path / "run", catalog, {"model": adapter, "model.base": tiny}, folder)
    acc = ctx.results["report"]["tasks"]["spelling"]["acc"]
    assert acc["documents"] == 24
    assert acc["change"] == pytest.approx(acc["model"] - acc["baseline"])
    assert acc["low"] < acc["change"] < acc["high"]
    assert acc["verdict"] in ("better", "worse"), acc
    rows = [json.loads(line) for line in (ctx.folder / "tasks.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    assert sum(row["scores"]["acc"] for row in rows) / 24 == pytest.approx(acc["model"])

    forth = ({"model": adapter, "model.base": tiny}, {})
    back = ({"model": tiny, "baseline": adapter, "baseline.base": tiny}, {"baseline": "b"})
    good, bad = (forth, back) if acc["verdict"] == "better" else (back, forth)
    gate = {"on": "spelling"}
    passed = evaluate(tmp_path / "good", catalog, good[0], folder, gate=gate, **good[1]).results["report"]
    assert passed["gate"]["passed"] is True
    assert abs(passed["tasks"]["spelling"]["acc"]["change"]) == pytest.approx(abs(acc["change"]))
    with pytest.raises(RunError, match="spelling is not better") as caught:
        evaluate(tmp_path / "bad", catalog, bad[0], folder, gate=gate, **bad[1])
    assert (caught.value.code, caught.value.param) == (Code.GATE_NOT_PASSED, "gate")


@needs_harness
def test_a_limit_and_a_model_with_nothing_beside_it(catalog: Catalog, tiny: Path, folder: Path, tmp_path: Path) -> None:
    options = {"limit": 6, "num_fewshot": 0}
    report = evaluate(tmp_path, catalog, {"model": tiny}, folder, task_options=options).results["report"]
    acc = report["tasks"]["spelling"]["acc"]
    assert (acc["documents"], acc["baseline"], acc["verdict"]) == (6, None, "not_compared")
    assert (report["rows"], report["task_options"]["limit"]) == (0, 6)


@needs_harness
def test_a_model_that_is_served_comes_to_what_it_comes_to_when_it_is_loaded(
    catalog: Catalog, tiny: Path, adapter: Path, folder: Path, tmp_path: Path
) -> None:
    """Log-likelihoods and written answers, of an adapter and of its base, from the plain engine."""
    inputs = {"model": adapter, "model.base": tiny}
    tasks = ["spelling", "writing"]
    loaded = evaluate(tmp_path / "loaded", catalog, inputs, folder, tasks=tasks).results["report"]
    with serving(tiny, {"words": adapter}) as socket:
        ways = {"model": Served((socket,), "words"), "baseline": Served((socket,), "plain")}
        ctx = evaluate(tmp_path / "served", catalog, inputs, folder, ways, tasks=tasks, deployment="words")
    report = ctx.results["report"]
    assert report["served_as"] == {"model": "words", "baseline": "plain"}
    assert report["tasks"].keys() == {"spelling", "writing"}
    assert report["tasks"] == loaded["tasks"]
    assert report["tasks"]["spelling"]["acc"]["model"] > 0 or report["tasks"]["spelling"]["acc"]["baseline"] > 0
    lines = [json.loads(line) for line in (ctx.folder / "tasks.jsonl").read_text().splitlines()]
    said = [line["said"] for line in lines if line["task"] == "writing"]
    assert len(said) == 24
    assert any(text for (text,) in said)


class Counting(RecordingContext):
    """An attempt that counts the steps of a model in this process, and stops after ``last`` of them."""

    last: float = float("inf")
    counted = 0

    def stop_requested(self) -> bool:
        type(self).counted += 1
        return self.counted > self.last


class Dying(RecordingContext):
    """One that ends after so many answers of an engine."""

    def progress(self, step: int, total_steps: int, **values: float | None) -> None:
        super().progress(step, total_steps, **values)
        if len(self.steps) == 60:
            raise ConnectionAbortedError


@needs_harness
def test_an_attempt_that_goes_on_asks_a_loaded_model_only_what_is_left(
    catalog: Catalog, tiny: Path, adapter: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> RecordingContext:
        monkeypatch.setattr(Counting, "counted", 0)
        inputs = {"model": adapter, "model.base": tiny}
        return evaluate(tmp_path / name, catalog, inputs, folder, None, Counting, tasks=["spelling", "writing"])

    whole, steps = run("whole"), Counting.counted
    monkeypatch.setattr(Counting, "last", steps * 3 // 4)
    with pytest.raises(Interrupted):
        run("parts")
    monkeypatch.setattr(Counting, "last", float("inf"))
    rest = run("parts")
    assert Counting.counted < steps // 2
    assert rest.results["report"] == whole.results["report"]
    assert (rest.folder / "tasks.jsonl").read_text() == (whole.folder / "tasks.jsonl").read_text()


@needs_harness
def test_an_attempt_that_goes_on_asks_an_engine_only_what_is_left(
    catalog: Catalog, tiny: Path, adapter: Path, folder: Path, tmp_path: Path
) -> None:
    inputs, more = {"model": adapter, "model.base": tiny}, {"tasks": ["spelling", "writing"], "deployment": "words"}
    with serving(tiny, {"words": adapter}) as socket:
        ways = {"model": Served((socket,), "words"), "baseline": Served((socket,), "plain")}
        whole = evaluate(tmp_path / "whole", catalog, inputs, folder, ways, **more)
        with pytest.raises(ConnectionAbortedError):
            evaluate(tmp_path / "parts", catalog, inputs, folder, ways, Dying, **more)
        rest = evaluate(tmp_path / "parts", catalog, inputs, folder, ways, **more)
    assert len(whole.steps) - 60 <= len(rest.steps) <= len(whole.steps) - 58
    assert rest.results["report"] == whole.results["report"]
    assert (rest.folder / "tasks.jsonl").read_text() == (whole.folder / "tasks.jsonl").read_text()

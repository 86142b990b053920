"""Evaluate: scores of a model beside those of what it was made from, and a gate that stops what is no better."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from app.catalog import Catalog, Interrupted, Served
from app.discovery import discover
from app.errors import Code, RunError
from tests.workers.conftest import conversation, make_model
from tests.workers.context import RecordingContext
from tests.workers.plain_engine import serving
from workers.recipes import sft

STRING = {"type": "string_check", "name": "exact", "reference": "{{item.expected}}"}
NEAR = {
    "type": "text_similarity",
    "name": "near",
    "input": "{{sample.output_text}}",
    "reference": "{{item.expected}}",
    "evaluation_metric": "fuzzy_match",
}


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return discover(("workers.recipes", "workers.graders", "workers.operations"))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 numbers, what is expected beside what is asked."""
    path = tmp_path_factory.mktemp("asked") / "asked.jsonl"
    rows = [(turns[:-1], turns[-1]["content"]) for turns in map(conversation, range(200, 224))]
    path.write_text("".join(json.dumps({"prompt": turns, "expected": answer}) + "\n" for turns, answer in rows))
    return path


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


def body(**changes: Any) -> dict[str, Any]:
    generation = {"max_new_tokens": 24, "batch_size": 12}
    return {
        "model": "m",
        "dataset": {"file": "f"},
        "graders": [NEAR],
        "generation": generation,
        "canary": False,
        **changes,
    }


def evaluate(
    root: Path,
    catalog: Catalog,
    inputs: dict[str, Path],
    ways: dict[str, Served] | None = None,
    stop_after: int | None = None,
    kept: Path | None = None,
    **changes: Any,
) -> RecordingContext:
    operation = catalog.operations["evaluate"]
    spec = operation.spec.model_validate(body(**changes))
    info = {field: {"name": path.name} for field, path in inputs.items()}
    ctx = RecordingContext(root, inputs, info, catalog)
    ctx.ways, ctx.stop_after = ways or {}, stop_after
    if kept is not None:
        ctx.kept_dir = kept
    operation.run(spec, ctx)
    return ctx


def on_adapter(adapter: Path, tiny: Path, asked: Path) -> dict[str, Path]:
    return {"model": adapter, "model.base": tiny, "dataset.file": asked}


def test_an_adapter_is_shown_beside_its_base(
    tmp_path: Path, catalog: Catalog, adapter: Path, tiny: Path, asked: Path
) -> None:
    inputs = on_adapter(adapter, tiny, asked)
    graders = [NEAR, STRING]
    gate = {"wants": "better", "on": "near", "min_change": 0.1}
    ctx = evaluate(tmp_path, catalog, inputs, graders=graders, weights=[1, 2], canary=True, gate=gate)
    report = ctx.results["report"]
    assert report["rows"] == 24
    near, exact, total = (report["scores"][name] for name in ("near", "exact", "total"))
    assert near["verdict"] == "better"
    assert near["low"] > 0.1
    assert near["change"] == pytest.approx(near["model"] - near["baseline"])
    assert total["model"] == pytest.approx(near["model"] + 2 * exact["model"])
    assert report["gate"]["passed"] is True
    assert report["canary"]["questions"] == 24
    assert {"baseline", "model", "lost", "gained"} <= report["canary"].keys()
    rows = [json.loads(line) for line in (ctx.folder / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    assert rows[0]["model"] != rows[0]["baseline"]
    mean = sum(row["scores"]["near"] for row in rows) / 24
    assert mean == pytest.approx(near["model"])
    assert report["answers"] == rows[:8]


def test_the_same_model_twice_is_no_difference_and_does_not_pass(
    tmp_path: Path, catalog: Catalog, tiny: Path, asked: Path
) -> None:
    inputs = {"model": tiny, "baseline": tiny, "dataset.file": asked}
    with pytest.raises(RunError) as caught:
        evaluate(tmp_path, catalog, inputs, baseline="b", gate={"on": "near"})
    assert (caught.value.code, caught.value.param) == ("gate_not_passed", "gate")
    assert "95 % interval" in caught.value.message
    found = evaluate(tmp_path / "again", catalog, inputs, baseline="b").results["report"]["scores"]["near"]
    assert (found["verdict"], found["change"]) == ("no_difference", 0.0)


def test_what_got_worse_is_told_and_not_worse_is_a_gate_too(
    tmp_path: Path, catalog: Catalog, adapter: Path, tiny: Path, asked: Path
) -> None:
    inputs = {"model": tiny, "baseline": adapter, "baseline.base": tiny, "dataset.file": asked}
    with pytest.raises(RunError, match="total is worse"):
        evaluate(tmp_path, catalog, inputs, baseline="b", gate={"wants": "not_worse"})
    ctx = evaluate(tmp_path / "again", catalog, inputs, baseline="b")
    assert ctx.results["report"]["scores"]["near"]["verdict"] == "worse"


def test_a_model_alone_has_scores_with_their_interval(
    tmp_path: Path, catalog: Catalog, tiny: Path, asked: Path
) -> None:
    found = evaluate(tmp_path, catalog, {"model": tiny, "dataset.file": asked}).results["report"]["scores"]["near"]
    assert found["verdict"] == "not_compared"
    assert found["baseline"] is None
    assert found["low"] <= found["model"] <= found["high"]


def test_answers_do_not_depend_on_how_many_are_made_at_a_time(
    tmp_path: Path, catalog: Catalog, adapter: Path, tiny: Path, asked: Path
) -> None:
    said = []
    for size in (1, 7):
        generation = {"max_new_tokens": 16, "batch_size": size}
        ctx = evaluate(tmp_path / str(size), catalog, on_adapter(adapter, tiny, asked), generation=generation)
        rows = (ctx.folder / "answers.jsonl").read_text().splitlines()
        said.append([json.loads(line)["model"] for line in rows])
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"graders": []}, "graders"),
        ({"graders": [NEAR, NEAR]}, "graders"),
        ({"graders": [{**NEAR, "name": "total"}]}, "graders"),
        ({"weights": [1, 2]}, "weights"),
        ({"gate": {"on": "nobody"}}, "gate.on"),
        ({"dataset": {"file": "f", "limit": 1}}, "limit"),
        ({"generation": {"temperature": -1}}, "temperature"),
    ],
)
def test_what_is_refused_at_submission(catalog: Catalog, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        catalog.operations["evaluate"].spec.model_validate(body(**changes))
    assert field in str(caught.value) or field in str(caught.value.errors())


def test_what_is_refused_before_a_model_is_loaded(
    tmp_path: Path, catalog: Catalog, adapter: Path, tiny: Path, asked: Path, numbers: Path
) -> None:
    def refused(inputs: dict[str, Path], **changes: Any) -> RunError:
        root = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        root.mkdir()
        with pytest.raises(RunError) as caught:
            evaluate(root, catalog, inputs, **changes)
        assert caught.value.hint
        return caught.value

    error = refused({"model": tiny, "dataset.file": asked}, gate={"on": "near"})
    assert (error.code, error.param) == ("bad_spec", "baseline")
    assert refused({"model": adapter, "dataset.file": asked}).param == "model"
    other = make_model(tmp_path / "wide", hidden_size=128)
    assert refused({"model": adapter, "model.base": other, "dataset.file": asked}).code == "base_mismatch"
    with pytest.raises(RunError, match="item.expected is missing"):
        evaluate(tmp_path / "columns", catalog, {"model": tiny, "dataset.file": numbers})


def test_a_model_that_is_served_answers_as_when_it_is_loaded(
    tmp_path: Path, catalog: Catalog, adapter: Path, tiny: Path, asked: Path
) -> None:
    """An adapter on its base's engine, and a whole model with a baseline of its own; nothing is loaded here."""
    gate = {"wants": "better", "on": "near"}
    inputs = on_adapter(adapter, tiny, asked)
    loaded = evaluate(tmp_path / "loaded", catalog, inputs, canary=True, gate=gate)
    both = {"model": tiny, "baseline": adapter, "baseline.base": tiny, "dataset.file": asked}
    with serving(tiny, {"words": adapter}) as socket:
        words, plain = Served((socket,), "words"), Served((socket,), "plain")
        more = {"canary": True, "gate": gate, "deployment": "words"}
        served = evaluate(tmp_path / "served", catalog, inputs, {"model": words, "baseline": plain}, **more)
        ways = {"model": plain, "baseline": words}
        back = evaluate(tmp_path / "back", catalog, both, ways, baseline="b", deployment="plain")
        alone = evaluate(tmp_path / "alone", catalog, {"model": tiny, "dataset.file": asked}, ways, deployment="plain")
        long = {"max_new_tokens": 8192, "batch_size": 2}
        with pytest.raises(RunError, match="maximum context length") as caught:
            evaluate(tmp_path / "long", catalog, inputs, ways, deployment="words", generation=long)
    assert (caught.value.code, caught.value.param) == (Code.BAD_SPEC, "deployment")
    rows = [(ctx.folder / "answers.jsonl").read_text() for ctx in (loaded, served)]
    assert rows[0] == rows[1]
    report = served.results["report"]
    assert report.pop("served_as") == {"model": "words", "baseline": "plain"}
    assert report == loaded.results["report"]
    assert report["gate"]["passed"] is True
    assert "device" not in served.results
    assert back.results["report"]["scores"]["near"]["change"] == pytest.approx(-report["scores"]["near"]["change"])
    assert alone.results["report"]["scores"]["near"]["verdict"] == "not_compared"


def test_a_model_that_answers_as_its_baseline_does_is_not_worse(
    tmp_path: Path, catalog: Catalog, tiny: Path, asked: Path
) -> None:
    inputs = {"model": tiny, "baseline": tiny, "dataset.file": asked}
    more: dict[str, Any] = {"baseline": "b", "gate": {"wants": "not_worse", "on": "near"}}
    report = evaluate(tmp_path / "same", catalog, inputs, **more).results["report"]
    assert (report["scores"]["near"]["change"], report["gate"]["passed"]) == (0.0, True)
    with pytest.raises(RunError, match="near is not better"):
        evaluate(tmp_path / "better", catalog, inputs, **more | {"gate": {"wants": "better", "on": "near"}})


def test_an_attempt_that_goes_on_makes_only_the_answers_that_are_left(
    tmp_path: Path, catalog: Catalog, adapter: Path, tiny: Path, asked: Path
) -> None:
    """Drawn ones, too: 4 batches and the general questions in 4, of both sides, in three attempts."""
    inputs = on_adapter(adapter, tiny, asked)
    more: dict[str, Any] = {"generation": {"max_new_tokens": 12, "batch_size": 6, "temperature": 1.0}, "canary": True}
    whole = evaluate(tmp_path / "whole", catalog, inputs, **more)
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("first", "second"):
        with pytest.raises(Interrupted):
            evaluate(tmp_path / name, catalog, inputs, stop_after=6, kept=kept, **more)
    last = evaluate(tmp_path / "last", catalog, inputs, kept=kept, **more)
    assert [len(ctx.steps) for ctx in (whole, last)] == [16, 4]
    assert (last.folder / "answers.jsonl").read_text() == (whole.folder / "answers.jsonl").read_text()
    assert last.results["report"] == whole.results["report"]
    assert last.codes().count("answers_kept") == 3

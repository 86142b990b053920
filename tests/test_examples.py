"""The examples are what a user copies first: each spec is taken as it stands, and its data can be learnt from."""

import ast
from pathlib import Path

import pytest

from app.discovery import discover
from app.files import rows
from app.grading import Sample
from app.jobs.intake import read_document, read_spec
from app.pipelines.service import read
from app.settings import Settings
from app.specs import TrainSpec
from workers.loading.judging import check_row

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PIPELINE = EXAMPLES / "pipeline.yaml"
SPECS = sorted({*EXAMPLES.glob("*.yaml")} - {PIPELINE})


def test_there_is_an_example_of_each_method() -> None:
    assert {path.name for path in SPECS} >= {"sft_lora.yaml", "sft_qlora.yaml", "sft_full.yaml", "merge.yaml"}
    catalog = discover(Settings().packages)
    assert {path.stem.split("_")[0] for path in SPECS} >= catalog.recipes.keys(), "an algorithm without an example"


def test_there_is_an_example_of_graders_and_of_trackers() -> None:
    specs = [read_spec(path.read_bytes(), "application/yaml", discover(Settings().packages)).spec for path in SPECS]
    for field in ("graders", "trackers", "reward_model"):
        assert any(getattr(spec, field, None) for spec in specs), field


def test_what_graders_read_stands_in_every_row() -> None:
    catalog = discover(Settings().packages)
    for path in SPECS:
        spec = read_spec(path.read_bytes(), "application/yaml", catalog).spec
        graders = getattr(spec, "graders", None)
        if graders is None or not isinstance(spec, TrainSpec):
            continue
        for row, turns in rows.read_asked(EXAMPLES / spec.dataset.file, spec.dataset.format):
            assert check_row(graders, catalog, Sample("", row.value or {}, turns)) is None, (path.name, row.place)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_spec_is_accepted_without_a_warning(path: Path) -> None:
    intake = read_spec(path.read_bytes(), "application/yaml", discover(Settings().packages))
    assert intake.warnings == []
    if isinstance(intake.spec, TrainSpec):
        assert path.stem.startswith(f"{intake.spec.algorithm}_{intake.spec.model.method}")
        report = rows.check(EXAMPLES / intake.spec.dataset.file)
        assert report.ok, report.problems


def test_the_pipeline_is_accepted_in_an_order_that_works() -> None:
    document = read_document(PIPELINE.read_bytes(), "application/yaml")
    _, steps = read(document, discover(Settings().packages))
    assert [step.name for step in steps] == ["sft", "judge", "ppo", "merged", "check", "serve"]
    assert all(step.intake.warnings == [] for step in steps)


def test_the_chat_example_is_python_that_only_needs_the_openai_client() -> None:
    tree = ast.parse((EXAMPLES / "chat.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"pathlib", "openai"}

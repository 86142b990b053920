"""Plugs: one file is the whole change; a broken one stops the start."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.catalog import CatalogError
from app.discovery import discover
from app.main import create_app
from app.settings import PROJECT_ROOT, Settings

RECIPE = """
from typing import Literal
from app.catalog import Recipe
from app.specs import TrainSpec

class TestedOrpoSpec(TrainSpec):
    '''Odds-ratio preference optimisation.'''
    algorithm: Literal["orpo_test"] = "orpo_test"
    beta: float = 0.1

def run(spec, ctx):
    pass

recipe = Recipe(TestedOrpoSpec, run)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable package of this test's own."""
    name = f"plugs_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


def document(settings: Settings) -> dict[str, Any]:
    return create_app(settings).openapi()


def test_a_file_in_an_operators_package_is_a_new_algorithm(package: Path, tmp_path: Path) -> None:
    (package / "orpo.py").write_text(RECIPE)
    (package / "_private.py").write_text("raise RuntimeError('never imported')")
    settings = Settings(data_dir=tmp_path, plugin_packages=(package.name,))
    schemas = document(settings)["components"]["schemas"]
    assert "beta" in schemas["TestedOrpoSpec"]["properties"]
    assert "TrainSpec" in json.dumps(schemas["JobSpec"])
    assert "TestedOrpoSpec" in json.dumps(schemas["TrainSpec"])
    assert "TestedOrpoSpec" not in json.dumps(document(Settings(data_dir=tmp_path))["components"]["schemas"])


def test_a_file_dropped_into_workers_recipes_is_a_new_algorithm(tmp_path: Path) -> None:
    """On a copy of the tree, in a process of its own."""
    for name in ("app", "workers", "migrations"):
        copy = tmp_path / "tree" / name
        copy.parent.mkdir(exist_ok=True)
        subprocess.run(["cp", "-r", str(PROJECT_ROOT / name), str(copy)], check=True)
    code = textwrap.dedent("""
        import sys, json, app.main
        from app.settings import Settings
        from pathlib import Path
        assert app.main.__file__.startswith(sys.argv[1]), app.main.__file__
        schema = app.main.create_app(Settings(data_dir=Path(sys.argv[1]))).openapi()["components"]["schemas"]
        assert "torch" not in sys.modules
        assert "TrainSpec" in json.dumps(schema["JobSpec"])
        print(json.dumps(schema["TrainSpec"]))
    """)

    def ask() -> str:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "tree")}
        command = [sys.executable, "-c", code, str(tmp_path / "tree")]
        return subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert "TestedOrpoSpec" not in ask()
    (tmp_path / "tree" / "workers" / "recipes" / "orpo_test.py").write_text(RECIPE)
    assert "TestedOrpoSpec" in ask()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a": RECIPE, "b": RECIPE}, r"\.b: a recipe named 'orpo_test' is already plugged in"),
        ({"a": "x = 1"}, r"a\.py: no plug; end the file with recipe = Recipe"),
        ({"a": "recipe = 'not a recipe'"}, "no plug"),
        ({"a": "1 / 0"}, r"\.a cannot be imported: ZeroDivisionError"),
        ({"a": "import no_such_library"}, "no_such_library"),
        ({"a": RECIPE.replace('= "orpo_test"', "")}, "needs a Literal with a default"),
    ],
)
def test_a_broken_file_stops_the_start(package: Path, files: dict[str, str], words: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    with pytest.raises(CatalogError, match=words):
        create_app(Settings(data_dir=tmp_path, plugin_packages=(package.name,)))


def test_a_package_that_does_not_exist_stops_the_start() -> None:
    with pytest.raises(CatalogError, match="'no.such.package' cannot be imported"):
        discover(["no.such.package"])


def test_two_packages_may_not_plug_in_the_same_name(package: Path) -> None:
    (package / "sft.py").write_text(RECIPE.replace("orpo_test", "sft"))
    with pytest.raises(CatalogError, match="already plugged in"):
        discover(["workers.recipes", package.name])


def test_every_plug_of_ours_is_found(tmp_path: Path) -> None:
    catalog = discover(Settings(data_dir=tmp_path).packages)
    assert {"sft"} <= set(catalog.recipes)
    assert {"merge", "validate", "import"} <= set(catalog.operations)
    assert catalog.merges
    assert "vllm" in catalog.engines
    for name in catalog.operations:
        assert catalog.spec_class(name, None) is not None
    assert catalog.spec_class("train", "nope") is None
    assert catalog.spec_class("serve", None) is None


@pytest.mark.parametrize("module", ["app.main", "app.api", "app.cli", "workers.main", "workers.supervisor"])
def test_no_process_but_the_runner_loads_torch(module: str) -> None:
    heavy = ("torch", "transformers", "trl", "peft", "vllm", "datasets", "accelerate")
    code = f"import {module}, sys; from app.discovery import discover; from app.settings import Settings; "
    code += f"discover(Settings().packages); print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_api_does_not_import_the_workers_code() -> None:
    """Only plugs are read, by name."""
    code = "import app.main, sys; assert 'torch' not in sys.modules; print([m for m in sys.modules if 'workers' in m])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

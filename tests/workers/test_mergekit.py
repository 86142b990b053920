"""Models merged by us and by mergekit, where it is installed: benchmarks/merge.py --with-mergekit puts it there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers.conftest import make_model
from tests.workers.test_mixing import merged, moved, tensors_of

MERGEKIT = Path(__file__).parents[2] / ".venv-bench" / "mergekit"
pytestmark = [
    pytest.mark.skipif(not MERGEKIT.exists(), reason="mergekit is not installed (benchmarks/merge.py --with-mergekit)"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
WEIGHTS = [0.5, 1.5, 0.25]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("mergekit") / "base")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, base: Path) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [moved(base, root / str(number), number) for number in range(3)]


def by_mergekit(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps({**config, "dtype": "float32"}))
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", str(folder / "config.yaml"), str(folder / "out")]
    subprocess.run(command, env={"PYTHONPATH": str(MERGEKIT), "HF_HUB_OFFLINE": "1"}, check=True, capture_output=True)
    return tensors_of(folder / "out")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"method": "model_soup"}, {"merge_method": "linear"}),
        ({"method": "task_arithmetic"}, {"merge_method": "task_arithmetic", "parameters": {"normalize": False}}),
        (
            {"method": "ties", "density": 0.3},
            {"merge_method": "ties", "parameters": {"normalize": True, "density": 0.3}},
        ),
    ],
)
def test_weighted_methods_are_mergekit_s(
    ours: dict[str, Any], theirs: dict[str, Any], tmp_path: Path, base: Path, models: list[Path]
) -> None:
    based = base if ours["method"] != "model_soup" else None
    ctx = merged(tmp_path / "ours", models, based, weights=WEIGHTS, proof_prompts=0, **ours)
    listed = [
        {"model": str(model), "parameters": {"weight": weight}} for model, weight in zip(models, WEIGHTS, strict=True)
    ]
    more = {"base_model": str(base)} if based else {}
    compare(tensors_of(ctx.outputs[0][1]), by_mergekit(tmp_path / "kit", {**theirs, **more, "models": listed}), base)


def test_slerp_is_mergekit_s(tmp_path: Path, base: Path, models: list[Path]) -> None:
    ctx = merged(tmp_path / "ours", models[:2], None, method="slerp", t=0.3, proof_prompts=0)
    config = {
        "merge_method": "slerp",
        "base_model": str(models[0]),
        "models": [{"model": str(model)} for model in models[:2]],
        "parameters": {"t": 0.3},
    }
    compare(tensors_of(ctx.outputs[0][1]), by_mergekit(tmp_path / "kit", config), base)


def compare(ours: dict[str, Any], theirs: dict[str, Any], base: Path) -> None:
    before = tensors_of(base)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        change = float((theirs[name] - before[name]).abs().max())
        assert change > 0.01
        assert torch.allclose(tensor, theirs[name], atol=1e-4 * change), name

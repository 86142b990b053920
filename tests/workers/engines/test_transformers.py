"""The plain engine is a pure function as well."""

from dataclasses import replace
from pathlib import Path

from app.engines import EngineLaunch
from app.specs import DeploymentOptions
from workers.engines.transformers import engine

LAUNCH = EngineLaunch(
    python=Path("/venv/bin/python"),
    model_dir=Path("/data/artifacts/art-1"),
    served_name="--dtype=x",
    socket=Path("/run/ts/s.sock"),
    options=DeploymentOptions(max_model_len=64, hot_load=True),
    has_gpu=False,
    dtype="float32",
    cpu_threads=4,
)


def test_the_command_line() -> None:
    words = [
        "/venv/bin/python",
        "-I",
        "-m",
        "workers.generation.server",
        "--uds=/run/ts/s.sock",
        "--model=/data/artifacts/art-1",
        "--served-model-name=--dtype=x",
        "--dtype=float32",
        "--max-model-len=64",
        "--hot-load",
    ]
    assert engine.argv(LAUNCH) == words
    assert engine.argv(replace(LAUNCH, options=DeploymentOptions())) == words[:-2]


def test_it_runs_where_the_worker_does_and_fetches_nothing() -> None:
    assert engine.own_python
    assert engine.env(LAUNCH)["HF_HUB_OFFLINE"] == "1"
    assert engine.env(LAUNCH)["OMP_NUM_THREADS"] == "3"

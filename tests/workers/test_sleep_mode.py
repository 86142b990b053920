"""What nvidia-smi says, and what counts when it says nothing that can be trusted."""

from pathlib import Path
from typing import Any, Literal

import pytest

from app.engines import EngineLaunch
from app.specs import DeploymentOptions
from workers import sleep_mode
from workers.sleep_mode import gpu_memory

SMI = """#!/bin/sh
echo "$@" > {folder}/asked
cat {folder}/says
exit {status}
"""


def driver(folder: Path, says: str, monkeypatch: pytest.MonkeyPatch, status: int = 0) -> None:
    (folder / "says").write_text(says)
    program = folder / "nvidia-smi"
    program.write_text(SMI.format(folder=folder, status=status))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("says", "status"),
    [
        ("", 0),
        ("0, [N/A], [N/A]\n", 0),
        ("0, 1024, 81920\n", 0),  # one of two
        ("0, 1024, 81920\n1, 5, 0\n", 0),
        ("0, 1024\n1, 2048\n", 0),
        ("No devices were found\n", 6),
        ("0, 1024, 81920\n1, 2048, 81920\n", 9),
    ],
)
def test_what_cannot_be_trusted_is_nothing(
    says: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(tmp_path, says, monkeypatch, status)
    assert gpu_memory("0,1") == ()


def test_without_a_driver_it_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_memory("0") == ()


def test_the_gpus_of_one_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(tmp_path, "0, 1024, 81920\n3, 73728, 81920\n", monkeypatch)
    first, last = gpu_memory("0,3")
    assert (first.gpu, last.gpu) == (0, 3)
    assert first.used_gb == pytest.approx(1.073741824)
    assert (first.free_part, last.free_part) == (pytest.approx(79 / 80), pytest.approx(0.1))
    asked = "--query-gpu=index,memory.used,memory.total --format=csv,noheader,nounits --id=0,3"
    assert (tmp_path / "asked").read_text().strip() == asked


@pytest.mark.parametrize(("task", "path"), [("generate", "/v1/completions"), ("embed", "/v1/embeddings")])
def test_an_engine_that_wakes_proves_it_by_what_it_is_for(
    task: Literal["generate", "embed"], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answers(_: Path, __: str, to: str, *rest: Any) -> tuple[int, str]:
        asked.append(to)
        return (200 if to in ("/wake_up", path) else 404), ""

    monkeypatch.setattr(sleep_mode, "_ask", answers)
    options = DeploymentOptions(task=task)
    sleep_mode.wake_up(EngineLaunch(Path("python"), Path("m"), "m", Path("s"), options, True, "float16"))
    assert asked == ["/wake_up", path]

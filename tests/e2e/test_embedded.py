"""Without a service, a command that takes a path starts one, and leaves nothing running."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.client import Client
from app.db import Database
from app.models import Job
from app.processes import processes_of_instance
from app.running import running_service
from app.settings import Settings
from tests.support import wait_for

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: the parent-death signal"),
]
COMMAND = str(Path(sys.executable).parent / "tunesmith")


class Box:
    """A data directory without a service, and commands on it."""

    def __init__(self, folder: Path, run_dir: str) -> None:
        self.folder = folder
        self.settings = Settings(data_dir=folder / "data", run_dir=Path(run_dir))
        self.environment = {
            **os.environ,
            "TUNESMITH_DATA_DIR": str(self.settings.data_dir),
            "TUNESMITH_RUN_DIR": run_dir,
            "TUNESMITH_PLUGIN_PACKAGES": "tests.plugs",
            "TUNESMITH_SLOTS": "train:1,light:1",
            "TUNESMITH_WARM_RUNNERS": "0",
            "TUNESMITH_HEARTBEAT_SECONDS": "0.3",
            "TUNESMITH_GRACE_SECONDS": "10",
            "NO_COLOR": "1",
        }

    def start(self, *arguments: object) -> "subprocess.Popen[str]":
        command = [COMMAND, *map(str, arguments)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, **pipes)

    def run(self, *arguments: object) -> "subprocess.CompletedProcess[str]":
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        assert running_service(self.settings) is None
        assert processes_of_instance(self.settings.instance) == []
        return subprocess.CompletedProcess([*map(str, arguments)], process.returncode, out, err)

    def spec(self, **fields: Any) -> Path:
        path = self.folder / "spec.json"
        path.write_text(json.dumps({"type": "sleepy", "experiment_name": "mine", **fields}))
        return path

    def jobs(self) -> list[Job]:
        database = Database(self.settings.database)
        with database.read() as session:
            found = list(session.query(Job).order_by(Job.created_at))
        database.close()
        return found


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    with tempfile.TemporaryDirectory(prefix="ts-box-") as run_dir:
        yield Box(tmp_path, run_dir)


def test_it_waits_for_the_job_and_says_how_it_ended(box: Box) -> None:
    done = box.run("submit", box.spec(), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "succeeded", "the job alone is on stdout"
    assert "one is started for this command" in done.stderr


def test_a_second_command_uses_the_service_of_the_first(box: Box) -> None:
    first = box.start("submit", box.spec(mode="saves_itself"), "--json")
    wait_for(lambda: running_service(box.settings), 30)
    with Client.find(box.settings) as client:
        wait_for(lambda: client.call("GET", "/jobs")["data"], 30)
        job = client.call("GET", "/jobs")["data"][0]
        second = box.start("submit", box.spec(experiment_name="other"), "--json")
        out, err = second.communicate(timeout=60)
        assert (second.returncode, json.loads(out)["status"]) == (0, "queued")
        assert "one is started" not in err
        client.call("POST", f"/jobs/{job['id']}/cancel")
    out, _ = first.communicate(timeout=60)
    assert (first.returncode, json.loads(out)["status"]) == (1, "cancelled")
    assert running_service(box.settings) is None


def test_ctrl_c_puts_the_job_on_hold(box: Box) -> None:
    process = box.start("submit", box.spec(mode="saves_itself"))
    wait_for(lambda: running_service(box.settings), 30)
    with Client.find(box.settings) as client:
        wait_for(lambda: [job for job in client.call("GET", "/jobs")["data"] if job["status"] == "running"], 30)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "is on hold; go on with tunesmith up" in err
    (job,) = box.jobs()
    assert (job.state, job.paused_at is not None) == ("queued", True)
    assert processes_of_instance(box.settings.instance) == []


def test_an_adapter_from_anywhere_is_imported_and_checked(box: Box) -> None:
    """A folder as the guide has it, with adapter_model.bin, outside everything that the service serves."""
    import torch  # noqa: PLC0415

    adapter = box.folder / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {"lora_A": (2, 8), "lora_B": (8, 2)}
    torch.save(
        {f"{module}.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}, adapter / "adapter_model.bin"
    )
    done = box.run("check_adapter", "./adapter")
    assert done.returncode == 0, done.stdout + done.stderr
    report = " ".join(done.stdout.split())
    assert "targets q_proj (1 modules)" in report
    assert "parameters 32 " in report
    assert [job.type for job in box.jobs()] == ["import", "check_adapter"]


def test_a_path_that_leads_nowhere_starts_nothing(box: Box) -> None:
    done = box.run("check_adapter", "./nothing")
    assert done.returncode == 1
    assert "there is nothing at nothing" in done.stderr
    assert not box.settings.data_dir.exists() or not (box.settings.data_dir / "embedded.log").exists()

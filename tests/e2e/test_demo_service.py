"""The service that a demo starts goes with the demo, however that ends."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from app.running import running_service
from app.settings import Settings
from tests.support import wait_for

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.fault,
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: the parent-death signal"),
]
DEMO = """
import sys, time
from pathlib import Path
from app.commands import demo, embedded
with embedded.told_to_stop(), demo._service(Path(sys.argv[1]), demo.Report()):
    Path(sys.argv[2]).touch()
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_no_service_is_left(tmp_path: Path, number: signal.Signals) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    marker = tmp_path / "marker"
    with tempfile.TemporaryDirectory(prefix="ts-demo-") as run_dir:
        environment = {
            **os.environ,
            "TUNESMITH_DATA_DIR": str(settings.data_dir),
            "TUNESMITH_RUN_DIR": run_dir,
            "TUNESMITH_PORT": "0",
            "TUNESMITH_SLOTS": "light:1",
        }
        process = subprocess.Popen(
            [sys.executable, "-c", DEMO, str(tmp_path / "model.gguf"), str(marker)],
            env=environment,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(lambda: marker.exists() or process.poll() is not None, 60)
        about = running_service(settings)
        assert about is not None
        log = settings.data_dir / "demo.log"
        assert stat.S_IMODE(log.stat().st_mode) == 0o600
        assert "ts_" in log.read_text()
        process.send_signal(number)
        assert process.wait(90) == (-number if number == signal.SIGKILL else 128 + number)
        wait_for(lambda: running_service(settings) is None, 20)
        wait_for(lambda: not Path(f"/proc/{about['pid']}").exists(), 20)

"""The plain engine in a process of its own, on a unix socket: what a deployment without vLLM runs."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.support import wait_for
from workers.replica import UnixConnection


@contextmanager
def serving(model: Path, adapters: Mapping[str, Path]) -> Iterator[Path]:
    """Its socket; the model's name is ``plain``, and adapters are loaded under theirs."""
    with tempfile.TemporaryDirectory(prefix="ts-") as folder:
        socket = Path(folder) / "s"
        command = [sys.executable, "-I", "-m", "workers.generation.server", f"--uds={socket}", "--hot-load"]
        options = [f"--model={model}", "--served-model-name=plain", "--dtype=float32"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([*command, *options], env=environment)
        try:
            wait_for(lambda: process.poll() is not None or socket.exists(), 120)
            assert process.poll() is None
            for name, adapter in adapters.items():
                body = json.dumps({"lora_name": name, "lora_path": str(adapter)})
                connection = UnixConnection(str(socket), 60)
                connection.request("POST", "/v1/load_lora_adapter", body, {"content-type": "application/json"})
                assert connection.getresponse().status == 200
                connection.close()
            yield socket
        finally:
            process.terminate()
            process.wait(30)

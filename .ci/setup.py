"""Makes `.venv` (API, worker, development) and `.venv-serve` (vLLM) from the locks: `make setup`.

Standard library only, and quick when there is nothing to do. A stamp is written last, so what an interrupted run left
is made again. `nvidia-smi` decides between the CPU and the CUDA locks.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_STACK = "import torch, transformers, peft, trl, accelerate, datasets, bitsandbytes; from trl import SFTTrainer"
ENGINE = "import transformers, vllm"
# Without byte-compiling thousands of files that are never imported, the installation takes half the time.
PIP = ["-m", "pip", "--disable-pip-version-check", "install", "--no-compile", "--progress-bar", "off"]
LARGE_DOWNLOAD = re.compile(r"\s*(Downloading \S+) \((\d{2,}\.\d MB|[\d.]+ GB)\)")


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def find_python() -> None:
    """Goes on in a newer interpreter where this one is too old, and stops where none has venv."""
    if sys.version_info < (3, 11):  # noqa: UP036
        for name in ("python3.13", "python3.12", "python3.11"):
            path = shutil.which(name)
            if path and subprocess.run([path, "-c", "import venv"], capture_output=True).returncode == 0:
                os.execv(path, [path, *sys.argv])
        sys.exit(
            f"setup: Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}.\n"
            "       Install one, then name it: make setup PYTHON=/path/to/python3.12"
        )
    try:
        import ensurepip  # noqa: F401, PLC0415
        import venv  # noqa: F401, PLC0415
    except ImportError:
        sys.exit(
            f"setup: {sys.executable} cannot make virtual environments (no venv or ensurepip module).\n"
            "       On Debian and Ubuntu: apt-get install python3-venv. Or name another interpreter:\n"
            "       make setup PYTHON=/path/to/python3.12"
        )


def has_gpu() -> bool:
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class Environment:
    def __init__(self, folder: str, locks: list, check: str) -> None:
        self.folder = ROOT / folder
        self.locks = [ROOT / "locks" / name for name in locks]
        self.check = check
        self.python = self.folder / "bin" / "python"
        self.half_made = self.folder / ".half-made"
        # An environment knows its own path and its Python: moved or of another version, it is made anew.
        self.origin = f"{sys.version_info[0]}.{sys.version_info[1]} {self.folder}"

    def key(self, *files: Path) -> str:
        digest = hashlib.sha256(self.origin.encode())
        for file in files:
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def is_stamped(self, name: str, key: str) -> bool:
        stamp = self.folder / name
        usable = os.access(self.python, os.X_OK) and not self.half_made.exists()
        return usable and stamp.exists() and stamp.read_text() == key

    def run(self, *arguments: str, python: str = "") -> None:
        """Runs the environment's Python (or the one named); shows large downloads, and the log's end if it fails."""
        log = []
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        command = [python or str(self.python), *arguments]
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            close_fds=False,
        ) as process:
            for line in process.stdout:
                log.append(line)
                found = LARGE_DOWNLOAD.match(line)
                if found:
                    say(f"  {found[1]} ({found[2]})")
        if process.returncode != 0:
            sys.stdout.writelines(line for line in log[-200:] if not line.startswith("WARNING: Location"))
            sys.exit(f"setup: {self.folder.name} is not finished (see above). `make setup` tries again.")

    def install(self, gpu: bool) -> None:
        key = self.key(*self.locks)
        if self.is_stamped(".locks", key):
            return
        started = time.monotonic()
        self.create()
        constraints = [argument for lock in self.locks for argument in ("-c", str(lock))]
        requirements = [argument for lock in self.locks for argument in ("-r", str(lock))]
        names = " + ".join(str(lock.relative_to(ROOT)) for lock in self.locks)
        # First and with its dependencies: a CPU build where pip finds one, else the CUDA build and what it needs.
        say(f"{self.folder.name}: installing torch")
        self.run(*PIP, *constraints, "torch")
        self.check_build(gpu)
        say(f"{self.folder.name}: installing {names}")
        self.run(*PIP, "--no-deps", *requirements)
        say(f"{self.folder.name}: first imports (slow only this once)")
        self.run("-c", self.check)
        self.half_made.unlink()
        (self.folder / ".locks").write_text(key)
        say(f"{self.folder.name}: ready after {time.monotonic() - started:.0f} s")

    def create(self) -> None:
        """Makes the environment; one that is there is kept, unless it is unusable. Leaves it marked as half-made."""
        made = self.folder / ".origin"
        moved = made.exists() and made.read_text() != self.origin
        if self.folder.exists() and (moved or self.half_made.exists() or not os.access(self.python, os.X_OK)):
            say(f"{self.folder.name}: {'of another Python or place' if moved else 'left half-made'}, starting again")
            self.folder.unlink() if self.folder.is_symlink() else shutil.rmtree(self.folder)
        is_new = not self.folder.exists()
        self.folder.mkdir(exist_ok=True)
        self.half_made.touch()
        if is_new:
            say(f"{self.folder.name}: Python {sys.version.split()[0]} of {sys.base_prefix}")
            self.run("-m", "venv", str(self.folder), python=sys.executable)
        made.write_text(self.origin)

    def install_project(self) -> None:
        key = self.key(ROOT / "pyproject.toml")
        if self.is_stamped(".project", key):
            return
        say(f"{self.folder.name}: installing the project (editable)")
        self.run(*PIP, "--no-deps", "--no-build-isolation", "--no-index", "-e", ".")
        (self.folder / ".project").write_text(key)

    def check_build(self, gpu: bool) -> None:
        (version,) = self.folder.glob("lib/python*/site-packages/torch-*.dist-info")
        cpu_build = "+cpu" in version.name
        if gpu and cpu_build:
            say(f"{self.folder.name}: WARNING, pip chose a CPU build of torch though there is a GPU;")
            say("  look for it in pip's find-links and extra-index-url, then: make clean setup")
        if not gpu and not cpu_build and sys.platform == "linux":
            say(f"{self.folder.name}: pip found no CPU build of torch and took the CUDA build, which is larger;")
            say("  PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL can name a place that has one, then: make clean setup")


def main() -> None:
    find_python()
    gpu = has_gpu()
    kind = "cuda" if gpu else "cpu"
    project = Environment(".venv", ["app.txt", f"train-{kind}.txt", "dev.txt"], TORCH_STACK)
    serve = Environment(".venv-serve", [f"serve-{kind}.txt"], ENGINE)
    with_serve = os.environ.get("SERVE", "1") != "0"
    with (ROOT / ".setup.lock").open("w") as lock:
        # Children hold the lock too: a pip that outlives a killed set-up is waited for.
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up runs here, waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        project.install(gpu)
        project.install_project()
        if with_serve:
            serve.install(gpu)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nsetup: stopped; `make setup` starts again where it can")

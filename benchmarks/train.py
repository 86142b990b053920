"""How fast a fine-tune is beside a plain trl script and LLaMA-Factory, at the same loss.

The same model (SmolLM2-135M-Instruct in float32), the same rows as the same tokens and labels, in the same batches in
the same order, the same LoRA (r 16 on all linear layers), learning rate and number of steps; each contender in a
process of its own, one after the other. Of trl and LLaMA-Factory there are two rows: as they come, and without
gradient checkpointing, which both switch on by themselves and which costs time for memory.

Equal loss: one judge measures the loss of every adapter on the same 64 held-out rows. Losses count as equal within
noise when they differ by less than a twentieth of what training gained, and the curves, step by step on the same
batches, by less than a tenth of their mean over the second half of the run.

LLaMA-Factory runs in an environment of its own, ``.venv-bench/llamafactory``, which ``--with-llamafactory`` makes;
where it is not there it is left out, and the table says so. Nothing else should run on the machine meanwhile.

    make bench-train                        or: .venv/bin/python benchmarks/train.py --steps 40 --with-llamafactory
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
ENVIRONMENTS = ROOT / ".venv-bench"
LLAMAFACTORY = ENVIRONMENTS / "llamafactory"
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
WARM_UP = 2
EQUAL = 0.05
CURVES = 0.1


@dataclass
class Contender:
    """One way to train, and how it did."""

    name: str
    script: str
    python: Path
    about: str
    settings: dict[str, Any] = field(default_factory=dict)
    missing: str | None = None
    """Why it does not take part."""


def contenders() -> list[Contender]:
    own, other = Path(sys.executable), LLAMAFACTORY / "bin" / "python"
    missing = None if other.exists() else f"not installed in {LLAMAFACTORY.relative_to(ROOT)}: add --with-llamafactory"
    as_it_comes, without = {"checkpointing": None}, {"checkpointing": False}
    return [
        Contender("tunesmith", "tunesmith.py", own, "the recipe sft with its defaults"),
        Contender("trl", "plain_trl.py", own, "SFTTrainer as it comes", as_it_comes),
        Contender("trl-lean", "plain_trl.py", own, "without gradient checkpointing", without),
        Contender("llamafactory", "llamafactory.py", other, "as it comes", as_it_comes, missing),
        Contender("llamafactory-lean", "llamafactory.py", other, "without gradient checkpointing", without, missing),
    ]


def install_llamafactory() -> None:
    """An environment with the versions of ``llamafactory.txt`` and our torch; quick when it is there."""
    python = LLAMAFACTORY / "bin" / "python"
    stamp = LLAMAFACTORY / ".made"
    if stamp.exists():
        return
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--no-compile", "--quiet"]
    torch = next(line for line in (ROOT / "locks" / "train-cpu.txt").read_text().splitlines() if "torch==" in line)
    print(f"making {LLAMAFACTORY.relative_to(ROOT)}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(LLAMAFACTORY)], check=True)
    subprocess.run([*pip, torch], check=True)
    subprocess.run([*pip, "--no-deps", "-r", str(HERE / "llamafactory.txt")], check=True)
    packages = next((LLAMAFACTORY / "lib").glob("python*/site-packages"))
    # LLaMA-Factory imports it for audio, and its builds want CUDA.
    (packages / "torchaudio.py").write_text('"""Of no use for texts."""\n')
    stamp.touch()


def call(contender: str, python: Path, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs a script of ``contenders/`` with a request on its stdin; ends the benchmark with its log when it fails."""
    result = folder / f"{request.get('name', contender)}.json"
    # A settled environment: what is set for our own processes may mean something to the others.
    kept = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_HOME": str(folder / "hub"), "PYTHONDONTWRITEBYTECODE": "1"}
    found = subprocess.run(
        [str(python), str(HERE / "contenders" / contender)],
        input=json.dumps({**request, "folder": str(folder), "result": str(result)}),
        env=environment,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if found.returncode:
        sys.exit(f"{contender} failed:\n{found.stdout[-4000:]}")
    return dict(json.loads(result.read_text()))


def timing(found: dict[str, Any], tokens: list[int]) -> dict[str, float]:
    """Seconds a step and tokens a second, padding not counted, without the first steps."""
    seconds = [later - earlier for earlier, later in zip(found["times"], found["times"][1:], strict=False)][WARM_UP:]
    return {
        "seconds_a_step": statistics.mean(seconds),
        "median_seconds_a_step": statistics.median(seconds),
        "tokens_a_second": sum(tokens[WARM_UP:]) / sum(seconds),
    }


def curve_difference(losses: list[float], others: list[float]) -> float:
    """Mean distance of two curves over the second half of the run, as a share of their mean there."""
    half = slice(len(losses) // 2, None)
    apart = statistics.mean(abs(a - b) for a, b in zip(losses[half], others[half], strict=True))
    return apart / statistics.mean([*losses[half], *others[half]])


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    models = ENVIRONMENTS / "models"
    models.mkdir(parents=True, exist_ok=True)
    shared = {
        "models": str(models),
        "data": arguments.data,
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "learning_rate": arguments.learning_rate,
        "max_length": arguments.max_length,
        "seed": arguments.seed,
        "lora": LORA,
    }
    data = call("prepare.py", Path(sys.executable), {**shared, "name": "data"}, folder)
    shared["base"] = data["base"]
    runs: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for one in contenders():
        if arguments.only and one.name not in arguments.only:
            continue
        if one.missing:
            skipped[one.name] = one.missing
            continue
        print(f"training: {one.name}", file=sys.stderr)
        found = call(one.script, one.python, {**shared, **one.settings, "name": one.name}, folder)
        runs[one.name] = {"about": one.about, **found, **timing(found, data["step_tokens"])}
    adapters = {"base": None} | {name: run["adapter"] for name, run in runs.items()}
    judged = call("judge.py", Path(sys.executable), {**shared, "name": "judged", "adapters": adapters}, folder)
    ours = runs.get("tunesmith")
    base = statistics.mean(judged["base"])
    for name, run in runs.items():
        run["held_out_loss"] = statistics.mean(judged[name])
        del run["adapter"], run["times"]
        if ours is None or run is ours:
            continue
        run["held_out_apart"] = abs(run["held_out_loss"] - ours["held_out_loss"]) / (base - ours["held_out_loss"])
        run["curves_apart"] = curve_difference(ours["losses"], run["losses"])
        run["equal"] = run["held_out_apart"] < EQUAL and run["curves_apart"] < CURVES
        run["ours_is_faster_by"] = run["seconds_a_step"] / ours["seconds_a_step"]
    return {
        "data": {key: data[key] for key in ("rows", "tokens_a_row", "padding", "grouped")},
        "settings": {**{key: shared[key] for key in ("steps", "batch_size", "learning_rate", "seed")}, "lora": LORA},
        "base_held_out_loss": base,
        "runs": runs,
        "skipped": skipped,
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
    }


def show(found: dict[str, Any]) -> None:
    runs, data = found["runs"], found["data"]
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(
        *("contender", "s a step", "median", "tokens/s", "peak RSS", "held-out loss", "apart", "curves apart", "equal"),
        "ours is faster by",
        title=f"{found['settings']['steps']} steps of {found['settings']['batch_size']} rows of "
        f"{data['tokens_a_row']:.1f} tokens, {data['padding']:.0%} padding, {found['cpus']} CPUs; "
        f"held-out loss of the base {found['base_held_out_loss']:.3f}",
    )
    for name, run in runs.items():
        compared = "equal" in run
        table.add_row(
            f"{name}: {run['about']}",
            f"{run['seconds_a_step']:.2f}",
            f"{run['median_seconds_a_step']:.2f}",
            f"{run['tokens_a_second']:.0f}",
            f"{run['peak_rss'] / 1e9:.2f} GB",
            f"{run['held_out_loss']:.4f}",
            f"{run['held_out_apart']:.1%}" if compared else "",
            f"{run['curves_apart']:.1%}" if compared else "",
            ("yes" if run["equal"] else "NO") if compared else "",
            f"{run['ours_is_faster_by']:.2f} ×" if compared else "",
        )
    console.print(table)
    steps = found["settings"]["steps"]
    curve = Table("step", *runs, title="training loss")
    for step in sorted({*range(0, steps, max(steps // 10, 1)), steps - 1}):
        curve.add_row(str(step + 1), *(f"{run['losses'][step]:.4f}" for run in runs.values()))
    console.print(curve)
    for name, reason in found["skipped"].items():
        print(f"left out: {name}: {reason}")


def main() -> None:
    """Prints two tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--data", default="numbers", help="numbers, or a file that can be learnt from")
    parser.add_argument("--only", nargs="+", help=f"of {', '.join(one.name for one in contenders())}")
    parser.add_argument("--with-llamafactory", action="store_true", help="install it first, if it is not there")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.with_llamafactory:
        install_llamafactory()
    with tempfile.TemporaryDirectory(prefix="ts-train-") as name:
        found = measure(arguments, Path(name))
    print(json.dumps(found, indent=2)) if arguments.json else show(found)


if __name__ == "__main__":
    main()

"""The guide that the product is built after: its blocks are run, as docs/guide-deviations.md says for each.

Substitutions: the model, flags for data, reward model and steps, experiment names, ``import torch``.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from app.client import Client
from app.running import running_service
from app.settings import Settings
from tests.guide import BASE, BLOCKS, SCRIPTS, needs_guide
from tests.support import wait_for
from tests.workers.conftest import conversation, make_servable_model

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "guide-deviations.md").read_text()
ENGINE = Settings().engine_python
# Of a machine without a GPU: a small cache, nothing compiled, no second process that imports everything again.
ON_A_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
SFT, REWARD, PPO = "sft_qwen_lora_r16", "reward_qwen_qlora", "ppo_qwen_lora"

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300), needs_guide]

# What the tests below and those in test_guide_configs.py run, by the number of the block; the page says the same.
RUN = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15, 16, 17}


@dataclass
class Guide:
    """A folder as the guide's reader has it: scripts, configs and ``outputs``, with a service behind."""

    folder: Path
    environment: dict[str, str]
    settings: Settings
    client: Client
    again: str = ""
    """The job of config_used.yaml, posted again."""

    def shell(self, text: str) -> str:
        """Runs commands as they stand; what they print."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def job(self, name: str, type_: str = "train") -> dict[str, Any]:
        """The newest job of a name and type that succeeded."""
        query = {"type": type_, "status": "succeeded", **({"experiment_name": name} if name else {})}
        found: list[dict[str, Any]] = self.client.call("GET", "/jobs", params=query)["data"]
        return found[0]


def train(number: int, **flags: Any) -> str:
    """A training block with a model that is here, data, and few steps."""
    more = " ".join(f"--{name} {value}" for name, value in {"model": "tiny", "max_steps": 2, **flags}.items())
    text, count = re.subn(
        r"^(python main\.py .*)$", rf"\1 {more} --set training.save_steps=1", BLOCKS[number], flags=re.M
    )
    assert count == 1
    return text


def with_names(text: str) -> str:
    """A merge block with the names of the runs that were made here."""
    for old, new in ((BASE, "tiny"), ("sft_lora/checkpoint-1000", "sft_lora/checkpoint-2"), ("sft_lora", SFT)):
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guide]:
    """A service of real processes with a tiny model, and a folder with the scripts and the guide's two configs."""
    root = tmp_path_factory.mktemp("guide")
    make_servable_model(root / "models" / "tiny")
    folder = root / "project"
    folder.mkdir()
    for script in ("main.py", "merge_peft_model.py", "scripts"):
        (folder / script).symlink_to(SCRIPTS / script)
    (folder / "config.yaml").write_text(BLOCKS[1])
    (folder / "config_qlora.yaml").write_text(BLOCKS[2])
    rows = [conversation(number) for number in range(24)]
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    wrong = {"role": "assistant", "content": "I pass."}
    pairs = [{"messages": row[:2], "chosen": row[2], "rejected": wrong} for row in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(root),
        "LANG": "C.UTF-8",
        "TUNESMITH_DATA_DIR": str(root / "data"),
        "TUNESMITH_MODEL_ROOTS": str(root / "models"),
        "TUNESMITH_PORT": "0",
        "TUNESMITH_SLOTS": "train:2,light:2",
        "TUNESMITH_WARM_RUNNERS": "2",
        **{name: os.environ[name] for name in ("HF_HOME",) if name in os.environ},
    }
    settings = Settings(data_dir=root / "data", port=0)
    log = root / "up.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-m", "app.cli", "up"], env=environment, stdout=output, stderr=output
        )
    try:
        wait_for(lambda: running_service(settings) or process.poll() is not None, 60)
        assert process.poll() is None, log.read_text()
        with Client.find(settings) as client:
            made = Guide(folder, environment, settings, client)
            made.shell(f"tunesmith import {root}/models/tiny --name tiny")
            yield made
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def trained(guide: Guide) -> Guide:
    """Blocks 4, 5 and the first command of 16 have been run, side by side."""
    commands = [
        train(4, dataset="talks.jsonl"),
        train(5, dataset="pairs.jsonl"),
        train(16, dataset="talks.jsonl").replace("20241201", "$(date +%Y%m%d)"),
    ]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(guide.shell, commands))
    used = guide.folder / "outputs" / SFT / "config_used.yaml"
    guide.again = guide.client.submit_text(used.read_bytes(), "application/yaml")["id"]
    return guide


@pytest.fixture(scope="module")
def merged(trained: Guide) -> Guide:
    """Block 9 has been run."""
    printed = trained.shell(with_names(BLOCKS[9]))
    # The answer of the last command, to the prompt that block 11 gives the model.
    assert re.search(r"^ +asked +你好，请介绍一下自己。\n +answers +'", printed, re.MULTILINE), printed
    return trained


# The page


def documented() -> dict[int, str]:
    """Number of a block → what the page says happens to it."""
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| (run|run with substitution|shown only) \| .+ \|$", PAGE, re.MULTILINE)
    assert len({number for number, _ in rows}) == len(rows), "a block stands twice"
    return {int(number): how for number, how in rows}


def test_every_block_of_the_guide_is_on_the_page_and_no_other() -> None:
    assert set(documented()) == set(BLOCKS)


def test_what_the_page_says_is_run_is_run_here() -> None:
    assert {number for number, how in documented().items() if how != "shown only"} == RUN


# The blocks


def test_training_leaves_what_the_guide_draws(trained: Guide) -> None:
    """Blocks 4, 5 and 7."""
    for name, method in ((SFT, "lora"), (REWARD, "qlora")):
        job = trained.job(name)
        assert job["result"]["steps"] == 2
        assert (job["resolved_spec"]["model"]["quantization_config"] is not None) == (method == "qlora")
    events = trained.client.call("GET", f"/jobs/{trained.job(REWARD)['id']}/events", params={"limit": 100})["data"]
    assert "dtype_replaced" in {event["code"] for event in events} or trained.job(REWARD)["result"]["device"] != "cpu"
    drawn = BLOCKS[7].replace("checkpoint-500", "checkpoint-1").replace("checkpoint-1000", "checkpoint-2")
    drawn = drawn.replace("adapter_model.bin", "adapter_model.safetensors")
    for path in paths(drawn):
        assert (trained.folder / path).exists(), path
    assert not list((trained.folder / "outputs" / SFT / "checkpoint-1").glob("optimizer*"))


def test_ppo_learns_from_the_reward_model(trained: Guide) -> None:
    """Block 6."""
    trained.shell(train(6, dataset="talks.jsonl", reward_model=REWARD, max_steps=1))
    job = trained.job(PPO)
    assert (job["status"], job["result"]["steps"]) == ("succeeded", 1)
    assert (trained.folder / "outputs" / PPO / "final_model" / "adapter_config.json").is_file()


def test_a_run_is_named_by_date_and_its_config_kept(trained: Guide) -> None:
    """Block 16: without an algorithm it trains SFT, byte for byte what block 4 trained."""
    (outputs,) = (trained.folder / "outputs").glob("sft_qwen7b_lora_r16_alpha32_*")
    assert trained.job(outputs.name)["status"] == "succeeded"
    assert weights(trained, outputs.name) == weights(trained, SFT)
    assert (outputs / "config_used.yaml").read_text() == BLOCKS[1], "copied over ours"
    assert trained.job(outputs.name)["resolved_spec"]["training"]["max_steps"] == 2


def test_an_adapter_is_saved_by_itself(trained: Guide) -> None:
    """Block 8."""
    trained.shell(with_names(BLOCKS[8]))
    saved = trained.folder / "saved_adapter"
    assert (saved / "adapter_config.json").is_file()
    assert (saved / "adapter_model.safetensors").read_bytes() == weights(trained, SFT)
    assert not saved.is_symlink()


def test_the_simple_script_checks_merges_and_validates(merged: Guide) -> None:
    """Block 9; of the checkpoint nothing but its folder was named."""
    report = merged.job("", "check_adapter")["result"]["report"]
    assert (report["ok"], report["r"], report["alpha"], report["base"]) == (True, 16, 32, "tiny")
    certificate = merged.job("", "merge")["result"]["certificate"]
    assert certificate["verdict"] in ("passed", "no_effect_to_measure")
    assert merged.job("", "validate")["result"]["report"]["ok"]
    folder = merged.folder / "merged_model"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert "./merged_model" not in json.dumps(merged.job("", "validate")["spec"]), "the copy is known as its artifact"


def test_the_merged_model_needs_only_transformers(merged: Guide) -> None:
    """Block 11, in a Python that does not look at this project."""
    code = f"import torch\n{BLOCKS[11]}"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=merged.folder,
        env={**merged.environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.skipif(ENGINE is None, reason="needs vLLM: make setup, or TUNESMITH_SERVE_PYTHON")
@pytest.mark.timeout(600)
def test_the_merged_model_is_served_by_vllm_alone(merged: Guide, tmp_path: Path) -> None:
    """Block 12 without its first line: vLLM's own Python, a port that is free, this machine alone, nothing compiled."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = BLOCKS[12].partition("python -m ")[2]
    for old, new in (("0.0.0.0", "127.0.0.1"), ("--port 8000", f"--port {port} --enforce-eager")):
        assert old in command
        command = command.replace(old, new)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = tmp_path / "vllm.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {ENGINE} -I -m {command}"],
            cwd=merged.folder,
            env={**environment, **ON_A_CPU},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            wait_for(lambda: process.poll() is not None or is_up(client), 480)
            assert process.poll() is None, log.read_text()[-4000:]
            question = {"messages": [{"role": "user", "content": "你好，请介绍一下自己。"}], "model": "my-model"}
            answer = client.post("/v1/chat/completions", json={**question, "max_tokens": 8, "ignore_eos": True})
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == "my-model"
            assert answer.json()["usage"]["completion_tokens"] == 8
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def is_up(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/health").status_code == 200
    return False


def test_the_advanced_script_merges_in_the_asked_dtype(merged: Guide) -> None:
    """Block 10: the same output path again, which is a copy that nobody touched and so is replaced."""
    merged.shell(with_names(BLOCKS[10]))
    config = json.loads((merged.folder / "merged_model" / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert merged.job("", "merge")["result"]["certificate"]["dtype"] == "float16"


def test_models_lie_where_the_guide_draws_them(merged: Guide) -> None:
    """Block 17, with the names of the runs made here."""
    drawn = BLOCKS[17]
    names = {"Qwen2.5-7B-Instruct": "tiny", "sft_lora_v1": f"{SFT}_v1", "reward_qlora_v1": f"{REWARD}_v1"}
    names |= {"ppo_lora_v1": f"{SFT}_v1", "sft_merged_v1": "merged_model_v1", "ppo_merged_v1": "merged_model_v1"}
    for old, new in names.items():
        assert old in drawn
        drawn = drawn.replace(old, new)
    for path in paths(drawn):
        assert (merged.settings.data_dir / path).is_dir(), path


def test_config_used_posted_again_gives_the_same_bytes(trained: Guide) -> None:
    for _ in trained.client.follow(trained.again):
        pass
    again = trained.client.call("GET", f"/jobs/{trained.again}")
    assert again["status"] == "succeeded", again["error"]
    assert weights(trained, f"{SFT}_v2") == weights(trained, SFT)
    used = trained.folder / "outputs" / SFT / "config_used.yaml"
    assert again["resolved_spec"] == yaml.safe_load(used.read_text())


# Shown only


def test_peft_is_new_enough_for_the_guide() -> None:
    """Block 18 installs it; here the lock does."""
    (wanted,) = re.findall(r"peft>=([\d.]+)", BLOCKS[18])
    assert tuple(map(int, version("peft").split(".")[:3])) >= tuple(map(int, wanted.split(".")))


def paths(drawing: str) -> list[str]:
    """Paths of a drawn tree, the dots that mean "and so on" left out."""
    found: list[str] = []
    parents: list[str] = []
    for line in drawing.splitlines():
        name = re.sub(r"#.*", "", line).lstrip("│├└─ ").strip()
        depth = (len(line) - len(line.lstrip("│├└─ "))) // 4
        if name and name != "...":
            parents[depth:] = [name.rstrip("/")]
            found.append("/".join(parents))
    return found


def weights(guide: Guide, run: str) -> bytes:
    """The trained adapter of a run."""
    return (guide.folder / "outputs" / run / "final_model" / "adapter_model.safetensors").read_bytes()

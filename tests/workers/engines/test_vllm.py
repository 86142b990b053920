"""The vLLM engine is a pure function: what it would start is compared word for word."""

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file

from app.engines import EngineLaunch
from app.serving import OnlineQuantization
from app.settings import PROJECT_ROOT
from app.specs import DeploymentOptions
from workers.engines.vllm import engine
from workers.facts import lora_modules

CPU = EngineLaunch(
    python=Path("/venv/bin/python"),
    model_dir=Path("/data/artifacts/art-1"),
    served_name="support",
    socket=Path("/run/ts/s.sock"),
    options=DeploymentOptions(),
    has_gpu=False,
    dtype="bfloat16",
)


def test_the_command_line_on_a_cpu() -> None:
    assert engine.argv(CPU) == [
        "/venv/bin/python",
        "-I",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--uds=/run/ts/s.sock",
        "--model=/data/artifacts/art-1",
        "--served-model-name=support",
        "--dtype=bfloat16",
        "--runner=generate",
        "--max-model-len=auto",
        "--shutdown-timeout=25",
        "--no-enable-log-requests",
        "--disable-uvicorn-access-log",
        "--disable-fastapi-docs",
        "--allowed-media-domains=media.invalid",
        "--enforce-eager",
    ]


def test_the_command_line_on_a_gpu() -> None:
    options = DeploymentOptions(max_model_len=4096, gpu_memory_utilization=0.5)
    launch = replace(CPU, has_gpu=True, options=options, dtype="float16", chat_template=Path("/data/t.jinja"))
    assert engine.argv(launch) == [
        "/venv/bin/python",
        "-I",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--uds=/run/ts/s.sock",
        "--model=/data/artifacts/art-1",
        "--served-model-name=support",
        "--dtype=float16",
        "--runner=generate",
        "--max-model-len=4096",
        "--shutdown-timeout=25",
        "--no-enable-log-requests",
        "--disable-uvicorn-access-log",
        "--disable-fastapi-docs",
        "--allowed-media-domains=media.invalid",
        "--gpu-memory-utilization=0.5",
        "--tensor-parallel-size=1",
        "--chat-template=/data/t.jinja",
    ]


def test_embeddings_are_another_runner_and_nothing_of_answers() -> None:
    launch = replace(CPU, options=DeploymentOptions(task="embed"))
    others = [word for word in engine.argv(CPU) if not word.startswith("--runner=")]
    added = ["--runner=pooling", "--convert=embed"]
    assert sorted(engine.argv(launch)) == sorted([*others, *added])
    assert launch.probe == ("/v1/embeddings", {"model": "support", "input": "Hi"})
    assert CPU.probe == ("/v1/completions", {"model": "support", "prompt": "Hi", "max_tokens": 1})


def test_fewer_bits_are_asked_for_by_name_on_a_gpu() -> None:
    launch = replace(CPU, has_gpu=True)
    asked = replace(launch, options=DeploymentOptions(quantization="fp8_per_block"))
    assert engine.argv(asked) == [*engine.argv(launch), "--quantization=fp8_per_block"]


def test_every_name_for_fewer_bits_is_one_of_vllms() -> None:
    found = list(PROJECT_ROOT.glob(".venv-serve/lib/python3*/site-packages/vllm/config/quantization.py"))
    if not found:
        pytest.skip("there is no environment with vLLM")
    source = found[0].read_text().partition("\n_ONLINE_SHORTHANDS")[2].partition("\n}")[0]
    names = set(re.findall(r'^    "(\w+)": QuantizationConfigArgs', source, re.MULTILINE))
    assert set(get_args(OnlineQuantization)) <= names


def test_the_parsers_of_the_models_family() -> None:
    launch = replace(CPU, tool_call_parser="hermes", reasoning_parser="deepseek_r1")
    added = ["--enable-auto-tool-choice", "--tool-call-parser=hermes", "--reasoning-parser=deepseek_r1"]
    assert engine.argv(launch) == engine.argv(CPU) + added


def test_room_for_adapters_is_made_only_where_some_can_come() -> None:
    options = DeploymentOptions(hot_load=True, max_lora_rank=32, max_loras=8, max_adapters=4)
    more = engine.argv(replace(CPU, options=options))
    assert [word for word in more if word not in engine.argv(CPU)] == [
        "--enable-lora",
        "--max-lora-rank=32",
        "--max-loras=4",
        "--max-cpu-loras=4",
        "--trust-request-chat-template",
    ]
    assert engine.env(replace(CPU, options=options))["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


@pytest.mark.parametrize(
    "name",
    ["--middleware=os", "-h", "a b", "a;rm -rf /", "$(id)", "a\nb", "a=b", "ft:Qwen/Q2:x", '{"a":1}', "ü", "'\"", ""],
)
def test_a_served_name_stays_one_word(name: str) -> None:
    plain = engine.argv(CPU)
    nasty = engine.argv(replace(CPU, served_name=name))
    assert nasty == [f"--served-model-name={name}" if word == "--served-model-name=support" else word for word in plain]


def test_no_route_that_changes_the_engine_is_open() -> None:
    for launch in (CPU, replace(CPU, has_gpu=True)):
        env = engine.env(launch)
        assert env["VLLM_SERVER_DEV_MODE"] == "0"
        assert env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "0"
        assert env["HF_HUB_OFFLINE"] == "1"
        assert env["SPT_NOENV"] == "1"


def test_the_routes_of_sleep_are_open_only_where_it_may_sleep() -> None:
    awake = replace(CPU, has_gpu=True)
    sleeps = replace(awake, sleep_mode=True)
    assert [word for word in engine.argv(sleeps) if word not in engine.argv(awake)] == ["--enable-sleep-mode"]
    changed = dict(set(engine.env(sleeps).items()) - set(engine.env(awake).items()))
    assert changed == {"VLLM_SERVER_DEV_MODE": "1"}
    assert "--enable-sleep-mode" not in engine.argv(replace(CPU, sleep_mode=True)), "only a GPU has what it gives back"
    assert engine.env(replace(CPU, sleep_mode=True))["VLLM_SERVER_DEV_MODE"] == "0"


def test_only_a_cpu_engine_gets_cpu_settings() -> None:
    assert engine.env(replace(CPU, cpu_threads=6))["OMP_NUM_THREADS"] == "5"
    assert engine.env(replace(CPU, cpu_threads=1))["OMP_NUM_THREADS"] == "1"
    assert not [key for key in engine.env(replace(CPU, has_gpu=True)) if "CPU" in key or "OMP" in key]


def test_adapters_are_kept_off_the_output_layer_on_a_cpu() -> None:
    """Its kernel there ends the engine when two requests at once ask for the log-probabilities of their prompts."""
    options = DeploymentOptions(hot_load=True)
    modules = ("down_proj", "q_proj")
    command = engine.argv(replace(CPU, options=options, lora_modules=modules))
    at = command.index("--lora-target-modules")
    assert command[at + 1 : at + 3] == ["down_proj", "q_proj"]
    assert command[at + 3].startswith("--")
    assert "--lora-target-modules" not in engine.argv(replace(CPU, options=options))
    assert "--lora-target-modules" not in engine.argv(replace(CPU, lora_modules=modules))
    assert "--lora-target-modules" not in engine.argv(replace(CPU, options=options, lora_modules=modules, has_gpu=True))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["model.layers.0.mlp.up_proj", "model.embed_tokens", "lm_head"], ("up_proj",)),
        (["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"], ("q_proj",)),
        (["model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate"], ()),
        (["transformer.h.0.attn.c_attn"], ()),
    ],
)
def test_only_the_usual_dense_modules_are_named(names: list[str], found: tuple[str, ...], tmp_path: Path) -> None:
    """Of a model with others nothing is said: a name that the engine cannot take would keep it from starting."""
    vectors = {"model.norm.weight": torch.zeros(2)}
    save_file({f"{name}.weight": torch.zeros(2, 2) for name in names} | vectors, tmp_path / "model.safetensors")
    assert lora_modules(tmp_path) == found


def test_damaged_weights_are_left_to_the_engine(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    assert lora_modules(tmp_path) == ()

"""The vLLM engine is a pure function: what it would start is compared word for word."""

from dataclasses import replace
from pathlib import Path

import pytest

from app.catalog import EngineLaunch
from app.specs import DeploymentOptions
from workers.engines.vllm import engine

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


def test_only_a_cpu_engine_gets_cpu_settings() -> None:
    assert engine.env(replace(CPU, cpu_threads=6))["OMP_NUM_THREADS"] == "5"
    assert engine.env(replace(CPU, cpu_threads=1))["OMP_NUM_THREADS"] == "1"
    assert not [key for key in engine.env(replace(CPU, has_gpu=True)) if "CPU" in key or "OMP" in key]

"""Fewer bits a weight, by llm-compressor in an environment of its own: held against the source before it counts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from app.errors import Code, RunError
from app.settings import Settings
from tests.support import make_adapter_folder
from tests.workers.conftest import make_model
from tests.workers.context import RecordingContext
from workers.context import JobContext
from workers.loading.outside import run_outside
from workers.operations import quantize
from workers.operations.quantize import QuantizeSpec, run

PYTHON = Settings().quantizer_python


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(
        tmp_path_factory.mktemp("models") / "wide", hidden_size=128, intermediate_size=256, num_key_value_heads=1
    )


def context(root: Path, model: Path, python: Path, **more: Path) -> RecordingContext:
    ctx = RecordingContext(root, {"model": model, **more})
    ctx.interpreters["quantize"] = python
    return ctx


@pytest.mark.skipif(PYTHON is None, reason="needs an environment with llm-compressor (docs/export.md)")
@pytest.mark.e2e
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("scheme", "calibrated", "least"),
    [("w8a16", False, 0.95), ("w4a16", False, 0.5), ("w4a16", True, 0.5), ("w8a8", False, 0.9), ("fp8", False, 0.9)],
)
def test_a_quantised_model_says_what_its_source_says(
    scheme: str, calibrated: bool, least: float, tmp_path: Path, wide: Path, numbers: Path
) -> None:
    assert PYTHON is not None
    more = {"calibration_file": "file-1", "calibration_rows": 16} if calibrated else {}
    ctx = context(tmp_path, wide, PYTHON, **({"calibration_file": numbers} if calibrated else {}))
    run(QuantizeSpec.model_validate({"model": "x", "scheme": scheme, "output_name": "small", **more}), ctx)
    certificate = json.loads((ctx.folder / "certificate.json").read_bytes())
    assert certificate == ctx.results["certificate"]
    assert certificate["top1_agreement"] >= least
    assert certificate["kl"] >= 0
    assert certificate["method"] == ("GPTQ" if calibrated else "rounding")
    block = json.loads((ctx.folder / "config.json").read_bytes())["quantization_config"]
    weights = block["config_groups"]["group_0"]["weights"]
    assert weights["num_bits"] == (4 if scheme == "w4a16" else 8)
    assert {"chat_template.jinja", "tokenizer.json", "LICENSE"} <= {path.name for path in ctx.folder.iterdir()}
    assert ctx.phases == ["loading", "loading", "quantising", "saving", "validating"]


def fake(folder: Path, body: str) -> Path:
    script = folder / "script.py"
    script.write_text("import json, sys, time\n" + body)
    return script


def outside(folder: Path, body: str) -> list[Any]:
    told: list[Any] = []
    run_outside(Path(sys.executable), fake(folder, body), {"a": 1}, folder, told=told.append, tick=lambda: None)
    return told


def test_lines_of_json_come_back_and_noise_does_not_hurt(tmp_path: Path) -> None:
    body = 'print("noise"); print(json.dumps(json.load(open(sys.argv[1])))); print("more", file=sys.stderr)'
    assert outside(tmp_path, body) == [{"a": 1}]


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ('raise SystemExit("no such scheme")', Code.RUN_FAILED, "no such scheme"),
        ("import os; os.kill(os.getpid(), 9)", Code.OUT_OF_MEMORY, "status -9"),
        ('raise RuntimeError("OutOfMemoryError: CUDA")', Code.OUT_OF_MEMORY, "CUDA"),
    ],
)
def test_a_program_that_fails_is_quoted(tmp_path: Path, body: str, code: Code, says: str) -> None:
    with pytest.raises(RunError) as caught:
        outside(tmp_path, body)
    assert caught.value.code is code
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ({"top1_agreement": 0.2, "non_finite_logits": 0}, Code.VALIDATION_FAILED),
        ({"top1_agreement": 0.9, "non_finite_logits": 3}, Code.NON_FINITE_WEIGHTS),
    ],
)
def test_another_model_is_not_published(
    found: dict[str, Any], code: Code, tmp_path: Path, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program's findings are planted: what it writes is judged, whoever wrote it."""
    result = {"kl": 0.1, "tokens": 9, "source_tokens": [5], "tokens_made": [6], "versions": {}, **found}
    body = f"""
target = json.load(open(sys.argv[1]))["target"]
open(target + "/config.json", "w").write('{{"quantization_config": {{"quant_method": "compressed-tensors"}}}}')
print(json.dumps({{"result": {result!r}}}))
"""
    monkeypatch.setattr(quantize, "SCRIPT", fake(tmp_path, body))
    with pytest.raises(RunError) as caught:
        run(QuantizeSpec(model="x"), context(tmp_path / "run", wide, Path(sys.executable)))
    assert caught.value.code is code


def test_a_model_that_does_not_say_that_it_is_quantised(
    tmp_path: Path, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
target = json.load(open(sys.argv[1]))["target"]
open(target + "/config.json", "w").write('{}')
print(json.dumps({"result": {"source_tokens": [], "tokens_made": [], "non_finite_logits": 0}}))
"""
    monkeypatch.setattr(quantize, "SCRIPT", fake(tmp_path, body))
    with pytest.raises(RunError, match="does not say"):
        run(QuantizeSpec(model="x"), context(tmp_path / "run", wide, Path(sys.executable)))


def test_without_an_environment_it_says_how_to_make_one(tmp_path: Path) -> None:
    ctx = JobContext(tmp_path, {"job_id": "job-1", "inputs": {}}, RecordingContext(tmp_path / "x").catalog)
    with pytest.raises(RunError) as caught:
        ctx.interpreter("quantize")
    assert caught.value.code is Code.ENGINE_MISSING
    assert "TUNESMITH_QUANTIZE_PYTHON" in (caught.value.hint or "")


def test_calibration_is_for_weights_alone() -> None:
    with pytest.raises(ValidationError, match="needs no calibration"):
        QuantizeSpec(model="x", scheme="fp8", calibration_file="file-0b7c1d2e3f405162738495a6")


def test_what_cannot_be_quantised_is_refused_at_submit(api: TestClient, models: Path) -> None:
    make_adapter_folder(models / "adapter")
    answer = api.post("/jobs", json={"type": "quantize", "model": str(models / "adapter")})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "wrong_kind")
    assert "quantize its result" in answer.json()["error"]["hint"]
    (models / "small").mkdir()
    (models / "small" / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    answer = api.post("/jobs", json={"type": "quantize", "model": str(models / "small")})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "quantised_base")
    answer = api.post("/jobs", json={"type": "quantize", "model": str(models / "tiny"), "scheme": "w2"})
    assert answer.status_code == 400
    assert "w4a16" in answer.text


def test_the_program_needs_nothing_of_ours() -> None:
    code = f"import runpy, sys; runpy.run_path({str(quantize.SCRIPT)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-I", "-c", code], check=True)

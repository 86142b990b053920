"""Quantise: a whole model with 8 or 4 bits a weight, for vLLM, by llm-compressor; proved by loading it again."""

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from app.catalog import Operation, RunContext
from app.errors import Code, RunError
from app.specs import FileRef, JobSpec, ModelRef, Name, conflict
from workers.loading import PROMPTS, copy_companions, load_tokenizer, prompt_ids, stop_tokens
from workers.loading.conversations import load_dataset
from workers.loading.outside import run_outside

SCRIPT = Path(__file__).parents[1] / "quantizer.py"
CERTIFICATE = "certificate.json"
LEAST_AGREEMENT = 0.5
"""Below this share of equal first choices the result is another model."""


class QuantizeSpec(JobSpec):
    """Write a whole model with fewer bits a weight, as vLLM reads it (compressed-tensors)."""

    type: Literal["quantize"] = "quantize"
    model: ModelRef = Field(description="A merged, trained or imported model; an adapter is merged first.")
    scheme: Literal["w8a16", "w4a16", "w8a8", "fp8"] = Field(
        "w8a16",
        description="Bits of weights and activations: whole numbers of 8 or 4 bits, activations as they are; w8a8 also "
        "rounds activations to 8 bits; fp8 both to 8-bit floating point.",
    )
    calibration_file: FileRef | None = Field(
        None, description="Rows of training data on which rounding is made least harmful (GPTQ; w8a16 and w4a16)."
    )
    calibration_rows: int = Field(256, ge=8, le=2048, description="So many rows of it.")
    calibration_max_length: int = Field(1024, ge=16, le=8192, description="Tokens of a row; longer ones are cut.")
    output_name: Name | None = Field(None, description="Name of the result; default: the experiment name.")
    aliases: ClassVar[dict[str, str]] = {"artifact": "model"}

    @model_validator(mode="after")
    def _check(self) -> "QuantizeSpec":
        if self.calibration_file is not None and self.scheme not in ("w8a16", "w4a16"):
            raise conflict(
                "calibration_file", f"{self.scheme} needs no calibration", "Remove it, or choose w4a16 or w8a16."
            )
        return self


def run(spec: QuantizeSpec, ctx: RunContext) -> None:
    """Raises RunError engine_missing, validation_failed, non_finite_weights, and what ``run_outside`` raises."""
    ctx.phase("loading")
    python = ctx.interpreter("quantize")
    source = ctx.input("model")
    tokenizer = load_tokenizer(source)
    stops = stop_tokens(tokenizer, source)
    calibration: list[list[int]] = []
    if spec.calibration_file is not None:
        rows = load_dataset(
            ctx.input("calibration_file"),
            "auto",
            tokenizer,
            stops=stops,
            max_length=spec.calibration_max_length,
            ctx=ctx,
            field="calibration_file",
        )
        calibration = rows[: spec.calibration_rows]["input_ids"]
    name = spec.output_name or spec.experiment_name or "model"
    folder = ctx.output("model", name=name, scheme=spec.scheme)
    job = {
        "source": str(source),
        "target": str(folder),
        "scheme": spec.scheme,
        "prompts": prompt_ids(tokenizer),
        "calibration": calibration,
        "stops": sorted(stops),
    }
    found: dict[str, Any] = {}

    def told(line: Any) -> None:
        if "phase" in line:
            ctx.phase(line["phase"])
        found.update(line.get("result", {}))

    run_outside(python, SCRIPT, job, ctx.work_dir, told=told, tick=ctx.tick)
    copy_companions(source, folder)
    certificate = _certificate(spec, found, tokenizer, source, folder, calibrated=bool(calibration))
    (folder / CERTIFICATE).write_text(json.dumps(certificate, indent=2) + "\n")
    if certificate["non_finite_logits"]:
        raise RunError(
            Code.NON_FINITE_WEIGHTS,
            f"the quantised model computes {certificate['non_finite_logits']} numbers that are not finite",
            hint="Choose w8a16.",
        )
    if certificate["top1_agreement"] < LEAST_AGREEMENT:
        raise RunError(
            Code.VALIDATION_FAILED,
            f"only {certificate['top1_agreement']:.0%} of first choices are the source's: another model",
            hint="Choose more bits (w8a16), or give a calibration_file.",
        )
    ctx.result(scheme=spec.scheme, bytes=certificate["bytes"], certificate=certificate)


def _certificate(
    spec: QuantizeSpec, found: dict[str, Any], tokenizer: Any, source: Path, folder: Path, *, calibrated: bool
) -> dict[str, Any]:
    said, again = found.pop("source_tokens"), found.pop("tokens_made")
    config = json.loads((folder / "config.json").read_bytes())
    block = config.get("quantization_config") or {}
    if block.get("quant_method") != "compressed-tensors":
        raise RunError(Code.VALIDATION_FAILED, "the saved model does not say that it is quantised")
    return {
        "scheme": spec.scheme,
        "method": "GPTQ" if calibrated else "rounding",
        "prompts": len(PROMPTS),
        **found,
        "source_says": tokenizer.decode(said, skip_special_tokens=True),
        "says": tokenizer.decode(again, skip_special_tokens=True),
        "source_bytes": _weights(source),
        "bytes": _weights(folder),
    }


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


operation = Operation(QuantizeSpec, run, slot="train")

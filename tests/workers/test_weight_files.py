"""Which files of a folder are its weights: other programs' copies of them count for nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from app.artifacts.inspect import tensor_shapes
from app.errors import BadRequest, Code, RunError
from tests.workers.test_import import bring
from tests.workers.test_streaming import make_adapter, make_base, ours, stored
from workers.loading import Recount, fingerprint, sha256_files, tensor_headers
from workers.loading.weights import non_finite, weight_files

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # peft about adapters of adapters
]
INDEX = "model.safetensors.index.json"


def shard(folder: Path, **files: str) -> None:
    """``tensor="file"``: writes the files and the index that names them."""
    for file in set(files.values()):
        save_file({name: torch.ones(2) for name, where in files.items() if where == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def test_a_copy_under_another_name_changes_neither_merge_nor_fingerprint(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base)
    alone = ours(base, [adapter], tmp_path / "alone")
    twice = shutil.copytree(base, tmp_path / "twice")
    save_file({"layers.0.attention.wq.weight": torch.full((2, 2), torch.nan)}, twice / "consolidated.safetensors")
    assert fingerprint(twice) == fingerprint(base)
    assert non_finite(twice) == []
    assert list(sha256_files(weight_files(twice))) == ["model.safetensors"]
    assert tensor_shapes(twice, "model") == tensor_shapes(base, "model")
    assert ours(twice, [adapter], tmp_path / "ours").keys() == alone.keys()
    assert Recount(twice, [adapter], tmp_path / "ours").run().false == []
    assert not (bring(tmp_path / "in", twice).folder / "consolidated.safetensors").exists()


def test_shards_are_those_of_the_index(tmp_path: Path) -> None:
    shard(tmp_path, a="one.safetensors", b="two.safetensors")
    save_file({"c": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert tensor_headers(tmp_path).keys() == {"a", "b"}
    assert stored(tmp_path).keys() == {"a", "b", "c"}


def test_an_adapter_is_its_own_file_and_without_any_usual_name_all_count(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "part-1.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "part-2.safetensors")
    assert tensor_headers(tmp_path).keys() == {"a", "b"}
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"c": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert tensor_headers(tmp_path).keys() == {"c"}


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ('{"weight_map": {"a": "gone.safetensors"}}', r"names gone\.safetensors, which is not there"),
        ('{"weight_map": {"a": "../outside.safetensors"}}', r"outside\.safetensors, which is not there"),
        ('{"weight_map": {"a": "one.safetensors"}}', "are two models"),
        ('{"weight_map": {}}', "names no file"),
        ('{"weight_map": []}', "cannot be read"),
        ("nonsense", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_an_index_that_cannot_be_followed_is_named(index: str, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (folder / "one", folder / "model", tmp_path / "outside"):
        save_file({"a": torch.ones(2)}, path.with_suffix(".safetensors"))
    (folder / INDEX).write_text(index)
    with pytest.raises(RunError, match=said) as caught:
        tensor_headers(folder)
    assert caught.value.code == Code.MODEL_INVALID
    with pytest.raises(BadRequest, match=said):
        tensor_shapes(folder, "model")

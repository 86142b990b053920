"""The certificate: broken merges of every kind are caught and publish nothing; good ones pass."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.catalog import Catalog
from app.errors import Code, RunError
from tests.workers import test_streaming
from tests.workers.conftest import make_model, make_tokenizer
from tests.workers.context import RecordingContext
from tests.workers.test_streaming import make_adapter, make_base, ours
from workers.loading import MergeSpec, fingerprint, proved, tensor_headers
from workers.merges import lora
from workers.operations.merge import run

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes"),
    pytest.mark.filterwarnings("ignore:.*_check_is_size will be removed:FutureWarning"),
]
CATALOG = Catalog(merges={"lora": lora.merge})
Q, NORM, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("proof") / "base", dtype="bfloat16")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return make_adapter(tmp_path_factory.mktemp("proof") / "adapter", base)


def merged(root: Path, base: Path, adapter: Path, info: Any = None, **fields: Any) -> RecordingContext:
    ctx = RecordingContext(root, {"adapter": adapter, "base_model": base}, info, catalog=CATALOG)
    run(MergeSpec.model_validate({"adapter": "artifact:art-a", **fields}), ctx)
    return ctx


def file_of(folder: Path, name: str) -> Path:
    return next(path for path in folder.glob("*.safetensors") if name in load_file(path))


def edit(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    path = file_of(folder, name)
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def with_value(value: float) -> Callable[[Any], Any]:
    def change(tensor: Any) -> Any:
        tensor.view(-1)[7] = value
        return tensor

    return change


def flipped(folder: Path, name: str, bit: int = 0) -> None:
    """One bit of one byte on the disk, in the middle of a tensor."""
    info = tensor_headers(folder)[name]
    data = bytearray(info.path.read_bytes())
    data[(info.start + info.end) // 2] ^= 1 << bit
    info.path.write_bytes(data)


def moved(factor: float) -> Callable[[Path, Path], None]:
    """Every change of the base times a factor: 0 = none, 2 = twice, -1 = taken away."""

    def plant(folder: Path, base: Path) -> None:
        before = load_file(base / "model.safetensors")
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            for name, tensor in tensors.items():
                wide = before[name].float()
                tensors[name] = (wide + factor * (tensor.float() - wide)).to(tensor.dtype)
            save_file(tensors, path, metadata={"format": "pt"})

    return plant


def swapped(folder: Path, one: str, other: str) -> None:
    first, second = (load_file(file_of(folder, name))[name] for name in (one, other))
    edit(folder, one, lambda _: second)
    edit(folder, other, lambda _: first)


def of(change: Callable[..., Any], *arguments: Any) -> Callable[[Path, Path], None]:
    return lambda folder, base: change(folder, *arguments)


def renamed(folder: Path, base: Path) -> None:
    path = file_of(folder, NORM)
    tensors = load_file(path)
    tensors["model.normal.weight"] = tensors.pop(NORM)
    save_file(tensors, path, metadata={"format": "pt"})


def config_with(**changes: Any) -> Callable[[Path, Path], None]:
    def plant(folder: Path, base: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return plant


def other_tokenizer(folder: Path, base: Path) -> None:
    make_tokenizer(folder, template="{{ messages }}")


def shard(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def index_with(name: str, file: Callable[[Path], str]) -> Callable[[Path, Path], None]:
    def plant(folder: Path, base: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"][name] = file(folder)
        path.write_text(json.dumps(index))

    return plant


def appended(folder: Path, base: Path) -> None:
    with shard(folder).open("ab") as file:
        file.write(b"\0" * 8)


KEY = "model.layers.1.self_attn.q_proj.weight"
# What somebody's disk, memory or next edit of the writer could do; ``weights`` right after they are written, ``files``
# once what travels with them is there.
WEIGHTS: dict[str, Callable[[Path, Path], None]] = {
    "no effect": moved(0.0),
    "added twice": moved(2.0),
    "added at another scale": moved(1.01),
    "taken away": moved(-1.0),
    "one module left out": lambda folder, base: edit(folder, Q, lambda _: load_file(base / "model.safetensors")[Q]),
    "NaN": of(edit, Q, with_value(float("nan"))),
    "NaN where no adapter is": of(edit, NORM, with_value(float("nan"))),
    "infinity": of(edit, Q, with_value(float("inf"))),
    "extra tensor changed": of(edit, NORM, lambda tensor: tensor * 1.01),
    "embedding changed": of(edit, EMBEDDING, with_value(3.0)),
    "missing shard": lambda folder, base: shard(folder).unlink(),
    "flipped bit": of(flipped, Q),
    "flipped bit, the sign's": of(flipped, Q, 7),
    "flipped bit where no adapter is": of(flipped, NORM),
    "flipped bit in an embedding": of(flipped, EMBEDDING),
    "cut short": lambda folder, base: shard(folder).write_bytes(shard(folder).read_bytes()[:-2]),
    "empty": lambda folder, base: shard(folder).write_bytes(b""),
    "header gone": lambda folder, base: shard(folder).write_bytes(b"\0" * 100),
    "longer than its tensors": appended,
    "tensor renamed": renamed,
    "tensor too many": lambda folder, base: save_file({"surplus": torch.ones(4)}, folder / "surplus.safetensors"),
    "two layers changed places": of(swapped, Q, KEY),
    "rows turned round": of(edit, Q, lambda tensor: tensor.flip(0)),
    "transposed": of(edit, Q, lambda tensor: tensor.T),
    "another dtype": of(edit, Q, lambda tensor: tensor.half()),
    "another shape": of(edit, Q, lambda tensor: tensor[:-1]),
    "index points elsewhere": index_with(Q, lambda folder: shard(folder, -1).name),
    "index names a file that is not there": index_with(Q, lambda folder: "model-00099-of-00099.safetensors"),
    "config of another shape": config_with(num_attention_heads=8),
    "head untied in config": config_with(tie_word_embeddings=False),
    "no config": lambda folder, base: (folder / "config.json").unlink(),
}
FILES: dict[str, Callable[[Path, Path], None]] = {
    "swapped tokenizer": other_tokenizer,
    "another chat template": lambda folder, base: (folder / "chat_template.jinja").write_text("{{ 1 }}"),
    "tokenizer lost": lambda folder, base: (folder / "tokenizer.json").unlink(),
}
SHORT = [
    *("no effect", "NaN", "extra tensor changed", "missing shard", "flipped bit", "flipped bit where no adapter is"),
    *(
        "cut short",
        "longer than its tensors",
        "two layers changed places",
        "config of another shape",
        "swapped tokenizer",
        "another chat template",
    ),
]


def caught(name: str, root: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> RunError:
    """Merges with a planted defect; the error, which must come and leave no verdict but ``failed``."""
    attribute, plant = ("write_merge", WEIGHTS[name]) if name in WEIGHTS else ("copy_beside", FILES[name])
    real = getattr(proved, attribute)

    def planted(*arguments: Any, **named: Any) -> Any:
        result = real(*arguments, **named)
        plant(arguments[1] if attribute == "write_merge" else arguments[2], base)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(proved, attribute, planted)
        ctx = RecordingContext(root, {"adapter": adapter, "base_model": base}, catalog=CATALOG)
        spec = {"adapter": "artifact:art-a", "max_shard_size": 1_000_000}
        # Smaller than the field allows: several shards of a small model.
        with pytest.raises(RunError) as error:
            run(MergeSpec.model_construct(**MergeSpec.model_validate(spec).__dict__ | {"max_shard_size": 60_000}), ctx)
    assert ctx.results["certificate"]["verdict"] == "failed"
    assert not (ctx.folder / "certificate.json").exists()
    assert not ctx.hashed
    return error.value


@pytest.mark.parametrize("name", SHORT)
def test_a_planted_defect_is_caught(
    name: str, tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = caught(name, tmp_path, base, adapter, monkeypatch)
    wanted = Code.NON_FINITE_WEIGHTS if name in ("NaN", "infinity") else Code.VALIDATION_FAILED
    assert error.code == wanted, error.message


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_planted_defect_is_caught(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [*WEIGHTS, *FILES]
    assert len(names) >= 30
    for number, name in enumerate(names):
        error = caught(name, tmp_path / str(number), base, adapter, monkeypatch)
        assert error.code in (Code.VALIDATION_FAILED, Code.NON_FINITE_WEIGHTS), (name, error.message)


def test_another_base_is_caught(tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sibling = make_model(tmp_path / "sibling", seed=1, dtype="bfloat16")
    read = proved.read_merge
    monkeypatch.setattr(proved, "read_merge", lambda _, *rest, **named: read(sibling, *rest, **named))
    with pytest.raises(RunError, match="not what base and adapter give") as error:
        merged(tmp_path, base, adapter)
    assert error.value.code == Code.VALIDATION_FAILED


def good(seed: int, root: Path) -> None:
    """One merge that is as it should be, of a kind that the dice choose."""
    dice = random.Random(seed)
    architecture = dice.choice(["qwen2", "llama", "mistral", "gemma", "phi", "qwen2_moe"])
    dtype = dice.choice(["float32", "bfloat16", "float16"])
    base = make_base(root / "base", architecture, dtype=dtype, tied=dice.random() < 0.5)
    make_tokenizer(base)
    config = json.loads((base / "config.json").read_text())
    assert config["vocab_size"] >= 400
    peft: dict[str, Any] = {"r": dice.choice([1, 2, 5, 16]), "use_rslora": dice.random() < 0.3}
    peft |= dice.choice([{}, {}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj"]}])
    if architecture != "qwen2_moe" and dice.random() < 0.3:
        peft["use_dora"] = True
    adapter = make_adapter(root / "adapter", base, seed=seed, size=dice.choice([0.03, 0.1, 0.2]), **peft)
    ctx = merged(root, base, adapter, torch_dtype=dice.choice([None, "float32"]))
    certificate = ctx.results["certificate"]
    assert certificate["verdict"] == "passed", (seed, certificate)
    assert not certificate["bytes"]["false"]
    assert certificate["retained"] > 0.9


@pytest.mark.parametrize("seed", range(6))
def test_a_good_merge_passes(seed: int, tmp_path: Path, wide_vocabulary: None) -> None:
    good(seed, tmp_path)


@pytest.fixture
def wide_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens as the tokenizer of the tests has."""
    monkeypatch.setitem(test_streaming.SIZES, "vocab_size", 416)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_of_two_hundred_good_merges_at_most_one_is_rejected(tmp_path: Path, wide_vocabulary: None) -> None:
    rejected = []
    for seed in range(100, 300):
        root = tmp_path / str(seed)
        try:
            good(seed, root)
        except (RunError, AssertionError) as error:
            rejected.append((seed, str(error)[:300]))
        shutil.rmtree(root, ignore_errors=True)
    assert len(rejected) <= 1, rejected


def test_it_says_what_was_merged(tmp_path: Path, base: Path, adapter: Path) -> None:
    ctx = merged(tmp_path, base, adapter)
    certificate = json.loads((ctx.folder / "certificate.json").read_text())
    assert certificate["bytes"]["tensors"] == len(load_file(base / "model.safetensors"))
    assert certificate["changed_tensors"] == certificate["bytes"]["modules"] == 14
    assert certificate["bytes"]["update_norm"] > 0
    assert certificate["tokenizer"]["sha256"].keys() >= {"tokenizer.json", "chat_template.jinja"}
    assert certificate["merged"]["sha256"] == {path.name: digest for path, digest in ctx.hashed.items()}
    assert {"torch", "peft"} <= certificate["versions"].keys()
    assert certificate["quantised"] is None
    assert ctx.steps[-1]["step"] == ctx.steps[-1]["total"] > 0
    assert ctx.phases == ["loading base", "loading adapter", "merging", "saving", "validating"]


def test_dead_modules_are_named_and_a_dead_adapter_is_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    for folder, dead in (("some", "layers.0.self_attn.q_proj.lora_B"), ("all", "lora_B")):
        path = shutil.copytree(adapter, tmp_path / folder) / "adapter_model.safetensors"
        save_file({name: tensor * (dead not in name) for name, tensor in load_file(path).items()}, path)
    ctx = merged(tmp_path / "one", base, tmp_path / "some")
    assert ctx.results["certificate"]["bytes"]["dead_modules"] == ["model.layers.0.self_attn.q_proj"]
    assert "dead_modules" in ctx.codes()
    with pytest.raises(RunError, match="all 14 modules of the adapter are dead") as error:
        merged(tmp_path / "none", base, tmp_path / "all")
    assert error.value.code == Code.EFFECT_LOST


def test_what_is_too_large_for_float16_is_named(tmp_path: Path, base: Path, adapter: Path) -> None:
    large = shutil.copytree(base, tmp_path / "large")
    edit(large, EMBEDDING, with_value(1e30))
    (adapter_copy := shutil.copytree(adapter, tmp_path / "a"))
    (adapter_copy / "base_model.json").unlink(missing_ok=True)
    with pytest.raises(RunError, match="1 of them are finite in float32 and too large for float16") as error:
        merged(tmp_path, large, adapter_copy, torch_dtype="float16", proof_prompts=0)
    assert error.value.code == Code.NON_FINITE_WEIGHTS
    assert "bfloat16" in (error.value.hint or "")


def test_a_tokenizer_of_another_model_is_caught(tmp_path: Path, base: Path, adapter: Path) -> None:
    foreign = shutil.copytree(adapter, tmp_path / "foreign")
    tokenizer = make_tokenizer(foreign)
    tokenizer.add_tokens([f"<extra-{number}>" for number in range(50)])
    tokenizer.save_pretrained(foreign)
    with pytest.raises(RunError, match="the tokenizer has 450 tokens and the model 400") as error:
        merged(tmp_path, base, foreign)
    assert error.value.code == Code.VALIDATION_FAILED


def test_an_effect_that_is_not_measured_is_said(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = merged(tmp_path / "none", base, adapter, proof_prompts=0)
    assert ctx.results["certificate"]["verdict"] == "effect_not_measured"
    monkeypatch.setattr("workers.loading.effect.MOST_WIDENED", 10)
    ctx = merged(tmp_path / "large", base, adapter)
    assert ctx.results["certificate"]["logits"].startswith("left out: weights that are no plain matrices")
    assert "effect_not_measured" in ctx.codes()


@pytest.mark.parametrize("rounded", [False, True])
def test_a_qlora_adapter_goes_into_the_base_itself_or_into_the_rounded_one(
    rounded: bool, tmp_path: Path, base: Path, adapter: Path
) -> None:
    trained = shutil.copytree(adapter, tmp_path / "trained")
    record = {"fingerprint": fingerprint(base), "name": "base", "quantization": "nf4"}
    (trained / "base_model.json").write_text(json.dumps(record))
    ctx = merged(tmp_path, base, trained, nf4_round_trip=rounded, torch_dtype="float32")
    certificate = ctx.results["certificate"]
    assert certificate["base"]["merged_into"] == ("nf4" if rounded else "unquantised")
    assert certificate["adapter"]["trained_on"] == "nf4"
    assert certificate["retained"] > 0.999
    assert certificate["quantised"]["kl"] > 1e-6
    plain = ours(base, [trained], tmp_path / "plain", "float32")
    found = load_file(ctx.folder / "model.safetensors")
    other = {name for name in plain if not torch.equal(plain[name], found[name])}
    linear = {name for name in plain if "_proj" in name}
    assert other == (linear if rounded else set())

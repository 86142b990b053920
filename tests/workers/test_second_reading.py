"""An adapter's config is read as peft reads it, and the proof finds a writer that reads it otherwise."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.errors import Code, RunError
from tests.workers.test_streaming import FUSED, assert_same_bits, by_peft, make_adapter, make_base, ours
from workers.loading import Recount, merging
from workers.loading.layout import Placed, place

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # peft about odd configs, which are the point here
]


def say(adapter: Path, **said: Any) -> None:
    """Changes the adapter's config; None takes a key out."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text()) | said
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("llama", {"fan_in_fan_out": True}),
        ("gpt2", {"fan_in_fan_out": False}),
        ("llama", {"lora_alpha": 0}),
        ("llama", {"lora_alpha": None}),
        ("llama", {"alpha_pattern": {"q_proj": 0}}),
    ],
)
def test_a_config_is_read_as_peft_reads_it(architecture: str, said: dict[str, Any], tmp_path: Path) -> None:
    """fan_in_fan_out counts for nothing, alpha 0 is a scale of 0, and an alpha that is not there is 8."""
    base = make_base(tmp_path / "base", architecture)
    adapter = make_adapter(tmp_path / "adapter", base)
    say(adapter, **said)
    expected = by_peft(base, adapter, "float32", tmp_path / "peft")
    assert_same_bits(ours(base, [adapter], tmp_path / "ours"), expected)
    assert not Recount(base, [adapter], tmp_path / "ours").run().false


@pytest.mark.parametrize(
    ("mistake", "architecture", "peft"),
    [
        ("transposed", "llama", {}),
        ("transposed", "gpt2", {"use_rslora": True, "rank_pattern": {"c_fc": 2}}),
        ("transposed", "gpt_oss", {"target_parameters": FUSED, "target_modules": ["q_proj"]}),
        ("scale", "llama", {"bias": "lora_only"}),
        ("scale", "qwen2_moe", {"target_parameters": FUSED, "target_modules": ["q_proj"]}),
    ],
)
def test_the_proof_finds_a_writer_that_reads_the_adapter_wrongly(
    mistake: str, architecture: str, peft: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", architecture)
    adapter = make_adapter(tmp_path / "adapter", base, **peft)

    def wrongly(*arguments: Any) -> list[Placed]:
        placed, shapes = place(*arguments), arguments[2]
        square = [item for item in placed if len(set(shapes[item.target].shape[-2:])) == 1]
        other = square[-1] if mistake == "transposed" else placed[-1]
        change = {"transposed": not other.transposed} if mistake == "transposed" else {"scale": 2 * other.scale}
        return [item._replace(**change) if item == other else item for item in placed]

    ours(base, [adapter], tmp_path / "right")
    assert not Recount(base, [adapter], tmp_path / "right").run().false
    with monkeypatch.context() as patch:
        patch.setattr(merging, "place", wrongly)
        ours(base, [adapter], tmp_path / "wrong")
        # The proof's own reading does not go by what place() says.
        patch.setattr("workers.loading.recount.place", wrongly)
        found = Recount(base, [adapter], tmp_path / "wrong").run().false
    assert len(found) == 1
    assert "differs" in found[0]


def test_a_config_of_another_rank_than_the_factors_is_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base, r=4)
    say(adapter, r=8)
    ours(base, [adapter], tmp_path / "ours")
    with pytest.raises(RunError, match="says rank 8, its factors have 4") as caught:
        Recount(base, [adapter], tmp_path / "ours")
    assert caught.value.code == Code.ADAPTER_INVALID

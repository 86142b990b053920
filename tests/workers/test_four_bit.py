"""4-bit bases on the CPU: training after an evaluation still reaches the first layer."""

from pathlib import Path

import pytest
import torch

from app.specs import ModelBlock
from tests.workers.context import RecordingContext
from workers.loading import load_model

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:bitsandbytes",
    "ignore:.*_check_is_size will be removed:FutureWarning",
)


def test_gradients_reach_the_first_layer_after_an_evaluation(tmp_path: Path, tiny: Path) -> None:
    block = ModelBlock.model_validate(
        {"model_name_or_path": "x", "peft_config": {"lora_dropout": 0.0}, "quantization_config": {}}
    )
    model, _ = load_model(tiny, block, RecordingContext(tmp_path))
    ids = torch.arange(3, 20).unsqueeze(0)

    def gradients() -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for n, p in model.named_parameters() if "layers.0" in n and "lora_B" in n]

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    after = gradients()
    assert before
    for one, other in zip(before, after, strict=True):
        assert torch.isfinite(other).all()
        assert other.abs().max() > 0
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)

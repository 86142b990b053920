"""peft: the base loaded, the adapter merged, the model saved, all synced."""

import os
import sys
from pathlib import Path


def main(base: str, adapter: str, target: str) -> None:
    """As peft's documentation has it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)
    model.merge_and_unload().save_pretrained(target)
    AutoTokenizer.from_pretrained(base).save_pretrained(target)
    assert (Path(target) / "config.json").exists()
    os.sync()


main(*sys.argv[1:4])

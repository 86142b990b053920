"""LLaMA-Factory's export, as ``llamafactory-cli export`` calls it; runs in an environment of its own."""

import os
import sys

os.environ["DISABLE_VERSION_CHECK"] = "1"  # it names a range; versions are pinned in ../llamafactory.txt


def main(base: str, adapter: str, target: str) -> None:
    """On the CPU, with its default size of files."""
    from llamafactory.train.tuner import export_model  # noqa: PLC0415

    export_model(
        {
            "model_name_or_path": base,
            "adapter_name_or_path": adapter,
            "template": "empty",
            "finetuning_type": "lora",
            "infer_dtype": "bfloat16",
            "export_dir": target,
            "export_device": "cpu",
        }
    )
    os.sync()


main(*sys.argv[1:4])

"""mergekit: a model with an adapter passed through, which merges the adapter into its cache and writes the result."""

import os
import runpy
import sys
from pathlib import Path


def main(base: str, adapter: str, target: str) -> None:
    """As ``mergekit-yaml`` is called."""
    config = Path(target).with_name("mergekit.yaml")
    config.write_text(f"merge_method: passthrough\ndtype: bfloat16\nmodels:\n  - model: {base}+{adapter}\n")
    cache = Path(target).with_name("lora-cache")
    sys.argv = ["mergekit-yaml", str(config), target, "--lora-merge-cache", str(cache), "--copy-tokenizer", "--quiet"]
    try:
        runpy.run_module("mergekit.scripts.run_yaml", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    os.sync()


main(*sys.argv[1:4])

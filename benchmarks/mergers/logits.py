"""Ours: the check of the logits by itself, on a model that was merged before. Says how long it computed."""

import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from workers.loading import load_tokenizer, measure_effect, prompt_ids  # noqa: E402


def main(base: Path, adapter: Path, merged: Path) -> dict[str, float]:
    """As a merge job asks it by default; ``seconds`` leave out the start of the process."""
    prompts = prompt_ids(load_tokenizer(base))
    start = time.monotonic()
    with tempfile.TemporaryDirectory(dir=merged.parent) as spool:
        effect, _ = measure_effect(base, adapter, merged, prompts, Path(spool))
    return {"seconds": time.monotonic() - start, "tokens": effect.tokens, "retained": effect.retained or 0.0}


print(json.dumps(main(*map(Path, sys.argv[1:4]))))

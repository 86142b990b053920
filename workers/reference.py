"""What transformers makes of an engine's answers: ``python -I -m workers.reference <job.json> <result.json>``.

``job.json``: ``model`` (folder), ``dtype``, ``tie`` and ``answers``, each with ``prompt`` or ``messages``, ``text``,
``token_ids`` (null: the text is tokenised) and ``logprob`` (of its first token). Each answer is read token by token:
was that the token that transformers would have taken there, after the same beginning? So one early difference does not
make all that follows one.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from workers.loading import load_tokenizer
from workers.loading.companions import tokenizer_files
from workers.loading.devices import set_threads
from workers.loading.prompts import opened


def main(job_path: Path, result_path: Path) -> None:
    """Writes the result whole or not at all."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    os.nice(10)  # the engine beside it is in use already
    set_threads()
    job = json.loads(job_path.read_bytes())
    folder = Path(job["model"])
    tokenizer = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, job["dtype"])).eval()
    read = [read_answer(model, tokenizer, answer, job["tie"]) for answer in job["answers"]]
    result = {
        **sums(read),
        "of_completions": sums([one for one, answer in zip(read, job["answers"], strict=True) if "prompt" in answer]),
        "of_chats": sums([one for one, answer in zip(read, job["answers"], strict=True) if "messages" in answer]),
        "tokenizer_sha256": _sha256(b"".join(path.read_bytes() for path in tokenizer_files(folder))),
        "template_sha256": _sha256(str(tokenizer.chat_template).encode()) if tokenizer.chat_template else None,
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
    }
    part = result_path.with_suffix(".part")
    part.write_text(json.dumps(result))
    part.rename(result_path)


def read_answer(model: Any, tokenizer: Any, answer: dict[str, Any], tie: float) -> dict[str, Any]:
    """Tokens in it, how many are transformers' own choice, and how far the first one's log-probability is off.

    A token within ``tie`` (in nats) of the choice counts as it: rounding decides between those.
    """
    import torch

    if "messages" in answer:
        asked = opened(answer["messages"], tokenizer)
    else:
        asked = list(tokenizer(answer["prompt"]).input_ids)
    made = answer.get("token_ids") or list(tokenizer(answer["text"], add_special_tokens=False).input_ids)
    if not made:
        return {"tokens": 0, "agreeing": 0, "distance": None}
    with torch.no_grad():
        logits = model(torch.tensor([asked + made]), use_cache=False).logits[0, len(asked) - 1 : -1].float()
    logs = logits.log_softmax(-1)
    own = logs.gather(-1, torch.tensor(made).unsqueeze(-1)).squeeze(-1)
    agreeing = int((own >= logs.amax(-1) - tie).sum())
    distance = None if answer["logprob"] is None else abs(float(own[0]) - answer["logprob"])
    return {"tokens": len(made), "agreeing": agreeing, "distance": distance}


def sums(read: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several answers: the share of tokens, and the mean and the largest distance in nats."""
    tokens = sum(one["tokens"] for one in read)
    distances = [one["distance"] for one in read if one["distance"] is not None]
    return {
        "answers": len(read),
        "tokens": tokens,
        "agreement": sum(one["agreeing"] for one in read) / tokens if tokens else None,
        "mean_distance": sum(distances) / len(distances) if distances else None,
        "max_distance": max(distances, default=None),
    }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Is a GGUF file the model that it was written from? It is loaded again and held against the source."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from app import gguf as rules
from app.errors import Code, RunError
from workers.loading.conversations import load_tokenizer
from workers.loading.devices import set_threads
from workers.loading.effect import mapped_model
from workers.loading.gguf_write import Entry
from workers.loading.proof import PROMPTS, logits, prompt_ids
from workers.loading.weights import tensor_headers

LOGITS = {"f32": 1e-4, "f16": 1e-2, "bf16": 5e-2, "q8_0": 1e-1}
"""How far a logit may be from the source's, as a share of the source's largest."""
WEIGHTS = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 1 / 254 + 2.0**-11}
"""How far a weight may be from the source's by rounding alone, as a share of its tensor's largest."""
_SUBNORMAL = 2.0**-24


class Agreement(NamedTuple):
    """What was found."""

    prompts: int
    tokens: int
    """Positions at which logits were compared."""
    next_token: int
    """The one that was generated from the file after the first prompt; the source's own choice is the same."""
    agreeing: int
    """Prompts after which both choose the same token; the others are ties that rounding breaks."""
    max_logit_distance: float
    relative_logit_distance: float
    logit_tolerance: float
    max_weight_error: float
    """Of its tensor's largest weight."""


def prove(
    folder: Path,
    target: Path,
    planned: Sequence[Entry],
    outtype: str,
    tick: Callable[[], None] = lambda: None,
) -> Agreement:
    """Loads ``target`` with transformers and compares tokens, weights, logits and the next token with ``folder``'s.

    The file's model lies in memory in float32, the source's stays in its files. Raises RunError validation_failed.
    """
    set_threads()
    source = load_tokenizer(folder)
    tokenizer = _same_tokens(source, target)
    prompts = prompt_ids(source)
    expected = logits(mapped_model(folder), prompts)
    tick()
    model = load_gguf(target)
    tick()
    error = _same_weights(model, folder, planned)
    tick()
    found = logits(model, prompts)
    largest = max(float(part.abs().max()) for part in expected)
    distance = max(float((one - other).abs().max()) for one, other in zip(expected, found, strict=True))
    allowed = LOGITS[outtype] * largest
    if not distance <= allowed:
        raise _differs(
            f"a logit is {distance:.3g} from the source's, where {allowed:.3g} is allowed"
            f" ({LOGITS[outtype]:g} of the largest)"
        )
    agreeing = 0
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        wanted, chosen = int(one[-1].argmax()), int(other[-1].argmax())
        # Two tokens that are closer than twice the rounding cannot be told apart by a rounded model.
        if wanted != chosen and float(one[-1][wanted] - one[-1][chosen]) > 2 * distance:
            raise _differs(f"after prompt {number + 1} it chooses token {chosen}, the source {wanted}")
        agreeing += wanted == chosen
    token = _generated(model, tokenizer, prompts[0])
    if token not in (int(expected[0][-1].argmax()), int(found[0][-1].argmax())):
        raise _differs(f"it generates token {token}, the source {int(expected[0][-1].argmax())}")
    return Agreement(
        prompts=len(prompts),
        tokens=sum(len(part) for part in expected),
        next_token=token,
        agreeing=agreeing,
        max_logit_distance=distance,
        relative_logit_distance=distance / largest if largest else 0.0,
        logit_tolerance=LOGITS[outtype],
        max_weight_error=error,
    )


def load_gguf(target: Path) -> Any:
    """The file's model in float32, by transformers. Raises RunError validation_failed.

    transformers passes over two things that the file says: how wide a head is where that is no quotient, and factors of
    the rotary frequencies. They are read from the file and put in.
    """
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM

    reader = GGUFReader(target)
    architecture = reader.get_field("general.architecture").contents()
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    try:
        config = AutoConfig.from_pretrained(target.parent, gguf_file=target.name, local_files_only=True)
        config.head_dim = int(reader.get_field(f"{architecture}.attention.key_length").contents())
        model, loaded = AutoModelForCausalLM.from_pretrained(
            target.parent,
            gguf_file=target.name,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise _differs(f"it cannot be loaded: {error}"[:500]) from error
    if missing := sorted(loaded["missing_keys"]):
        raise _differs(f"it lacks {len(missing)} tensors, e.g. {missing[0]}")
    if factors is not None:
        model.model.rotary_emb.inv_freq /= torch.from_numpy(factors.copy())
    return model.eval()


def _same_tokens(source: Any, target: Path) -> Any:
    """The tokenizer as the file has it; it must spell the prompts as the source's does."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(target.parent, gguf_file=target.name, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _differs(f"its tokenizer cannot be loaded: {error}"[:500]) from error
    own, read = source.backend_tokenizer, tokenizer.backend_tokenizer
    # The file tells how text is cut by a name alone, and the name was derived from these very steps. transformers does
    # not know every name; what it knows differently is not the file's fault.
    read.normalizer, read.pre_tokenizer = own.normalizer, own.pre_tokenizer
    if hasattr(own.model, "ignore_merges"):
        read.model.ignore_merges = own.model.ignore_merges
    texts = [*PROMPTS, "".join(map(str, source.all_special_tokens)), "Füße, 東京 and 🙂:  two  spaces\n\n\tand tabs"]
    for text in texts:
        one, other = (each(text, add_special_tokens=False).input_ids for each in (source, tokenizer))
        if one != other:
            place = next((n for n, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
            raise _differs(f"it spells {text[:40]!r} with other tokens, from the {place + 1}th on")
    if isinstance(source.chat_template, str) and tokenizer.chat_template != source.chat_template:
        raise _differs("it has another chat template")
    return tokenizer


def _same_weights(model: Any, folder: Path, planned: Sequence[Entry]) -> float:
    """The largest difference, as a share of its tensor's largest weight; a tensor at a time."""
    import torch
    from safetensors import safe_open

    headers, state = tensor_headers(folder), model.state_dict()
    worst = 0.0
    for entry in planned:
        with safe_open(str(headers[entry.source].path), framework="pt") as file:
            own = file.get_tensor(entry.source).to(torch.float32)
        read = state.get(entry.source)
        if read is None or read.shape != own.shape:
            raise _differs(f"{entry.source} is not in it as it should be")
        largest = float(own.abs().max())
        distance = float(torch.sub(read, own, out=own).abs_().max())
        if not distance <= WEIGHTS[entry.stored] * largest + _SUBNORMAL * (entry.stored != "F32"):
            raise _differs(
                f"{entry.source} differs by {distance:.3g}, which rounding to {entry.stored} does not explain"
            )
        worst = max(worst, distance / largest if largest else 0.0)
    return worst


def _generated(model: Any, tokenizer: Any, prompt: Sequence[int]) -> int:
    import torch

    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    return int(output[0, -1])


def _differs(what: str) -> RunError:
    return RunError(
        Code.VALIDATION_FAILED,
        f"the GGUF file is not the model that it was written from: {what}",
        hint="nothing was published; GET /jobs/{id}/logs has more, and outtype: f32 tells rounding from a fault",
    )


def certificate(agreement: Agreement, config: Mapping[str, Any], outtype: str) -> dict[str, Any]:
    """What is kept of the proof, as JSON."""
    return {
        "verdict": "passed",
        "format": "gguf",
        "outtype": outtype,
        "architecture": rules.FAMILIES[config["model_type"]].architecture,
        **agreement._asdict(),
    }

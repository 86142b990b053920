"""The LM head where it counts: on the positions that have a label, and on no others."""

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from workers.loading.conversations import IGNORED


class Labelled(NamedTuple):
    """What a model says of a batch's labels, row after row."""

    logits: Any
    """(labels, vocabulary)"""
    targets: Any
    """(labels,)"""
    mask: Any
    """(rows, tokens - 1): where the next token is a label."""


def head_of(model: Any) -> Any:
    """The layer that makes logits; None where there is none of its own."""
    while hasattr(model, "module"):  # wrapped for several ranks
        model = model.module
    ask = getattr(model, "get_output_embeddings", None)
    return ask() if ask else None


@contextlib.contextmanager
def head_on(model: Any, mask: Any) -> Iterator[None]:
    """Within it the head sees the places of a mask (rows, tokens) alone: logits are (1, places, vocabulary)."""
    rows, columns = mask.nonzero(as_tuple=True)

    def narrow(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        virtual = hidden.shape[1] - mask.shape[1]  # what learnt prompts put before the row
        places = rows * hidden.shape[1] + columns + virtual
        return (hidden.flatten(0, 1).index_select(0, places).unsqueeze(0), *inputs[1:])

    handle = head_of(model).register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        handle.remove()


def labelled(model: Any, labels: Any, **inputs: Any) -> Labelled:
    """One forward of a batch, and the head on its labels; ``inputs`` are what the model takes."""
    import torch

    following = labels[:, 1:]
    mask = following != IGNORED
    if "attention_mask" in inputs and mask_is_idle(model, inputs["attention_mask"]):
        del inputs["attention_mask"]
    with head_on(model, torch.nn.functional.pad(mask, (0, 1))):
        logits = model(**inputs, use_cache=False).logits
    return Labelled(logits.flatten(0, 1), following[mask], mask)


def mask_is_idle(model: Any, mask: Any) -> bool:
    """Whether a mask hides only what nobody sees: padding behind the rows, of a model that looks back alone.

    Attention without a mask is quicker, and what it computes for the padding is not used.
    """
    config = getattr(model, "config", None)
    if mask is None or config is None or mask.dim() != 2:
        return False
    text = config.get_text_config()
    looks_ahead = getattr(text, "is_causal", True) is False or getattr(text, "use_bidirectional_attention", False)
    return not looks_ahead and bool((mask[:, 1:] <= mask[:, :-1]).all())


def lean_head(model: Any, temperature: float = 1.0) -> None:
    """On a CPU: trl's ``model(…, labels=…, fused_lm_head=True)`` runs the head once, on the labels alone.

    trl runs it on all positions there, in parts that its backward pass computes again: less memory, more time. With
    ``lean=True`` it leaves out the entropy of each prediction, which costs as much as the loss. ``temperature``: what
    logits are divided by, as in answers that are drawn.
    """
    import torch
    from trl.trainer.utils import FusedCausalLMOutput

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain = inner.forward

    @functools.wraps(type(inner).forward)  # generate() looks at what it takes
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return plain(*args, **kwargs)
        if args or kwargs.get("shift_labels") is not None or kwargs.get("output_router_logits"):
            return plain(*args, fused_lm_head=True, **kwargs)
        labels, items, lean = kwargs.pop("labels"), kwargs.pop("num_items_in_batch", None), kwargs.pop("lean", False)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("use_cache", "output_router_logits")}
        found = labelled(self, labels, **kwargs)
        logits = found.logits.float() / temperature if temperature != 1 else found.logits.float()
        losses = torch.nn.functional.cross_entropy(logits, found.targets, reduction="none")
        with torch.no_grad():
            others = {
                "is_top1": found.logits.argmax(-1) == found.targets,
                "mean_logits": logits.mean(-1),
            }
            if not lean:
                every = torch.log_softmax(logits, dim=-1)
                others["entropy"] = -(every.exp() * every).sum(-1)
        count = found.mask.sum().clamp(min=1) if items is None else items
        return FusedCausalLMOutput(
            loss=losses.sum() / count,
            log_probs=_spread(-losses, found.mask),
            label_mask=found.mask,
            **{name: _spread(value, found.mask) for name, value in others.items()},
        )

    inner.forward = types.MethodType(forward, inner)


def _spread(values: Any, mask: Any) -> Any:
    """One value for each label, at the labels' places; zero elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)

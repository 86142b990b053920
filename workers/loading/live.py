"""A run that answers between its steps, with its own weights as they are now (``live_http`` brings the requests).

For machines whose one card holds the training and has no room for an engine beside it. One request at a time, a cap on
its tokens and its seconds; what training draws at random is put back as it was, so that the run ends with the same
bytes whether anybody asked or not.
"""

import contextlib
import queue
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from app.catalog import RunContext
from workers.loading.conversations import stop_tokens
from workers.loading.prompts import opened
from workers.loading.rollouts import drawing_plainly
from workers.turns import voiced

MOST_TOKENS = 256
"""An answer's tokens at most; fewer where a request asks for fewer."""
MOST_SECONDS = 20.0
"""An answer ends after so long with ``finish_reason: length``: training waits meanwhile."""
PATIENCE = 100.0
"""Seconds that a request waits for the end of a step."""


class Refused(Exception):
    """A request that cannot be answered: status and message.

    ``param`` is the field at fault, if one is; ``kind`` the service's code where ``invalid_value`` says too little.
    """

    def __init__(self, status: int, message: str, param: str | None = None, kind: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.kind = kind


@dataclass
class Ask:
    """One request, and the pieces of its answer as they come."""

    chat: bool
    messages: list[dict[str, Any]]
    prompt: str
    model: str
    tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: list[str]
    stream: bool
    usage: bool
    template: dict[str, Any] = field(default_factory=dict)
    """Switches for the chat template."""
    pieces: "queue.SimpleQueue[Any]" = field(default_factory=queue.SimpleQueue)
    """Texts, then a dict with ``finish_reason`` and ``usage``, or a Refused."""
    gone: bool = False
    """Whoever asked has left."""


class Live:
    """Requests come in by ``asking``, in any thread; ``between_steps`` answers whoever waits."""

    def __init__(self, ctx: RunContext, tokenizer: Any) -> None:
        self._ctx, self._tokenizer = ctx, tokenizer
        self._busy = threading.Lock()
        self._asked: queue.SimpleQueue[Ask] = queue.SimpleQueue()

    def end(self) -> None:
        """Nobody is answered any more; who waits is told so."""
        while ask := self._next():
            ask.pieces.put(Refused(503, "the run has ended"))

    def _next(self) -> Ask | None:
        with contextlib.suppress(queue.Empty):
            while (ask := self._asked.get_nowait()).gone:
                pass
            return ask
        return None

    @contextlib.contextmanager
    def asking(self, ask: Ask) -> Iterator[Ask]:
        """Hands a request over to the training thread. Raises Refused while another is being answered."""
        if not self._busy.acquire(blocking=False):
            raise Refused(503, "this run answers one request at a time")
        try:
            self._asked.put(ask)
            yield ask
        finally:
            ask.gone = True
            self._busy.release()

    def between_steps(self, model: Any, step: int) -> None:
        """Answers the request that waits, if one does, in the calling thread. Never raises for the request's sake."""
        ask = self._next()
        if ask is None:
            return
        began = time.monotonic()
        try:
            numbers = _answer(ask, model, self._tokenizer, self._ctx)
            left = ask.gone
            ask.pieces.put({**numbers, "step": step})
        except Exception as error:  # training goes on, whatever a request did
            self._ctx.event("live_answer_failed", f"{type(error).__name__}: {error}"[:500], level="warn", step=step)
            refused = isinstance(error, Refused)
            ask.pieces.put(error if refused else Refused(500, f"the run could not answer: {type(error).__name__}"))
            return
        seconds = round(time.monotonic() - began, 2)
        if left:
            self._ctx.event("live_left", f"Whoever asked after step {step} left after {seconds} s.", step=step)
            return
        self._ctx.event("live_answered", f"Answered a request after step {step}, {seconds} s.", step=step)


def _answer(ask: Ask, model: Any, tokenizer: Any, ctx: RunContext) -> dict[str, Any]:
    import torch
    from transformers import GenerationConfig, MaxTimeCriteria, StoppingCriteriaList

    try:
        turns = voiced(ask.messages, tokenizer.chat_template)
        ids = opened(turns, tokenizer, **ask.template) if ask.chat else list(tokenizer(ask.prompt).input_ids)
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise Refused(400, f"messages: the chat template refuses them: {error}", "messages") from error
    room = (getattr(model.config, "max_position_embeddings", None) or 1 << 30) - len(ids)
    if not ids or room < 1:
        asked_in = "messages" if ask.chat else "prompt"
        raise Refused(400, f"the prompt has {len(ids)} tokens, which leaves no room for an answer", asked_in)
    how: dict[str, Any] = {"do_sample": False}
    if ask.temperature > 0:
        how = {"do_sample": True, "temperature": ask.temperature, "top_p": ask.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=min(ask.tokens, room),
        eos_token_id=sorted(stop_tokens(tokenizer, model.generation_config)),
        pad_token_id=tokenizer.pad_token_id,
        **how,
    )
    told = _Streamer(tokenizer, ask, ctx)
    asked = torch.tensor([ids], device=model.device)
    ends = StoppingCriteriaList([MaxTimeCriteria(MOST_SECONDS), lambda rows, *_: told.over(rows)])
    # No inference_mode: what a model keeps from a pass, such as positions, would be unusable for gradients.
    with torch.no_grad(), _as_it_was(model, ask.seed), drawing_plainly(model):
        model.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            generation_config=config,
            streamer=told,
            stopping_criteria=ends,
        )
    finish = "stop" if told.stopped or told.last in config.eos_token_id else "length"
    usage = {"prompt_tokens": len(ids), "completion_tokens": told.count, "total_tokens": len(ids) + told.count}
    return {"finish_reason": finish, "usage": usage}


@contextlib.contextmanager
def _as_it_was(model: Any, seed: int | None) -> Iterator[None]:
    """Mode and every generator of random numbers, afterwards as before."""
    import numpy as np  # noqa: PLC0415
    import torch

    training, drawn, drawn_by_numpy = model.training, random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(time.time_ns() % (1 << 62) if seed is None else seed)
        model.eval()
        try:
            yield
        finally:
            model.train(training)
            random.setstate(drawn)
            np.random.set_state(drawn_by_numpy)  # noqa: NPY002


class _Streamer:
    """What ``generate`` calls with each token: passes on the text that cannot change any more."""

    def __init__(self, tokenizer: Any, ask: Ask, ctx: RunContext) -> None:
        self._tokenizer, self._ask, self._ctx = tokenizer, ask, ctx
        self._tokens: list[int] | None = None
        self._sent = 0
        self.stopped = False
        self.last: int | None = None

    @property
    def count(self) -> int:
        return len(self._tokens or ())

    def put(self, value: Any) -> None:
        if self._tokens is None:  # the first call brings the prompt
            self._tokens = []
            return
        self._tokens.append(int(value.reshape(-1)[-1]))
        self.last = self._tokens[-1]
        self._ctx.tick()
        self._tell(final=False)

    def end(self) -> None:
        self._tell(final=True)

    def over(self, rows: Any) -> Any:
        """A stopping criterion: bool (rows,)."""
        import torch

        return torch.full((rows.shape[0],), self.stopped or self._ask.gone, dtype=torch.bool, device=rows.device)

    def _tell(self, *, final: bool) -> None:
        if self.stopped:
            return
        text = self._tokenizer.decode(self._tokens or [], skip_special_tokens=True)
        found = [place for place in (text.find(stop, 0) for stop in self._ask.stop) if place >= 0]
        if found:
            text, self.stopped = text[: min(found)], True
        elif not final:
            # Half a character, or what may become a stop text, waits for what comes next.
            held = max((_overlap(text, stop) for stop in self._ask.stop), default=0)
            text = text[: len(text) - held].removesuffix("�")
        if len(text) > self._sent:
            self._ask.pieces.put(text[self._sent :])
            self._sent = len(text)


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters may be the beginning of ``stop``."""
    return max((size for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)

"""A model that goes on from prompts, one at a time, with adapters that come and go."""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from workers.generation.asked import Asked, Refused
from workers.turns import voiced

_ROWS = 256
"""Of a prompt, scored at a time."""
_HALF = "\ufffd"
"""What a decoder writes for a character whose bytes have not all come yet."""


class Read(NamedTuple):
    """A token of a prompt. Nothing scores the first, which stands after nothing."""

    token: str
    logprob: float | None
    top: dict[str, float] | None
    """Itself and the likeliest one in its place."""


@dataclass
class Written:
    """An answer."""

    text: str = ""
    finish: str = "length"
    """stop or length."""
    token_ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Natural logarithms, one for each token; empty unless they were asked for."""
    read: "list[Read]" = field(default_factory=list)
    """The prompt's tokens, where they were asked for with their logarithms."""


@dataclass(eq=False)
class Adapter:
    """One that is loaded."""

    inner: str
    """Its name among the model's modules."""
    users: int = 0
    """Requests that were accepted for it and are not over."""


class Writer:
    """Not quick: no batching, no paged cache. What it computes is what transformers and peft compute."""

    def __init__(self, folder: Path, served_name: str, dtype: str, max_model_len: int | None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.served_name = served_name
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._model: Any = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        own = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 4096
        self.room = min(own, max_model_len or own)
        self._generation = model.generation_config
        self._adapters: dict[str, Adapter] = {}
        # Guards the names and the counts of users; the turn is the model's.
        self._known = threading.Condition()
        self._inside: set[str] = set()
        self._made = 0
        self._turn = threading.Lock()
        self.waiting = 0

    @property
    def models(self) -> list[str]:
        """Names that are answered to."""
        with self._known:
            return [self.served_name, *self._adapters]

    @staticmethod
    def expect_adapters() -> None:
        """Imports beforehand what ``load`` needs: that takes seconds, for which the first adapter would wait."""
        import torch
        from peft import LoraConfig, inject_adapter_in_model

        # A part of it is imported only when a layer is replaced.
        inject_adapter_in_model(LoraConfig(r=1, target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(1, 1)))

    def load(self, name: str, folder: Path) -> None:
        """Adds an adapter. Raises Refused."""
        from peft import PeftModel

        if name in self.models:
            raise Refused(f"The lora adapter '{name}' has already been loaded.")
        with self._turn:
            self._made += 1
            inner = f"a{self._made}"  # a name of modules holds no dots
            try:
                if isinstance(self._model, PeftModel):
                    self._model.load_adapter(folder, inner)
                else:
                    self._model = PeftModel.from_pretrained(self._model, folder, inner)
                self._model.eval()
            except Exception as error:  # whatever peft says of a folder is said of this adapter alone
                if isinstance(self._model, PeftModel) and inner in self._model.peft_config:
                    self._drop(inner)
                raise Refused(f"{type(error).__name__}: {error}"[:1000], 500) from error
            self._inside.add(inner)
            with self._known:
                self._adapters[name] = Adapter(inner)

    def unload(self, name: str) -> None:
        """Its name is unknown from now on; what was accepted for it is answered before it goes. Raises Refused."""
        with self._known:
            adapter = self._adapters.pop(name, None)
        if adapter is None:
            raise Refused(f"The lora adapter '{name}' cannot be found.", 404)
        # Long answers may be under way: whoever unloads does not wait for them, as with vLLM.
        threading.Thread(target=self._let_go, args=(adapter,), name="unload", daemon=True).start()

    def _let_go(self, adapter: Adapter) -> None:
        with self._known:
            self._known.wait_for(lambda: not adapter.users)
        with self._turn:
            self._drop(adapter.inner)

    def _drop(self, inner: str) -> None:
        self._inside.discard(inner)
        if len(self._model.peft_config) == 1:
            self._model = self._model.unload()
        else:
            # Of those that stay, peft would choose one itself and warn of it.
            self._model.set_adapter(next(name for name in self._model.peft_config if name != inner))
            self._model.delete_adapter(inner)

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[Adapter | None]:
        """What answers to the name: an adapter, which stays until the block ends, or None: the model itself.

        Raises Refused, 404, when nothing does.
        """
        with self._known:
            adapter = self._adapters.get(name)
            if adapter is not None:
                adapter.users += 1
            elif name != self.served_name:
                raise Refused(f"The model `{name}` does not exist.", 404, param="model")
        try:
            yield adapter
        finally:
            if adapter is not None:
                with self._known:
                    adapter.users -= 1
                    self._known.notify_all()

    def ids(self, asked: Asked) -> list[int]:
        """The prompt as token ids. Raises Refused when it cannot be read or is too long."""
        field = "messages" if asked.chat else "prompt"
        try:
            if asked.chat:
                template = asked.template.get("chat_template") or self._tokenizer.chat_template
                messages: Any = asked.prompt
                turns: Any = voiced(messages, template)
                encoded = self._tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, return_dict=True, **asked.template
                )
                ids = list(encoded["input_ids"])
            else:
                ids = (
                    list(asked.prompt) if isinstance(asked.prompt, list) else self._tokenizer(asked.prompt)["input_ids"]
                )
        except Exception as error:  # a template refuses in its own words
            raise Refused(f"the prompt cannot be read: {error}"[:1000], param=field) from error
        wanted = len(ids) + (asked.max_tokens or 1)
        if wanted > self.room:
            raise Refused(
                f"This model's maximum context length is {self.room} tokens, and {len(ids)} in the prompt and"
                f" {asked.max_tokens or 1} in the answer are {wanted}.",
                param=field,
            )
        if not ids or max(ids) >= self._model.get_input_embeddings().num_embeddings:
            raise Refused("the prompt is empty, or holds ids that the model does not know", param=field)
        return ids

    def write(
        self,
        asked: Asked,
        ids: list[int],
        adapter: Adapter | None,
        on_text: Callable[[str], None],
        gone: threading.Event,
    ) -> Written:
        """Goes on from the prompt; ``on_text`` gets each piece as it is made. Ends early once ``gone`` is set.

        ``adapter`` is what ``using`` found. Who leaves its block sets ``gone`` before.
        """
        self.waiting += 1
        try:
            with self._turn:
                return self._write(asked, ids, adapter, on_text, gone)
        finally:
            self.waiting -= 1

    def _write(
        self,
        asked: Asked,
        ids: list[int],
        adapter: Adapter | None,
        on_text: Callable[[str], None],
        gone: threading.Event,
    ) -> Written:
        import torch
        from transformers import LogitsProcessorList, StoppingCriteriaList

        if gone.is_set():
            return Written()
        plan = self._plan(asked, len(ids))
        watch = _Watch(self._tokenizer, len(ids), asked.stop, on_text, gone)
        inputs = torch.tensor([ids], device=self._model.device)
        if adapter is not None:
            self._model.set_adapter(adapter.inner)
        plain = self._inside and adapter is None
        with torch.inference_mode(), self._model.disable_adapter() if plain else contextlib.nullcontext():
            if asked.seed is not None:
                torch.manual_seed(asked.seed % 2**63)
            read = self._read(inputs) if asked.echo and asked.logprobs else []
            output = self._model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                generation_config=plan,
                logits_processor=LogitsProcessorList(_penalties(asked, len(ids))),
                stopping_criteria=StoppingCriteriaList([watch]),
                return_dict_in_generate=True,
                output_logits=asked.logprobs,
            )
        new = output.sequences[0, len(ids) :].tolist()
        ends = set(_as_list(plan.eos_token_id))
        stopped = watch.stopped or bool(new and new[-1] in ends)
        written = Written(watch.finish(), "stop" if stopped else "length", new, read=read)
        if asked.echo:
            written.text = self._tokenizer.decode(ids) + written.text
        if asked.logprobs:
            rows = torch.stack([row[0].float() for row in output.logits]).log_softmax(-1)
            written.logprobs = rows[torch.arange(len(new)), torch.tensor(new, device=rows.device)].tolist()
            written.tokens = [self._tokenizer.decode([token]) for token in new]
        return written

    def _read(self, ids: Any) -> list[Read]:
        """Scores a prompt, ``[1, length]``. In pieces: logarithms of all its rows at once may not fit."""
        import torch

        def text(token: int) -> str:
            return str(self._tokenizer.decode([token]))

        found = [Read(text(int(ids[0, 0])), None, None)]
        logits = self._model(input_ids=ids, use_cache=False).logits[0, :-1]
        for rows, tokens in zip(logits.split(_ROWS), ids[0, 1:].split(_ROWS), strict=True):
            scores = rows.float().log_softmax(-1)
            own, best = scores[torch.arange(len(tokens)), tokens], scores.max(-1)
            columns = (tokens.tolist(), own.tolist(), best.indices.tolist(), best.values.tolist())
            for token, value, likeliest, most in zip(*columns, strict=True):
                # Where both are written alike, the higher one is told.
                found.append(Read(text(token), value, {text(token): value} | {text(likeliest): most}))
        return found

    def _plan(self, asked: Asked, prompt: int) -> Any:
        plan = copy.deepcopy(self._generation)
        plan.max_new_tokens = asked.max_tokens or self.room - prompt
        plan.max_length = None
        plan.min_new_tokens = asked.min_tokens or None
        plan.pad_token_id = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else 0
        ends = [*_as_list(plan.eos_token_id), *asked.stop_ids]
        plan.eos_token_id = None if asked.ignore_eos else (ends or None)
        temperature = asked.sampling.get("temperature", 1.0)
        plan.do_sample = temperature > 0
        if plan.do_sample:
            for name in ("temperature", "top_p", "min_p"):
                setattr(plan, name, asked.sampling.get(name, None if name == "min_p" else 1.0))
            plan.top_k = max(0, int(asked.sampling.get("top_k", 0)))
        else:
            plan.temperature, plan.top_p, plan.top_k, plan.min_p = 1.0, 1.0, 50, None
        plan.repetition_penalty = asked.sampling.get("repetition_penalty", 1.0)
        return plan


def _penalties(asked: Asked, prompt: int) -> list[Any]:
    """OpenAI's two: they count what the answer holds so far, not the prompt."""
    presence, frequency = (asked.sampling.get(f"{name}_penalty", 0.0) for name in ("presence", "frequency"))
    if not presence and not frequency:
        return []

    def lowered(input_ids: Any, scores: Any) -> Any:
        counts = scores.new_zeros(scores.shape[-1]).scatter_add_(
            0, input_ids[0, prompt:], scores.new_ones(input_ids.shape[1] - prompt)
        )
        return scores - frequency * counts - presence * (counts > 0)

    return [lowered]


class _Watch:
    """Asked after every token: tells the text so far, looks for stop strings, and whether anybody still listens."""

    def __init__(
        self,
        tokenizer: Any,
        prompt: int,
        stop: tuple[str, ...],
        on_text: Callable[[str], None],
        gone: threading.Event,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._stop = stop
        # A piece that a stop string may begin with is not told before it is clear that none does.
        self._held = max((len(word) - 1 for word in stop), default=0)
        self._on_text = on_text
        self._gone = gone
        self._text = ""
        self._told = 0
        self.stopped = False

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        import torch

        self._text = self._tokenizer.decode(input_ids[0, self._prompt :], skip_special_tokens=True)
        ends = [at for word in self._stop if (at := self._text.find(word)) >= 0]
        if ends:
            self._text, self.stopped = self._text[: min(ends)], True
        elif not self._text.endswith(_HALF):
            self._tell(len(self._text) - self._held)
        done = self.stopped or self._gone.is_set()
        return torch.full((input_ids.shape[0],), done, device=input_ids.device, dtype=torch.bool)

    def finish(self) -> str:
        """The whole text, all of it told."""
        self._tell(len(self._text))
        return self._text

    def _tell(self, upto: int) -> None:
        if upto > self._told:
            self._on_text(self._text[self._told : upto])
            self._told = upto


def _as_list(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [int(value)]

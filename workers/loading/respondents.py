"""Who answers in an evaluation: a model in this process, or one that is being served."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from app.catalog import RunContext
from workers.loading.answering import answers
from workers.loading.prompts import Prompt
from workers.loading.said import Said
from workers.loading.served import ServedModel
from workers.loading.suites import Asked, Suites

Side = Literal["model", "baseline"]


class Respondent(Protocol):
    """A model that can be asked. What it has answered in an earlier attempt of the job it is not asked again."""

    @property
    def name(self) -> str | None:
        """Under which it was served; None of a model in this process."""
        ...

    def answers(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float) -> list[str]:
        """One to each prompt, in their order; temperature 0 takes the likeliest token each time."""
        ...

    def suites(self, suites: Suites, *, template: bool) -> Asked:
        """All suites of a job."""
        ...


class Loaded:
    """A model in this process; ``stops`` are the token ids that end an answer."""

    def __init__(
        self, side: Side, model: Any, tokenizer: Any, ctx: RunContext, *, batch_size: int, stops: set[int], seed: int
    ) -> None:
        self._side, self._model, self._tokenizer, self._ctx = side, model, tokenizer, ctx
        self._batch_size, self._stops, self._seed = batch_size, stops, seed
        self.name = None

    def answers(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float) -> list[str]:
        """See Respondent."""
        how = [max_new_tokens, temperature, self._batch_size, sorted(self._stops), self._seed]
        computed = [str(self._model.device), str(self._model.dtype)]
        said = Said(self._ctx, self._side, computed, how, [prompt.ids for prompt in prompts])
        return answers(
            self._model,
            self._tokenizer,
            prompts,
            self._ctx,
            said,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            batch_size=self._batch_size,
            stops=self._stops,
            seed=self._seed,
        )

    def suites(self, suites: Suites, *, template: bool) -> Asked:
        """See Respondent."""
        return suites.ask(self._side, self._model, self._tokenizer, self._batch_size, template=template)


class Deployed:
    """A model that an engine serves: asked over the engine's socket, ``batch_size`` requests at a time.

    Prompts go as token ids, made with the tokenizer of the model's own files.
    """

    def __init__(
        self,
        field: Side,
        tokenizer: Any,
        ctx: RunContext,
        *,
        batch_size: int,
        stops: set[int],
        seed: int,
    ) -> None:
        self._served, self._tokenizer = ServedModel(ctx, field, batch_size), tokenizer
        self._stops, self._seed = sorted(stops), seed

    @property
    def name(self) -> str | None:
        """See Respondent."""
        return self._served.name

    def answers(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float) -> list[str]:
        """See Respondent. A prompt's seed depends on its place, so two models are asked with the same ones."""
        how = {"max_tokens": max_new_tokens, "temperature": temperature, "stop_token_ids": self._stops}
        bodies = [{"prompt": prompt.ids, "seed": self._seed + row, **how} for row, prompt in enumerate(prompts)]
        return self._served.ask(bodies, _text)

    def suites(self, suites: Suites, *, template: bool) -> Asked:
        """See Respondent."""
        return suites.ask_served(self._served, self._tokenizer, template=template)


def _text(_: int, answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])

"""lm-evaluation-harness's own client of completions, over our way to a served model."""

from collections.abc import Sequence
from typing import Any

from workers.loading.served import ServedModel

LONGEST = 2048
"""Tokens of prompt and answer where the engine does not say how many it takes: the package's own default."""
_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty")


def harness_model(served: ServedModel, tokenizer: Any) -> Any:
    """A served model as the package sees models; needs the package.

    It is asked as the package asks a model that it has loaded: the same tokens go in, and the same ends an answer.
    Templates and tokens are made here, with the tokenizer of the model's own files.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.models.utils import normalize_gen_kwargs

    class Deployed(LocalCompletionsAPI):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(
                model="-",  # the name is put in where the request is sent
                base_url="http://engine/v1/completions",
                tokenizer_backend=None,
                num_concurrent=2,  # above one it hands over all requests at once; how many are sent is ours to say
                max_length=served.room(LONGEST),
            )
            self.tokenizer, self.tokenizer_backend, self.tokenized_requests = tokenizer, "huggingface", True

        def tok_encode(
            self, string: Any, left_truncate_len: int | None = None, add_special_tokens: bool | None = None, **_: Any
        ) -> list[Any]:
            """Token ids of a text, or of each of several; special tokens as the tokenizer has them, but never twice.

            The package's client leaves them out, which is another question to every model that begins with one.
            """
            if not isinstance(string, str):
                return [self.tok_encode(text, left_truncate_len) for text in string]
            if add_special_tokens is None:
                first = tokenizer.decode(self.prefix_token_id)
                add_special_tokens = not (first and string.startswith(first))
            ids: list[int] = tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]
            return ids[-left_truncate_len:] if left_truncate_len else ids

        async def get_batched_requests(
            self,
            requests: Sequence[Any],
            cache_keys: Sequence[Any],
            *,
            generate: bool = True,
            ctxlens: Sequence[int] | None = None,
            gen_kwargs: dict[str, Any] | None = None,
            **_: Any,
        ) -> list[Any]:
            """All requests, a body each; a list of one answer for each, as the package has it."""
            # A seed for each: a question that is asked several times must not be answered the same each time.
            how = _generation(gen_kwargs or {}) if generate else _SCORED
            seeded = enumerate(requests, self._seed)
            bodies = [{"prompt": [ids], "seed": seed, **how} for seed, ids in seeded]
            if generate:
                return await served.gather(bodies, lambda _, answer: self.parse_generations(outputs=answer))
            assert ctxlens is not None
            found = await served.gather(
                bodies, lambda number, answer: self.parse_logprobs(outputs=answer, ctxlens=[ctxlens[number]])
            )
            return [[tuple(one) for one in each] for each in found]

    def _generation(asked: dict[str, Any]) -> dict[str, Any]:
        wanted = normalize_gen_kwargs(asked)
        # The package ends a loaded model's answer at this token too, whatever its generation config says.
        ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return {
            "max_tokens": wanted["max_gen_toks"],
            "temperature": wanted.get("temperature", 0.0),
            "stop": [word for word in wanted["until"] if word],
            "stop_token_ids": ends,
            **{name: wanted[name] for name in _SAMPLING if wanted.get(name) is not None},
        }

    return Deployed()


# What a continuation's log-likelihood is read from. Tokens as ids: two that are written alike must not pass for one.
_SCORED = {
    "max_tokens": 1,
    "temperature": 0,
    "logprobs": 1,
    "echo": True,
    "return_tokens_as_token_ids": True,
}

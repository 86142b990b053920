"""What a completion request asks of the plain engine, and its refusal of what it cannot do (no torch)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from app.errors import Code
from workers.turns import plain, switches

_CANNOT = (
    *("structured_outputs", "logit_bias", "suffix", "bad_words", "prompt_logprobs", "allowed_token_ids"),
    *("truncate_prompt_tokens", "include_stop_str_in_output", "continue_final_message"),
)
_ONLY_TRUE = ("skip_special_tokens", "add_generation_prompt", "include_reasoning")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class Refused(Exception):
    """The request cannot be answered as it stands: 400, or 404 for a model that is not here.

    ``param`` is the field at fault, if one is; ``kind`` the service's code where ``invalid_value`` says too little.
    """

    def __init__(self, message: str, status: int = 400, *, param: str | None = None, kind: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.kind = kind


@dataclass(frozen=True)
class Asked:
    """One prompt and how to go on from it."""

    model: str
    prompt: str | list[int] | list[Mapping[str, Any]]
    """Text, token ids, or the messages of a chat."""
    max_tokens: int | None
    """None = as much as there is room for."""
    sampling: Mapping[str, float]
    """Of temperature, top_p, top_k, min_p and the three penalties: those that were given."""
    seed: int | None
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    min_tokens: int
    ignore_eos: bool
    logprobs: bool
    echo: bool
    """Whether the answer begins with the prompt; with ``logprobs`` its tokens are scored too."""
    token_ids: bool
    """Whether the answer's token ids are told, as vLLM's ``return_token_ids`` has it."""
    template: Mapping[str, Any]
    """Switches for the chat template, and ``chat_template`` where it is not the model's own."""
    number: int = 0
    """Of the answers to the same prompt."""

    @property
    def chat(self) -> bool:
        """Whether the prompt is a conversation."""
        return isinstance(self.prompt, list) and bool(self.prompt) and isinstance(self.prompt[0], Mapping)


def read(body: Mapping[str, Any], *, chat: bool) -> list[Asked]:
    """The answers that a body asks for, in the order of their ``index``. Raises Refused."""
    if body.get("tools"):
        message = "tools: the engine transformers reads no calls of them; vLLM does"
        raise Refused(message, param="tools", kind=Code.TOOLS_NOT_SUPPORTED)
    for name in _CANNOT:
        if body.get(name):
            raise Refused(f"{name} is not supported by the engine transformers; vLLM has it", param=name)
    for name in _ONLY_TRUE:
        if body.get(name) is False:
            raise Refused(f"{name}: false is not supported by the engine transformers; vLLM has it", param=name)
    if body.get("add_special_tokens") not in (None, not chat):
        raise Refused(
            "add_special_tokens: the engine transformers adds them to completions alone; vLLM has the choice",
            param="add_special_tokens",
        )
    if body.get("logprobs") and body.get("stream"):
        raise Refused(
            "logprobs are not told in a stream by the engine transformers; ask without stream", param="logprobs"
        )
    if body.get("echo") and (chat or body.get("stream")):
        raise Refused(
            "echo is for completions that are not streamed with the engine transformers; vLLM has it", param="echo"
        )
    kind = (body.get("response_format") or {}).get("type", "text")
    if kind != "text":
        raise Refused(
            f"response_format {kind} is not supported by the engine transformers; vLLM has it", param="response_format"
        )
    if body.get("top_logprobs") or (not chat and (body.get("logprobs") or 0) > 1):
        raise Refused(
            "alternatives to the chosen token are not told by the engine transformers; ask for logprobs alone",
            param="top_logprobs" if body.get("top_logprobs") else "logprobs",
        )
    template = _template(body)
    if chat:
        try:
            prompts: list[Any] = [plain(body["messages"])]
        except ValueError as error:
            raise Refused(str(error), param="messages") from error
    else:
        given = body.get("prompt", "")
        several = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
        prompts = list(given) if several else [given]
    stop = body.get("stop") or ()
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    count = int(body.get("n") or 1)
    seed = body.get("seed")
    return [
        Asked(
            model=str(body.get("model")),
            prompt=prompt,
            max_tokens=limit if limit is not None else None if chat else 16,
            sampling={name: body[name] for name in _SAMPLING if body.get(name) is not None},
            seed=None if seed is None else seed + number,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_ids=tuple(body.get("stop_token_ids") or ()),
            min_tokens=int(body.get("min_tokens") or 0),
            ignore_eos=bool(body.get("ignore_eos")),
            logprobs=bool(body.get("logprobs")),
            echo=bool(body.get("echo")),
            token_ids=bool(body.get("return_token_ids")),
            template=template,
            number=number,
        )
        for prompt in prompts
        for number in range(count)
    ]


def _template(body: Mapping[str, Any]) -> dict[str, Any]:
    own = body.get("chat_template")
    try:
        return {**switches(body), **({"chat_template": own} if own else {})}
    except ValueError as error:
        raise Refused(str(error), param="reasoning_effort") from error

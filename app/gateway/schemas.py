"""What a completion request may hold: OpenAI's fields, some of vLLM's, and nothing else reaches an engine."""

import difflib
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, WithJsonSchema

from app.errors import BadRequest, Code

Count = Annotated[int, Field(ge=1, le=1_048_576)]
Token = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(max_length=65536)]
Anything = Annotated[JsonValue, WithJsonSchema({})]
NoEffect = Annotated[Anything, Field(description="Accepted for OpenAI clients; has no effect here.")]

REFUSED = {
    "audio": "This service answers in text.",
    "cache_salt": "Leave it out.",
    "chat_template": "The model's own chat template is used.",
    "functions": "Use tools.",
    "function_call": "Use tool_choice.",
    "guided_choice": "Use structured_outputs.choice.",
    "guided_grammar": "Use structured_outputs.grammar.",
    "guided_json": "Use response_format with a json_schema.",
    "guided_regex": "Use structured_outputs.regex.",
    "kv_transfer_params": "Leave it out.",
    "mm_processor_kwargs": "Leave it out.",
    "priority": "Leave it out.",
    "prompt_embeds": "Send the prompt as text or token ids.",
    "request_id": "Leave it out; the answer's x-request-id tells it.",
    "use_beam_search": "Use n with a temperature.",
    "vllm_xargs": "Leave it out.",
    "web_search_options": "This service does not search the web.",
}


class Sampling(BaseModel):
    """What both kinds of request have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    dropped: ClassVar[frozenset[str]] = frozenset({"user", "metadata", "store"})

    model: str = Field(min_length=1, max_length=512, description="Name of a deployment; GET /v1/models lists them.")
    stream: bool | None = Field(None, description="Send the answer as server-sent events while it is made.")
    stream_options: dict[Literal["include_usage", "continuous_usage_stats", "include_obfuscation"], bool] | None = None
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=64)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    response_format: dict[str, Anything] | None = None

    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="vLLM: sample among so many tokens; -1 = all.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=1_048_576)] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: Count | None = None
    bad_words: Annotated[list[Text], Field(max_length=1024)] | None = None
    allowed_token_ids: Annotated[list[Token], Field(max_length=65536)] | None = None
    structured_outputs: dict[str, Anything] | None = Field(
        None, description="vLLM: one of json, regex, choice, grammar."
    )
    add_special_tokens: bool | None = None

    user: NoEffect = None
    metadata: NoEffect = None
    store: NoEffect = None

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """The request in ``body``. Raises BadRequest that names the field at fault."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise _bad_request(cls, error) from None

    def body_for(self, served_name: str) -> bytes:
        """What the engine gets: the same under its own name, without what has no effect and without nulls.

        Nulls inside messages stay: there they mean something.
        """
        if self.stream_options is not None:
            self.stream_options.pop("include_obfuscation", None)
        request = self.model_copy(update={"model": served_name})
        return request.model_dump_json(exclude_none=True, exclude=set(self.dropped)).encode()


class ChatRequest(Sampling):
    """``POST /v1/chat/completions``."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "support", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64}]
        }
    )
    dropped: ClassVar[frozenset[str]] = Sampling.dropped | {
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "prediction",
        "verbosity",
        "modalities",
    }

    messages: Annotated[list[dict[str, Anything]], Field(min_length=1, max_length=65536)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Anything]], Field(max_length=1024)] | None = None
    tool_choice: str | dict[str, Anything] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str, Field(max_length=16)] | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[Literal["enable_thinking", "thinking"], bool] | None = Field(
        None, description="For models that think: switch it on or off."
    )

    service_tier: NoEffect = None
    safety_identifier: NoEffect = None
    prompt_cache_key: NoEffect = None
    prompt_cache_options: NoEffect = None
    prompt_cache_retention: NoEffect = None
    prediction: NoEffect = None
    verbosity: NoEffect = None
    modalities: list[Literal["text"]] | None = None


class CompletionRequest(Sampling):
    """``POST /v1/completions``."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "support", "prompt": "Once upon a time", "max_tokens": 64}]}
    )
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=64)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=64)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: Text | None = None
    best_of: Literal[1] | None = Field(None, description="Only 1; use n for several answers.")

    dropped: ClassVar[frozenset[str]] = Sampling.dropped | {"best_of"}


def _bad_request(cls: type[Sampling], error: ValidationError) -> BadRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    kind, message = first["type"], first["msg"]
    steps = [str(step) for step in first["loc"]]
    if kind == "json_invalid":
        return BadRequest(
            f"the body is not valid JSON: {message.removeprefix('Invalid JSON: ')}", code=Code.INVALID_JSON
        )
    if not steps:
        return BadRequest("the body must be a JSON object", code=Code.INVALID_TYPE)
    name = steps[0][:64]
    if kind == "missing":
        return BadRequest(f"{name} is missing", param=name, code=Code.MISSING_FIELD)
    if kind == "extra_forbidden":
        if name in REFUSED:
            return BadRequest(f"{name} is not taken here", param=name, code=Code.REFUSED_FIELD, hint=REFUSED[name])
        near = difflib.get_close_matches(name, cls.model_fields, 1)
        hint = f"Did you mean {near[0]}?" if near else None
        return BadRequest(
            f"{name[:64]} is not a field of this request", param=name[:64], code=Code.UNKNOWN_FIELD, hint=hint
        )
    code = Code.INVALID_TYPE if kind.endswith("_type") else Code.INVALID_VALUE
    inner = steps[1] if len(steps) > 1 else ""
    if inner and not inner.isdigit() and code is Code.INVALID_TYPE:
        # Below a union pydantic speaks of its first branch alone.
        return BadRequest(f"{name} has none of the forms that it may have", param=name, code=code, hint="See /docs.")
    path = f"{name}.{inner}" if inner.isdigit() else name
    return BadRequest(f"{path}: {message[0].lower()}{message[1:]}", param=path, code=code)

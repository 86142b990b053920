"""What a completion request may hold: OpenAI's fields, some of vLLM's, and nothing else reaches an engine."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field

from app.gateway.media import carried
from app.gateway.requests import Anything, Count, EngineRequest, NoEffect, StreamOptions, Text, Token


class Sampling(EngineRequest):
    """What both kinds of request have in common."""

    dropped: ClassVar[frozenset[str]] = frozenset({"user", "metadata", "store"})

    stream: bool | None = Field(None, description="Send the answer as server-sent events while it is made.")
    stream_options: StreamOptions | None = None
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

    @property
    def wants_usage(self) -> bool:
        """Only where it is asked for."""
        return (self.stream_options or {}).get("include_usage", False)

    def _imposed(self) -> dict[str, Any]:
        """A stream's usage is always told, because it is counted here."""
        if not self.streamed:
            return {"stream_options": None}
        every = self.wants_usage and (self.stream_options or {}).get("continuous_usage_stats", False)
        options = {"include_usage": True, "continuous_usage_stats": True} if every else {"include_usage": True}
        return {"stream_options": options}


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
    template: ClassVar[Literal["unused", "sent", "impossible"]] = "sent"

    messages: Annotated[list[dict[str, Anything]], Field(min_length=1, max_length=65536), AfterValidator(carried)]
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

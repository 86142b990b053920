"""Embeddings, OpenAI's Responses and Anthropic's Messages, as far as an engine can do them without a memory."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field, JsonValue

from app.gateway.media import carried
from app.gateway.requests import Anything, Count, EngineRequest, NoEffect, StreamOptions, Text, Token

_NO_MEMORY = "Nothing is kept between requests here: send the whole conversation as input."


class EmbeddingsRequest(EngineRequest):
    """``POST /v1/embeddings``."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "passages", "input": ["How do I reset it?"]}]})
    dropped: ClassVar[frozenset[str]] = frozenset({"user"})

    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=2048)]
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=2048)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    truncate_prompt_tokens: Count | None = Field(None, description="vLLM: keep so many tokens of each input.")
    add_special_tokens: bool | None = None
    user: NoEffect = None


def _only_functions(tools: list[dict[str, JsonValue]]) -> list[dict[str, JsonValue]]:
    """The engine's own tools reach the network; those that callers run are functions."""
    for tool in tools:
        if tool.get("type") != "function":
            raise ValueError("only tools of type function are taken")
    return tools


class ResponsesRequest(EngineRequest):
    """``POST /v1/responses``, without a memory: ``store`` has no effect."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"model": "support", "input": "Hello!"}]})
    dropped: ClassVar[frozenset[str]] = frozenset(
        {
            "access_programs",
            "background",
            "background_options",
            "conversation",
            "context_management",
            "image",
            "max_tool_calls",
            "metadata",
            "previous_response_id",
            "prompt",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "stream_options",
            "user",
        }
    )
    refused: ClassVar[dict[str, str]] = EngineRequest.refused | {
        "conversation": _NO_MEMORY,
        "previous_response_id": _NO_MEMORY,
        "prompt": "Stored prompts are not here: send instructions and input.",
        "context_management": _NO_MEMORY,
    }
    endings: ClassVar[tuple[bytes, ...]] = (
        b"event: response.completed",
        b"event: response.incomplete",
        b"event: response.failed",
        b"event: error",
        b"data: [DONE]",
    )
    template: ClassVar[Literal["unused", "sent", "impossible"]] = "impossible"

    input: Annotated[
        str | Annotated[list[dict[str, Anything]], Field(min_length=1, max_length=65536)], AfterValidator(carried)
    ]
    instructions: str | None = None
    stream: bool | None = Field(None, description="Send the answer as server-sent events while it is made.")
    stream_options: StreamOptions | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Anything]], Field(max_length=1024), AfterValidator(_only_functions)] | None = None
    tool_choice: str | dict[str, Anything] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Anything] | None = None
    text: dict[str, Anything] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = Field(None, description="vLLM: sample among so many tokens; -1 = all.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None

    background: Literal[False] | None = None
    conversation: None = None
    context_management: None = None
    previous_response_id: None = None
    prompt: None = None
    access_programs: NoEffect = None
    background_options: NoEffect = None
    image: NoEffect = None
    max_tool_calls: NoEffect = None
    metadata: NoEffect = None
    prompt_cache_key: NoEffect = None
    prompt_cache_options: NoEffect = None
    prompt_cache_retention: NoEffect = None
    safety_identifier: NoEffect = None
    service_tier: NoEffect = None
    store: NoEffect = None
    user: NoEffect = None

    def _imposed(self) -> dict[str, Any]:
        return {"store": False}


class MessagesRequest(EngineRequest):
    """``POST /v1/messages``, Anthropic's."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "support", "max_tokens": 64, "messages": [{"role": "user", "content": "Hello!"}]}]
        }
    )
    dropped: ClassVar[frozenset[str]] = frozenset(
        {
            "cache_control",
            "container",
            "context_management",
            "diagnostics",
            "inference_geo",
            "metadata",
            "service_tier",
            "speed",
            "user_profile_id",
            "workspace_id",
        }
    )
    refused: ClassVar[dict[str, str]] = EngineRequest.refused | {
        "container": "There are no containers here.",
        "mcp_servers": "Tools are run by the caller: use tools.",
        "context_management": "Send the conversation as it shall be read.",
    }
    endings: ClassVar[tuple[bytes, ...]] = (b"event: message_stop", b"event: error", b"data: [DONE]")
    anthropic: ClassVar[bool] = True
    template: ClassVar[Literal["unused", "sent", "impossible"]] = "impossible"

    messages: Annotated[list[dict[str, Anything]], Field(min_length=1, max_length=65536), AfterValidator(carried)]
    max_tokens: Count
    system: str | list[dict[str, Anything]] | None = None
    stream: bool | None = Field(None, description="Send the answer as server-sent events while it is made.")
    stop_sequences: Annotated[list[Text], Field(max_length=64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    tools: Annotated[list[dict[str, Anything]], Field(max_length=1024)] | None = None
    tool_choice: dict[str, Anything] | None = None
    thinking: dict[str, Anything] | None = None
    output_config: dict[str, Anything] | None = None

    container: None = None
    context_management: None = None
    metadata: dict[str, Anything] | None = Field(None, description="`user_id` keeps a user on one side of a split.")
    cache_control: NoEffect = None
    diagnostics: NoEffect = None
    inference_geo: NoEffect = None
    service_tier: NoEffect = None
    speed: NoEffect = None
    user_profile_id: NoEffect = None
    workspace_id: NoEffect = None

    @property
    def sender(self) -> str | None:
        """Anthropic's clients say it in the metadata."""
        user = (self.metadata or {}).get("user_id")
        return user if isinstance(user, str) and user else None

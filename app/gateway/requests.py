"""What all requests to an engine have in common: how they are checked, and what of them reaches the engine."""

import difflib
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, WithJsonSchema
from pydantic_core import to_json

from app.errors import BadRequest, Code, NotFound, plainly

Count = Annotated[int, Field(ge=1, le=1_048_576)]
Token = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(max_length=65536)]
Anything = Annotated[JsonValue, WithJsonSchema({})]
NoEffect = Annotated[Anything, Field(description="Accepted for clients that send it; has no effect here.")]
StreamOptions = dict[Literal["include_usage", "continuous_usage_stats", "include_obfuscation"], bool]

_REFUSED = {
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
    "moderation": "This service does not moderate: check prompt and answer yourself.",
    "priority": "Leave it out.",
    "prompt_embeds": "Send the prompt as text or token ids.",
    "request_id": "Leave it out; the answer's x-request-id tells it.",
    "use_beam_search": "Use n with a temperature.",
    "vllm_xargs": "Leave it out.",
    "web_search_options": "This service does not search the web.",
}


class EngineRequest(BaseModel):
    """The body of a request that is passed on."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    dropped: ClassVar[frozenset[str]] = frozenset()
    """Fields that are taken and do not reach the engine."""
    refused: ClassVar[dict[str, str]] = _REFUSED
    """Known names that are not taken, and what to do instead."""
    endings: ClassVar[tuple[bytes, ...]] = (b"data: [DONE]",)
    """What the last event of a whole stream begins with."""
    template: ClassVar[Literal["unused", "sent", "impossible"]] = "unused"
    """What becomes of the chat template of an adapter that has one of its own."""
    anthropic: ClassVar[bool] = False
    """Errors inside a stream have Anthropic's shape, not OpenAI's."""

    model: str = Field(min_length=1, max_length=512, description="A deployment or an alias; GET /v1/models lists them.")

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """The request in ``body``. Raises BadRequest that names the field at fault."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise _bad_request(cls, error) from None

    @property
    def streamed(self) -> bool:
        """Whether the answer shall come as server-sent events."""
        return getattr(self, "stream", None) is True

    @property
    def wants_usage(self) -> bool:
        """Whether a stream's last piece, which tells the usage, is for the client too."""
        return True

    @property
    def has_tools(self) -> bool:
        """Whether the model is offered tools."""
        return bool(getattr(self, "tools", None))

    @property
    def sender(self) -> str | None:
        """Who asks, where the client tells: one sender stays on one side of an alias's split."""
        user = getattr(self, "user", None)
        return user if isinstance(user, str) and user else None

    def body_for(self, served_name: str, template: str | None = None) -> bytes:
        """What the engine gets: the same under its own name, without what has no effect and without nulls.

        Nulls inside messages stay: there they mean something. ``template`` is the chat template that the model needs
        in place of its engine's. Raises NotFound where the engine takes none on this route.
        """
        request = self.model_copy(update={"model": served_name, **self._imposed()})
        body = request.model_dump_json(exclude_none=True, by_alias=True, exclude=set(self.dropped)).encode()
        if template is None or self.template == "unused":
            return body
        if self.template == "impossible":
            raise NotFound(
                f"{self.model[:128]} has its own chat template, which its engine takes at /v1/chat/completions alone",
                param="model",
                code=Code.ENDPOINT_NOT_SUPPORTED,
                hint="Ask at /v1/chat/completions, or merge the adapter and deploy the result.",
            )
        # Not a field: no client can say it.
        return b'{"chat_template":' + to_json(template) + b"," + body[1:]

    def _imposed(self) -> dict[str, Any]:
        """What the engine is told whatever the client said."""
        return {}


def _bad_request(cls: type[EngineRequest], error: ValidationError) -> BadRequest:
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
    if kind == "missing" and len(steps) == 1:
        return BadRequest(f"{name} is missing", param=name, code=Code.MISSING_FIELD)
    if kind in ("extra_forbidden", "none_required") and name in cls.refused:
        return BadRequest(f"{name} is not taken here", param=name, code=Code.REFUSED_FIELD, hint=cls.refused[name])
    if kind == "extra_forbidden" and len(steps) == 1:
        near = difflib.get_close_matches(name, cls.model_fields, 1)
        hint = f"Did you mean {near[0]}?" if near else None
        return BadRequest(f"{name} is not a field of this request", param=name, code=Code.UNKNOWN_FIELD, hint=hint)
    code = Code.INVALID_TYPE if kind.endswith("_type") else Code.INVALID_VALUE
    inner = steps[1] if len(steps) > 1 else ""
    if inner and not inner.isdigit() and code is Code.INVALID_TYPE:
        # Below a union pydantic speaks of its first branch alone.
        return BadRequest(f"{name} has none of the forms that it may have", param=name, code=code, hint="See /docs.")
    path = f"{name}.{inner}" if inner.isdigit() else name
    return BadRequest(f"{path}: {plainly(message)}", param=path, code=code)

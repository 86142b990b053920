"""Errors that name the culprit and know their HTTP status.

Services raise these; the one handler in ``app.main`` turns them into the error object
``{"error": {"message", "type", "param", "code", "hint"}}``. The worker side uses ``RunError`` with the same codes.
"""

from enum import StrEnum
from typing import Any


class Code(StrEnum):
    """Every error code that a client can see, in one place."""

    # the request
    INVALID_JSON = "invalid_json"
    INVALID_YAML = "invalid_yaml"
    UNKNOWN_FIELD = "unknown_field"
    REFUSED_FIELD = "refused_field"
    MISSING_FIELD = "missing_field"
    INVALID_VALUE = "invalid_value"
    INVALID_TYPE = "invalid_type"
    UNKNOWN_ALGORITHM = "unknown_algorithm"
    CONFLICTING_FIELDS = "conflicting_fields"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    BODY_TOO_LARGE = "body_too_large"
    HEADERS_TOO_LARGE = "headers_too_large"
    INVALID_HOST = "invalid_host"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    NOT_FOUND = "not_found"
    MISSING_API_KEY = "missing_api_key"
    INVALID_API_KEY = "invalid_api_key"
    MISSING_SCOPE = "missing_scope"
    RATE_LIMIT_EXCEEDED = "rate_limit_exceeded"
    # data
    INVALID_FILE = "invalid_file"
    EMPTY_FILE = "empty_file"
    # models
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_OUTSIDE_ROOTS = "model_outside_roots"
    MODEL_NOT_ALLOWED = "model_not_allowed"
    MODEL_UNREACHABLE = "model_unreachable"
    HUB_REFUSED = "hub_refused"
    MODEL_INVALID = "model_invalid"
    TARGET_MODULES_NOT_FOUND = "target_modules_not_found"
    ADAPTER_INVALID = "adapter_invalid"
    ADAPTER_NOT_SERVABLE = "adapter_not_servable"
    BASE_MISMATCH = "base_mismatch"
    QUANTISED_BASE = "quantised_base"
    # state
    WRONG_STATE = "wrong_state"
    IN_USE = "in_use"
    NAME_TAKEN = "name_taken"
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"
    UNKNOWN_STEP = "unknown_step"
    DEPENDENCY_CYCLE = "dependency_cycle"
    WRONG_KIND = "wrong_kind"
    MODEL_NOT_READY = "model_not_ready"
    TOOLS_NOT_SUPPORTED = "tools_not_supported"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    ENDPOINT_NOT_SUPPORTED = "endpoint_not_supported"
    MODEL_WAKING = "model_waking"
    DISK_FULL = "disk_full"
    DATABASE_BUSY = "database_busy"
    DATABASE_DAMAGED = "database_damaged"
    STOPPING = "stopping"
    ENGINE_ERROR = "engine_error"
    INTERNAL_ERROR = "internal_error"
    # runs
    BAD_DATA = "bad_data"
    BAD_SPEC = "bad_spec"
    NON_FINITE_LOSS = "non_finite_loss"
    NON_FINITE_WEIGHTS = "non_finite_weights"
    EFFECT_LOST = "effect_lost"
    VALIDATION_FAILED = "validation_failed"
    GATE_NOT_PASSED = "gate_not_passed"
    OUT_OF_MEMORY = "oom"
    GATED_MODEL = "gated_model"
    CRASHED = "crashed"
    KILLED = "killed"
    PROTOCOL = "protocol"
    RUN_FAILED = "run_failed"
    WORKER_LOST = "worker_lost"
    CRASH_LOOP = "crash_loop"
    HOST_OUT_OF_MEMORY = "host_oom"
    STALLED = "stalled"
    WALL_TIME_EXCEEDED = "wall_time_exceeded"
    QUEUE_TIME_EXCEEDED = "queue_time_exceeded"
    STORAGE_ERROR = "storage_error"
    DEPENDENCY_FAILED = "dependency_failed"
    START_TIMEOUT = "start_timeout"
    NO_CAPACITY = "no_capacity"
    ENGINE_CRASH_LOOP = "engine_crash_loop"
    PARITY_MISSED = "parity_missed"
    ENGINE_MISSING = "engine_missing"


class AppError(Exception):
    """An error with a status, a code, the field at fault and a hint what to do."""

    status = 400
    type = "invalid_request_error"
    code = Code.INVALID_VALUE
    retry_after: int | None = None

    def __init__(
        self, message: str, *, param: str | None = None, code: Code | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.hint = hint
        self.headers: dict[str, str] = {}
        """More headers of the answer."""

    def as_object(self) -> dict[str, dict[str, str | None]]:
        """The error object of the contract; ``hint`` only when there is one."""
        body = {"message": self.message, "type": self.type, "param": self.param, "code": str(self.code)}
        return {"error": body if self.hint is None else {**body, "hint": self.hint}}


def plainly(message: str) -> str:
    """Pydantic's message as the rest of a sentence."""
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def anthropics(error: AppError, request_id: str | None = None) -> dict[str, Any]:
    """The same error in Anthropic's frame, for ``/v1/messages``: of their types ours lack but one."""
    told = error.as_object()["error"]
    kind = "api_error" if error.type == "server_error" else error.type
    frame: dict[str, Any] = {"type": "error", "error": {**told, "type": kind}}
    return frame if request_id is None else {**frame, "request_id": request_id}


class BadRequest(AppError):
    """400: the request itself is at fault."""


class Unauthorized(AppError):
    """401: no key, or one that we do not know."""

    status = 401
    type = "authentication_error"
    code = Code.INVALID_API_KEY


class Forbidden(AppError):
    """403: the key lacks the scope."""

    status = 403
    type = "permission_error"
    code = Code.MISSING_SCOPE


class NotFound(AppError):
    """404: unknown, or not yours."""

    status = 404
    type = "not_found_error"
    code = Code.NOT_FOUND


class Conflict(AppError):
    """409: wrong state, in use or name taken. Never worth an automatic retry."""

    status = 409
    type = "conflict_error"
    code = Code.WRONG_STATE


class TooLarge(AppError):
    """413: the body is over the cap."""

    status = 413
    code = Code.BODY_TOO_LARGE


class UnsupportedMediaType(AppError):
    """415: a content type that the route does not read."""

    status = 415
    code = Code.UNSUPPORTED_MEDIA_TYPE


class IdempotencyKeyReused(AppError):
    """422: the same Idempotency-Key came with another body."""

    status = 422
    code = Code.IDEMPOTENCY_KEY_REUSED


class TooManyRequests(AppError):
    """429: more than the key may ask for; come back after ``retry_after`` seconds."""

    status = 429
    type = "rate_limit_error"
    code = Code.RATE_LIMIT_EXCEEDED


class Unavailable(AppError):
    """503: busy or waking; come back after ``retry_after`` seconds."""

    status = 503
    type = "server_error"
    code = Code.DATABASE_BUSY

    def __init__(
        self, message: str, *, retry_after: int = 1, code: Code | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, code=code, hint=hint)
        self.retry_after = retry_after


class BadGateway(AppError):
    """502: the serving engine answered with something that we cannot pass on."""

    status = 502
    type = "server_error"
    code = Code.ENGINE_ERROR


class InsufficientStorage(AppError):
    """507: the disk has no room for new work."""

    status = 507
    type = "server_error"
    code = Code.DISK_FULL


class RunError(Exception):
    """A run that cannot succeed: raised by recipes, merges and operations, kept in the job's ``error``.

    ``transient``: another attempt may well succeed; the job's retry policy decides whether there is one.
    """

    def __init__(
        self,
        code: Code,
        message: str,
        *,
        hint: str | None = None,
        param: str | None = None,
        transient: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.param = param
        self.transient = transient

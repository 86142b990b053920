"""The hub as a client sees it: which token is sent, and what its refusals mean to whoever submitted the job.

The address is ``HF_ENDPOINT``'s. The token is never a field: the worker's environment has it, in ``HF_TOKEN`` or in the
file that ``HF_TOKEN_PATH`` names, or ``hf auth login`` has left it in ``HF_HOME``.
"""

import errno
import os
from pathlib import Path
from typing import Any

from app.errors import Code, RunError

TOKEN = "HF_TOKEN (or the file that HF_TOKEN_PATH names) in the worker's environment"
BUSY = (408, 412, 425, 429)
"""Beside every 5xx: what may go well a moment later. 412: somebody else committed meanwhile."""


def token() -> str | None:
    """The token by reference; None when there is none. Its value goes into requests and nowhere else."""
    from huggingface_hub import get_token

    path = os.environ.get("HF_TOKEN_PATH")
    if path and not os.environ.get("HF_TOKEN"):
        # Read here, because the library looks at this variable once, when it is imported: too early in a warm runner.
        try:
            return Path(path).read_text().strip() or None
        except OSError as error:
            raise RunError(
                Code.HUB_REFUSED,
                f"the file that HF_TOKEN_PATH names cannot be read: {error.strerror}",
                hint="Let the worker's user read it, or set HF_TOKEN.",
            ) from error
    found: str | None = get_token()
    return found


def client(secret: str | None) -> Any:
    """``huggingface_hub``'s client for ``HF_ENDPOINT``; without a token it sends none."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging

    # It would put addresses into the run's log, and those that uploads go to are signed.
    logging.set_verbosity_error()
    return HfApi(token=secret or False, library_name="tunesmith")


def endpoint() -> str:
    """Where the hub is, for people."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def trouble(error: Exception, repo: str, field: str, secret: str | None, *, writing: bool = False) -> RunError:
    """What went wrong with a repository, with the field at fault and what to do.

    Connections that break, 5xx and 429 are ``transient``: the retry policy decides about another attempt.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cause = _first_cause(error)
    if isinstance(cause, RunError):
        return cause
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(Code.DISK_FULL, "the disk is full", hint="Free space on the disk of HF_HOME.")
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    said = _hidden(_said(cause), secret)
    # Most often a name in the registry with a letter wrong.
    ours = "" if "/" in repo else f" Nothing in the registry is called {repo}: GET /artifacts lists what is."
    who = f"the account of {TOKEN}" if secret else f"an account, whose token goes into {TOKEN}"
    if isinstance(cause, GatedRepoError):
        return RunError(
            Code.GATED_MODEL,
            f"{field}: {repo} is gated: {said}",
            param=field,
            hint=f"Accept its licence at {endpoint()}/{repo} with {who}.",
        )
    if isinstance(cause, RevisionNotFoundError):
        return RunError(
            Code.MODEL_NOT_FOUND,
            f"{field}: {repo} has no such revision",
            param=field,
            hint=f"{endpoint()}/{repo}/commits/main lists its commits; hub:{repo}@<commit> names one.",
        )
    if status == 403 or (status == 401 and (secret or writing)):
        verb = "write to" if writing else "read"
        return RunError(
            Code.HUB_REFUSED,
            f"{field}: {endpoint()} does not let this token {verb} {repo}: {status}, {said}",
            param=field,
            hint=f"Give a token that may {verb} it: {TOKEN}.",
        )
    if isinstance(cause, RepositoryNotFoundError) or status == 404:
        return RunError(
            Code.MODEL_NOT_FOUND,
            f"{field}: {endpoint()} has no {repo}, or shows it to others alone",
            param=field,
            hint=f"Check the name; a private repository needs {who}.{ours}",
        )
    if status is not None and status < 500 and status not in BUSY:
        return RunError(Code.HUB_REFUSED, f"{field}: {endpoint()} refused {repo}: {status}, {said}", param=field)
    if _is_outside(cause):
        what = "took" if writing else "delivered"
        return RunError(
            Code.MODEL_UNREACHABLE,
            f"{field}: {endpoint()} has not {what} {repo}: {said}",
            param=field,
            hint=(
                "The artifact is safe here: POST /jobs/{id}/retry goes on with the files that are not there yet."
                if writing
                else "Check HF_ENDPOINT and the network, or put the model into a folder under TUNESMITH_MODEL_ROOTS; "
                f"what has come is not fetched again.{ours}"
            ),
            transient=True,
        )
    return RunError(Code.RUN_FAILED, f"{field}: {repo}: {said}", param=field)


def _first_cause(error: BaseException) -> BaseException:
    """What the library wrapped into a sentence of its own: a refusal, a broken connection, a full disk."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionResolutionError

    wrappers = (LocalEntryNotFoundError, RevisionResolutionError, RuntimeError)
    found: BaseException = error
    while isinstance(found, wrappers) and not isinstance(found, HfHubHTTPError) and found.__cause__ is not None:
        found = found.__cause__
    return found


def _is_outside(error: BaseException) -> bool:
    """A connection or the hub itself, not this machine."""
    import httpx2
    from huggingface_hub.errors import RevisionResolutionError

    return isinstance(error, httpx2.TransportError | RevisionResolutionError | OSError)


def _said(error: BaseException) -> str:
    """The hub's own words, in one line, without the address asked for (it may be signed)."""
    server = getattr(error, "server_message", None)
    text = str(server) if server else str(error)
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return line.partition(" for url")[0][:500].rstrip(".") or type(error).__name__


def _hidden(text: str, secret: str | None) -> str:
    return text.replace(secret, "…") if secret else text

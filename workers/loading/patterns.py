"""Regular expressions that users write: checked when a spec is read, searched with a time limit."""

import re

from app.errors import Code, RunError

SECONDS = 1.0
"""Some patterns take years on some texts; no search may take longer than this."""


def fault_of(pattern: str) -> str | None:
    """What is wrong with a pattern; None for one that can be used."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return None


def found(pattern: str, text: str, *, full: bool = False, ignore_case: bool = False) -> bool:
    """Whether the pattern occurs in the text, or matches the ``full`` text. Raises RunError bad_spec."""
    import regex

    look = regex.fullmatch if full else regex.search
    try:
        return look(pattern, text, flags=regex.IGNORECASE if ignore_case else 0, timeout=SECONDS) is not None
    except TimeoutError:
        raise RunError(
            Code.BAD_SPEC,
            f"the pattern {pattern[:100]!r} took more than {SECONDS:g} s on one text",
            hint="Leave out repeats within repeats, such as (a+)+.",
        ) from None
    except regex.error as error:
        raise RunError(Code.BAD_SPEC, f"the pattern {pattern[:100]!r} cannot be used: {error}") from error

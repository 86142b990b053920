"""What one request comes to, told to the meter and to the key's limits once it is over."""

import time
from collections.abc import Mapping
from typing import Any

from app.gateway.limits import Permit
from app.projects.caller import Caller
from app.usage.meter import Meter


class Tally:
    """Filled on the way; ``end`` tells, once."""

    def __init__(self, meter: Meter, permit: Permit, caller: Caller) -> None:
        self._meter = meter
        self._permit = permit
        self._caller = caller
        self._began = time.perf_counter()
        self._first: float | None = None
        self._prompt = 0
        self._completion: int | None = None
        self.model: str | None = None
        """Who answers; None while that is not known, and then nothing is counted."""
        self.pieces = 0
        """Events of a stream so far."""
        self.whole = False
        """The answer came to its end, so that the usage that it told is all of it."""
        self.failed = False
        """The engine refused or broke off. A client that leaves is no failure."""

    def first_byte(self) -> None:
        """The engine has begun to answer."""
        if self._first is None:
            self._first = time.perf_counter()

    def used(self, usage: Any) -> None:
        """The ``usage`` of an answer, in OpenAI's names or Anthropic's. Anthropic tells it in two parts."""
        if not isinstance(usage, Mapping):
            return
        prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
        completion = usage.get("completion_tokens", usage.get("output_tokens"))
        if isinstance(prompt, int):
            self._prompt = max(self._prompt, prompt)
        if isinstance(completion, int):
            self._completion = max(self._completion or 0, completion)

    def end(self) -> None:
        """Counts the request and makes room for the next. Only the first call counts."""
        if self._permit.left:
            return
        completion = self._completion
        if completion is None or not self.whole or self.failed:
            # What a stream tells on its way is what it had come to by then: Anthropic's begins with a count of 0.
            # An engine sends about a token a piece. An answer in one piece that never came counts nothing.
            completion = max(completion or 0, self.pieces)
        self._permit.leave(self._prompt + completion)
        if self.model is not None:
            now = time.perf_counter()
            self._meter.add(
                self._caller,
                self.model,
                failed=self.failed,
                prompt_tokens=self._prompt,
                completion_tokens=completion,
                seconds=now - self._began,
                first_byte_seconds=(self._first or now) - self._began,
            )

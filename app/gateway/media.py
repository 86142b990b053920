"""Images, audio and video of a request: what is sent in it is passed on, what would have to be fetched is refused.

An engine that fetched an address for a client would reach what the client cannot: its own machine and the network
around it. Engines are started so that they fetch nothing; here the client is told why, whichever engine it is.
"""

from typing import TypeVar

from pydantic import JsonValue
from pydantic_core import PydanticCustomError

_ADDRESSED = ("image_url", "audio_url", "video_url", "file_url")
_NESTED = ("content", "output")
Given = TypeVar("Given", bound=JsonValue)


def carried(messages: Given) -> Given:
    """The messages as they are. Raises PydanticCustomError for a part that is an address."""
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict) and any(_fetches(message.get(name)) for name in _NESTED):
            raise PydanticCustomError(
                "media_address",
                "message {number} has an address, and none is fetched: send it as a data: URL",
                {"number": number},
            )
    return messages


def _fetches(content: JsonValue) -> bool:
    for part in content if isinstance(content, list) else (content,):
        if not isinstance(part, dict):
            continue
        source = part.get("source")
        given = [part.get(name) for name in _ADDRESSED] + [source.get("url") if isinstance(source, dict) else None]
        if any(_is_address(value) for value in given) or any(_fetches(part.get(name)) for name in _NESTED):
            return True
    return False


def _is_address(given: JsonValue) -> bool:
    url = given.get("url") if isinstance(given, dict) else given
    return isinstance(url, str) and url[:5].lower() != "data:"

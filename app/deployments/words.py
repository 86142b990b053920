"""How the words of an adapter differ from its base's: tokenizer, end of an answer, chat template. Reads files alone.

Of these an engine can take the chat template alone from each request; all else is the base's.
"""

import filecmp
import hashlib
import json
from pathlib import Path
from typing import Any

from app import parsers
from app.artifacts import inspect
from app.errors import AppError

_TOKENIZES = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")
"""Parts of a tokenizer.json that say which ids a text becomes; truncation and padding are settings of a run."""


def own_template(folder: Path, base: Path) -> str | None:
    """An adapter's chat template; None where it has none, or the base's."""
    template = inspect.template_of(folder)
    return template if template and template != inspect.template_of(base) else None


def fault(folder: Path, base: Path) -> str | None:
    """Why an engine that serves the base cannot read and write the adapter's words; None when it can."""
    own, its = folder / "tokenizer.json", base / "tokenizer.json"
    # Large ones take a second to be read as JSON; most are the base's, byte for byte.
    same = not own.is_file() or (its.is_file() and filecmp.cmp(own, its, shallow=False))
    if not same and _tokenizer(own) != _tokenizer(its):
        return "its tokenizer is not the base's"
    template = own_template(folder, base)
    if template is None:
        return None
    if _has_several(folder):
        return "it has several chat templates of its own"
    if (base / "tekken.json").is_file() or any(base.glob("tokenizer.model.v*")):
        return "its chat template is not the base's, which is read by Mistral's own tokenizer"
    if parsers.for_template(template).reasoning != parsers.for_template(inspect.template_of(base)).reasoning:
        # An engine has one parser for all: it would take answers for thoughts, or thoughts for answers.
        return "its chat template opens thoughts otherwise than the base's"
    end = _end(folder)
    if end is not None and end not in _ends(base):
        return f"its answers end with {end}, at which the base does not stop"
    return None


def _tokenizer(path: Path) -> str:
    """A hash of what decides which ids a text becomes."""
    try:
        whole = json.loads(path.read_bytes())
        deciding = {key: whole.get(key) for key in _TOKENIZES}
    except (OSError, ValueError, AttributeError):
        return f"{path} cannot be read"
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _has_several(folder: Path) -> bool:
    """Under names, of which the library takes one by what the request holds."""
    if (folder / "additional_chat_templates").is_dir():
        return True
    named = _read(folder, "tokenizer_config.json").get("chat_template")
    return not (folder / "chat_template.jinja").is_file() and not isinstance(named, str)


def _end(folder: Path) -> str | None:
    """The token that ends an answer, by the tokenizer's config."""
    token = _read(folder, "tokenizer_config.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _ends(base: Path) -> set[str]:
    """Tokens at which an engine ends the base's answers: the tokenizer's own, and those of its generation config."""
    ids: Any = None
    for name in ("generation_config.json", "config.json"):  # as the engines find them
        if (base / name).is_file():
            config = _read(base, name)
            ids = config.get("eos_token_id")
            break
    wanted = set(ids) if isinstance(ids, list) else {ids}
    try:
        added = json.loads((base / "tokenizer.json").read_bytes())["added_tokens"]
    except (OSError, ValueError, LookupError, TypeError):
        added = []
    named = {entry.get("content") for entry in added or () if isinstance(entry, dict) and entry.get("id") in wanted}
    return {end for end in (*named, _end(base)) if isinstance(end, str)}


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = inspect.read_json(folder / name, "model")
    except AppError:
        return {}
    return found

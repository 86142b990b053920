"""The guide that the product is built after: its fenced blocks, by number."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT.parent / "shared" / "design" / "guide.md"
SCRIPTS = ROOT / "examples" / "guide"
BASE = "Qwen/Qwen2.5-7B-Instruct"

needs_guide = pytest.mark.skipif(
    not GUIDE.is_file(), reason="the guide lies beside the checkout, as ../shared/design/guide.md"
)


def blocks() -> dict[int, str]:
    """The guide's fenced blocks, numbered from 1."""
    if not GUIDE.is_file():
        return {}
    found = re.findall(r"^ *```\w*\n(.*?)^ *```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    return dict(enumerate(found, 1))


BLOCKS = blocks()

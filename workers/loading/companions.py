"""The small files that travel with weights: tokenizer, chat template, generation defaults, licence."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

TOKENIZER = (
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template*",
)
OTHERS = ("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")


def copy_companions(source: Path, target: Path, *, tokenizer: bool = True, others: bool = True) -> list[str]:
    """Copies them unchanged, so that serving tokenises exactly as training did; returns their names, sorted."""
    patterns = (TOKENIZER if tokenizer else ()) + (OTHERS if others else ())
    names = sorted(
        path.name for path in source.iterdir() if path.is_file() and any(fnmatch(path.name, glob) for glob in patterns)
    )
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names


def tokenizer_files(directory: Path) -> list[Path]:
    """The files that make its tokenizer, chat template included, by name."""
    files = (path for path in directory.iterdir() if path.is_file())
    return sorted(path for path in files if any(fnmatch(path.name, glob) for glob in TOKENIZER))


def has_tokenizer(directory: Path) -> bool:
    """True when the folder can tell text from tokens by itself."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))

"""What the recipes that learn from judges are tried on: a model that spells a little, and a word it could say more."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.catalog import Catalog
from app.discovery import discover
from tests.workers.conftest import conversation
from tests.workers.context import RecordingContext

WORD = "seven"
SAYS_IT = {"type": "string_check", "name": "says it", "operation": "like", "reference": "{{item.word}}"}


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    return discover(["workers.graders", "workers.recipes"])


@pytest.fixture(scope="session")
def speller(tmp_path_factory: pytest.TempPathFactory, tiny: Path, numbers: Path, catalog: Catalog) -> Path:
    """The tiny model after 40 steps on numbers: it says a few words for a number, often the wrong ones."""
    recipe = catalog.recipes["sft"]
    spec = recipe.spec.model_validate(
        {
            "model": {"model_name_or_path": "artifact:art-tiny", "use_peft": False},
            "dataset": {"file": "file-1"},
            "training": {"max_steps": 40, "learning_rate": 5e-3, "per_device_train_batch_size": 16},
        }
    )
    inputs = {"model.model_name_or_path": tiny, "dataset.file": numbers}
    ctx = RecordingContext(tmp_path_factory.mktemp("speller"), inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.loading.devices.os.sched_getaffinity", lambda _: {0})
        recipe.run(spec, ctx)
    return ctx.folder


@pytest.fixture(scope="session")
def word_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Numbers to spell, and beside each the word that the judge wants to hear."""
    return asked(tmp_path_factory.mktemp("words") / "words.jsonl", range(100))


def asked(path: Path, numbers: range, **columns: Any) -> Path:
    rows = [{"prompt": conversation(number)[:2], "word": WORD, **columns} for number in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

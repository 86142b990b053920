"""The pages say what is so: error codes, statuses, specs, names of commands."""

import re
from pathlib import Path

import pytest
import typer.main

from app import errors
from app.cli import app
from app.discovery import discover
from app.errors import AppError, Code
from app.files.rows import FORMATS, check
from app.jobs.intake import read_spec
from app.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
ERRORS = (ROOT / "docs/errors.md").read_text()


def first_column(section: str) -> list[str]:
    text = ERRORS.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `?([a-z_0-9]+)`? \| .*\|$", text, re.MULTILINE)[1:]


def test_every_error_code_stands_in_the_table_in_order() -> None:
    assert first_column("Codes") == [str(code) for code in Code]


def test_every_status_of_our_errors_stands_in_the_table_with_its_type() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AppError)}
    for kind in kinds:
        assert f"| {kind.status} | `{kind.type}` |" in ERRORS
    assert first_column("Status") == sorted(first_column("Status"))


def test_the_specs_on_the_training_page_are_taken() -> None:
    (spec,) = re.findall(r"```yaml\n(type: .*?)```", (ROOT / "docs/train.md").read_text(), re.DOTALL)
    assert read_spec(spec.encode(), "application/yaml", discover(Settings().packages)).warnings == []


def test_the_rows_on_the_training_page_can_be_learnt_from(tmp_path: Path) -> None:
    shapes = re.findall(r"^\| `(\w+)` \| `(\{.*?\})`", (ROOT / "docs/train.md").read_text(), re.MULTILINE)
    assert [name for name, _ in shapes] == list(FORMATS)
    for name, row in shapes:
        path = tmp_path / f"{name}.jsonl"
        path.write_text(row + "\n")
        report = check(path)
        assert (report.ok, report.format) == (True, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_names_exists(page: Path) -> None:
    root = typer.main.get_command(app)
    commands = root.commands  # type: ignore[attr-defined]
    code = re.findall(r"```bash\n(.*?)```|`([^`\n]+)`", page.read_text(), re.DOTALL)
    for text in ("\n".join(parts) for parts in code):
        for name, rest in re.findall(r"(?:^|/|\s)tunesmith ([a-z-]+)((?: [^\n#`|]+)?)", text):
            assert name in commands, f"tunesmith {name}"
            group = getattr(commands[name], "commands", None)
            words = rest.split()
            if group is not None and words:
                assert words[0] in group, f"tunesmith {name} {words[0]}"
            known = {option for parameter in commands[name].params for option in parameter.opts}
            if group is None:
                assert {word for word in words if word.startswith("-")} <= known, text
        for target in re.findall(r"(?:^|\s)make ([a-z-]+)", text):
            makefile = (ROOT / "Makefile").read_text()
            stem = target.split("-")[0]
            assert re.search(rf"^{target}:|^{stem}-%:", makefile, re.MULTILINE), f"make {target}"

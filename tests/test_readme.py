"""The README says what is so: its settings, its map, and the plugs that it shows are run as they stand."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.catalog import Catalog
from app.discovery import discover
from app.engines import EngineLaunch
from app.settings import Settings
from app.specs import DeploymentOptions
from tests.workers.conftest import make_model
from tests.workers.context import RecordingContext

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PACKAGE = "plugs_of_the_readme"


# --- settings ---------------------------------------------------------------------------------------------------------


def settings_table() -> str:
    """What has to stand between the README's markers; printed by ``python tests/test_readme.py``."""
    rows = ["| variable | default | what it sets |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default_factory or not field.default else f"`{_shown(field.default)}`"
        if name == "data_dir":
            default = "`./data` in a checkout, else `~/.local/share/tunesmith`"
        rows.append(f"| `TUNESMITH_{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows)


def _shown(value: Any) -> str:
    return (
        ",".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else value
    )


def test_the_settings_table_is_what_the_settings_say() -> None:
    table = README.split("<!-- settings -->\n")[1].split("\n<!-- /settings -->")[0]
    assert table == settings_table(), f"between <!-- settings --> and <!-- /settings --> belongs:\n{settings_table()}"


@pytest.mark.parametrize("path", ["README.md", *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md"))])
def test_every_setting_that_a_page_names_exists(path: str) -> None:
    known = {f"TUNESMITH_{name.upper()}" for name in Settings.model_fields}
    compose = set(re.findall(r"\$\{(TUNESMITH_\w+)", "".join(file.read_text() for file in ROOT.glob("docker-*.yml"))))
    tests = {"TUNESMITH_TEST_POSTGRES_URL", "TUNESMITH_TEST_REDIS_URL"}
    named = set(re.findall(r"TUNESMITH_[A-Z_]+[A-Z]", (ROOT / path).read_text()))
    assert named <= known | compose | tests


# --- the map and the links --------------------------------------------------------------------------------------------


def test_the_map_shows_every_room_and_no_other() -> None:
    section = README.split("## The map\n")[1].split("\n## ")[0]
    shown = set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))
    assert [name for name in shown if not (ROOT / name).exists()] == []
    rooms = {
        f"{tree}/{path.name}" + "/" * path.is_dir()
        for tree in ("app", "workers")
        for path in (ROOT / tree).iterdir()
        if path.name[0] not in "._" and path.name != "__init__.py"
        if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))
    }
    assert rooms <= shown


@pytest.mark.parametrize(
    "path", ["README.md", *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/**/*.md"))]
)
def test_every_link_to_a_file_leads_somewhere(path: str) -> None:
    page = ROOT / path
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


# --- the plugs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    """Ours, and the README's three in a package of their own, found in the way every plug is."""
    root = tmp_path_factory.mktemp("plugs")
    (root / PACKAGE).mkdir()
    (root / PACKAGE / "__init__.py").touch()
    blocks = re.findall(r"```python\n# workers/\w+/(\w+\.py)\n(.*?)```", README, re.DOTALL)
    assert [name for name, _ in blocks] == ["norms.py", "half.py", "asgi.py"]
    for name, code in blocks:
        (root / PACKAGE / name).write_text(code)
    sys.path.insert(0, str(root))
    yield discover([*Settings().packages, PACKAGE])
    sys.path.remove(str(root))
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is trained in a second."""
    return make_model(tmp_path_factory.mktemp("readme") / "tiny")


def test_the_algorithm_appears_in_the_schema_and_learns(catalog: Catalog, base: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    recipe = catalog.recipes["norms"]
    assert "norms" in str(catalog.schema_adapter().json_schema()["$defs"]["NormsSpec"])
    spec = recipe.spec.model_validate(
        {
            "algorithm": "norms",
            "experiment_name": "try",
            "model": {"model_name_or_path": "tiny", "use_peft": False},
            "dataset": {"file": "file-1"},
            "training": {"max_steps": 16, "learning_rate": 0.05},
        }
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{number}", "completion": "seven"}}\n' for number in range(4)))
    ctx = RecordingContext(tmp_path, {"model.model_name_or_path": base, "dataset.file": rows})
    recipe.run(spec, ctx)
    assert ctx.losses[-1] < ctx.losses[0]
    before, after = (load_file(folder / "model.safetensors") for folder in (base, ctx.folder))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("norm" in name for name in changed)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes")
def test_the_merge_method_adds_half_of_the_adapter(catalog: Catalog, base: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    spec = catalog.spec_class("merge", None)
    assert spec is not None
    asked = spec.model_validate({"adapter": "some", "method": "half", "output_name": "halved"})
    ctx = RecordingContext(tmp_path, {"base_model": base, "adapter": tmp_path / "adapter"}, catalog=catalog)
    catalog.operations["merge"].run(asked, ctx)
    weight = "model.layers.0.self_attn.q_proj.weight"
    before, after = (load_file(folder / "model.safetensors")[weight] for folder in (base, ctx.folder))
    halves = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = f"base_model.model.{weight.removesuffix('.weight')}"
    a, b = halves[f"{name}.lora_A.weight"], halves[f"{name}.lora_B.weight"]
    torch.testing.assert_close(after, before + (4 / 2) / 2 * b @ a)


def test_the_engine_becomes_a_command_line(catalog: Catalog, tmp_path: Path) -> None:
    engine = catalog.engines["asgi"]
    launch = EngineLaunch(
        python=Path(sys.executable),
        model_dir=tmp_path,
        served_name="support",
        socket=tmp_path / "e.s",
        options=DeploymentOptions(engine="asgi"),
        has_gpu=False,
        dtype="float32",
    )
    assert engine.argv(launch)[-1] == f"--uds={tmp_path}/e.s"
    assert engine.env(launch) == {"MODEL_DIR": str(tmp_path), "SERVED_NAME": "support"}


if __name__ == "__main__":
    print(settings_table())

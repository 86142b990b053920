"""Settings: read from the environment, absolute, and refused with a reason where they make no sense."""

import os
import stat
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import Settings


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    monkeypatch.setenv("TUNESMITH_DATA_DIR", str(tmp_path / "data"))
    return monkeypatch


def test_lists(env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    env.setenv("TUNESMITH_MODEL_ROOTS", f"{tmp_path}/a:{tmp_path}/b/../c:")
    env.setenv("TUNESMITH_ALLOWED_HUB_REPOS", "Qwen/*, meta-llama/*,")
    env.setenv("TUNESMITH_PLUGIN_PACKAGES", "one, two.three")
    env.setenv("TUNESMITH_ALLOWED_HOSTS", "tune.example.com,*.internal")
    settings = Settings()
    assert settings.model_roots == (tmp_path / "a", tmp_path / "c")
    assert settings.allowed_hub_repos == ("Qwen/*", "meta-llama/*")
    assert settings.packages[-2:] == ("one", "two.three")
    assert settings.hosts == ["tune.example.com", "*.internal"]


def test_an_empty_variable_is_no_value(env: pytest.MonkeyPatch) -> None:
    """As compose files leave them."""
    for name in ("DATABASE_URL", "BROKER_URL", "MODEL_ROOTS", "SLOTS", "PORT"):
        env.setenv(f"TUNESMITH_{name}", "")
    settings = Settings()
    assert settings.database.startswith("sqlite:///")
    assert (settings.model_roots, settings.slots, settings.port) == ((), None, 8000)


def test_paths_become_absolute(env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    env.chdir(tmp_path)
    env.setenv("TUNESMITH_DATA_DIR", "here/../there")
    assert Settings().data_dir == tmp_path / "there"
    env.setenv("HOME", str(tmp_path))
    env.setenv("TUNESMITH_DATA_DIR", "~/mine")
    assert Settings().data_dir == tmp_path / "mine"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "x"),
        ("PORT", "70000"),
        ("SLOTS", "train"),
        ("SLOTS", "cook:1"),
        ("LEASE_SECONDS", "0"),
        ("HEARTBEAT_SECONDS", "-1"),
        ("MAX_BODY_BYTES", "0"),
    ],
)
def test_what_makes_no_sense_is_refused(env: pytest.MonkeyPatch, name: str, value: str) -> None:
    env.setenv(f"TUNESMITH_{name}", value)
    with pytest.raises(ValidationError, match=name.lower()):
        Settings()


def test_the_folder_for_sockets(env: pytest.MonkeyPatch, tmp_path: Path, run_dir: Path) -> None:
    env.setenv("TUNESMITH_RUN_DIR", str(run_dir / "r"))
    folder = Settings().sockets
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    assert stat.S_IMODE(Settings().sockets.stat().st_mode) == 0o700
    env.setenv("TUNESMITH_RUN_DIR", str(tmp_path / ("x" * 100)))
    with pytest.raises(RuntimeError, match="too long for unix sockets"):
        _ = Settings().sockets
    env.delenv("TUNESMITH_RUN_DIR")
    env.setenv("XDG_RUNTIME_DIR", str(run_dir))
    settings = Settings()
    assert settings.sockets == run_dir / f"ts-{os.getuid()}-{settings.instance}"


def test_two_data_directories_are_two_installations(tmp_path: Path) -> None:
    one, other = Settings(data_dir=tmp_path / "a"), Settings(data_dir=tmp_path / "b")
    assert one.instance != other.instance
    assert one.instance == Settings(data_dir=tmp_path / "a" / "x" / "..").instance


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:1"),
        ("0.0.0.0", "http://127.0.0.1:1"),
        ("::", "http://127.0.0.1:1"),
        ("::1", "http://[::1]:1"),
    ],
)
def test_where_the_service_is_reached(tmp_path: Path, host: str, url: str) -> None:
    assert Settings(data_dir=tmp_path, host=host, port=1).base_url == url


def test_the_key_is_not_in_the_representation(tmp_path: Path) -> None:
    assert "ts_secret" not in repr(Settings(data_dir=tmp_path, api_key="ts_secret"))


def test_settings_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings(data_dir=tmp_path).port = 1

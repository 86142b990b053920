"""Where an engine listens and what it reads: a folder or a path that cannot be used, a model that was altered."""

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from app.processes import processes_with_token
from app.settings import Settings
from app.storage import Storage
from tests.support import wait_for
from tests.workers.serving.conftest import Serving
from workers.supervisor import House


def failed(serving: Serving, code: str) -> dict[str, str]:
    wait_for(lambda: serving.shown()["status"] == "failed")
    error: dict[str, str] = serving.shown()["last_error"]
    assert error["code"] == code
    assert [pid for token in serving.tokens for pid in processes_with_token(token)] == []
    return error


# Case 80


@pytest.mark.parametrize("wrong", ["too long", "a file is in the way", "it cannot be made"])
def test_a_folder_for_sockets_that_cannot_be_had(
    serve: Callable[..., Serving], house: House, settings: Settings, tmp_path: Path, wrong: str
) -> None:
    """It is said at once, with what to set: another start would find the same."""
    (tmp_path / "file").touch()
    folders = {"too long": tmp_path / ("x" * 90), "a file is in the way": tmp_path / "file" / "run"}
    folder = folders.get(wrong, Path("/proc/tunesmith"))
    elsewhere = Settings.model_validate({**settings.model_dump(), "run_dir": folder})
    object.__setattr__(house, "settings", elsewhere)
    serving = serve()
    error = failed(serving, "storage_error")
    assert str(folder) in error["message"]
    assert "TUNESMITH_RUN_DIR" in error["hint"]
    assert len(serving.tokens) == 1, "it was tried once"
    assert "engine_died" not in serving.codes()


def test_a_folder_for_sockets_that_was_cleaned_away_is_made_again(
    serve: Callable[..., Serving], settings: Settings
) -> None:
    serving = serve(before=lambda _: settings.sockets.rmdir())
    serving.ready()
    assert serving.asks("plain") == 200
    assert (serving.shown()["restarts"], settings.sockets.stat().st_mode & 0o777) == (0, 0o700)


def socket_of(settings: Settings, job_id: str, attempt: int) -> Path:
    return settings.sockets / f"{job_id[4:12]}{attempt}.s"


@pytest.mark.parametrize("kind", ["file", "stale socket", "stranger"])
def test_what_lies_where_its_socket_shall_be_is_replaced(
    serve: Callable[..., Serving], settings: Settings, kind: str
) -> None:
    """The folder is ours alone; a stranger who listened there gets no request."""
    with socket.socket(socket.AF_UNIX) as stranger:

        def before(job_id: str) -> None:
            path = socket_of(settings, job_id, 1)
            if kind == "file":
                path.write_text("not a socket")
                return
            stranger.bind(str(path))
            if kind == "stranger":
                stranger.listen()

        serving = serve(before=before)
        serving.ready()
        assert serving.asks("plain") == 200
        assert (serving.shown()["restarts"], len(serving.tokens)) == (0, 1)
        stranger.setblocking(False)
        if kind == "stranger":
            with pytest.raises(BlockingIOError):
                stranger.accept()


def test_a_path_that_cannot_be_had_is_followed_by_another(serve: Callable[..., Serving], settings: Settings) -> None:
    """A folder lies there, which nobody removes: the next attempt has a path of its own."""
    serving = serve(before=lambda job_id: socket_of(settings, job_id, 1).mkdir())
    serving.ready()
    assert serving.asks("plain") == 200
    assert serving.shown()["restarts"] == 1
    assert serving.codes().count("engine_died") == 1
    assert serving.shown()["last_error"] is None or "engine_not_startable" in serving.shown()["last_error"]["message"]


# Case 81

ALTERED = ("changed", "cut short", "gone", "added", "a link", "manifest gone", "manifest changed", "config changed")


def alter(folder: Path, how: str) -> str:
    """Damages a published model; the file that is to be named."""
    weights, manifest, config = (folder / name for name in ("model.safetensors", "MANIFEST.json", "config.json"))
    if how == "changed":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif how == "cut short":
        os.truncate(weights, 40)
    elif how == "gone":
        weights.unlink()
    elif how == "added":
        (folder / "chat_template.jinja").write_text("{{ 'say something else' }}")
        return "chat_template.jinja"
    elif how == "a link":
        other = folder.parent / "elsewhere"
        os.rename(weights, other)
        weights.symlink_to(other)
    elif how == "manifest gone":
        manifest.unlink()
        return manifest.name
    elif how == "manifest changed":
        about = json.loads(manifest.read_text())
        del about["files"]["model.safetensors"]
        weights.unlink()
        manifest.write_text(json.dumps(about))
        return manifest.name
    else:
        config.write_text(config.read_text().replace("llama", "other"))
        return config.name
    return weights.name


@pytest.mark.parametrize("how", ALTERED)
def test_a_model_that_was_altered_is_not_started(
    serve: Callable[..., Serving], base: str, storage: Storage, how: str
) -> None:
    folder = storage.artifact_dir(base)
    named: list[str] = []
    serving = serve(before=lambda _: named.append(alter(folder, how)))
    error = failed(serving, "model_invalid")
    assert error["message"] == f"not as published: {named[0]}"
    assert "run the job again" in error["hint"]
    assert not list(storage.job_dir(serving.job_id).glob("a*/log.txt")), "no engine was ever started"


def test_a_model_that_is_altered_while_it_is_served_is_not_started_again(
    serve: Callable[..., Serving], base: str, storage: Storage
) -> None:
    serving = serve()
    serving.ready()
    alter(storage.artifact_dir(base), "changed")
    assert serving.asks("plain") == 200, "what was read at the start is served on"
    (engine,) = serving.engines()
    os.kill(engine, signal.SIGKILL)
    assert "model.safetensors" in failed(serving, "model_invalid")["message"]
    assert len(list(storage.job_dir(serving.job_id).glob("a*/log.txt"))) == 1

"""A model of the hub is staged by the real client from a stand-in: once, whole, at one commit, or with a reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.catalog import Catalog
from app.errors import Code, RunError
from tests.hub.server import HubServer
from tests.hub.store import Account
from tests.workers.conftest import TOKEN
from workers.context import EVENTS, JobContext
from workers.loading import base_label
from workers.told import patched

FIELD = "model.model_name_or_path"
REPO = "acme/base"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model-00001-of-00002.safetensors": b"a" * 40_000,
    "model-00002-of-00002.safetensors": b"b" * 50_000,
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "LICENSE": b"Do what you like.\n",
}
UNWANTED = {
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "README.md": b"# base\n",
    "modeling_evil.py": b"raise SystemExit\n",
    "pytorch_model.bin": b"pickled",
    "consolidated.safetensors": b"a" * 90_000,
    "original/params.json": b"{}",
    "original/model.safetensors": b"again",
    "onnx/model.onnx": b"graph",
}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def commit(hub: HubServer) -> str:
    """The only commit of a repository with more in it than anybody wants."""
    return hub.store.add(REPO, {**FILES, **UNWANTED})


def context(
    folder: Path, spec: dict[str, Any] | None = None, field: str = FIELD, revision: str | None = None, **more: Any
) -> JobContext:
    pinned = f"hub:{REPO}" + (f"@{revision}" if revision else "")
    inputs = {field: {"hub": REPO, "revision": revision, "pinned": pinned}}
    spec = {"model": {"model_name_or_path": pinned, "revision": None}} if spec is None else spec
    folder.mkdir()
    return JobContext(folder, {"job_id": "ftjob-1", "spec": spec, "inputs": inputs} | more, Catalog())


def told(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def events(folder: Path) -> list[str]:
    return [line["code"] for line in told(folder, "event")]


def refused(folder: Path, **fields: Any) -> RunError:
    with pytest.raises(RunError) as caught:
        context(folder, **fields).input(FIELD)
    assert caught.value.param == FIELD
    assert TOKEN not in f"{caught.value.message} {caught.value.hint}"
    return caught.value


def fetched(hub: HubServer) -> list[str]:
    """Files whose bytes were asked for."""
    return hub.store.asked("GET", "/(resolve|cdn)/")


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_gated_model_names_the_licence_and_the_token(hub: HubServer, commit: str, tmp_path: Path) -> None:
    hub.store.repos[REPO].gated = True
    error = refused(tmp_path / "a1")
    assert (error.code, error.transient) == (Code.GATED_MODEL, False)
    assert error.hint is not None
    assert f"{hub.url}/{REPO}" in error.hint
    assert "HF_TOKEN" in error.hint
    hub.store.accounts[TOKEN] = Account("alice", ("acme",), licences=(REPO,))
    assert context(tmp_path / "a2").input(FIELD).name == commit


@pytest.mark.parametrize("whole", [False, True])
def test_a_quantised_base_is_refused_before_its_weights_are_fetched(
    whole: bool, hub: HubServer, tmp_path: Path
) -> None:
    config = b'{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'
    hub.store.add(REPO, {**FILES, "config.json": config})
    pinned = {"hub": REPO, "revision": None, "pinned": f"hub:{REPO}", "plain": not whole}
    if whole:  # a job that takes weights as they are stored
        assert context(tmp_path / "a1", inputs={FIELD: pinned}).input(FIELD).is_dir()
        return
    error = refused(tmp_path / "a1", inputs={FIELD: pinned})
    assert (error.code, error.transient) == (Code.QUANTISED_BASE, False)
    assert "gptq" in error.message
    assert [name for name in fetched(hub) if "safetensors" in name] == []


def test_a_token_that_the_hub_does_not_know(hub: HubServer, commit: str, tmp_path: Path) -> None:
    hub.store.accounts.clear()
    error = refused(tmp_path / "a1")
    assert (error.code, error.transient) == (Code.HUB_REFUSED, False)
    assert "HF_TOKEN" in (error.hint or "")


@pytest.mark.parametrize("with_token", [True, False])
def test_a_repository_that_is_not_there_or_is_private(
    with_token: bool, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.store.accounts[TOKEN] = Account("mallory")
    if not with_token:
        monkeypatch.delenv("HF_TOKEN")
    absent = refused(tmp_path / "a1")
    hub.store.add(REPO, FILES, private=True)
    private = refused(tmp_path / "a2")
    assert (absent.code, absent.message, absent.hint) == (private.code, private.message, private.hint)
    assert absent.code is Code.MODEL_NOT_FOUND
    assert "HF_TOKEN" in (absent.hint or "")


def test_a_name_without_an_owner_is_most_often_one_of_the_registry(hub: HubServer, tmp_path: Path) -> None:
    pinned = {"hub": "suport", "revision": None, "pinned": "hub:suport"}
    error = refused(tmp_path / "a1", inputs={FIELD: pinned})
    assert error.code is Code.MODEL_NOT_FOUND
    assert "Nothing in the registry is called suport: GET /artifacts lists what is." in (error.hint or "")


def test_a_revision_that_is_not_there(hub: HubServer, commit: str, tmp_path: Path) -> None:
    for number, revision in enumerate(("v9", "0" * 40)):
        error = refused(tmp_path / f"a{number}", revision=revision)
        assert (error.code, error.transient) == (Code.MODEL_NOT_FOUND, False)
        assert "no such revision" in error.message


@pytest.mark.parametrize(
    ("files", "says"), [({"pytorch_model.bin": b"p"}, "pickles: pytorch_model.bin"), ({}, "no weights")]
)
def test_weights_that_nobody_opens(files: dict[str, bytes], says: str, hub: HubServer, tmp_path: Path) -> None:
    hub.store.add(REPO, {"config.json": b"{}", **files})
    error = refused(tmp_path / "a1")
    assert error.code is Code.MODEL_INVALID
    assert says in error.message
    assert fetched(hub) == []


def test_a_disk_that_it_does_not_fit_on(
    hub: HubServer, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is missing and the reserve are weighed before a byte is fetched; what is here already is not counted."""
    total = sum(map(len, FILES.values()))
    monkeypatch.setattr("app.disk.free_bytes", lambda _: total + 999)
    error = refused(tmp_path / "a1", reserve_bytes=1000)
    assert error.code is Code.DISK_FULL
    assert "HF_HOME" in error.message
    assert fetched(hub) == []
    assert context(tmp_path / "a2", reserve_bytes=999).input(FIELD).name == commit
    hub.store.add(REPO, {"tokenizer_config.json": b'{"new": 1}'})
    monkeypatch.setattr("app.disk.free_bytes", lambda _: 100)
    assert (context(tmp_path / "a3").input(FIELD) / "tokenizer_config.json").read_bytes() == b'{"new": 1}'


def test_a_hub_that_is_not_there(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    error = refused(tmp_path / "a1")
    assert (error.code, error.transient) == (Code.MODEL_UNREACHABLE, True)
    assert "http://127.0.0.1:9" in error.message
    assert "HF_ENDPOINT" in (error.hint or "")


# --- what breaks on the way -------------------------------------------------------------------------------------------


def test_a_broken_connection_goes_on_where_it_stopped(
    hub: HubServer, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The library writes so much at a time, 10 MB, and goes on after the last that it wrote.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4000)
    hub.store.drop("GET", "/cdn/", after=10_000)
    folder = context(tmp_path / "a1").input(FIELD)
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    ranges = [headers["range"] for method, _, headers in hub.store.requests if method == "GET" and "range" in headers]
    assert ranges == ["bytes=8000-"]


def test_a_later_attempt_fetches_only_what_is_missing(hub: HubServer, commit: str, tmp_path: Path) -> None:
    blob = hub.store.repos[REPO].commits[commit][SECOND].sha256
    hub.store.fail("GET", f"/cdn/{blob}", 500, times=9)
    error = refused(tmp_path / "a1")
    assert (error.code, error.transient) == (Code.MODEL_UNREACHABLE, True)
    hub.store.faults.clear()
    hub.store.forget()
    folder = context(tmp_path / "a2").input(FIELD)
    assert {name: (folder / name).read_bytes() for name in FILES} == FILES
    assert hub.store.asked("GET", "/cdn/") == [f"/cdn/{blob}"]
    (event,) = [line for line in told(tmp_path / "a2", "event") if line["code"] == "model_downloading"]
    assert event["data"]["files"] == [SECOND]


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_weights_config_tokenizer_and_licence_are_fetched_and_nothing_else(
    hub: HubServer, commit: str, tmp_path: Path
) -> None:
    folder = context(tmp_path / "a1").input(FIELD)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert folder.name == commit
    assert folder.is_relative_to(tmp_path / "hf" / "hub"), "in the cache that other libraries share"
    assert events(tmp_path / "a1") == ["model_downloading", "model_download_complete"]
    first = told(tmp_path / "a1", "event")[0]["data"]
    size = sum(map(len, FILES.values()))
    assert (first["repo"], first["commit"], first["bytes"]) == (REPO, commit, size)
    last = told(tmp_path / "a1", "progress")[-1]
    assert (last["step"], last["total_steps"]) == (size, size)


def test_progress_in_bytes_while_it_comes(
    hub: HubServer, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.staging._POLL", 0.02)
    monkeypatch.setattr("workers.context._PROGRESS_SECONDS", 0.0)
    hub.store.drop("GET", "/cdn/", after=10_000)  # the client waits a second before it goes on
    context(tmp_path / "a1").input(FIELD)
    steps = [line["step"] for line in told(tmp_path / "a1", "progress")]
    assert any(0 < step < steps[-1] for step in steps)
    assert steps == sorted(steps)


def test_a_large_model_is_not_fetched_twice(hub: HubServer, commit: str, tmp_path: Path) -> None:
    context(tmp_path / "a1").input(FIELD)
    hub.store.forget()
    assert context(tmp_path / "a2").input(FIELD).name == commit
    assert fetched(hub) == []
    assert events(tmp_path / "a2") == ["model_cached"]
    hub.store.forget()
    context(tmp_path / "a3", revision=commit).input(FIELD)
    assert hub.store.requests == []


def test_a_cache_that_another_library_filled_is_used_in_place(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a commit as revision and no list of the repository, as older libraries leave it: nothing is asked."""
    commit = "8f3c0f2b5c7d4e1a9b6f0d2c3e4a5b6c7d8e9f00"
    snapshot = tmp_path / "hf" / "hub" / "models--acme--base" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name, data in FILES.items():
        (snapshot / name).write_bytes(data)
    assert context(tmp_path / "a1", revision=commit).input(FIELD) == snapshot
    assert hub.store.requests == []
    (snapshot / SECOND).unlink()
    assert refused(tmp_path / "a2", revision=commit).code is Code.MODEL_NOT_FOUND
    assert hub.store.requests != [], "a shard is missing, so the hub was asked"


def test_the_hub_is_down_and_the_branch_is_known_from_before(
    hub: HubServer, commit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context(tmp_path / "a1").input(FIELD)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert context(tmp_path / "a2").input(FIELD).name == commit


def test_a_branch_that_moved_is_fetched_again_but_only_what_differs(
    hub: HubServer, commit: str, tmp_path: Path
) -> None:
    context(tmp_path / "a1").input(FIELD)
    newer = hub.store.add(REPO, {FIRST: b"c" * 10})
    hub.store.forget()
    folder = context(tmp_path / "a2").input(FIELD)
    assert (folder.name, (folder / FIRST).read_bytes()) == (newer, b"c" * 10)
    assert len(hub.store.asked("GET", "/cdn/")) == 1
    assert context(tmp_path / "a3", revision=commit).input(FIELD).name == commit


def test_the_token_goes_to_the_hub_alone(hub: HubServer, commit: str, tmp_path: Path) -> None:
    hub.store.repos[REPO].private = True
    context(tmp_path / "a1").input(FIELD)
    assert hub.store.tokens() == {f"Bearer {TOKEN}"}
    cdn = [headers for _, path, headers in hub.store.requests if path.startswith("/cdn/")]
    assert len(cdn) == 2
    assert not any("authorization" in headers for headers in cdn), "where large files lie is another machine"
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


# --- what is written down ---------------------------------------------------------------------------------------------


def test_the_commit_is_pinned_in_the_resolved_spec(hub: HubServer, commit: str, tmp_path: Path) -> None:
    spec = {"model": {"model_name_or_path": f"hub:{REPO}", "revision": None}}
    ctx = context(tmp_path / "a1", spec)
    assert ctx.input(FIELD).name == commit
    hub.store.forget()
    assert ctx.input(FIELD).name == commit
    assert hub.store.requests == []
    (line,) = told(tmp_path / "a1", "resolved")
    assert patched(spec, line)["model"]["model_name_or_path"] == f"hub:{REPO}@{commit}"
    assert ctx.input_info(FIELD)["commit"] == commit


def test_what_the_spec_does_not_name_is_not_added_to_it(hub: HubServer, commit: str, tmp_path: Path) -> None:
    """The base of an adapter is an input too."""
    for number, (spec, field) in enumerate(
        [
            ({"type": "merge", "adapter": "artifact:a", "base_model": None}, "base_model"),
            ({"type": "validate", "model": "artifact:a"}, "base_model"),
            ({"model": {"model_name_or_path": "artifact:a"}}, f"{FIELD}.base"),
        ]
    ):
        folder = tmp_path / f"a{number}"
        context(folder, spec, field).input(field)
        assert told(folder, "resolved") == []


def test_a_commit_is_no_part_of_a_models_name(hub: HubServer, commit: str) -> None:
    assert base_label({}, f"hub:org/name@{commit}") == "org/name"
    assert base_label({}, "org/name") == "org/name"

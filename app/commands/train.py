"""``tunesmith train``: from a config.yaml on this machine to a run."""

import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from app.client import Client
from app.commands import folders
from app.commands.embedded import service_for
from app.commands.jobs import AsJson, Follow, submitted
from app.commands.show import fail
from app.documents import parse_yaml
from app.errors import AppError

_FILE_ID = re.compile(r"file-[0-9a-f]{24}")
# Where a spec names models, beside the graders.
_MODELS = (("model", "model_name_or_path"), ("reward_model",))


def train(
    config: Annotated[
        Path, typer.Option(help="model, dataset, training, reward_model, graders, then …", show_default=True)
    ] = Path("config.yaml"),
    algorithm: Annotated[str | None, typer.Option(help="sft (the default), reward, ppo, dpo …")] = None,
    experiment_name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    model: Annotated[str | None, typer.Option(help="The model to start from, instead of the config's.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Rows to learn from: a file here, or a file id.")] = None,
    eval_dataset: Annotated[str | None, typer.Option(help="Held-out rows: a file here, or a file id.")] = None,
    reward_model: Annotated[str | None, typer.Option(help="The judge of a ppo run.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other field, e.g. training.save_steps=100.")
    ] = None,
    follow_: Follow = False,
    json: AsJson = False,
) -> None:
    """Trains from a config.yaml; dataset paths are uploaded, flags override."""
    spec = _read(config)
    # A path in the config is seen from the config, one of a flag from where the command was given.
    _absolute(spec, config.absolute().parent)
    flags = {
        "algorithm": algorithm,
        "experiment_name": experiment_name,
        "model.model_name_or_path": model,
        "dataset.file": dataset,
        "dataset.eval_file": eval_dataset,
        "reward_model": reward_model,
        "training.max_steps": max_steps,
    }
    for path, value in flags.items():
        if value is not None:
            _put(spec, path.split("."), value)
    for assignment in set_ or []:
        path, mark, text = assignment.partition("=")
        if not mark:
            fail(f"--set {assignment} has no value", "Write e.g. --set training.save_steps=100.")
        _put(spec, path.split("."), _parsed(text.encode(), f"--set {assignment}"))
    _absolute(spec, Path.cwd())
    with service_for(folders.readable(folders.as_path(place[name]) for place, name in _models(spec))) as client:
        for place, name in _models(spec):
            place[name] = folders.reference(client, place[name])
        _upload(client, spec)
        # As YAML: the service reads a name such as 20241201 as the text that it is.
        text = yaml.safe_dump({"type": "train", **spec}, allow_unicode=True, sort_keys=False)
        submitted(client, client.submit_text(text.encode(), "application/yaml"), follow_, json)


def _read(config: Path) -> dict[str, Any]:
    try:
        text = config.read_bytes()
    except OSError as error:
        fail(f"{config} cannot be read: {error.strerror}", "Name it with --config.")
    spec = _parsed(text, str(config))
    if not isinstance(spec, dict):
        fail(f"{config} is not a mapping")
    if isinstance(spec.get("dataset"), str):
        spec["dataset"] = {"file": spec["dataset"]}
    return spec


def _parsed(text: bytes, where: str) -> Any:
    try:
        return parse_yaml(text)[0]
    except AppError as error:
        fail(f"{where}: {error.message}", error.hint)


def _put(spec: dict[str, Any], path: list[str], value: Any) -> None:
    *parents, last = path
    place: Any = spec
    for step in parents:
        place = place.setdefault(step, {})
        if not isinstance(place, dict):
            fail(f"{'.'.join(path)} cannot be set: {step} is not a mapping in the config")
    place[last] = value


def _models(spec: dict[str, Any]) -> Iterator[tuple[MutableMapping[str, Any], str]]:
    """Every place of the spec that names a model."""
    for *parents, last in _MODELS:
        place: Any = spec
        for step in parents:
            place = place.get(step) if isinstance(place, dict) else None
        if isinstance(place, dict) and isinstance(place.get(last), str):
            yield place, last
    yield from _judges(spec.get("graders"))


def _judges(value: Any) -> Iterator[tuple[MutableMapping[str, Any], str]]:
    if isinstance(value, dict):
        if isinstance(value.get("model"), str):
            yield value, "model"
        for inner in value.values():
            yield from _judges(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _judges(inner)


def _files(spec: dict[str, Any]) -> Iterator[tuple[MutableMapping[str, Any], str]]:
    """Every place that names rows on this machine."""
    dataset = spec.get("dataset")
    if not isinstance(dataset, dict):
        return
    for name in ("file", "eval_file"):
        value = dataset.get(name)
        if isinstance(value, str) and not _FILE_ID.fullmatch(value):
            yield dataset, name


def _absolute(spec: dict[str, Any], folder: Path) -> None:
    for place, name in _models(spec):
        if (path := folders.as_path(place[name], folder)) is not None:
            place[name] = str(path)
    for place, name in _files(spec):
        place[name] = str(folder / Path(place[name]).expanduser())


def _upload(client: Client, spec: dict[str, Any]) -> None:
    """Dataset paths of the caller's machine become uploaded files."""
    for place, name in _files(spec):
        path = Path(place[name])
        if not path.is_file():
            fail(f"dataset.{name}: there is no file {path}")
        place[name] = client.upload(path)["id"]

"""``tunesmith jobs``, ``submit``, ``train``, ``merge``, ``validate``, ``import``."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from app.client import Client
from app.commands.show import as_json, fail, finished, follow, out, service, table
from app.documents import parse_yaml
from app.errors import AppError

group = typer.Typer(help="Submitted work.", no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
Follow = Annotated[bool, typer.Option("--follow/--no-follow", help="Wait, with a live bar.")]


def submit(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A job spec, YAML or JSON.")],
    follow_: Annotated[bool, typer.Option("--follow", help="Wait, with a live bar.")] = False,
    json: AsJson = False,
) -> None:
    """Submits a job spec as it is."""
    media = "application/json" if path.suffix == ".json" else "application/yaml"
    with service() as client:
        _submitted(client, client.submit_text(path.read_bytes(), media), follow_, json)


def train(
    config: Annotated[Path, typer.Option(help="model, dataset, training, then …")] = Path("config.yaml"),
    algorithm: Annotated[str | None, typer.Option(help="sft, …")] = None,
    experiment_name: Annotated[str | None, typer.Option(help="Name of the run.")] = None,
    follow_: Annotated[bool, typer.Option("--follow", help="Wait, with a live bar.")] = False,
    json: AsJson = False,
) -> None:
    """Trains from a config.yaml; dataset paths are uploaded, flags override."""
    try:
        spec, _ = parse_yaml(config.read_bytes())
    except OSError as error:
        fail(f"{config} cannot be read: {error.strerror}", "Name it with --config.")
    except AppError as error:
        fail(f"{config}: {error.message}", error.hint)
    if not isinstance(spec, dict):
        fail(f"{config} is not a mapping")
    spec = {"type": "train", **spec}
    if algorithm:
        spec["algorithm"] = algorithm
    if experiment_name:
        spec["experiment_name"] = experiment_name
    with service() as client:
        _upload_paths(client, spec, config.parent)
        _submitted(client, client.submit(spec), follow_, json)


def _upload_paths(client: Client, spec: dict[str, Any], folder: Path) -> None:
    """Dataset paths of the caller's machine become uploaded files."""
    dataset = spec.get("dataset")
    if isinstance(dataset, str):
        dataset = spec["dataset"] = {"file": dataset}
    if not isinstance(dataset, dict):
        return
    for field in ("file", "eval_file"):
        value = dataset.get(field)
        if isinstance(value, str) and not re.fullmatch(r"file-[0-9a-f]{24}", value):
            path = (folder / value).expanduser()
            if not path.is_file():
                fail(f"dataset.{field}: there is no file {path}")
            dataset[field] = client.upload(path)["id"]


def merge(
    adapter_path: Annotated[str, typer.Option(help="An adapter: artifact:<id>, a registered name or a path.")],
    base_model: Annotated[str | None, typer.Option(help="Default: the base that the adapter was trained on.")] = None,
    output_name: Annotated[str | None, typer.Option(help="Name of the merged model.")] = None,
    torch_dtype: Annotated[str | None, typer.Option(help="Default: the base's.")] = None,
    json: AsJson = False,
) -> None:
    """Merges an adapter into its base, with a proof."""
    spec = {"adapter": adapter_path, "base_model": base_model, "output_name": output_name, "torch_dtype": torch_dtype}
    with service() as client:
        given = {name: value for name, value in spec.items() if value is not None}
        _submitted(client, client.submit({"type": "merge", **given}), True, json)


def validate(
    model: Annotated[str, typer.Argument(help="A model: artifact:<id>, a registered name or a path.")],
    json: AsJson = False,
) -> None:
    """Loads a model, lets it answer, looks for what is broken."""
    with service() as client:
        _submitted(client, client.submit({"type": "validate", "model": model}), True, json)


def import_model(
    path: Annotated[Path, typer.Argument(exists=True, help="A Hugging Face folder, or a .gguf file.")],
    name: Annotated[str, typer.Option(help="Name in the registry.")],
    kind: str = "model",
    json: AsJson = False,
) -> None:
    """Registers a model or adapter that lies in a folder under TUNESMITH_MODEL_ROOTS."""
    spec = {"type": "import", "path": str(path.resolve()), "name": name, "kind": kind}
    with service() as client:
        _submitted(client, client.submit(spec), True, json)


def _submitted(client: Client, job: dict[str, Any], wait: bool, json: bool) -> None:
    if not wait:
        as_json(job) if json else out.print(f"{job['id']}  {job['status']}  {job['experiment_name']}", markup=False)
        return
    if json:
        for _ in client.follow(job["id"]):
            pass
        job = client.call("GET", f"/jobs/{job['id']}")
        as_json(job)
    else:
        job = follow(client, job["id"], job["algorithm"] or job["type"])
    finished(client, job)
    if not json:
        out.print(f"{job['id']} succeeded: {', '.join(job['artifact_ids']) or 'no artifacts'}", markup=False)


@group.command("list")
def list_jobs(limit: int = 20, status: str | None = None, json: AsJson = False) -> None:
    """Jobs, newest first."""
    with service() as client:
        query = {"limit": limit, **({"status": status} if status else {})}
        answer = client.call("GET", "/jobs", params=query)
    columns = ["id", "type", "algorithm", "status", "experiment_name", "created_at"]
    as_json(answer) if json else table(answer["data"], columns)


@group.command()
def show(job_id: str) -> None:
    """One job, as JSON."""
    with service() as client:
        as_json(client.call("GET", f"/jobs/{job_id}"))


@group.command("follow")
def follow_job(job_id: str) -> None:
    """A live bar until the job is final; exits 0 only if it succeeded."""
    with service() as client:
        finished(client, follow(client, job_id, "job"))


@group.command()
def logs(job_id: str, tail_bytes: int = 65536) -> None:
    """The end of a job's log."""
    with service() as client:
        print(client.call("GET", f"/jobs/{job_id}/logs", params={"tail_bytes": tail_bytes}))


@group.command()
def cancel(job_id: str) -> None:
    """Cancels a job."""
    _control(job_id, "cancel")


@group.command()
def pause(job_id: str) -> None:
    """Puts a job on hold; one that runs saves a checkpoint first."""
    _control(job_id, "pause")


@group.command()
def resume(job_id: str) -> None:
    """Takes a job off hold; it goes on from its last checkpoint."""
    _control(job_id, "resume")


@group.command()
def retry(job_id: str) -> None:
    """Runs a failed or cancelled job again, as a new one."""
    _control(job_id, "retry")


def _control(job_id: str, verb: str) -> None:
    with service() as client:
        job = client.call("POST", f"/jobs/{job_id}/{verb}")
    out.print(f"{job['id']} is {job['status']}", markup=False)

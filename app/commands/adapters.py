"""``tunesmith merge``, ``check-adapter``, ``validate``, ``extract-adapter``, ``import``: models as folders."""

from pathlib import Path
from typing import Annotated, Any

import typer

from app.commands import folders
from app.commands.embedded import service_for
from app.commands.jobs import AsJson, submitted
from app.commands.show import out

_BAR = 40
Adapter = Annotated[str, typer.Option(help="A path, artifact:<id>, or a registered name.")]


def merge(
    adapter_path: Adapter,
    base_model: Annotated[str | None, typer.Option(help="Default: the base that the adapter was trained on.")] = None,
    output_name: Annotated[str | None, typer.Option(help="Name of the merged model.")] = None,
    output_path: Annotated[Path | None, typer.Option(help="Where a copy of the merged model is put.")] = None,
    torch_dtype: Annotated[str | None, typer.Option(help="Default: the base's.")] = None,
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Take a base with other weights of the same shapes.")
    ] = False,
    nf4_round_trip: Annotated[
        bool, typer.Option("--nf4-round-trip", help="Round the base to 4 bit first, as it was while QLoRA trained.")
    ] = False,
    proof_prompts: Annotated[
        int | None, typer.Option(min=0, max=8, help="Prompts whose logits are compared; default 8, 0 = none.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Merges an adapter into its base, with a proof."""
    places = [folders.as_path(adapter_path), folders.as_path(base_model)]
    with service_for(folders.readable(places)) as client:
        if output_path:
            folders.check_free(client, output_path)
        spec = {
            "adapter": folders.reference(client, adapter_path),
            "base_model": folders.reference(client, base_model) if base_model else None,
            "output_name": output_name or (folders.name_of(output_path) if output_path else None),
            "torch_dtype": torch_dtype,
            "allow_base_mismatch": allow_base_mismatch or None,
            "nf4_round_trip": nf4_round_trip or None,
            "proof_prompts": proof_prompts,
        }
        given = {name: value for name, value in spec.items() if value is not None}
        job = submitted(client, client.submit({"type": "merge", **given}), True, json, _proof_lines)
        if output_path:
            folders.copy_out(job["artifact_ids"][0], output_path)


def extract_adapter(
    model_path: Annotated[str, typer.Option(help="A checkpoint, or the final model, of a run.")],
    output_path: Annotated[Path, typer.Option(help="Where a copy of the adapter is put.")],
    output_name: Annotated[str | None, typer.Option(help="Name of the adapter.")] = None,
    json: AsJson = False,
) -> None:
    """Takes the adapter alone out of a checkpoint: what training left beside it stays behind."""
    with service_for(folders.readable([folders.as_path(model_path)])) as client:
        folders.check_free(client, output_path)
        name = output_name or folders.name_of(output_path)
        spec = {"type": "extract_adapter", "model": folders.reference(client, model_path), "output_name": name}
        job = submitted(client, client.submit(spec), True, json)
        folders.copy_out(job["artifact_ids"][0], output_path)


def check_adapter(
    path: Annotated[str, typer.Argument(help="An adapter: a path, artifact:<id>, or a registered name.")],
    base_model: Annotated[str | None, typer.Option(help="A base to compare it with; default its own.")] = None,
    json: AsJson = False,
) -> None:
    """Says what an adapter is, and what is wrong with it."""
    with service_for(folders.readable([folders.as_path(path), folders.as_path(base_model)])) as client:
        spec = {"type": "check_adapter", "adapter": folders.reference(client, path)}
        if base_model:
            spec["base_model"] = folders.reference(client, base_model)
        submitted(client, client.submit(spec), True, json, _adapter_lines)


def validate(
    model: Annotated[str, typer.Argument(help="A model: a path, artifact:<id>, or a registered name.")],
    base_model: Annotated[str | None, typer.Option(help="Of an adapter: its base; default its own.")] = None,
    json: AsJson = False,
) -> None:
    """Loads a model, lets it answer, looks for what is broken."""
    with service_for(folders.readable([folders.as_path(model), folders.as_path(base_model)])) as client:
        spec = {"type": "validate", "model": folders.reference(client, model)}
        if base_model:
            spec["base_model"] = folders.reference(client, base_model)
        submitted(client, client.submit(spec), True, json, _model_lines)


def push(
    artifact: Annotated[str, typer.Argument(help="artifact:<id>, or a registered name.")],
    repository: Annotated[str, typer.Argument(help="org/name; it is made if it is not there.")],
    revision: Annotated[str | None, typer.Option(help="A branch; default main.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Everybody may read it.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    json: AsJson = False,
) -> None:
    """Puts an artifact into a repository of the hub, with the token of the worker's environment."""
    with service_for(folders.readable([folders.as_path(artifact)])) as client:
        spec = {
            "model": folders.reference(client, artifact),
            "repo_id": repository,
            "private": not public,
            "revision": revision,
            "commit_message": message,
        }
        given = {name: value for name, value in spec.items() if value is not None}
        submitted(client, client.submit({"type": "push_to_hub", **given}), True, json, _push_lines)


def import_model(
    path: Annotated[Path, typer.Argument(exists=True, help="A Hugging Face folder, or a .gguf file.")],
    name: Annotated[str, typer.Option(help="Name in the registry.")],
    kind: Annotated[folders.Kind | None, typer.Option(help="What it is; default what the folder's files say.")] = None,
    base: Annotated[str | None, typer.Option(help="Of an adapter: the model that it was trained on.")] = None,
    json: AsJson = False,
) -> None:
    """Registers a model or adapter that lies in a folder of this machine."""
    kind = kind or folders.kind_of(path)
    spec = {"type": "import", "path": str(path.resolve()), "name": name, "kind": kind}
    with service_for(folders.readable([path, folders.as_path(base)])) as client:
        if base:
            spec["base"] = folders.reference(client, base)
        submitted(client, client.submit(spec), True, json)


def _proof_lines(job: dict[str, Any]) -> None:
    proof = (job["result"] or {}).get("certificate")
    if not proof:
        return
    _rows(("verdict", proof["verdict"].replace("_", " ")))
    if proof.get("retained") is not None:
        _rows(("kept", f"{proof['retained']:.1%} of the adapter's effect"))


def _adapter_lines(job: dict[str, Any]) -> None:
    report = (job["result"] or {}).get("report")
    if not report:
        return
    share = f" ({report['share']:.2%} of the base's)" if report["share"] is not None else ""
    base = report["base"] or "not known"
    _rows(
        ("type", report["type"]),
        ("base", base if report["base_here"] else f"{base} (not known here: not compared)"),
        ("r", report["r"]),
        ("alpha", report["alpha"]),
        ("dropout", report["dropout"]),
        ("targets", f"{', '.join(report['targets'])} ({report['modules']} modules)"),
        ("bias", report["bias"]),
        ("parameters", f"{report['parameters']:,}{share}"),
        ("trained on", report["trained_on"]),
        *_update_rows(report),
        *((f"{problem['level']}", problem["message"]) for problem in report["problems"]),
    )
    if not report["problems"]:
        _rows(("problems", "none"))


def _update_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The norm of the update, and a bar for each layer."""
    if report.get("update_norm") is None:
        return []
    relative = report["relative_update"]
    beside = f", {relative['least']:.2%} to {relative['most']:.2%} of the weights" if relative else ""
    rows = [("update", f"norm {report['update_norm']:.4g}{beside}")]
    most = max((layer["norm"] for layer in report["layers"]), default=0.0)
    for layer in report["layers"]:
        name = "others" if layer["layer"] is None else f"layer {layer['layer']}"
        bar = "█" * round(_BAR * layer["norm"] / most) if most else ""
        rows.append((f"  {name}", f"{layer['norm']:<10.4g}{bar}"))
    return rows


def _push_lines(job: dict[str, Any]) -> None:
    result = job["result"] or {}
    if "commit_url" not in result:
        return
    sent = (
        f"{len(result['uploaded'])} files, {result['uploaded_bytes']:,} bytes" if result["changed"] else "nothing new"
    )
    _rows(("commit", result["commit_url"]), ("sent", sent), ("private", "yes" if result["private"] else "no"))


def _model_lines(job: dict[str, Any]) -> None:
    report = (job["result"] or {}).get("report")
    if not report:
        return
    _rows(*((check["name"], f"{check['status']}: {check['detail']}") for check in report["checks"]))
    if report["parameters"]:
        _rows(("parameters", f"{report['parameters']:,}"))
    if report["answer"] is not None:
        # A report of an older release does not say what was asked.
        _rows(*((("asked", report["prompt"]),) if "prompt" in report else ()), ("answers", repr(report["answer"])))


def _rows(*rows: tuple[str, Any]) -> None:
    for name, value in rows:
        out.print(f"  {name:<16}{value}", markup=False)

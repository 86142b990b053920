"""``tunesmith deploy``, ``deployments`` and ``chat``."""

import contextlib
import time
from collections.abc import Iterable
from typing import Annotated, Any

import typer
import yaml

from app.client import Client, ServiceError
from app.commands import folders
from app.commands.show import as_json, err, fail, finished, follow, out, service, table

group = typer.Typer(help="Models being served.", no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", help="NAME=VALUE, e.g. parity=warn or idle_timeout=600; may be repeated."),
]


def deploy(
    model: Annotated[str, typer.Argument(help="A registered name, artifact:<id>, or a path.")],
    name: Annotated[str | None, typer.Option(help="The model name that clients ask for.")] = None,
    max_model_len: int | None = None,
    replicas: Annotated[int | None, typer.Option(help="Copies of the engine.")] = None,
    tool_call_parser: Annotated[
        str | None, typer.Option(help="vLLM's parser for calls of tools; default by the model's chat template.")
    ] = None,
    reasoning_parser: Annotated[
        str | None, typer.Option(help="vLLM's parser for thoughts; default by the model's chat template.")
    ] = None,
    option: Options = None,
    json: AsJson = False,
) -> None:
    """Serves a model and waits until it answers."""
    options = _named(option)
    if own := next((field for field in ("type", "model", "name") if field in options), None):
        raise typer.BadParameter(f"{own} is no option of an engine", param_hint="--option")
    served = name or model.rstrip("/").rsplit("/", 1)[-1].replace(":", "-")
    spec: dict[str, Any] = {"type": "deploy", "model": model, "name": served}
    chosen = {
        "max_model_len": max_model_len,
        "replicas": replicas,
        "tool_call_parser": tool_call_parser,
        "reasoning_parser": reasoning_parser,
    }
    spec |= options | {field: value for field, value in chosen.items() if value}
    with service() as client:
        spec["model"] = folders.reference(client, model)
        job = client.submit(spec)
        job = client.call("GET", f"/jobs/{job['id']}") if json else job
        job = follow(client, job["id"], "deploy") if not json else _wait(client, job["id"])
        if json:
            as_json(job)
        finished(client, job)
        if not json:
            out.print(f"{served} answers at {client.url}/v1; try: tunesmith chat {served}", markup=False)


def _wait(client: Any, job_id: str) -> Any:
    for _ in client.follow(job_id):
        pass
    return client.call("GET", f"/jobs/{job_id}")


@group.command("list")
def list_deployments(limit: int = 20, json: AsJson = False) -> None:
    """Deployments, newest first."""
    with service() as client:
        answer = client.call("GET", "/deployments", params={"limit": limit})
    as_json(answer) if json else table(answer["data"], ["id", "name", "status", "model", "restarts", "created_at"])


@group.command()
def show(
    name: Annotated[str, typer.Argument(help="Of a deployment, or its id.")],
    json: AsJson = False,
) -> None:
    """One deployment: how it is, what it serves, by which engines, with which options."""
    with service() as client:
        row = _found(client, name)
    if json:
        as_json(row)
        return
    parity, options = row["parity"] or {}, row["options"]
    error = row["last_error"]
    lines: list[tuple[str, Any]] = [
        ("name", row["name"]),
        ("id", row["id"]),
        ("status", row["status"]),
        ("model", row["model"]),
        ("engine", f"{options.get('engine')} ({parity['engine']})" if parity.get("engine") else options.get("engine")),
        ("endpoint", row["endpoint"]),
        *(("replica", _words(one, "id", "status", "generation", "restarts")) for one in row["replicas"]),
        *(("adapter", _words(one, "name", "status", "adapter", "effect")) for one in row["adapters"]),
        ("parity", f"{parity['verdict']}: {parity['reason']}" if "reason" in parity else parity.get("verdict")),
        ("coming", row["coming"] and row["coming"]["model"]),
        ("last error", error and f"{error.get('code')}: {error.get('message')}"),
        ("hint", error and error.get("hint")),
        *(("option", f"{field}={value}") for field, value in options.items() if value is not None),
    ]
    for label, value in lines:
        if value is not None:
            out.print(f"{label:<11}{value}", markup=False)


def _words(row: dict[str, Any], first: str, second: str, *others: str) -> str:
    more = (f"{field} {row[field]}" for field in others if row[field] is not None)
    return "  ".join((str(row[first]), str(row[second]), *more))


def _found(client: Client, name: str) -> dict[str, Any]:
    """The deployment of an id or a name; of several that have had the name the one that serves, else the newest."""
    if name.startswith("dep-"):
        with contextlib.suppress(ServiceError):  # it may be a name, too
            row: dict[str, Any] = client.call("GET", f"/deployments/{name}")
            return row
    older: dict[str, Any] | None = None
    cursor: dict[str, str] = {}
    while True:
        page = client.call("GET", "/deployments", params={"limit": 100, **cursor})
        for row in page["data"]:
            if row["name"] == name and row["status"] not in ("stopped", "failed"):
                return row
            older = older or (row if row["name"] == name else None)
        if not page["has_more"]:
            break
        cursor = {"after": page["last_id"]}
    if older is None:
        fail(f"there is no deployment {name}", "tunesmith deployments list shows what there is.")
    return older


@group.command()
def load(
    deployment_id: str,
    adapter: Annotated[str, typer.Argument(help="A registered name, artifact:<id>, or a path.")],
    name: Annotated[str | None, typer.Option(help="The model name that clients ask for.")] = None,
    json: AsJson = False,
) -> None:
    """Loads an adapter into a deployment of its base, while it serves."""
    with service() as client:
        body = {"adapter": folders.reference(client, adapter), "name": name}
        answer = client.call("POST", f"/deployments/{deployment_id}/adapters", json=body)
    as_json(answer) if json else out.print(f"{answer['name']} is being loaded", markup=False)


@group.command()
def unload(deployment_id: str, name: str) -> None:
    """Takes an adapter off a deployment."""
    with service() as client:
        client.call("DELETE", f"/deployments/{deployment_id}/adapters/{name}")
    out.print(f"{name} is no longer served", markup=False)


@group.command()
def update(
    deployment_id: str,
    model: Annotated[str | None, typer.Option(help="Another model under the same name.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Copies of the engine.")] = None,
    option: Options = None,
    wait: Annotated[bool, typer.Option(help="Until the new engines answer.")] = True,
    json: AsJson = False,
) -> None:
    """Changes a deployment while it serves: new engines take over, and no request fails."""
    body: dict[str, Any] = {"model": model, "replicas": replicas}
    body = {name: value for name, value in body.items() if value is not None} | _named(option)
    if not body:
        raise typer.BadParameter("say what is to change: --model, --replicas or --option")
    with service() as client:
        if model is not None:
            body["model"] = folders.reference(client, model)
        row = client.call("PATCH", f"/deployments/{deployment_id}", json=body)
        before, replaced = row["generation"], row["coming"] is not None
        while wait and row["coming"] is not None:
            time.sleep(0.5)
            row = client.call("GET", f"/deployments/{deployment_id}")
    failed = replaced and row["coming"] is None and row["generation"] == before
    if json:
        as_json(row)
    elif not failed:
        served = row["coming"] or row
        out.print(f"{row['name']}: {served['options']['replicas']} x {served['model']}", markup=False)
    if failed:
        err.print((row["last_error"] or {}).get("message", row["status"]), style="red", markup=False)
        raise typer.Exit(1)


def _named(entries: list[str] | None) -> dict[str, Any]:
    """``NAME=VALUE`` as a spec has them."""
    found = {}
    for entry in entries or []:
        name, equals, value = entry.partition("=")
        if not equals:
            raise typer.BadParameter(f"{entry!r} is not NAME=VALUE", param_hint="--option")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise typer.BadParameter(f"{entry!r}: the value is not YAML", param_hint="--option") from error
    return found


@group.command()
def stop(deployment_id: str) -> None:
    """Stops a deployment."""
    with service() as client:
        client.call("DELETE", f"/deployments/{deployment_id}")
    out.print(f"{deployment_id} is being stopped", markup=False)


def chat(
    model: Annotated[str, typer.Argument(help="The name of a deployment.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="One question instead of a conversation.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    vs: Annotated[list[str] | None, typer.Option(help="Another model, beside it; may be given again.")] = None,
    max_tokens: int = 512,
) -> None:
    """Talks to a deployment through the OpenAI API."""
    if vs:
        _side_by_side([model, *vs], prompt, system, max_tokens)
        return
    from openai import OpenAI, OpenAIError

    with service() as found:
        url, key = f"{found.url}/v1", found.key
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    with OpenAI(base_url=url, api_key=key) as client:
        while True:
            try:
                text = prompt if prompt is not None else input("> ")
            except (EOFError, KeyboardInterrupt):
                return
            messages.append({"role": "user", "content": text})
            try:
                answer = _said(
                    client.chat.completions.create(model=model, messages=messages, max_tokens=max_tokens, stream=True)
                )
            except OpenAIError as error:
                print(flush=True)  # what it has said so far keeps its line
                body = getattr(error, "body", None)
                said = body if isinstance(body, dict) else {}
                fail(str(said.get("message") or error), said.get("hint"))
            messages.append({"role": "assistant", "content": answer})
            if prompt is not None:
                return


def _said(chunks: Iterable[Any]) -> str:
    """Prints an answer as it comes."""
    answer = ""
    for chunk in chunks:
        piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
        answer += piece
        print(piece, end="", flush=True)
    print()
    return answer


def _side_by_side(models: list[str], prompt: str | None, system: str | None, max_tokens: int) -> None:
    """Each model goes on with its own answers; the user says the same to all."""
    start = [{"role": "system", "content": system}] if system else []
    talks: list[list[dict[str, Any]]] = [list(start) for _ in models]
    failed = False
    with service() as client:
        while True:
            try:
                text = prompt if prompt is not None else input("> ")
            except (EOFError, KeyboardInterrupt):
                return
            for talk in talks:
                talk.append({"role": "user", "content": text})
            answers = _compared(client, models, talks, max_tokens)
            for entry, talk in zip(answers, talks, strict=True):
                error = entry["error"]
                failed = failed or error is not None
                seconds = f"{entry['latency_ms'] / 1000:.1f} s"
                out.print(f"{entry['model']} ({seconds})", markup=False, style="bold")
                said = f"error: {error['message']}" if error else entry["content"] or ""
                out.print(said + "\n", markup=False, style="red" if error else None)
                talk.append({"role": "assistant", "content": entry["content"] or ""})
            if prompt is not None:
                raise typer.Exit(int(failed))


def _compared(
    client: Client, models: list[str], talks: list[list[dict[str, Any]]], max_tokens: int
) -> list[dict[str, Any]]:
    """In one request while all have said the same, which is so at the beginning; else one for each."""
    sampling = {"max_tokens": max_tokens}
    if all(talk == talks[0] for talk in talks):
        body = {"models": models, "messages": talks[0], "sampling": sampling}
        return list(client.call("POST", "/compare", json=body, timeout=600)["data"])
    found = []
    for model, talk in zip(models, talks, strict=True):
        body = {"models": [model], "messages": talk, "sampling": sampling}
        found += client.call("POST", "/compare", json=body, timeout=600)["data"]
    return found

"""``tunesmith keys`` and ``usage``."""

from typing import Annotated, Any

import typer

from app.commands.show import as_json, out, service, table

group = typer.Typer(help="API keys: who may call, and how much.", no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
Requests = Annotated[int | None, typer.Option("--requests-per-minute", min=0, help="To models; 0 = without a limit.")]
Tokens = Annotated[int | None, typer.Option("--tokens-per-minute", min=0, help="Read and written; 0 = no limit.")]
Open = Annotated[int | None, typer.Option("--concurrent-requests", min=0, help="Open at once; 0 = without a limit.")]
_COLUMNS = ["id", "name", "scopes", "requests_per_minute", "tokens_per_minute", "concurrent_requests", "revoked_at"]


@group.command()
def create(
    name: str,
    scope: Annotated[list[str] | None, typer.Option(help="read, submit, serve, admin; may be given again.")] = None,
    requests: Requests = None,
    tokens: Tokens = None,
    concurrent: Open = None,
    json: AsJson = False,
) -> None:
    """Makes a key and shows it, this once."""
    body: dict[str, Any] = {"name": name, **_limits(requests, tokens, concurrent)}
    if scope:
        body["scopes"] = scope
    with service() as client:
        made = client.call("POST", "/keys", json=body)
    as_json(made) if json else out.print(made["key"], markup=False)


@group.command("list")
def list_keys(json: AsJson = False) -> None:
    """Keys with their limits; an empty field is as the settings have it."""
    with service() as client:
        answer = client.call("GET", "/keys")
    if json:
        as_json(answer)
        return
    table([{**row, "scopes": ",".join(row["scopes"])} for row in answer["data"]], _COLUMNS)


@group.command()
def limit(
    key_id: Annotated[str, typer.Argument(help="The middle part of ts_<id>_<secret>.")],
    requests: Requests = None,
    tokens: Tokens = None,
    concurrent: Open = None,
) -> None:
    """Changes what a key may ask; what is left out stays."""
    with service() as client:
        client.call("PATCH", f"/keys/{key_id}", json=_limits(requests, tokens, concurrent))
    out.print(f"{key_id} is changed", markup=False)


@group.command()
def revoke(key_id: str) -> None:
    """Ends a key."""
    with service() as client:
        client.call("DELETE", f"/keys/{key_id}")
    out.print(f"{key_id} is revoked", markup=False)


def usage(
    by: Annotated[list[str] | None, typer.Option(help="day, key, model; may be given again.")] = None,
    since: Annotated[str | None, typer.Option(help="First day, 2026-11-27.")] = None,
    until: Annotated[str | None, typer.Option(help="Last day.")] = None,
    key: Annotated[str | None, typer.Option(help="Only this key's, by its id.")] = None,
    model: Annotated[str | None, typer.Option(help="Only this model's.")] = None,
    json: AsJson = False,
) -> None:
    """What was asked of models: requests, tokens and latency by day, key and model."""
    asked = {"by": by or ["day", "key", "model"], "since": since, "until": until, "key": key, "model": model}
    with service() as client:
        params = {name: value for name, value in asked.items() if value is not None}
        answer = client.call("GET", "/usage", params={**params, "limit": 1000})
    if json:
        as_json(answer)
        return
    names = {"day": "day", "key": "key_id", "model": "model"}
    counts = ["requests", "errors", "prompt_tokens", "completion_tokens", "mean_first_byte_ms", "mean_latency_ms"]
    table(answer["data"], [names[group] for group in asked["by"] or []] + counts)


def _limits(requests: int | None, tokens: int | None, concurrent: int | None) -> dict[str, int]:
    asked = {"requests_per_minute": requests, "tokens_per_minute": tokens, "concurrent_requests": concurrent}
    return {name: value for name, value in asked.items() if value is not None}

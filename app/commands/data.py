"""``tunesmith files``."""

from pathlib import Path
from typing import Annotated

import typer

from app.commands.embedded import service_for
from app.commands.show import as_json, out, service, table

group = typer.Typer(help="Data to learn from.", no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


@group.command()
def upload(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSON Lines, or a JSON array.")],
    purpose: str = "fine-tune",
    json: AsJson = False,
) -> None:
    """Uploads and checks a data file."""
    with service_for() as client:
        answer = client.upload(path, purpose)
    as_json(answer) if json else out.print(f"{answer['id']}  {answer['rows']} rows  {answer['format']}")


@group.command("list")
def list_files(limit: int = 20, json: AsJson = False) -> None:
    """Uploaded files, newest first."""
    with service() as client:
        answer = client.call("GET", "/files", params={"limit": limit})
    as_json(answer) if json else table(answer["data"], ["id", "filename", "rows", "format", "bytes", "created_at"])

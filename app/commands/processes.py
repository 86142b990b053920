"""``tunesmith up``, ``api``, ``worker``, ``migrate``: the processes of the service."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from app.commands.show import as_json, fail, out
from app.settings import Settings


def up() -> None:
    """The whole service in the foreground: API, worker, broker, database. Ctrl-C stops it."""
    from app.up import Service  # noqa: PLC0415  # and with it all that the other commands do not need

    try:
        status = Service(Settings(), lambda text: print(text, flush=True)).run()
    except RuntimeError as error:
        fail(str(error))
    raise typer.Exit(status)


def api() -> None:
    """Only the API, for a set-up of several processes or containers."""
    os.execv(sys.executable, [sys.executable, "-I", "-m", "app.api"])


def worker() -> None:
    """Only a worker."""
    os.execv(sys.executable, [sys.executable, "-I", "-m", "workers.main"])


def migrate(
    check: Annotated[bool, typer.Option("--check", help="Only say whether models and migrations agree.")] = False,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Brings the database to this program's schema; a new database gets its first API key."""
    from app import schema  # noqa: PLC0415
    from app.projects.bootstrap import ensure_first_key  # noqa: PLC0415

    settings = Settings()
    if not check:
        try:
            schema.upgrade(settings)
        except schema.Unusable as error:
            fail(str(error))
        ensure_first_key(settings, lambda text: typer.echo(text, err=json))
    else:
        # Against a database of its own, so that it needs no service and touches no data.
        with tempfile.TemporaryDirectory() as folder:
            scratch = settings.model_copy(update={"data_dir": Path(folder), "database_url": None})
            schema.upgrade(scratch)
            schema.drift(scratch)
    if json:
        as_json({"head": schema.head(), "checked": check})
    else:
        out.print(f"migrations and models agree ({schema.head()})" if check else f"the schema is {schema.head()}")

"""What the command line prints: progress bars, tables, errors with a hint, JSON for programs."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from app.client import Client, ServiceError
from app.settings import Settings

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
# What else is told of a run beside its warnings: how it came to its end, and what it came to.
_TOLD = ("stopped_early", "best_checkpoint_loaded", "learning_checked", "learning_not_measured")


def fail(message: str, hint: str | None = None) -> NoReturn:
    """Says what went wrong and what to do, and exits 1."""
    err.print(Text(f"error: {message}", style="red"))
    if hint:
        err.print(Text(f"hint: {hint}"))
    raise typer.Exit(1)


@contextmanager
def service() -> Iterator[Client]:
    """A client; its errors become messages."""
    try:
        with Client.find(Settings()) as client:
            yield client
    except ServiceError as error:
        fail(error.message, error.hint)


def as_json(value: Any) -> None:
    """For programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def label(artifact: dict[str, Any]) -> str:
    """An artifact as specs take it."""
    return f"{artifact['name']}:v{artifact['version']}"


def table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    """For people."""
    grid = Table(box=None, pad_edge=False)
    for column in columns:  # an id that is cut off is of no use, however narrow the terminal
        grid.add_column(
            column, no_wrap=True, min_width=max(len(_cell(row.get(column))) for row in [*rows, {column: column}])
        )
    for row in rows:
        grid.add_row(*(_cell(row.get(column)) for column in columns))
    out.print(grid)


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


class _Numbers(ProgressColumn):
    """Loss, speed and time left."""

    def render(self, task: Task) -> Text:
        """The numbers that are known."""
        fields = task.fields
        parts = []
        if fields.get("loss") is not None:
            parts.append(f"loss {fields['loss']:.3f}")
        if fields.get("tokens_per_second"):
            parts.append(f"{fields['tokens_per_second']:.0f} tokens/s")
        if fields.get("eta_seconds") is not None:
            parts.append(f"{timedelta(seconds=round(fields['eta_seconds']))} left")
        return Text("  ".join(parts))


def follow(client: Client, job_id: str, label: str) -> dict[str, Any]:
    """Shows a live bar until the job is final; returns the job."""
    columns = [
        TextColumn("{task.description:<10}"),
        TextColumn("{task.fields[phase]:<10}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[steps]}"),
        TimeElapsedColumn(),
        _Numbers(),
    ]
    plain = not out.is_terminal
    told = ""
    with Progress(*columns, console=out, transient=False, disable=plain) as bar:
        task = bar.add_task(label, total=None, phase="queued", steps="")
        for event, data in client.follow(job_id):
            if event == "event" and data.get("level") in ("warn", "error"):
                out.print(f"  {data['level']}: {data['message']}", style="yellow", markup=False)
            elif event == "event" and data.get("code") in _TOLD:
                out.print(f"  {data['message']}", markup=False)
            if event == "progress":
                step, total = data.get("step") or 0, data.get("total_steps")
                phase = data.get("phase") or data["status"]
                numbers: dict[str, Any] = {
                    name: data.get(name) for name in ("loss", "tokens_per_second", "eta_seconds")
                }
                steps = f"{step}/{total}" if total else ""
                bar.update(task, completed=step, total=total, phase=phase, steps=steps, **numbers)
                line = f"  {label}: {phase} {steps}".rstrip()
                every = max(1, (total or 1) // 8)
                if plain and line != told and (step % every == 0 or step == total):
                    loss = f" loss {numbers['loss']:.3f}" if numbers["loss"] is not None else ""
                    out.print(line + loss, markup=False)
                    told = line
            if event == "done":
                bar.update(task, phase=data["status"], eta_seconds=None)
    job: dict[str, Any] = client.call("GET", f"/jobs/{job_id}")
    return job


def finished(client: Client, job: dict[str, Any]) -> None:
    """Exits 1 with the reason and the log's end unless the job succeeded."""
    if job["status"] == "succeeded":
        return
    error = job.get("error") or {"message": f"the job is {job['status']}"}
    log = str(client.call("GET", f"/jobs/{job['id']}/logs", params={"tail_bytes": 4000}))
    if log.strip():
        err.print(log, markup=False, style="dim")
    fail(f"{job['id']}: {error['message']}", error.get("hint"))

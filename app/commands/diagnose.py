"""``tunesmith diagnose``: why a job failed, or why what it left is poor."""

import json as encoding
from typing import Annotated

import typer

from app.commands.registry import artifact_id
from app.commands.show import as_json, out, service

AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
_MARKS = {"error": "✗", "warning": "!"}


def diagnose(
    what: Annotated[str, typer.Argument(help="A job's id, an artifact's id, or a name of the registry.")],
    json: AsJson = False,
) -> None:
    """Says what is wrong with a job or an artifact, and what to change. Exits 1 when there is an error."""
    with service() as client:
        identifier = what.removeprefix("job:")
        if not identifier.startswith(("job-", "ftjob-")):
            identifier = artifact_id(client, identifier)
        room = "artifacts" if identifier.startswith("art-") else "jobs"
        answer = client.call("GET", f"/{room}/{identifier}/diagnosis")
    findings = answer["findings"]
    if json:
        as_json(answer)
    elif not findings:
        out.print(f"{answer['id']}: nothing is wrong that its record would show", markup=False)
    for finding in [] if json else findings:
        out.print(f"{_MARKS[finding['level']]} {finding['row'].replace('_', ' ')}: {finding['message']}", markup=False)
        if finding["hint"]:
            out.print(f"  {finding['hint']}", markup=False)
        if finding["patch"]:
            out.print(f"  patch for {finding['patches']}: {encoding.dumps(finding['patch'])}", markup=False)
    if any(finding["level"] == "error" for finding in findings):
        raise typer.Exit(1)

"""``tunesmith workers``."""

from typing import Annotated, Any

import typer

from app.commands.show import as_json, service, table

AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


def workers(json: AsJson = False) -> None:
    """Workers and their slots: what each has, and which job is on it."""
    with service() as client:
        answer = client.call("GET", "/workers")
    if json:
        as_json(answer)
        return
    columns = ["worker", "status", "slot", "class", "gpu", "vram_gb", "job"]
    table([_row(worker, slot) for worker in answer["data"] for slot in worker["slots"]], columns)


def _row(worker: dict[str, Any], slot: dict[str, Any]) -> dict[str, Any]:
    kind = f"{slot['class']} (reserved)" if slot["reserved"] else slot["class"]
    job = slot["job_id"] or ("another project's" if slot["busy"] else None)
    row = {"worker": worker["id"], "status": worker["status"], "slot": slot["slot_id"], "class": kind}
    return {**row, "gpu": slot["name"], "vram_gb": slot["vram_gb"], "job": job}

"""``tunesmith artifacts`` and ``aliases``: what jobs left, by name, and the names that point to versions."""

import shutil
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.text import Text
from rich.tree import Tree

from app.client import Client
from app.commands.show import as_json, fail, label, out, service, table
from app.storage import sha256_of

artifacts = typer.Typer(help="Adapters, models and reports that jobs left.", no_args_is_help=True)
aliases = typer.Typer(help="Names that point to a version, and can be moved.", no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
Which = Annotated[str, typer.Argument(help="A name (its newest version), name:v3, an alias, or an id.")]
Note = Annotated[str | None, typer.Option(help="Why; kept in the history.")]
_COLUMNS = ["id", "version", "kind", "bytes", "aliases", "tags", "created_at"]


def artifact_id(client: Client, which: str) -> str:
    """The id of what is meant: an id, ``name``, ``name:v3`` or an alias. Exits 1 when there is none."""
    which = which.removeprefix("artifact:")
    if which.startswith("art-"):
        return which
    name, _, version = which.partition(":v")
    query: dict[str, Any] = {"name": name, "limit": 100}
    while True:
        page = client.call("GET", "/artifacts", params=query)
        for row in page["data"]:
            if not version or str(row["version"]) == version:
                return str(row["id"])
        if not page["has_more"]:
            break
        query["after"] = page["data"][-1]["id"]
    known = client.call("GET", "/aliases")["data"]
    found = next((row["artifact_id"] for row in known if row["name"] == which.rpartition("@")[2]), None)
    if found is None:
        fail(f"there is no artifact {which}", "tunesmith artifacts list shows what there is.")
    return str(found)


@artifacts.command("list")
def list_artifacts(
    name: str | None = None,
    kind: Annotated[str | None, typer.Option(help="adapter, model, reward, report or gguf.")] = None,
    tag: str | None = None,
    limit: int = 20,
    json: AsJson = False,
) -> None:
    """Newest first."""
    given = {"name": name, "kind": kind, "tag": tag, "limit": limit}
    with service() as client:
        page = client.call(
            "GET", "/artifacts", params={key: value for key, value in given.items() if value is not None}
        )
    if json:
        as_json(page)
        return
    shown = [
        {**row, "version": label(row), "aliases": ", ".join(row["aliases"]), "tags": ", ".join(row["tags"])}
        for row in page["data"]
    ]
    table(shown, _COLUMNS)
    if page["has_more"]:
        out.print(f"the newest {limit}; --limit shows more", style="dim")


@artifacts.command()
def show(which: Which) -> None:
    """One artifact, as JSON."""
    with service() as client:
        as_json(client.call("GET", f"/artifacts/{artifact_id(client, which)}"))


@artifacts.command()
def card(which: Which) -> None:
    """Its model card, in Markdown."""
    with service() as client:
        print(client.call("GET", f"/artifacts/{artifact_id(client, which)}/card"))


@artifacts.command()
def lineage(which: Which, json: AsJson = False) -> None:
    """What it was made from, and what was made of it."""
    with service() as client:
        graph = client.call("GET", f"/artifacts/{artifact_id(client, which)}/lineage")
    if json:
        as_json(graph)
        return
    nodes = {node["id"]: node for node in graph["nodes"]}
    for title, here, there in (("made from", "target", "source"), ("went into", "source", "target")):
        ways: dict[str, list[tuple[str, str]]] = {}
        for edge in graph["edges"]:
            ways.setdefault(edge[here], []).append((edge[there], edge["role"]))
        if graph["id"] in ways:
            tree = Tree(Text(f"{_node(nodes[graph['id']])} {title}"))
            _grow(tree, graph["id"], ways, nodes)
            out.print(tree)


def _grow(tree: Tree, above: str, ways: dict[str, list[tuple[str, str]]], nodes: dict[str, dict[str, Any]]) -> None:
    for below, role in ways.get(above, ()):
        beside = "" if role == "output" else f" ({role})"
        _grow(tree.add(Text(_node(nodes[below]) + beside)), below, ways, nodes)


def _node(node: dict[str, Any]) -> str:
    return f"{node['type']} {node['name']}" + (", deleted" if node["deleted"] else "")


@artifacts.command()
def tag(
    which: Which, tags: Annotated[list[str] | None, typer.Argument(help="All of them; none: takes all away.")]
) -> None:
    """Sets its tags."""
    with service() as client:
        row = client.call("PATCH", f"/artifacts/{artifact_id(client, which)}", json={"tags": tags or []})
    out.print(f"{label(row)}: {', '.join(row['tags']) or 'no tags'}", markup=False)


@artifacts.command()
def delete(which: Which) -> None:
    """Takes away its record and its bytes, for good; refused while something needs it."""
    with service() as client:
        found = artifact_id(client, which)
        client.call("DELETE", f"/artifacts/{found}")
    out.print(f"{found} is deleted", markup=False)


@artifacts.command()
def download(
    which: Which, to: Annotated[Path, typer.Option("--to", help="A folder that is not there yet.")] = Path()
) -> None:
    """Fetches every file and holds it against the manifest; from another machine too."""
    with service() as client:
        found = client.call("GET", f"/artifacts/{artifact_id(client, which)}")
        target = Path(f"{found['name']}-v{found['version']}") if to == Path() else to
        if target.exists():
            fail(f"{target} exists already", "Name another folder with --to: nothing is overwritten.")
        fresh = target.with_name(f".{target.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            for entry in client.call("GET", f"/artifacts/{found['id']}/files")["data"]:
                path = fresh / entry["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                client.download(f"/artifacts/{found['id']}/files/{quote(entry['path'])}", path)
                if sha256_of(path) != entry["sha256"]:
                    fail(f"{entry['path']} has not come as the manifest has it", "Try again.")
            fresh.rename(target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    out.print(f"{target} holds {label(found)}", markup=False)


@aliases.command("list")
def list_aliases(json: AsJson = False) -> None:
    """All of them, and where they point."""
    with service() as client:
        answer = client.call("GET", "/aliases")
    as_json(answer) if json else table([_row(row) for row in answer["data"]], ["name", "version", "canary", "moved_at"])


@aliases.command("show")
def show_alias(name: str) -> None:
    """Where it points, and every move, as JSON."""
    with service() as client:
        as_json(client.call("GET", f"/aliases/{name}"))


@aliases.command("set")
def set_alias(
    name: str,
    target: Annotated[str, typer.Argument(help="A name (its newest version), name:v3, another alias, or an id.")],
    canary: Annotated[str | None, typer.Option(help="A second target, for a share of the requests.")] = None,
    percent: Annotated[float, typer.Option(help="That share.")] = 10,
    note: Note = None,
) -> None:
    """Points it there; requests follow within a second, and none fails."""
    body: dict[str, Any] = {"artifact": target}
    if canary is not None:
        body["canary"] = {"artifact": canary, "percent": percent}
    if note is not None:
        body["note"] = note
    with service() as client:
        _moved(client.call("PUT", f"/aliases/{name}", json=body))


@aliases.command()
def rollback(name: str, note: Note = None) -> None:
    """Points it to where it pointed before."""
    with service() as client:
        _moved(client.call("POST", f"/aliases/{name}/rollback", json={} if note is None else {"note": note}))


@aliases.command("delete")
def delete_alias(name: str) -> None:
    """Takes it away; the artifact stays, and so does the history."""
    with service() as client:
        client.call("DELETE", f"/aliases/{name}")
    out.print(f"{name} points nowhere any more", markup=False)


def _row(alias: dict[str, Any]) -> dict[str, Any]:
    canary = alias["canary"]
    return {**alias, "canary": f"{canary['percent']:g} % {canary['version']}" if canary else ""}


def _moved(alias: dict[str, Any]) -> None:
    row = _row(alias)
    beside = f", {row['canary']}" if row["canary"] else ""
    out.print(f"{alias['name']} points to {alias['version']}{beside}", markup=False)

"""Where an artifact came from, and what became of it: jobs, files, bases and artifacts as a graph."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError
from sqlalchemy import ColumnElement, String, cast, or_, select
from sqlalchemy.orm import Session

from app.artifacts import references, repository
from app.catalog import Catalog
from app.errors import NotFound
from app.models import Artifact, DeletedArtifact, File, Job

MOST_NODES = 500
Direction = Literal["up", "down", "both"]


class Node(BaseModel):
    """Something in the graph."""

    id: str = Field(description="Of the artifact, job or file; of a base that is no artifact what the spec named.")
    type: Literal["artifact", "job", "file", "base"]
    name: str
    facts: dict[str, Any] = Field(
        default_factory=dict,
        description="Artifact: kind, sha256, bytes. Job: type, algorithm, status, spec_sha256, seed, versions of the"
        " libraries. File: sha256, rows, format. Base: repository and commit, where it came from a hub.",
    )
    deleted: bool = Field(False, description="It is gone; this is what is still known of it.")


class Edge(BaseModel):
    """``source`` went into ``target``, or came out of it."""

    source: str
    target: str
    role: str = Field(description="The spec's field, or `output`.", examples=["dataset.file"])


class Lineage(BaseModel):
    """A graph without cycles: edges point from what was used to what was made."""

    id: str = Field(description="The artifact that was asked for.")
    nodes: list[Node]
    edges: list[Edge]
    complete: bool = Field(description="False: there is more than this answer holds.")


class _Graph:
    def __init__(self, session: Session, project_id: str, catalog: Catalog) -> None:
        self._session, self._project, self._catalog = session, project_id, catalog
        self.nodes: dict[str, Node] = {}
        self.edges: dict[tuple[str, str, str], Edge] = {}

    @property
    def full(self) -> bool:
        return len(self.nodes) >= MOST_NODES

    def edge(self, source: str, target: str, role: str) -> None:
        self.edges[source, target, role] = Edge(source=source, target=target, role=role)

    def up(self, artifact_id: str) -> None:
        """The artifact, the job that made it, and all that this job used, back to what nothing here made."""
        waiting = [artifact_id]
        while waiting and not self.full:
            current = waiting.pop()
            job_id = self.artifact(current)
            job = self._job(job_id) if job_id else None
            if job is None:
                continue
            self.edge(job.id, current, "output")
            waiting += [used for used in self._inputs(job) if used not in self.nodes]

    def down(self, artifact_id: str) -> None:
        """All jobs that used the artifact, what they left, and so on."""
        level = [artifact_id]
        while level and not self.full:
            below: list[str] = []
            for job in self._users(level):
                if not set(self._inputs(job, only=set(level))):
                    continue
                self._add_job(job)
                for left in self._left(job.id):
                    if left.id not in self.nodes:
                        below.append(left.id)
                    self._add_artifact(left)
                    self.edge(job.id, left.id, "output")
            level = below

    def _users(self, artifact_ids: Sequence[str]) -> Sequence[Job]:
        """Jobs that may have used these, which may be gone: by id, or by the job that left them."""
        text = cast(Job.resolved_spec, String)
        names = [f"artifact:{artifact_id}" for artifact_id in artifact_ids]
        rows: list[Artifact | DeletedArtifact] = [
            *repository.by_ids(self._session, artifact_ids).values(),
            *repository.tombstones(self._session, artifact_ids),
        ]
        names += [f"job:{row.job_id}" for row in rows if row.job_id]
        if not names:
            return []
        named: list[ColumnElement[bool]] = [text.contains(f'"{name}"', autoescape=True) for name in names]
        query = select(Job).where(Job.project_id == self._project, or_(*named)).order_by(Job.created_at)
        return self._session.scalars(query.limit(MOST_NODES)).all()

    def _inputs(self, job: Job, only: set[str] | None = None) -> Iterator[str]:
        """Artifacts that a job used, whose edges are drawn here; files and bases become nodes at once."""
        for path, kind, value in self._references(job):
            if kind == "file":
                if only is None:
                    self._file(value)
                    self.edge(value, job.id, path)
                continue
            source = self._source(value)
            if only is None or source in only:
                if source is None:
                    self._base(value)
                self.edge(source or value, job.id, path)
                if source is not None:
                    yield source

    def _references(self, job: Job) -> Iterator[tuple[str, str, str]]:
        spec_class = self._catalog.spec_class(job.type, job.algorithm)
        try:
            if spec_class is not None:
                yield from references.references(spec_class.model_validate(job.resolved_spec))
        except ValidationError:
            return  # of a plug that is another now, or gone

    def _source(self, value: str) -> str | None:
        """The artifact that a pinned reference means."""
        if value.startswith("artifact:"):
            return value.removeprefix("artifact:")
        if value.startswith("job:"):
            left = [row for row in self._left(value.removeprefix("job:")) if row.kind != "report"]
            return left[-1].id if left else None
        return None

    def _left(self, job_id: str) -> list[Artifact | DeletedArtifact]:
        """What a job left, oldest first, also what was deleted since: it was there when others used it."""
        living: list[Artifact | DeletedArtifact] = [*repository.of_job(self._session, job_id)]
        return sorted([*living, *repository.deleted_of_job(self._session, job_id)], key=lambda row: row.created_at)

    def artifact(self, artifact_id: str) -> str | None:
        """Puts an artifact into the graph, or what is left of it; the id of the job that made it."""
        row = repository.get(self._session, self._project, artifact_id)
        if row is not None:
            self._add_artifact(row)
            return row.job_id
        gone = repository.tombstone(self._session, self._project, artifact_id)
        if gone is None:
            self.nodes[artifact_id] = Node(id=artifact_id, type="artifact", name=artifact_id, deleted=True)
            return None
        self._add_artifact(gone)
        return gone.job_id

    def _add_artifact(self, row: Artifact | DeletedArtifact) -> None:
        facts: dict[str, Any] = {"kind": row.kind, "sha256": row.sha256}
        if isinstance(row, Artifact):
            facts["bytes"] = row.bytes
        deleted = isinstance(row, DeletedArtifact)
        name = f"{row.name}:v{row.version}"
        self.nodes[row.id] = Node(id=row.id, type="artifact", name=name, facts=facts, deleted=deleted)

    def _job(self, job_id: str) -> Job | None:
        job = self._session.get(Job, job_id)
        if job is not None:
            self._add_job(job)
        return job

    def _add_job(self, job: Job) -> None:
        training = job.resolved_spec.get("training") or {}
        facts = {
            "type": job.type,
            "algorithm": job.algorithm,
            "status": job.state,
            "spec_sha256": job.spec_sha256,
            "seed": training.get("seed"),
            "versions": (job.result or {}).get("versions"),
            "retry_of": job.retry_of,
            "reproduces": job.reproduces,
        }
        known = {name: value for name, value in facts.items() if value is not None}
        self.nodes[job.id] = Node(id=job.id, type="job", name=job.experiment_name, facts=known)

    def _file(self, file_id: str) -> None:
        row = self._session.get(File, file_id)
        if row is None:
            self.nodes[file_id] = Node(id=file_id, type="file", name=file_id, deleted=True)
            return
        facts = {"sha256": row.sha256, "rows": row.rows, "format": row.format, "bytes": row.bytes}
        self.nodes[file_id] = Node(id=file_id, type="file", name=row.filename, facts=facts)

    def _base(self, value: str) -> None:
        facts: dict[str, Any] = {}
        if value.startswith("hub:"):
            repo, _, commit = value.removeprefix("hub:").partition("@")
            facts = {"repository": repo, "commit": commit or None}
        self.nodes[value] = Node(id=value, type="base", name=value.removeprefix("hub:"), facts=facts)


def lineage(session: Session, project_id: str, catalog: Catalog, artifact_id: str, direction: Direction) -> Lineage:
    """The graph around an artifact, also of one that was deleted. Raises NotFound."""
    known = repository.get(session, project_id, artifact_id) or repository.tombstone(session, project_id, artifact_id)
    if known is None:
        raise NotFound(
            f"there is no artifact {artifact_id}", param="artifact_id", hint="GET /artifacts lists what there is."
        )
    graph = _Graph(session, project_id, catalog)
    if direction != "down":
        graph.up(artifact_id)
    if direction != "up":
        graph.down(artifact_id)
    if artifact_id not in graph.nodes:
        graph.artifact(artifact_id)
    nodes = list(graph.nodes.values())
    edges = [edge for edge in graph.edges.values() if edge.source in graph.nodes and edge.target in graph.nodes]
    return Lineage(id=artifact_id, nodes=nodes, edges=edges, complete=not graph.full)

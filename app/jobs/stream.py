"""Live events: one tailer a process reads what is new for all listeners and fans it out to bounded queues."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import anyio.to_thread
from fastapi.sse import format_sse_event
from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from app.db import Database
from app.jobs.schemas import EventOut, by_step
from app.models import Job, JobEvent, Metric
from app.states import JobState

PERIOD = 0.5
PING = 15.0
_BATCH = 500
# What one round can bring: events, metrics, progress, done, the end, and the end once more when the service stops.
_ROUND = 2 * _BATCH + 4
_QUEUE = 2 * _ROUND


@dataclass(frozen=True)
class Frame:
    """One server-sent event; ``id`` is ``<seq>`` for events and ``m<step>`` for metrics."""

    id: str | None
    event: str
    data: str

    def encode(self) -> bytes:
        """As bytes on the wire."""
        return format_sse_event(data_str=self.data, event=self.event, id=self.id)


@dataclass(eq=False)
class Listener:
    """One client and how far it has read."""

    job_id: str
    seq: int
    step: int
    known: set[str] | None = None
    """Numbers of ``step`` that it has: an evaluation's follow later. None = it came back; it has the step's own."""
    queue: asyncio.Queue[Frame | None] = field(default_factory=lambda: asyncio.Queue(_QUEUE))
    progress: str = ""

    def lacks(self, metric: Metric) -> bool:
        """Whether it has not read this number yet."""
        if metric.job_id != self.job_id or metric.step != self.step:
            return metric.job_id == self.job_id and metric.step > self.step
        return metric.name.startswith("eval_") if self.known is None else metric.name not in self.known

    @property
    def has_room(self) -> bool:
        """False for a client that reads slowly: nothing is fetched for it until it has caught up."""
        return self.queue.qsize() <= _QUEUE - _ROUND


def cursor(last_event_id: str | None) -> tuple[int, int]:
    """``(seq, step)`` from a ``Last-Event-ID``: ``12``, ``m40``, or ``12,m40``. Anything else starts anew."""
    seq, step = 0, -1
    for part in (last_event_id or "").split(","):
        digits = part.strip().removeprefix("m")
        if digits.isdecimal() and len(digits) < 10:
            if part.strip().startswith("m"):
                step = int(digits)
            else:
                seq = int(digits)
    return seq, step


class Tailer:
    """Polls the database every 500 ms while anybody listens."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._listeners: set[Listener] = set()
        self._task: asyncio.Task[None] | None = None

    async def frames(self, job_id: str, seq: int, step: int) -> AsyncIterator[bytes]:
        """What happened after the cursor, then what happens, until the job is final."""
        listener = Listener(job_id, seq, step)
        self._listeners.add(listener)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            while True:
                try:
                    frame = await asyncio.wait_for(listener.queue.get(), PING)
                except TimeoutError:
                    yield b": ping\n\n"
                    continue
                if frame is None:
                    return
                yield frame.encode()
        finally:
            self._listeners.discard(listener)

    async def close(self) -> None:
        """Ends every stream; clients reconnect with Last-Event-ID."""
        for listener in list(self._listeners):
            _end(listener)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while self._listeners:
            listeners = [listener for listener in self._listeners if listener.has_room]
            try:
                batches = await anyio.to_thread.run_sync(self._poll, listeners)
            except Exception:  # the database is away: the next round tries again
                await asyncio.sleep(PERIOD)
                continue
            more = False
            for listener, (frames, final) in zip(listeners, batches, strict=True):
                more = more or len(frames) >= _BATCH
                for frame in frames:
                    listener.queue.put_nowait(frame)
                if final:
                    _end(listener)
                    self._listeners.discard(listener)
            if not more:
                await asyncio.sleep(PERIOD)

    def _poll(self, listeners: Sequence[Listener]) -> list[tuple[list[Frame], bool]]:
        if not listeners:
            return []
        with self._database.read() as session:
            jobs = {
                job.id: job
                for job in session.scalars(select(Job).where(Job.id.in_({item.job_id for item in listeners})))
            }
            events = _new_events(session, listeners)
            metrics, whole = _new_metrics(session, listeners)
        return [_frames(item, jobs.get(item.job_id), events, metrics, whole) for item in listeners]


def _new_events(session: Session, listeners: Sequence[Listener]) -> list[JobEvent]:
    wanted = or_(*(and_(JobEvent.job_id == item.job_id, JobEvent.seq > item.seq) for item in listeners))
    query = select(JobEvent).where(wanted).order_by(JobEvent.job_id, JobEvent.seq)
    return list(session.scalars(query.limit(_BATCH * len(listeners))))


def _new_metrics(session: Session, listeners: Sequence[Listener]) -> tuple[list[Metric], bool]:
    """Numbers of whole steps, and whether that is all there is."""
    wanted = or_(*(and_(Metric.job_id == item.job_id, Metric.step >= item.step) for item in listeners))
    query = select(Metric).where(wanted).order_by(Metric.job_id, Metric.step)
    limit = _BATCH * len(listeners)
    rows = list(session.scalars(query.limit(limit)))
    if len(rows) < limit:
        return rows, True
    last = (rows[-1].job_id, rows[-1].step)  # perhaps cut in two by the limit
    return [row for row in rows if (row.job_id, row.step) != last] or rows, False


def _frames(
    item: Listener, job: Job | None, events: Sequence[JobEvent], metrics: Sequence[Metric], whole: bool
) -> tuple[list[Frame], bool]:
    frames: list[Frame] = []
    for event in [event for event in events if event.job_id == item.job_id and event.seq > item.seq][:_BATCH]:
        item.seq = event.seq
        frames.append(Frame(str(event.seq), "event", EventOut.of(event).model_dump_json()))
    mine = [metric for metric in metrics if item.lacks(metric)]
    for step in by_step(mine)[:_BATCH]:
        item.step = step.step
        frames.append(Frame(f"m{step.step}", "metrics", step.model_dump_json()))
    if mine:
        item.known = {metric.name for metric in metrics if metric.job_id == item.job_id and metric.step == item.step}
    if job is None:
        return frames, True
    progress = json.dumps({"status": job.state, "phase": job.phase, **(job.progress or {})})
    if progress != item.progress:
        item.progress = progress
        frames.append(Frame(None, "progress", progress))
    final = JobState(job.state).terminal and whole and not mine and item.seq >= job.next_seq
    if final:
        frames.append(Frame(None, "done", json.dumps({"status": job.state})))
    return frames, final


def _end(listener: Listener) -> None:
    listener.queue.put_nowait(None)

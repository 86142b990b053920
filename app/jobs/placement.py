"""What fits where: the needs of jobs against the slots of one worker. Pure; claims, holds and preemption ask it.

A *device* is a GPU with its sub-slots, or a slot without a GPU. Several devices of one class make up a job of several
GPUs, so on a machine without any, ``gpus: 2`` takes two train slots.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

SHARED_PART = 0.9
"""So much of a GPU's memory may be promised to jobs that share it."""
ON_A_GPU = ("train", "serve")


@dataclass(frozen=True)
class Need:
    """What a job asks of a worker."""

    slot_class: str
    gpus: int = 1
    min_vram_gb: float | None = None
    memory_gb: float | None = None

    @property
    def devices(self) -> int:
        """Only what trains or serves is counted in GPUs; the rest takes one slot whatever it says."""
        return max(1, self.gpus) if self.slot_class in ON_A_GPU else 1

    @property
    def vram_gb(self) -> float | None:
        """Memory that each GPU must have."""
        return self.min_vram_gb if self.slot_class in ON_A_GPU else None

    @property
    def shares(self) -> bool:
        """Whether the job may have neighbours on its GPU: one GPU, an estimate, no engine."""
        return self.slot_class == "train" and self.devices == 1 and self.memory_gb is not None


@dataclass(frozen=True)
class Holder:
    """The job on a slot; ``slot_id`` is the slot whose thread supervises it."""

    job_id: str
    slot_id: str
    need: Need


@dataclass(frozen=True)
class Spot:
    """A slot with who is on it."""

    worker_id: str
    slot_id: str
    slot_class: str
    gpu: int | None = None
    vram_gb: float | None = None
    reserved: bool = False
    holder: Holder | None = None


@dataclass(frozen=True)
class Device:
    """A GPU, or a slot without one."""

    spots: tuple[Spot, ...]

    @property
    def first(self) -> Spot:
        """What all its slots have in common stands in each."""
        return self.spots[0]

    @property
    def holders(self) -> dict[str, Holder]:
        """The jobs on it."""
        return {spot.holder.job_id: spot.holder for spot in self.spots if spot.holder is not None}

    def suits(self, need: Need) -> bool:
        """Whether the job could run here if nothing else did."""
        takes = ON_A_GPU if self.first.slot_class == "gpu" else (self.first.slot_class,)
        if need.slot_class not in takes or (self.first.reserved and need.slot_class != "serve"):
            return False
        return need.vram_gb is None or (self.first.vram_gb or 0) >= need.vram_gb

    def room(self, need: Need, away: frozenset[str] = frozenset()) -> tuple[Spot, ...]:
        """The slots that the job would take here now; none when there is no room. ``away`` are jobs about to leave."""
        if not self.suits(need):
            return ()
        staying = [holder.need for job_id, holder in self.holders.items() if job_id not in away]
        free = tuple(spot for spot in self.spots if spot.holder is None or spot.holder.job_id in away)
        if not staying:
            return free[:1] if need.shares else free
        promised = sum(other.memory_gb or 0 for other in (*staying, need))
        fits = promised <= SHARED_PART * (self.first.vram_gb or 0)
        return free[:1] if need.shares and all(other.shares for other in staying) and fits else ()


@dataclass(frozen=True)
class Board:
    """The devices of one worker."""

    worker_id: str
    devices: tuple[Device, ...] = field(default=())

    @classmethod
    def of(cls, worker_id: str, spots: Iterable[Spot]) -> "Board":
        """From its slots."""

        def key(spot: Spot) -> tuple[str, int, str]:
            return (spot.slot_class, -1 if spot.gpu is None else spot.gpu, spot.slot_id if spot.gpu is None else "")

        ordered = sorted(spots, key=lambda spot: (*key(spot), spot.slot_id))
        return cls(worker_id, tuple(Device(tuple(group)) for _, group in groupby(ordered, key)))

    def device_of(self, slot_id: str) -> Device:
        """The device of a slot. Raises StopIteration for a slot of another worker."""
        return next(device for device in self.devices if any(spot.slot_id == slot_id for spot in device.spots))

    def could_hold(self, need: Need) -> bool:
        """Whether the job could ever run here."""
        return any(len(group) >= need.devices for group in self.groups(need))

    def place(
        self, need: Need, own: Device | None = None, away: frozenset[str] = frozenset()
    ) -> tuple[tuple[Spot, ...], ...]:
        """The slots, device by device, that the job would take now, ``own`` first; empty when it does not fit.

        An engine leaves the slots that anybody may have to others while a reserved one is idle.
        """
        for group in self.groups(need):
            if own is not None and own not in group:
                continue
            rooms = {device: room for device in group if (room := device.room(need, away))}
            if own is not None and own not in rooms:
                continue
            if own is not None and not own.first.reserved and any(device.first.reserved for device in rooms):
                continue
            chosen = sorted(rooms, key=lambda device: (device is not own, not device.first.reserved))[: need.devices]
            if len(chosen) == need.devices:
                return tuple(rooms[device] for device in chosen)
        return ()

    def kept(self, need: Need) -> list[Device]:
        """The devices that are kept free for a job that waits for several of them, or for a whole one."""
        if self.place(need):
            return []
        for group in self.groups(need):
            if len(group) >= need.devices:
                return sorted(group, key=lambda device: len(device.holders))[: need.devices]
        return []

    def idle(self, need: Need) -> int:
        """How many of the devices that suit the job are wholly idle."""
        return max((sum(not device.holders for device in group) for group in self.groups(need)), default=0)

    def groups(self, need: Need) -> list[list[Device]]:
        """The devices that suit the job, class by class: a job's devices are of one class."""
        suitable = [device for device in self.devices if device.suits(need)]
        return [list(group) for _, group in groupby(suitable, lambda device: device.first.slot_class)]


def best_for(need: Need, boards: Sequence[Board]) -> Board | None:
    """The worker that will have room soonest, as far as one can see: the one with most idle devices."""
    able = [board for board in boards if board.could_hold(need)]
    return max(able, key=lambda board: (board.idle(need), board.worker_id), default=None)

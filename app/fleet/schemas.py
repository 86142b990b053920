"""Workers as the API shows them."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

WorkerStatus = Literal["alive", "silent", "stopped"]


class SlotOut(BaseModel):
    """A place where one job runs."""

    slot_id: str
    slot_class: str = Field(
        alias="class", description="train, serve, light, or gpu, which takes what trains or serves."
    )
    gpu: int | None = Field(None, description="Index of its GPU, as nvidia-smi counts.")
    vram_gb: float | None = Field(None, description="Memory of that GPU in 10⁹ bytes.")
    name: str | None = Field(None, description="What that GPU calls itself.")
    reserved: bool = Field(False, description="Engines alone may take it (TUNESMITH_RESERVED_SLOTS).")
    busy: bool
    job_id: str | None = Field(description="The job on it; null when that belongs to another project.")
    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)


class WorkerOut(BaseModel):
    """A worker process and its slots."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "gpu-box-4711-9f3a01c2",
                    "object": "worker",
                    "host": "gpu-box",
                    "pid": 4711,
                    "status": "alive",
                    "started_at": "2026-03-01T09:00:00Z",
                    "seen_at": "2026-03-01T09:30:05Z",
                    "facts": {"cpus": 32, "memory_gb": 270.1, "gpus": [{"gpu": 0, "name": "H200", "vram_gb": 150.8}]},
                    "slots": [
                        {
                            "slot_id": "gpu-0",
                            "class": "gpu",
                            "gpu": 0,
                            "vram_gb": 150.8,
                            "name": "H200",
                            "reserved": False,
                            "busy": True,
                            "job_id": "ftjob-0b7c1d2e3f405162738495a6",
                        }
                    ],
                }
            ]
        }
    )
    id: str
    object: Literal["worker"] = "worker"
    host: str
    pid: int
    status: WorkerStatus = Field(
        description="silent = no sign of life for a lease (TUNESMITH_LEASE_SECONDS); stopped = it said goodbye."
    )
    started_at: datetime
    seen_at: datetime
    facts: dict[str, Any] = Field(description="cpus, memory_gb (10⁹ bytes), gpus.")
    slots: list[SlotOut]

"""The rows. Every row belongs to a project; names of constraints are fixed so that migrations can find them."""

from app.models.base import DEFAULT_PROJECT, ApiKey, Base, Project, new_id, now, steady_now
from app.models.fleet import Deployment, DeploymentAdapter, DeploymentReplica, Slot, Worker
from app.models.jobs import Checkpoint, Job, JobDependency, JobEvent, Metric, Pipeline, PipelineStep, Sweep, SweepPoint
from app.models.registry import Alias, AliasMove, Artifact, ArtifactTag, DeletedArtifact, File
from app.models.usage import Usage

__all__ = [
    "Alias",
    "AliasMove",
    "ApiKey",
    "Artifact",
    "ArtifactTag",
    "Base",
    "Checkpoint",
    "DEFAULT_PROJECT",
    "DeletedArtifact",
    "Deployment",
    "DeploymentAdapter",
    "DeploymentReplica",
    "File",
    "Job",
    "JobDependency",
    "JobEvent",
    "Metric",
    "Pipeline",
    "PipelineStep",
    "Project",
    "Slot",
    "Sweep",
    "SweepPoint",
    "Usage",
    "Worker",
    "new_id",
    "now",
    "steady_now",
]

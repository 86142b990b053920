"""``/deployments``: models being served."""

from typing import Any

from fastapi import APIRouter

from app.db import after_commit
from app.deployments import service
from app.deployments.schemas import DeploymentIn, DeploymentOut
from app.deps import After, Limit, Reader, RoomsDep, Server
from app.paging import Deleted, Page

router = APIRouter(prefix="/deployments", tags=["deployments"])


@router.post("", status_code=201, summary="Serve a model")
def create_deployment(body: DeploymentIn, caller: Server, rooms: RoomsDep) -> DeploymentOut:
    """Starts an engine on a worker. `status` becomes `ready` after a real one-token completion."""
    with rooms.database.write() as session:
        after_commit(session, rooms.doorbell.ring)
        return service.create_from(session, rooms.settings, rooms.catalog, caller.project_id, caller.key_id, body)


@router.get("", summary="List deployments, newest first")
def list_deployments(caller: Reader, rooms: RoomsDep, limit: Limit = 20, after: After = None) -> Page[DeploymentOut]:
    """Those that serve, and those that did."""
    with rooms.database.read() as session:
        return service.listing(session, rooms.settings, caller.project_id, limit, after)


@router.get("/{deployment_id}", summary="Show a deployment")
def get_deployment(deployment_id: str, caller: Reader, rooms: RoomsDep) -> DeploymentOut:
    """Status, engine options and the last error."""
    with rooms.database.read() as session:
        return service.show(session, rooms.settings, caller.project_id, deployment_id)


@router.delete("/{deployment_id}", summary="Stop a deployment")
def delete_deployment(deployment_id: str, caller: Server, rooms: RoomsDep) -> Any:
    """Stops the engine; the row stays as history with the status `stopped`."""
    with rooms.database.write() as session:
        service.stop(session, caller.project_id, deployment_id)
        return Deleted(id=deployment_id, object="deployment")

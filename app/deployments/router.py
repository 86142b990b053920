"""``/deployments``: models being served."""

from typing import Any

from fastapi import APIRouter

from app.db import after_commit
from app.deployments import adapters, service
from app.deployments.schemas import AdapterIn, AdapterOut, DeploymentChange, DeploymentIn, DeploymentOut
from app.deps import After, Limit, Reader, RoomsDep, Server
from app.paging import Deleted, Page, page_of

router = APIRouter(prefix="/deployments", tags=["deployments"])


@router.post("", status_code=201, summary="Serve a model")
def create_deployment(body: DeploymentIn, caller: Server, rooms: RoomsDep) -> DeploymentOut:
    """Starts an engine on a worker. `status` becomes `ready` after a real one-token completion, or embedding.

    `adapters` are loaded beside the model that they were trained on, each under a model name of its own.
    """
    project, key = caller.project_id, caller.key_id
    looked = adapters.look(rooms.database, rooms.settings, project, body.adapters, body.max_lora_rank, "adapters")
    with rooms.database.write() as session:
        after_commit(session, rooms.doorbell.ring)
        return service.create_from(session, rooms.settings, rooms.catalog, project, key, body, looked)


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


@router.patch("/{deployment_id}", summary="Change a deployment while it serves")
def change_deployment(deployment_id: str, body: DeploymentChange, caller: Server, rooms: RoomsDep) -> DeploymentOut:
    """Another model or other options: new engines start beside the old ones and take over when all of them can answer.

    No request fails meanwhile; if a new engine fails, the old ones go on, and `last_error` tells why. `replicas` alone
    starts or ends engines of the same kind.
    """
    with rooms.database.write() as session:
        after_commit(session, rooms.doorbell.ring)
        return service.change(session, rooms.settings, rooms.catalog, caller.project_id, deployment_id, body)


@router.delete("/{deployment_id}", summary="Stop a deployment")
def delete_deployment(deployment_id: str, caller: Server, rooms: RoomsDep) -> Any:
    """Stops the engine; the row stays as history with the status `stopped`."""
    with rooms.database.write() as session:
        service.stop(session, caller.project_id, deployment_id)
        return Deleted(id=deployment_id, object="deployment")


@router.post("/{deployment_id}/adapters", status_code=201, summary="Load an adapter into a running deployment")
def add_adapter(deployment_id: str, body: AdapterIn, caller: Server, rooms: RoomsDep) -> AdapterOut:
    """Loaded in a moment, without a restart; loaded again whenever the engine starts. A refusal names the reason."""
    room = adapters.limits(rooms.database, caller.project_id, deployment_id).max_lora_rank
    (looked,) = adapters.look(rooms.database, rooms.settings, caller.project_id, [body], room, "")
    with rooms.database.write() as session:
        after_commit(session, rooms.doorbell.ring)
        return adapters.attach_to(session, caller.project_id, deployment_id, looked, caller.key_id)


@router.get("/{deployment_id}/adapters", summary="List the adapters of a deployment")
def list_adapters(deployment_id: str, caller: Reader, rooms: RoomsDep) -> Page[AdapterOut]:
    """By name, all of them."""
    with rooms.database.read() as session:
        found = adapters.listing(session, caller.project_id, deployment_id)
        return page_of(found, len(found), [entry.name for entry in found])


@router.delete("/{deployment_id}/adapters/{name}", summary="Take an adapter off a deployment")
def delete_adapter(deployment_id: str, name: str, caller: Server, rooms: RoomsDep) -> Deleted:
    """Its name leads nowhere from now on; the engine lets go of it, and answers that are under way are finished."""
    with rooms.database.write() as session:
        after_commit(session, rooms.doorbell.ring)
        adapters.detach(session, caller.project_id, deployment_id, name)
        return Deleted(id=name, object="deployment.adapter")

"""Push to hub: an artifact's files and its model card, as one commit in a repository of the hub."""

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from app.catalog import Operation, RunContext
from app.specs import AdapterRef, JobSpec, ModelRef, conflict
from workers.loading.pushing import Push, files_of

_PART = re.compile(r"^[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?$")
_LONGEST = 96


def _repository(value: str) -> str:
    """The hub's own rules for names, so that a bad one is refused before anything waits for a slot."""
    parts = value.split("/")
    good = len(parts) == 2 and len(value) <= _LONGEST and all(_PART.match(part) for part in parts)
    if not good or "--" in value or ".." in value or value.endswith(".git"):
        raise PydanticCustomError(
            "repo_id",
            "{value} is no name of a repository",
            {
                "value": repr(value[:_LONGEST]),
                "hint": "Write org/name: letters, digits, dot, dash, underscore; at most 96.",
            },
        )
    return value


class PushSpec(JobSpec):
    """Put an artifact into a repository of the hub."""

    type: Literal["push_to_hub"] = "push_to_hub"
    takes_adapters: ClassVar[bool] = True
    aliases: ClassVar[dict[str, str]] = {"artifact": "model"}
    model: ModelRef | None = Field(
        None, description="What is pushed: any artifact but a report, by id, by name, or as `job:<id>`."
    )
    adapter: AdapterRef | None = Field(None, description="The same for an adapter; give one of the two.")
    repo_id: Annotated[str, AfterValidator(_repository)] = Field(
        description="The repository, `org/name`; it is made if it is not there."
    )
    private: bool = Field(True, description="Refuse to put it where everybody can read it.")
    revision: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$", description="A branch; default main."
    )
    commit_message: str | None = Field(None, min_length=1, max_length=200, description="Default: the artifact's name.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.model is None) == (self.adapter is None):
            raise conflict("model", "one of model and adapter says what is pushed", "Give one of them.")
        return self

    def default_name(self) -> str:
        """``push_name``, of the repository."""
        return f"push_{self.repo_id.partition('/')[2]}"


def run(spec: PushSpec, ctx: RunContext) -> None:
    """Ask, compare, send. Raises RunError hub_refused, model_unreachable, storage_error."""
    ctx.phase("validating")
    field = "model" if spec.model is not None else "adapter"
    known = ctx.input_info(field)
    push = Push(spec.repo_id, spec.revision, spec.private)
    private = push.prepare()
    files = files_of(ctx.input(field), str(known["card"]), ctx.work_dir, ctx)
    ctx.phase("uploading")
    message = spec.commit_message or f"{known['name']} ({known['artifact_id']})"
    pushed = push.send(files, message, ctx)
    ctx.result(
        repo_id=spec.repo_id,
        url=push.address,
        revision=push.branch,
        commit=pushed.commit,
        commit_url=f"{push.address}/commit/{pushed.commit}",
        private=private,
        changed=bool(pushed.uploaded),
        files=len(files),
        bytes=sum(file.bytes for file in files.values()),
        uploaded=pushed.uploaded[:100],
        uploaded_bytes=pushed.uploaded_bytes,
    )


operation = Operation(PushSpec, run, variables=("HF_TOKEN",), wants_card=True)

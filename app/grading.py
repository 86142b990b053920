"""What graders, and the specs that name them, share: an answer to be scored, the common fields, the typed choice."""

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, Field, create_model

from app.specs import Spec, conflict

LABEL_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,62}$"


class Sample(NamedTuple):
    """One answer to be scored."""

    output_text: str
    item: Mapping[str, Any] = types.MappingProxyType({})
    """The row that was asked, with all its columns."""
    turns: Sequence[dict[str, Any]] = ()
    """What was asked, as messages."""


Scoring = Callable[[Sequence[Sample]], list[float]]
"""One number for each answer; higher is better."""


class GraderSpec(Spec):
    """What every grader has in common; a grader's spec adds ``type: Literal[…]`` with a default and its own fields.

    A spec that takes graders has a field of ``GraderSpec``, ``list[GraderSpec]`` or ``dict[str, GraderSpec]``; the
    catalog types it as one of the graders that are plugged in.
    """

    type: str
    name: str | None = Field(
        None, pattern=LABEL_PATTERN, description="Names the scores in metrics; default the grader's type."
    )

    @property
    def label(self) -> str:
        """What its scores are called."""
        return self.name or self.type


def check_graders(
    graders: Sequence[GraderSpec], field: str, weights: Sequence[float] | None, weights_field: str
) -> None:
    """Refuses an empty list, two of one name (their metrics could not be told apart), weights that do not fit.

    Raises a conflict.
    """
    if not graders:
        raise conflict(field, f"{field} is empty", "Name at least one grader.")
    labels: list[str] = []
    for index, grader in enumerate(graders):
        if grader.label in labels:
            raise conflict(
                f"{field}.{index}.name", f"two graders are called {grader.label!r}", "Give each a name of its own."
            )
        labels.append(grader.label)
    if weights is not None and len(weights) != len(graders):
        raise conflict(
            weights_field, f"{len(weights)} weights for {len(graders)} graders", "Give one weight for each grader."
        )


S = TypeVar("S", bound=BaseModel)


def typed(spec: type[S], graders: Mapping[str, type[GraderSpec]]) -> type[S]:
    """The spec with each place for a grader typed as one of ``graders``; the spec itself where there is no place."""
    if not graders:
        return spec
    choice: Any = reduce(or_, graders.values())
    if len(graders) > 1:
        choice = Annotated[choice, Field(discriminator="type")]
    fields: dict[str, Any] = {}
    for name, info in spec.model_fields.items():
        annotation = _with(info.annotation, choice)
        if annotation is not info.annotation:
            fields[name] = (annotation, info)
    if not fields:
        return spec
    return create_model(spec.__name__, __base__=spec, __module__=spec.__module__, __doc__=spec.__doc__, **fields)


def _with(annotation: Any, choice: Any) -> Any:
    """The annotation with ``choice`` in place of ``GraderSpec``; the same object where that does not occur."""
    if annotation is GraderSpec:
        return choice
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if origin not in (list, dict, typing.Union, types.UnionType):
        return annotation
    changed = [_with(option, choice) for option in options]
    if all(new is old for new, old in zip(changed, options, strict=True)):
        return annotation
    return origin[tuple(changed)] if origin in (list, dict) else reduce(or_, changed)

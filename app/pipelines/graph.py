"""Who waits for whom: names, order and cycles, before any row is made (pure)."""

import difflib
from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from app.errors import BadRequest, Code


def order(edges: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Steps so that each comes after those it waits for; ``edges[step][field] = other step``.

    Raises BadRequest unknown_step or dependency_cycle that names the field.
    """
    for step, fields in edges.items():
        for field, other in fields.items():
            if other not in edges:
                raise _unknown(f"jobs.{step}.{field}", other, list(edges))
    # Steps keep the order of the request where nothing else decides.
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for step, fields in edges.items():
        sorter.add(step, *dict.fromkeys(fields.values()))
    try:
        return list(sorter.static_order())
    except CycleError as error:
        ring: Sequence[str] = error.args[1]
        step, other = ring[1], ring[0]
        field = next(name for name, target in edges[step].items() if target == other)
        raise BadRequest(
            f"jobs.{step}.{field}: these steps wait for each other: {' <- '.join(ring)}",
            param=f"jobs.{step}.{field}",
            code=Code.DEPENDENCY_CYCLE,
            hint="One of them has to come first: name something that exists already.",
        ) from error


def heedless(
    edges: Mapping[str, Mapping[str, str]], publishers: Sequence[str], exams: Sequence[str]
) -> list[tuple[str, str]]:
    """Steps that make public what an exam asks, or what comes of it, and do not wait for it: ``(step, exam)``."""

    def waits_for(step: str) -> set[str]:
        found: set[str] = set()
        left = [step]
        while left:
            left += (others := set(edges[left.pop()].values()) - found)
            found |= others
        return found

    def asks(step: str) -> set[str]:
        return {other for field, other in edges[step].items() if not field.startswith("after.")}

    return [
        (step, exam)
        for step in publishers
        for exam in exams
        if exam not in (before := waits_for(step)) and asks(exam) & before
    ]


def _unknown(param: str, name: str, steps: Sequence[str]) -> BadRequest:
    near = difflib.get_close_matches(name, steps, 1)
    return BadRequest(
        f"{param}: there is no step {name[:63]!r}",
        param=param,
        code=Code.UNKNOWN_STEP,
        hint=(f"Did you mean job:{near[0]}? " if near else "") + f"Steps here: {', '.join(steps)}.",
    )

"""The graders that are plugged in, and what one answer gets from one of them. No torch."""

from typing import Any

import pytest

from app.catalog import Bench, Catalog
from app.discovery import discover
from app.grading import GraderSpec, Sample, Scoring


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return discover(["workers.graders"])


class Table:
    """A bench without a model: looks graders up."""

    ctx: Any = None
    field, device, dtype, batch_size = "graders.0", "cpu", "float32", 1

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog

    def scoring(self, spec: GraderSpec, place: str) -> Scoring:
        plug = self.catalog.graders[spec.type]
        if plug.grade is not None:
            grade = plug.grade
            return lambda samples: grade(spec, samples)
        assert plug.load is not None
        bench: Bench = self
        return plug.load(spec, bench)


@pytest.fixture(scope="module")
def score(catalog: Catalog) -> Any:
    """``score({"type": …}, answer, **columns)``: what one answer gets."""

    def run(spec: dict[str, Any], answer: str, /, **item: Any) -> float:
        whole = catalog.graders[spec["type"]].spec.model_validate(spec)
        (result,) = Table(catalog).scoring(whole, "")([Sample(answer, item)])
        return result

    return run

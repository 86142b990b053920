"""The store against a reference model (P4, P5, P21): random histories, on both databases."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import run_state_machine_as_test

from app.settings import Settings
from tests.app.jobs.machine.rules import Store, StoreMachine
from tests.conftest import Cluster

# 200 take 84 s on SQLite and 154 s on Postgres, on two cores that others use too: too long for every `make test`. The
# examples are the same in every run; the campaign by hand has ten times as many.
EXAMPLES = {"sqlite": 100, "postgres": 50}


@pytest.fixture
def store(
    backend: str, cluster: Cluster | None, sqlite_template: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    # In memory where that can be: what a disk does is no part of this test.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        path = Path(folder)
        if cluster is None:
            (path / "tunesmith.db").write_bytes(sqlite_template.read_bytes())
            store = Store(Settings(data_dir=path))
            monkeypatch.setattr("app.models.base.datetime", store.wall)
            yield store
            store.database.close()
            return
        with cluster.database(cluster.template) as url:
            store = Store(Settings(data_dir=path, database_url=url))
            monkeypatch.setattr("app.models.base.datetime", store.wall)
            yield store
            store.database.close()


def campaign(store: Store, examples: int) -> None:
    """The same examples in every run; one that fails is printed as a program, and fails again."""
    machine = type("StoreMachine", (StoreMachine,), {"store": store})
    run_state_machine_as_test(
        machine,
        settings=hypothesis_settings(
            max_examples=examples, stateful_step_count=50, deadline=None, derandomize=True, database=None
        ),
    )


@pytest.mark.fault
@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
def test_the_store_does_what_the_table_says(store: Store, backend: str) -> None:
    campaign(store, EXAMPLES[backend])


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("backend", ["sqlite", "postgres"])
def test_the_store_does_what_the_table_says_for_hours(store: Store) -> None:
    campaign(store, 2000)

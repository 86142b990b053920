"""OpenAI's clients repeat a request whose answer they never got, and say so in a header: that makes one job."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

BODY = {"type": "sleepy"}


@pytest.mark.parametrize(("count", "same"), [("0", False), ("1", True), ("2", True), (None, False)])
def test_a_repeat_is_the_same_job(api: TestClient, count: str | None, same: bool) -> None:
    first = api.post("/jobs", json=BODY).json()
    headers = {} if count is None else {"x-stainless-retry-count": count}
    answer = api.post("/jobs", json=BODY, headers=headers)
    assert answer.status_code == 201
    assert (answer.json()["id"] == first["id"]) == same


@pytest.mark.parametrize("body", [{**BODY, "priority": 1}, {**BODY, "experiment_name": "b"}])
def test_another_body_is_another_job(api: TestClient, body: dict[str, Any]) -> None:
    first = api.post("/jobs", json=BODY).json()
    assert api.post("/jobs", json=body, headers={"x-stainless-retry-count": "1"}).json()["id"] != first["id"]


def test_a_repeat_of_what_never_came_is_a_new_job(api: TestClient) -> None:
    assert api.post("/jobs", json=BODY, headers={"x-stainless-retry-count": "1"}).status_code == 201


def test_a_count_that_is_no_number_is_refused(api: TestClient) -> None:
    assert api.post("/jobs", json=BODY, headers={"x-stainless-retry-count": "many"}).status_code == 400

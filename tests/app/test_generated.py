"""Requests that a machine makes up from ``openapi.json``, good ones and bad ones: each is answered as documented."""

from collections import Counter
from typing import Any

import hypothesis
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given
from schemathesis import GenerationMode

ENDLESS = "/stream"
"""Routes that answer until a job is over; none of the jobs that are made up here has a worker."""
OURS = ("authorization", "x-api-key")
SENT = ("method", "url", "params", "headers", "cookies", "json", "content", "data", "files")


def request_of(client: TestClient, case: Any) -> Any:
    """With a good key in place of a made-up one; None for what no client can put into a request."""
    asked = case.as_transport_kwargs(base_url=str(client.base_url))
    asked = {name: value for name, value in asked.items() if name in SENT}
    asked["headers"] = {name: value for name, value in asked["headers"].items() if name.lower() not in OURS}
    if isinstance(asked.get("data"), bytes | str):
        asked["content"] = asked.pop("data")
    try:
        request = client.build_request(**asked)
        request.read()
    except (AttributeError, TypeError, UnicodeError):
        return None
    return request


def check(answer: Any, responses: dict[str, Any]) -> None:
    status = str(answer.status_code)
    assert status in responses or f"{status[0]}XX" in responses, f"{status} is not documented: {answer.text[:300]}"
    assert answer.status_code < 500, answer.text[:300]
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["message"]
        assert error["type"]


@pytest.mark.parametrize("backend", ["sqlite"])
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: str(mode.value))
@pytest.mark.parametrize("examples", [5, pytest.param(100, marks=pytest.mark.long)])
def test_every_operation_answers_as_documented(api: TestClient, mode: GenerationMode, examples: int) -> None:
    document = api.get("/openapi.json").json()
    asked: Counter[str] = Counter()

    def ask(operation: Any) -> None:
        responses = document["paths"][operation.path][operation.method.lower()]["responses"]

        @hypothesis.settings(
            max_examples=examples,
            derandomize=examples < 10,  # the short form asks the same every time
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def one(case: Any) -> None:
            request = request_of(api, case)
            if request is not None:
                asked[operation.label] += 1
                check(api.send(request), responses)

        try:
            one()
        except hypothesis.errors.Unsatisfiable:
            assert "parameters" not in document["paths"][operation.path][operation.method.lower()], (
                "nothing to do wrong"
            )

    found = [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]
    operations = [operation for operation in found if not operation.path.endswith(ENDLESS)]
    for operation in operations:
        ask(operation)
    assert len(operations) > 60
    assert len(asked) >= len(operations) - (2 if mode is GenerationMode.NEGATIVE else 0)

"""schemathesis on a real server: every constraint of ``openapi.json`` at its edges, and one operation after another."""

import subprocess
import sys
from pathlib import Path

import pytest

OWN_JUDGEMENT = ("positive_data_acceptance", "negative_data_rejection", "allow_header_conformance")
"""What a schema cannot say is refused all the same (a model that is not here); ``?until=0`` is a day; and DELETE is
possible at /artifacts/import, as the artifact of that name."""


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("backend", ["sqlite"])
@pytest.mark.parametrize(("phases", "seconds"), [("examples,coverage", 300), ("stateful", 120)])
def test_no_request_finds_a_fault(api_url: str, key: str, tmp_path: Path, phases: str, seconds: int) -> None:
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{api_url}/openapi.json", f"--phases={phases}"]
    options = ["--checks=all", f"--exclude-checks={','.join(OWN_JUDGEMENT)}", "--exclude-path-regex=/stream$"]
    bounds = ["--seed=1", "--max-examples=20", f"--max-time={seconds}", "--no-color"]
    header = ["-H", f"Authorization: Bearer {key}"]
    done = subprocess.run([*command, *options, *bounds, *header], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    assert " generated, " in done.stdout

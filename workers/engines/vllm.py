"""vLLM as a serving engine: a launch becomes an argv list and an environment, and nothing is started here.

The list is fixed. Nothing a client sends becomes an option, because several of vLLM's options import code or open
files (``--middleware``, ``--tool-parser-plugin``, ``--tool-server``, ``--hf-overrides``, ``--trust-remote-code`` …).
"""

from app.engines import Engine, EngineLaunch

SHUTDOWN_SECONDS = 25
"""For requests in flight after SIGTERM; a little less than a replica's grace of 30 s."""


def argv(launch: EngineLaunch) -> list[str]:
    """The command line. Text goes in as ``--option=value``, so that a leading dash cannot become an option."""
    options = launch.options
    arguments = [
        # -I: neither the working directory nor PYTHONPATH can put a module before vLLM's own.
        *(str(launch.python), "-I", "-m", "vllm.entrypoints.openai.api_server"),
        f"--uds={launch.socket}",
        f"--model={launch.model_dir}",
        f"--served-model-name={launch.served_name}",
        f"--dtype={launch.dtype}",
        # By itself it would serve embeddings of some models, and never be ready to answer.
        f"--runner={'pooling' if options.task == 'embed' else 'generate'}",
        # auto: the model's own length, or as much of it as the cache holds.
        f"--max-model-len={options.max_model_len or 'auto'}",
        f"--shutdown-timeout={SHUTDOWN_SECONDS}",
        "--no-enable-log-requests",
        "--disable-uvicorn-access-log",
        "--disable-fastapi-docs",
        # Reserved by RFC 2606, so never resolved: no image or audio of a request is fetched.
        "--allowed-media-domains=media.invalid",
    ]
    if options.task == "embed":
        # Of a model that answers the last token's state becomes the embedding; one that embeds stays as it is.
        arguments.append("--convert=embed")
    if options.hot_load:
        arguments += [
            "--enable-lora",
            f"--max-lora-rank={options.max_lora_rank}",
            f"--max-loras={min(options.max_loras, options.max_adapters)}",
            # Weights of every adapter that we keep loaded stay in the host's memory.
            f"--max-cpu-loras={options.max_adapters}",
            # An adapter may have a chat template of its own; the gateway sends it, and takes none from a client.
            "--trust-request-chat-template",
        ]
        if launch.lora_modules and not launch.has_gpu:
            # Without it the output layer is ready for adapters too, and its CPU kernel counts rows of answers alone:
            # two requests at once that ask for the prompt's log-probabilities (echo) ended the engine (vLLM 0.32).
            arguments += ["--lora-target-modules", *launch.lora_modules]
    if launch.has_gpu:
        arguments += [
            f"--gpu-memory-utilization={options.gpu_memory_utilization}",
            f"--tensor-parallel-size={options.tensor_parallel_size}",
        ]
        if options.quantization is not None:
            arguments.append(f"--quantization={options.quantization}")
        if launch.sleep_mode:
            arguments.append("--enable-sleep-mode")
    else:
        # Without a GPU there are no graphs to capture, and compiling costs minutes at every first start.
        arguments.append("--enforce-eager")
    if launch.chat_template is not None:
        arguments.append(f"--chat-template={launch.chat_template}")
    if launch.tool_call_parser is not None:
        arguments += ["--enable-auto-tool-choice", f"--tool-call-parser={launch.tool_call_parser}"]
    if launch.reasoning_parser is not None:
        arguments.append(f"--reasoning-parser={launch.reasoning_parser}")
    return arguments


def env(launch: EngineLaunch) -> dict[str, str]:
    """The environment, beside PATH and the like."""
    variables = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Opens /sleep, /wake_up and /is_sleeping, but also /collective_rpc and more that change the engine: on the
        # private socket alone, which only this user reaches, and the gateway forwards none of them.
        "VLLM_SERVER_DEV_MODE": "1" if launch.sleep_mode and launch.has_gpu else "0",
        # Its routes to load and unload are reached over the private socket alone: the gateway forwards none of them.
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1" if launch.options.hot_load else "0",
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "VLLM_MAX_N_SEQUENCES": "64",
        "TOKENIZERS_PARALLELISM": "false",
        # setproctitle would write over the environment, by which a stray process is recognised.
        "SPT_NOENV": "1",
    }
    if not launch.has_gpu:
        variables |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # Beside --enforce-eager a few small functions are still compiled when they are first needed, that for
            # logprobs among them: the first probe of an adapter, which asks for some, took 20 s on two busy cores.
            "TORCH_COMPILE_DISABLE": "1",
            # The model runs inside EngineCore instead of in one more process that imports everything again: on two
            # cores 36 s to ready became 20-23 s. (vLLM itself would ask for that process only to bind its threads.)
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # One core less than there are, for the scheduler and the HTTP server, as vLLM's own binding has it. On two
            # cores beside one busy process: 25 tokens/s for one request with one thread, 12 with two.
            "OMP_NUM_THREADS": str(max(1, launch.cpu_threads - 1)),
            # Threads that spin while they wait starve each other as soon as the cores are shared (2 tokens/s).
            "GOMP_SPINCOUNT": "1000",
        }
    return variables


engine = Engine(
    "vllm",
    argv,
    env,
    hot_load=True,
    comparable=True,
    parses=True,
    quantizes=True,
    embeds=True,
    sleep_mode=True,
    busy=("vllm:num_requests_running", "vllm:num_requests_waiting"),
)

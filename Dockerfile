# Two images from one file: `api` (no torch) and `worker` (torch, and vLLM in an environment of its own).
#
#   docker build --target api .
#   docker build --target worker .                              the CUDA locks
#   docker build --target worker --build-arg ACCELERATOR=cpu .  the CPU locks
#
# With the CPU locks pip takes a CPU build of torch where it finds one (PIP_EXTRA_INDEX_URL can name a place that has
# one), else the CUDA build, which is larger and runs on a CPU too.

ARG PYTHON_IMAGE=python:3.11-slim

# --- what every stage stands on ---------------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_PROGRESS_BAR=off
# Both images run as the same user: the data volume and the engines' sockets are shared between them.
RUN useradd --uid 10001 --user-group --create-home tunesmith \
    && install -d -o tunesmith -g tunesmith -m 0700 /data /run/tunesmith

# --- the project as a wheel -------------------------------------------------------------------------------------------
FROM base AS wheel
WORKDIR /src
COPY locks/dev.txt locks/
RUN pip install --constraint locks/dev.txt hatchling
COPY pyproject.toml LICENSE ./
COPY app app
COPY workers workers
COPY migrations migrations
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

# --- environments: the locks first, so that a change of our code installs nothing anew --------------------------------
FROM base AS app-locked
RUN python -m venv /opt/app
COPY locks/app.txt /locks/
RUN --mount=type=cache,target=/root/.cache/pip /opt/app/bin/pip install --no-deps -r /locks/app.txt

FROM app-locked AS app-installed
COPY --from=wheel /wheels /wheels
RUN /opt/app/bin/pip install --no-deps --no-index /wheels/*.whl

FROM app-locked AS train-locked
ARG ACCELERATOR=cuda
ARG PIP_EXTRA_INDEX_URL
COPY locks/train-${ACCELERATOR}.txt /locks/
# torch first and with its dependencies: the lock names its version, pip finds the build that fits.
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/app/bin/pip install -c /locks/app.txt -c /locks/train-${ACCELERATOR}.txt torch \
    && /opt/app/bin/pip install --no-deps -r /locks/train-${ACCELERATOR}.txt

FROM train-locked AS train-installed
COPY --from=wheel /wheels /wheels
RUN /opt/app/bin/pip install --no-deps --no-index /wheels/*.whl

FROM base AS serve-locked
ARG ACCELERATOR=cuda
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv /opt/serve
COPY locks/serve-${ACCELERATOR}.txt /locks/
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/serve/bin/pip install -c /locks/serve-${ACCELERATOR}.txt torch \
    && /opt/serve/bin/pip install --no-deps -r /locks/serve-${ACCELERATOR}.txt

# --- api --------------------------------------------------------------------------------------------------------------
FROM base AS api
COPY --from=app-installed /opt/app /opt/app
ENV PATH=/opt/app/bin:$PATH \
    TUNESMITH_DATA_DIR=/data \
    TUNESMITH_RUN_DIR=/run/tunesmith \
    TUNESMITH_HOST=0.0.0.0 \
    TUNESMITH_PORT=8000
USER tunesmith
WORKDIR /home/tunesmith
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-I", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
CMD ["tunesmith", "api"]

# --- worker -----------------------------------------------------------------------------------------------------------
FROM base AS worker
# libnuma: vLLM on a CPU. libgomp: bitsandbytes. gcc: Triton builds its launchers on the machine where it runs.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=serve-locked /opt/serve /opt/serve
COPY --from=train-installed /opt/app /opt/app
ENV PATH=/opt/app/bin:$PATH \
    TUNESMITH_DATA_DIR=/data \
    TUNESMITH_RUN_DIR=/run/tunesmith \
    TUNESMITH_SERVE_PYTHON=/opt/serve/bin/python \
    HF_HOME=/data/huggingface
USER tunesmith
WORKDIR /home/tunesmith
VOLUME /data
STOPSIGNAL SIGTERM
# Asks the database whether a worker has said within three leases that it lives.
HEALTHCHECK --interval=30s --timeout=15s --start-period=60s --retries=3 \
    CMD ["python", "-I", "-c", "import sys; from app.db import Database; from app.health import readiness; from app.queue import SilentDoorbell; from app.settings import Settings; s = Settings(); r = readiness(s, Database(s.database), SilentDoorbell(), stopping=False); sys.exit(not r.ready or 'no worker' in r.degraded)"]
CMD ["tunesmith", "worker"]

# Every target works from a fresh clone: `setup` comes first and is quick when there is nothing to do.

PYTHON ?= python3
BIN := .venv/bin
# Files, not tests, go to the two processes: what a file sets up once is used by all its tests.
PYTEST = $(BIN)/python -m pytest -rsfExXR -n $(JOBS) --dist loadfile
JOBS ?= 2
MINUTES ?= 10
SEED ?= 1
BENCHMARKS := $(sort $(filter-out benchmarks/__init__.py,$(wildcard benchmarks/*.py)))

.DEFAULT_GOAL := help
.PHONY: help setup demo up test check static faults soak matrix proof bench locks clean

help:
	@echo "make demo        the main job end to end: fine-tune, merge, prove, serve, chat"
	@echo "make up          the whole service in the foreground"
	@echo "make test        every test that this machine can run in about 25 minutes"
	@echo "make check       format, lint, types, import contracts, migrations, then the tests"
	@echo "make faults      the whole fault campaign, with what it measured (ARGS=--quick: its short forms)"
	@echo "make soak        a seeded soak of the whole service: MINUTES=10 SEED=1"
	@echo "make matrix      one training step of every cell of GET /capabilities, on this machine"
	@echo "make proof       200 good merges and every planted defect, through the proof of a merge"
	@echo "make bench       every benchmark; make bench-NAME runs benchmarks/NAME.py"
	@echo "make setup       .venv and .venv-serve from the locks (the others do it first; SERVE=0 leaves out .venv-serve)"
	@echo "make locks       resolve the locks again from pyproject.toml"
	@echo "make clean       remove the environments and the tools' caches"
	@echo "Variables: PYTHON=/path/to/python3.11 or newer, ARGS='more arguments for pytest or the command'"

setup:
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "setup: there is no $(PYTHON). Install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python3"; \
		exit 1; }
	@SERVE="$(SERVE)" "$(PYTHON)" .ci/setup.py

demo: setup
	@$(BIN)/tunesmith demo $(ARGS)

up: setup
	@$(BIN)/tunesmith up $(ARGS)

test: setup
	$(PYTEST) -m "not long" $(ARGS)

static: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/tunesmith migrate --check

check: static
	$(PYTEST) -m "not long" $(ARGS)

faults: setup
	$(BIN)/python -m tests.faults.report $(ARGS)

soak: setup
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES) --seed $(SEED) $(ARGS)

matrix: setup
	$(PYTEST) tests/workers/recipes/test_matrix.py tests/workers/recipes/test_matrix_ranks.py $(ARGS)

proof: setup
	$(PYTEST) --dist load -m long tests/workers/test_certificate.py $(ARGS)

bench: setup
	@for file in $(BENCHMARKS); do echo "== $$file"; $(BIN)/python "$$file" $(ARGS) || exit 1; done

bench-%: setup
	@$(BIN)/python benchmarks/$*.py $(ARGS)

locks: setup
	$(BIN)/python locks/make.py

clean:
	rm -rf .venv .venv-serve .setup.lock .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .schemathesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

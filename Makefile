# `make train` and `make test` start from a bare clone; README.md shows the plain commands behind them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One worker process per core; each test file runs in one worker, because some files share costly fixtures. By default
# files with few tests come last: those are the longest, and the last one would leave the other cores idle.
BY_FILE := -n auto --dist loadfile --no-loadscope-reorder
# Flower has its own environment, because it pins other versions of protobuf, rich and typer than this project.
ENGINE := .flower-venv
ENGINE_INSTALLED := $(ENGINE)/.installed
PIP := pip install --quiet --disable-pip-version-check
# uv is a dependency of Flower. A version stays as it is in the lock file while pyproject.toml allows it.
COMPILE = $(ENGINE)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--no-emit-package torch --constraint requirements-torch.txt --custom-compile-command "make lock"
FLOWER := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["flower"], sep=chr(10))
# Small models run faster on one thread: threads wait for one another, and on shared cores that costs a multiple.
ONE_THREAD := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}

.DEFAULT_GOAL := help
.PHONY: help install engine train flower-demo test test-all lint benchmark lock

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## create .venv from its lock file; torch from TORCH_INDEX=address if given

# torch has a step of its own, after its dependencies: each index serves another build of one version (CPU, CUDA).
$(INSTALLED): requirements-dev.lock requirements-torch.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) --require-hashes --no-deps --requirement requirements-dev.lock
	$(BIN)/$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --requirement requirements-torch.txt
	$(BIN)/$(PIP) --no-deps --editable .
	touch $@

engine: $(ENGINE_INSTALLED)  ## create .flower-venv, Flower's environment, from its own lock file

$(ENGINE_INSTALLED): requirements-flower.lock pyproject.toml
	$(PYTHON) -m venv $(ENGINE)
	$(ENGINE)/bin/$(PIP) --require-hashes --no-deps --requirement requirements-flower.lock
	$(ENGINE)/bin/$(PIP) --no-deps --editable .
	touch $@

flower-demo: install engine  ## run a deployed federation on this machine: SuperLink, nginx, three hospitals, coordinator
	$(ONE_THREAD) $(BIN)/python deploy/demo.py --engine $(abspath $(ENGINE))/bin

train: install  ## fetch the foundation, write demonstration sites if data/01_raw is empty, train, evaluate
	$(BIN)/kedro run --pipeline=federated_training

test: install  ## run the quick tests, as CI does
	$(ONE_THREAD) $(BIN)/python -m pytest -m "not slow" $(BY_FILE)

test-all: install  ## run all tests, including the slow ones
	$(ONE_THREAD) $(BIN)/python -m pytest $(BY_FILE)

lint: install  ## check style, formatting, import rules, types and dead code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/vulture

benchmark: install  ## run benchmarks/nuclei.py on the nuclei sites in DATA=folder, three seeds
	$(BIN)/python benchmarks/nuclei.py --data $(or $(DATA),$(error name the folder of the nuclei sites with DATA=folder, see docs/nuclei.md))

lock: engine  ## rewrite the lock files after a change of pyproject.toml or requirements-torch.txt
	$(COMPILE) pyproject.toml --output-file requirements.lock
	$(COMPILE) pyproject.toml --extra dev --constraint requirements.lock --output-file requirements-dev.lock
	$(ENGINE)/bin/python -c '$(FLOWER)' | $(COMPILE) - --output-file requirements-flower.lock

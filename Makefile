# `make train` and `make test` start from a bare clone; README.md shows the plain commands behind them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One worker process per core; each test file runs in one worker, because some files share costly fixtures.
BY_FILE := -n auto --dist loadfile
# Flower has its own environment, because it pins other versions of protobuf, rich and typer than this project.
ENGINE := .flower-venv
ENGINE_INSTALLED := $(ENGINE)/.installed
# Small models run faster on one thread: threads wait for one another, and on shared cores that costs a multiple.
ONE_THREAD := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}

.DEFAULT_GOAL := help
.PHONY: help install engine train flower-demo test test-all lint benchmark lock

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## create .venv from the lock file

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

engine: $(ENGINE_INSTALLED)  ## create .flower-venv, Flower's environment, from its own lock file

$(ENGINE_INSTALLED): requirements-flower.lock pyproject.toml
	$(PYTHON) -m venv $(ENGINE)
	$(ENGINE)/bin/pip install --quiet --disable-pip-version-check --requirement requirements-flower.lock
	$(ENGINE)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
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

lock: install  ## rewrite requirements.lock from the installed packages
	$(BIN)/pip freeze --exclude-editable | sed -E '/^(pip|setuptools|wheel)==/d; s/\+cpu$$//' > requirements.lock

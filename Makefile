# `make train` and `make test` do everything from nothing; README shows the plain commands behind them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# A test file a core; the files with costly fixtures stay whole.
BY_FILE := -n auto --dist loadfile
# Flower's own environment: its pins (protobuf, rich, typer) are not this project's.
ENGINE := .flower-venv
ENGINE_INSTALLED := $(ENGINE)/.installed
# Threads of one process each that wait for one another make small models slower, several times where cores are shared.
ONE_THREAD := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}

.DEFAULT_GOAL := help
.PHONY: help install engine train flower-demo test test-all lint benchmark lock

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## make .venv from the lock file

$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

engine: $(ENGINE_INSTALLED)  ## make .flower-venv, Flower's environment, from its own lock file

$(ENGINE_INSTALLED): requirements-flower.lock pyproject.toml
	$(PYTHON) -m venv $(ENGINE)
	$(ENGINE)/bin/pip install --quiet --disable-pip-version-check --requirement requirements-flower.lock
	$(ENGINE)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

flower-demo: install engine  ## a deployed federation on this machine: SuperLink, nginx, three hospitals, coordinator
	$(ONE_THREAD) $(BIN)/python deploy/demo.py --engine $(abspath $(ENGINE))/bin

train: install  ## fetch the foundation, write the demonstration sites if there are none, train, evaluate
	$(BIN)/kedro run --pipeline=federated_training

test: install  ## the quick tests, as CI runs them
	$(ONE_THREAD) $(BIN)/python -m pytest -m "not slow" $(BY_FILE)

test-all: install  ## every test, the slow ones too
	$(ONE_THREAD) $(BIN)/python -m pytest $(BY_FILE)

lint: install  ## style, formatting, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

benchmark: install  ## benchmarks/nuclei.py on the nuclei sites in DATA=folder, three seeds
	$(BIN)/python benchmarks/nuclei.py --data $(or $(DATA),$(error give the nuclei sites as DATA=folder: docs/nuclei.md))

lock: install  ## write requirements.lock anew from what is installed
	$(BIN)/pip freeze --exclude-editable | sed -E '/^(pip|setuptools|wheel)==/d; s/\+cpu$$//' > requirements.lock

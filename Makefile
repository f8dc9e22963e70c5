# Every target installs what it needs into .venv first. Override on the command line, e.g. `make fit PYTHON=python3.12`.
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dev
CONFIG ?= configs/aki.yaml
WORKERS ?= 2
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread a process: pytest runs $(WORKERS) of them, and tiny tensors gain nothing from more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help setup fit test test-slow test-exhaustive lint format docs clean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(STAMP) ## create .venv and install mmfuse and everything it needs

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --editable '.[$(EXTRAS)]'
	touch $@

fit: setup ## train, evaluate and report the default model
	$(BIN)/mmfuse fit --config $(CONFIG) $(ARGS)

test: setup ## run the tests, without the slow ones
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: setup ## run the slow tests
	$(PYTEST) -m "slow and not exhaustive" $(ARGS)

test-exhaustive: setup ## run every case of the slow tests that are sampled elsewhere (8 minutes of CPU)
	$(PYTEST) -m exhaustive $(ARGS)

lint: setup ## style, types and the layer rule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: setup ## let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## build the documentation into site/
	$(BIN)/mkdocs build --strict

clean: ## remove what make builds, and leave .venv and runs/ alone
	rm -rf site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Each target sets up what it needs: a fresh machine with Python >= 3.10 has to do nothing first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train test lint format bench clean

help:
	@echo "make train   train the paper's model, small, on rendered video; ARGS=... go to training.train"
	@echo "make test    run the test suite; ARGS=... go to pytest"
	@echo "make lint    ruff and mypy"
	@echo "make format  rewrite the sources as ruff likes them"
	@echo "make bench   measure the operators against eager PyTorch and torch.compile"
	@echo "make setup   .venv with everything installed, which the others do first"
	@echo "make clean   remove .venv, caches and build output"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[train,bench,dev]"
	@touch "$@"

train: setup
	"$(BIN)/python" -m training.train --recipe quick $(ARGS)

test: setup
	"$(BIN)/python" -m pytest -q $(ARGS)

lint: setup
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"

format: setup
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

bench: setup
	"$(BIN)/python" -m benchmarks.refine $(ARGS)
	"$(BIN)/python" -m benchmarks.strip_pool
	"$(BIN)/python" -m benchmarks.batch_hard

clean:
	rm -rf "$(VENV)" build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Targets for a checkout. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Two test processes share two cores; OpenMP threads that spin while idle would take them from each other.
export OMP_WAIT_POLICY := PASSIVE
test test-distributed test-gpu test-oldest: export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
.PHONY: help setup train test test-distributed test-gpu test-oldest check format bench corpus assets wheel clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(READY) ## create the environment in .venv

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

train: $(READY) ## the default recipe, from the embedded corpus to its report (3.5 minutes on 2 cores)
	$(BIN)/moba-train train

test: $(READY) ## the CPU test suite (2 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not distributed and not gpu'

test-distributed: $(READY) ## the tests that start several processes (6 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m distributed

test-gpu: $(READY) ## the tests that need a GPU, and those that need two where there are two
	$(BIN)/python -m pytest -m gpu -n auto --maxprocesses 16 --dist loadgroup --live

test-oldest: $(READY) ## the model tests against the oldest transformers that is allowed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .oldest transformers==5.17.0 'huggingface_hub<2'
	PYTHONPATH=.oldest $(BIN)/python -m pytest tests/test_hf_attention.py tests/test_rope.py tests/test_recompute.py tests/test_train.py tests/test_export.py

check: $(READY) ## linter, formatter and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## apply the formatter and the linter's fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## attention against dense: on a GPU the full table, on a CPU the growth from 2K to 32K
	$(BIN)/moba-train bench

assets: $(READY) ## SmolLM2-135M into data/fetched, hash-checked (93 MB download)
	$(BIN)/moba-train fetch model=smollm2_135m

wheel: $(READY) ## build the wheel, recipes and corpus included, into dist/
	$(BIN)/python -m build --wheel

clean: ## remove caches and builds; runs, stores and .venv stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

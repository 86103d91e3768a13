# Two commands for a fresh machine that has Python 3.11 or newer and make:
#   make demo   sets up .venv and shows what the library is good for
#   make test   sets up .venv and runs the whole test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp

# two cores are not oversubscribed by the thread pools of torch and BLAS
export OMP_NUM_THREADS ?= 2

# processes of the test suite; `make test PARALLEL=` runs it in one
PARALLEL ?= -n 2 --dist worksteal

# environments of `make test-oldest` and `make test-engines`
OLDEST ?= build/oldest
ENGINES ?= build/engines

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-gpu test-oldest test-engines check format docs wheel package nightly benchmarks clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv and install clkit with everything it is developed with

$(STAMP): pyproject.toml constraints.txt
	@echo "==> setting up $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	@touch $(STAMP)

demo: setup ## three small runs on handwritten digits, in one table
	$(BIN)/clkit demo

test: setup ## the whole test suite, doctests included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu" $(PARALLEL)

test-slow: setup ## the tests that take longer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(PARALLEL)

test-gpu: setup ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

test-oldest: $(OLDEST)/.setup-stamp ## the whole test suite with the oldest versions that are supported
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -m "not slow and not gpu" $(PARALLEL)

$(OLDEST)/.setup-stamp: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet -e '.[test]' -c constraints-oldest.txt
	@touch $@

test-engines: $(ENGINES)/.setup-stamp ## the pages on Dask and Ray, with Dask and Ray
	OMP_NUM_THREADS=1 $(ENGINES)/bin/python -m pytest tests/test_engines.py

$(ENGINES)/.setup-stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/pip install --quiet -e '.[test,engines]' -c constraints.txt
	@touch $@

check: setup ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## rewrite files in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup ## build the documentation; runs the tutorials, warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html
	@echo "==> docs/_build/html/index.html"

wheel: setup ## build the wheel into dist/
	rm -f dist/*.whl
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

# the environment weighs as much as .venv does, so it goes when the examples have run
package: ## install the built wheel alone in an empty environment and run the README's examples there
	rm -rf build/package dist/*.whl
	$(PYTHON) -m venv build/package
	build/package/bin/pip wheel --quiet --no-deps --wheel-dir dist .
	build/package/bin/pip install --quiet --no-cache-dir dist/*.whl -c constraints.txt
	build/package/bin/python .ci/readme_examples.py README.md
	rm -rf build/package

nightly: test test-slow test-oldest test-engines check docs package benchmarks ## everything that needs no data and no GPU; an hour or so

benchmarks: setup ## the benchmarks that need no data
	$(BIN)/python benchmarks/digits.py
	$(BIN)/python benchmarks/startup.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/analytic.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/trainer.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/long_stream.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/onpro.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/onpro_digits.py

clean: ## remove what was built, and .venv
	rm -rf $(VENV) dist build docs/_build docs/tutorials docs/api/generated .pytest_cache .mypy_cache .ruff_cache .hypothesis

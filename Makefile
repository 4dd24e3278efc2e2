# `make demo` and `make test` set up .venv on a machine that has only Python and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# `make bench OUT=name` keeps results as benchmarks/results/name-*.json.
OUT ?= bench
PACKAGES := gradsurgery architectures recipes
# An editable install links file by file: a folder that gains or loses a file installs anew.
FOLDERS := $(shell find $(PACKAGES) -type d -not -name __pycache__)

# Two OpenMP threads that spin for each other make a step ten times slower on cores that are shared with others.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test lint bench clean

demo: $(VENV)/installed
	$(BIN)/python -m gradsurgery.recipes.nyuv2 --method ew cagrad --out runs/demo

# A process a core, each with a thread of its own; tests that share a slow fixture stay together.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadgroup

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

bench: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks --out $(OUT)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml $(FOLDERS)
	$(BIN)/pip install --quiet --editable ".[recipes]" --config-settings editable_mode=strict
	touch $@

$(VENV)/installed-dev: $(VENV)/bin/python pyproject.toml $(FOLDERS)
	$(BIN)/pip install --quiet --editable ".[dev]" --config-settings editable_mode=strict
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build *.egg-info runs data

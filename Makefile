# `make run` and `make test` set up everything they need in .venv; the tests need a good deal more than the program.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: run test check lint types format docs cuda clean

run: $(STAMP)
	$(BIN)/dmoe-run --gpu-mem 8GB examples/prompt.txt

# Two processes, since many tests wait for others of theirs; a file's tests stay in one, and share what the file builds.
test: $(DEV)
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: lint types

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV)
	$(BIN)/python -m mkdocs build

# Needs nvcc, but no GPU; offload_engine finds the library where this leaves it.
cuda: $(STAMP)
	$(BIN)/python -m offload_engine.kernels.cuda_build

# torch goes in alone and pinned first: resolved together with the rest it may be taken as a CUDA build of several GB.
$(STAMP): pyproject.toml constraints.txt hatch_build.py $(wildcard offload_engine/kernels/cpu/*) offload_engine/kernels/build.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(DEV): $(STAMP)
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

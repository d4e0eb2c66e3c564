# Every target sets up what it needs: on Debian, python3, python3-venv and make are enough.
#
#   make quickstart                      five pictures -> adapter, on the embedded base
#   make test PYTEST_ARGS="-k layout"    part of the tests
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu    another build of torch

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := torch>=2.11,<2.14
TORCH_INDEX ?=
EXTRAS ?= dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PYTEST_ARGS ?=
BUDGET ?= 4h
JOBS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install quickstart science test test-all lint types clean

help:
	@echo "make quickstart | science | test | test-all | lint | types | clean   (TORCH_INDEX, PYTEST_ARGS, BUDGET, JOBS)"

install: $(INSTALLED)

# torch comes first and alone, so that the index (or TORCH_INDEX) decides which build the rest is resolved against.
$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "No python3 found: install Python 3.11 or newer (Debian: python3 python3-venv)." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, $(PYTHON) is %d.%d: set PYTHON=..." % v[:2])'
	@"$(PYTHON)" -c 'import ensurepip' 2>/dev/null || { echo "Python's venv module is not complete: install it (Debian: apt-get install python3-venv)." >&2; exit 1; }
	@echo "Installing into $(VENV) ..."
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@$(PIP) --editable ".[$(EXTRAS)]"
	@touch $@

quickstart: $(INSTALLED)
	@$(BIN)/litp quickstart

# Resumable: cells that exist are kept, and a changed recipe or base makes new ones.
science: $(INSTALLED)
	@$(BIN)/python benchmarks/crashes.py --kills 50 --jobs $(JOBS) --out benchmarks/crashes_cpu.json; \
	crashes=$$?; $(BIN)/python -m lit_personalize.report.science --budget $(BUDGET) --jobs $(JOBS); \
	status=$$?; $(BIN)/python -m lit_personalize.report.pages && exit $$((crashes > status ? crashes : status))

test: $(INSTALLED)
	@$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: $(INSTALLED)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)
	@$(BIN)/ruff check .

types: $(INSTALLED)
	@$(BIN)/mypy

# Keeps runs/: trainings are yours.
clean:
	rm -rf $(VENV) build dist lit_personalize.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

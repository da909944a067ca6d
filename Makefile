# Two commands: `make train` runs the twin (full attention, then NSA, then their comparison), `make test` the tests.
# Both create .venv from the pinned constraints first. ARGS passes overrides: make train ARGS="steps=50 name=try".
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := dev$(shell nvidia-smi -L >/dev/null 2>&1 && echo ,gpu)
ARGS ?=
# Packages are installed without bytecode, which their first import writes: without it every process compiles for 20 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test test-gpu test-slow lint setup clean

train: setup
	$(BIN)/sieve twin $(ARGS)

test: setup lint
	$(BIN)/python -m pytest $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m slow $(ARGS)

test-gpu: setup
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: setup
	$(BIN)/ruff check .

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Sieve needs Python 3.11, 3.12 or 3.13 with the venv module; give one by PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Installing into $(VENV) with $(PYTHON) (about two minutes, 2 GB)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info

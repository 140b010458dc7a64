# make demo: set up and quantize a real model · make test: everything that must pass · make help
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c 'import sys,venv,ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test lint types unit docs bench clean
help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer with venv and ensurepip was found; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch .venv/installed $@

demo: .venv/installed  ## set up .venv, then quantize the embedded LeNet and show the result (./quantcli-demo)
	$(BIN)/quantcli demo

test: .venv/installed-dev  ## lint, type-check and run every test, side by side
	@$(MAKE) --no-print-directory -j3 lint types unit

lint: .venv/installed-dev  ## ruff, both checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev  ## mypy --strict
	$(BIN)/mypy

unit: .venv/installed-dev  ## pytest alone
	$(BIN)/python -m pytest -n auto --dist worksteal

docs: .venv/installed-dev  ## write docs/cli.md, docs/operators.md and the JSON Schema anew from the code
	$(BIN)/python -m quantcli.reference

bench: .venv/installed-dev  ## the table of docs/benchmarks.md (needs QUANTCLI_BED)
	$(BIN)/python -m benchmarks.peers

clean:  ## remove the environment and what the tools leave behind
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info quantcli-demo build

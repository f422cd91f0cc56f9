# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
# Index of CPU builds of torch, for a machine without a GPU whose default index has CUDA builds only (README).
TORCH_INDEX ?=
BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/pip install -q --disable-pip-version-check

.PHONY: help demo test test-long test-fast lint format manual clean

help:            ## this list
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  +##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(INSTALLED)   ## a sweep of 8 QLoRA trials on the embedded base, and its best adapter
	@$(BIN)/orchestrator demo

test: lint       ## lint, types, import contract and tests; on a machine with an NVIDIA GPU, those of it too
	@$(BIN)/pytest -m "not gpu and not long"
	@if command -v nvidia-smi > /dev/null; then $(BIN)/pytest tests/gpu; fi

test-long: $(INSTALLED) ## the other tests: whole sweeps that are killed, resumed, exported, served
	@$(BIN)/pytest -m "not gpu and long"

test-fast: lint  ## the same without the tests that train or start Ray
	@$(BIN)/pytest -m "not gpu and not slow"

lint: $(INSTALLED)   ## style, types and import contract
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports > .venv/lint-imports.log 2>&1 || { cat .venv/lint-imports.log; exit 1; }

format: $(INSTALLED) ## put the code into the house's format
	@$(BIN)/ruff check -q --fix .
	@$(BIN)/ruff format -q .

manual: $(INSTALLED) ## write the files that are made from the specification: JSON Schema, reference, every-field.yaml
	@$(BIN)/python scripts/write_manual.py

clean:           ## remove the environment
	@rm -rf .venv

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "needs Python 3.11 or newer; make demo PYTHON=python3.12"; exit 2; }
	@echo "installing into .venv (a few minutes the first time; .venv/install.log)"
	@$(PYTHON) -m venv .venv
	@# torch by itself: a range, or another package's wish for it, would pull the newest CUDA build.
	@{ $(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' constraints.txt) && \
	   $(PIP) -c constraints.txt -e '.[dev]'; } > .venv/install.log 2>&1 || { cat .venv/install.log; exit 1; }
	@$(PIP) -c constraints.txt -e '.[bohb]' >> .venv/install.log 2>&1 || \
	   echo "without search.algorithm bohb: one of its packages needs a C compiler (.venv/install.log)"
	@touch $@

.PHONY: docs
test: docs
docs: $(INSTALLED)   ## build the documentation site into build/site; broken links are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Start with `make demo` or `make test`; both install what they need into .venv.
PYTHON ?= python3
# Package index with CPU builds of torch, for a machine without a GPU if the default index has only CUDA builds (README).
TORCH_INDEX ?=
# Versions to install: constraints.txt, or nothing for the newest versions that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/pip install -q --disable-pip-version-check
CONSTRAIN := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
TORCH := $(shell sed -nE '$(if $(CONSTRAINTS),s/^(torch==.*)/\1/p,s/^ *"(torch>=[^"]*)".*/\1/p)' $(or $(CONSTRAINTS),pyproject.toml))

.PHONY: help demo test test-long test-fast test-faults test-gpu lint format manual audit fuzz clean

help:            ## print this list
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  +##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(INSTALLED)   ## run a sweep of 8 QLoRA trials on the embedded base, and compare its best adapter with the base
	@$(BIN)/orchestrator demo

test: lint       ## run lint and all tests except the long ones; GPU tests too if there is an NVIDIA GPU
	@$(BIN)/pytest -m "not gpu and not long"
	@if command -v nvidia-smi > /dev/null; then $(BIN)/pytest tests/gpu; fi

test-long: $(INSTALLED) ## run the long tests: whole sweeps that are killed, resumed, exported and served
	@$(BIN)/pytest --durations=20 -rs -m "not gpu and long"

test-fast: lint  ## run lint and the tests that neither train nor start Ray
	@$(BIN)/pytest -m "not gpu and not slow"

test-faults: $(INSTALLED) ## kill parts of sweeps at random moments, and print what was lost (half an hour on 2 cores)
	@table=$$(mktemp) && FAULT_TABLE=$$table $(BIN)/pytest tests/faults -m faults; status=$$?; rm -f "$$table"; exit $$status

test-gpu: $(INSTALLED) ## run the tests that need an NVIDIA GPU
	@$(BIN)/pytest tests/gpu

lint: $(INSTALLED)   ## check style, types and import contracts
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports > .venv/lint-imports.log 2>&1 || { cat .venv/lint-imports.log; exit 1; }

format: $(INSTALLED) ## format the code and apply the linter's fixes
	@$(BIN)/ruff check -q --fix .
	@$(BIN)/ruff format -q .

manual: $(INSTALLED) ## write the files generated from the specification: JSON Schema, reference, every-field.yaml
	@$(BIN)/python scripts/write_manual.py

audit: $(INSTALLED)  ## look up the pinned versions in the database of known vulnerabilities (needs the network; not in CI)
	@$(BIN)/pip-audit --no-deps --disable-pip --progress-spinner off -r constraints.txt

fuzz: $(INSTALLED)   ## read damaged experiments, records and bundles for a minute each (extra fuzz; not in CI)
	@$(BIN)/python scripts/fuzz.py

clean:           ## remove the environment .venv
	@rm -rf .venv

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "needs Python 3.11 or newer; make demo PYTHON=python3.12"; exit 2; }
	@echo "installing into .venv (a few minutes the first time; .venv/install.log)"
	@$(PYTHON) -m venv .venv
	@# torch first and from its own index: otherwise the requirement of another package installs the newest CUDA build.
	@{ $(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)" && \
	   $(PIP) $(CONSTRAIN) -e '.[dev]'; } > .venv/install.log 2>&1 || { cat .venv/install.log; exit 1; }
	@$(PIP) $(CONSTRAIN) -e '.[bohb]' >> .venv/install.log 2>&1 || \
	   echo "search.algorithm bohb is not available: one of its packages needs a C compiler (.venv/install.log)"
	@touch $@

.PHONY: docs
test: docs
docs: $(INSTALLED)   ## build the documentation site into build/site; broken links are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

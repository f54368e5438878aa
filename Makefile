# Two commands suffice: `make demo` and `make test`. Both make .venv first, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

# Nothing started from here reports home, looks for updates or installs packages of its own accord.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-full compliance-demo test test-slow check clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo '  PYTHON=python3.12 chooses the interpreter, ARGS="..." is handed to the command or to pytest.'

setup: $(READY) ## Make .venv with the pinned versions (again only if pyproject.toml or constraints.txt change).

# torch goes first: its wheel is the largest, so a failed download shows before anything else is done.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("cotune needs Python 3.11 or newer: make PYTHON=python3.11 setup" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup ## Fine-tune a small model over simulated hospitals, privately, and write the report.
	$(BIN)/cotune simulate recipe:icd10-routing $(ARGS)

demo-full: setup ## The demo, and the baselines it is compared with.
	$(BIN)/cotune simulate recipe:icd10-routing --baselines $(ARGS)

# The same job twice, with the same planted secrets; without privacy it needs a learning rate of its own.
COMPLIANCE := runs/compliance-$(shell date +%Y%m%d-%H%M%S)
compliance-demo: setup ## Plant secrets, train with privacy and without, attack both, write the report.
	$(BIN)/cotune simulate recipe:compliance --out $(COMPLIANCE) $(ARGS)
	$(BIN)/cotune simulate recipe:compliance --out $(COMPLIANCE) --canaries-of $(COMPLIANCE)/*-compliance \
	  run.name=open privacy.level=none train.optimizer=adamw train.learning_rate=0.01 train.batch_size=64 \
	  --i-know $(ARGS)
	$(BIN)/cotune attack $(COMPLIANCE)/*-compliance --control $(COMPLIANCE)/*-open
	$(BIN)/cotune verify $(COMPLIANCE)/*-compliance

test: setup ## The default tests: no network, no GPU, no Flower process.
	$(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: setup ## The slow tests: real packages, Flower, deployed federations, kills.
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile $(ARGS)

check: setup ## The gate: format, lint, types, default tests.
	scripts/check $(ARGS)

clean: ## Remove caches and build products; .venv, runs/ and data/ stay.
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis ./*.fab ./*.egg-info
	find shared client server simulations tests -name __pycache__ -type d -prune -exec rm -rf {} +

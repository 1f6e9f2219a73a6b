# Every target sets up what it needs. PYTHON picks the interpreter; VENV the virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= $(shell cat .torch-version)

.PHONY: quickstart test test-all lint install clean
quickstart: install            ## demonstrations -> OFT fine-tuning -> closed-loop evaluation -> quickstart/report.html
	$(BIN)/vla-oft quickstart --out quickstart

test: install lint             ## everything CI runs
	$(BIN)/pytest -m "not slow"

test-all: install lint         ## the slow tests as well
	$(BIN)/pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml packages/vla-oft-client/pyproject.toml .torch-version scripts/system_packages.sh
	bash scripts/system_packages.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	bash scripts/python_packages.sh $(BIN)/python $(TORCH)
	touch $@

clean:
	rm -rf $(VENV) quickstart

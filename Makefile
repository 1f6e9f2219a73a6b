# Every target sets up what it needs. PYTHON picks the interpreter, VENV the virtual environment, OUT the folder of the quickstart.
PYTHON ?= python3
VENV ?= .venv
OUT ?= quickstart
BIN := $(VENV)/bin
SOURCES := pyproject.toml packages/vla-oft-client/pyproject.toml .torch-version scripts/system_packages.sh scripts/python_packages.sh

.PHONY: quickstart test test-all lint clean
quickstart: $(VENV)/.run       ## demonstrations -> OFT fine-tuning -> closed-loop evaluation -> quickstart/report.html
	$(BIN)/vla-oft quickstart --out $(OUT)

test: lint                     ## everything CI runs
	$(BIN)/pytest -m "not slow"

test-all: lint                 ## the slow tests as well
	$(BIN)/pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/.run: $(SOURCES)
	PYTHON=$(PYTHON) bash scripts/system_packages.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	bash scripts/python_packages.sh $(BIN)/python $$(cat .torch-version) data,sim
	touch $@

$(VENV)/.dev: $(VENV)/.run
	bash scripts/python_packages.sh $(BIN)/python $$(cat .torch-version) data,sim,train,dev
	touch $@

clean:                         ## removes the virtual environment and the quickstart's folder
	rm -rf $(VENV) $(OUT)

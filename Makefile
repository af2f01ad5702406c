PYTHON ?= python3
VENV ?= .venv
OLDEST ?= 2.6.0
BIN := $(VENV)/bin
OLDEST_VENV := .venv-oldest
# Most modules of the requirements are never imported, so that compiling them takes longer than importing the others.
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
INSTALL := $(BIN)/python $(PIP_INSTALL) --constraint constraints.txt

.PHONY: quickstart test test-oldest lint docs dist clean

quickstart: $(VENV)/.installed  ## fine-tune the shipped model on a reward, in a minute on a laptop
	$(BIN)/lightning-draft fit --config quickstart

test: $(VENV)/.installed-dev  ## run the tests and doctests; those of tests/smoke are for the oldest releases
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal --ignore tests/smoke

test-oldest: $(OLDEST_VENV)/.installed-$(OLDEST)  ## run tests/smoke with the lowest releases that are allowed
	OMP_NUM_THREADS=1 OLDEST=$(OLDEST) $(OLDEST_VENV)/bin/python -m pytest tests/smoke

lint: $(VENV)/.installed-dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs  ## build the documentation; a broken link or reference is an error
	$(BIN)/python -m mkdocs build --strict

dist: $(VENV)/.installed-dev  ## build the sdist and the wheel
	rm -rf build dist
	$(BIN)/python -m build

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	DS_BUILD_OPS=0 $(INSTALL) --editable ".[dev]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(INSTALL) --editable ".[docs]"
	touch $@

$(OLDEST_VENV)/.installed-$(OLDEST): pyproject.toml constraints-oldest.txt
	rm -rf $(OLDEST_VENV)
	$(PYTHON) -m venv $(OLDEST_VENV)
	sed 's/^torch==.*/torch==$(OLDEST)/' constraints-oldest.txt > $(OLDEST_VENV)/constraints.txt
	$(OLDEST_VENV)/bin/python $(PIP_INSTALL) --constraint $(OLDEST_VENV)/constraints.txt --editable . "pytest>=8"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST_VENV) build dist *.egg-info

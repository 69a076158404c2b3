# PYTHON chooses the interpreter that makes the virtual environment, ARGS adds to the command of run and test.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: run test lint docs clean

run: $(STAMP)
	$(BIN)/python -m launch.main --config=configs/hfedmoe.py $(ARGS)

# Files in their order: the longest ones are not the last, so the workers end together. The slow tests are run
# by `make test ARGS="-m slow"`.
test: $(STAMP)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

lint: $(STAMP)-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(STAMP)-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; run make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[test]'
	touch $@

# Only who lints or builds the documentation installs the tools for it.
$(STAMP)-%: $(STAMP)
	$(INSTALL) '.[$*]'
	touch $@

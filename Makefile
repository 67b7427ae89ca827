# Everything on a fresh machine: `make quickstart`, `make digits` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNTIMES ?= .venv-runtimes

.PHONY: quickstart digits quality bench runtimes test check clean
.DELETE_ON_ERROR:

quickstart: $(STAMP)
	$(BIN)/qaware run experiments/quickstart.yaml

digits: $(STAMP)
	$(BIN)/qaware run experiments/digits.yaml

quality: $(STAMP)
	$(BIN)/python -m benchmarks.quality --out quality.json

# Without the peers (pip install -e '.[bench]') the benchmark says which it left out.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.speed --out speed.json

# The runtimes that are extras, in an environment of their own: litert-torch lowers typing_extensions, and
# llama-cpp-python is compiled for ten minutes.
runtimes: $(RUNTIMES)/.installed
	$(RUNTIMES)/bin/pytest tests/exporters
	$(RUNTIMES)/bin/python -m benchmarks.matrix --out matrix.json

$(RUNTIMES)/.installed: pyproject.toml
	$(PYTHON) -m venv $(RUNTIMES)
	$(RUNTIMES)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(RUNTIMES)/bin/pip install --quiet --disable-pip-version-check -e '.[dev,runtimes]'
	touch $@

test: check
	$(BIN)/pytest

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(RUNTIMES) build dist *.egg-info

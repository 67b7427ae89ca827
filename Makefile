# Everything on a fresh machine: `make quickstart`, `make digits` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart digits quality bench test check clean
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
	rm -rf $(VENV) build dist *.egg-info

# `make demo` and `make test` start from nothing: they make the environment, install and run.

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow test-survival test-fuzz test-browser bench lint

demo: $(INSTALLED)
	$(VENV)/bin/avatarl demo

# A test process on each core, a thread each; a file's tests stay together, for they share what is slow to make.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m slow --ignore tests/survival --ignore tests/fuzz

test-survival: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m slow tests/survival

test-fuzz: $(INSTALLED)
	$(VENV)/bin/python -m pytest -m fuzz tests/fuzz

test-browser: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,app]"
	$(VENV)/bin/python -m pytest -m browser

bench: $(INSTALLED)
	$(VENV)/bin/python benchmarks/loss.py
	$(VENV)/bin/python benchmarks/step.py
	$(VENV)/bin/python benchmarks/estimators.py
	$(VENV)/bin/python benchmarks/tables.py

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

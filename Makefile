# Each target does its own set-up, in a virtual environment in .venv, and can be repeated.
PYTHON ?= python3
VENV := .venv
RUN := OMP_NUM_THREADS=1 $(VENV)/bin
FOLDER ?= runs/mnist1d

.PHONY: demo test test-all lint chapter benchmark clean

## The main job: a student with and without a teacher on MNIST-1D, 5 seeds; about two minutes.
demo: $(VENV)/.package
	OMP_NUM_THREADS=2 $(VENV)/bin/lightning-distill compare -c examples/mnist1d.yaml --folder $(FOLDER)

## Lint, types and the tests that take seconds.
test: lint
	$(RUN)/python -m pytest -n 2 --dist worksteal -m "not slow"
	$(RUN)/python scripts/chapter.py --check

## Everything, also what takes minutes.
test-all: lint
	$(RUN)/python -m pytest -n 2

lint: $(VENV)/.development
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

## Which rows of the chapter have a test; writes docs/chapter.md.
chapter: $(VENV)/.development
	$(RUN)/python scripts/chapter.py --write

## Side by side: a hand-written loop, Trainer and KD, peers.
benchmark: $(VENV)/.development
	$(RUN)/python scripts/benchmark.py

clean:
	rm -rf $(VENV) build dist *.egg-info

# Debian's python3 comes without venv; virtualenv needs only pip.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); $(PYTHON) -m pip install --user virtualenv && $(PYTHON) -m virtualenv $(VENV); }

$(VENV)/.package: $(VENV)/bin/python pyproject.toml constraints.txt
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.development: $(VENV)/.package
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

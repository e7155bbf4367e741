# `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 8080

.DEFAULT_GOAL := help

.PHONY: help
help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# One environment for everything; made anew when the dependencies change.
$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

.PHONY: demo
demo: $(VENV)/installed  ## Start the whole mesh, play the HTTP API and the examples with curl, stop it
	@$(BIN)/atserving demo

.PHONY: up
up: $(VENV)/installed  ## Run the mesh in the foreground, the edge on PORT (8080)
	@$(BIN)/atserving up --port $(PORT)

.PHONY: test
test: $(VENV)/installed  ## Run the test suite
	$(BIN)/python -m pytest

.PHONY: lint
lint: $(VENV)/installed  ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.PHONY: format
format: $(VENV)/installed  ## Format the code and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: proto
proto: $(VENV)/installed  ## Generate stubs and Envoy's descriptor set from proto/
	$(BIN)/python proto/generate.py

.PHONY: bench
bench: $(VENV)/installed  ## Measure the whole mesh: latency and requests a second
	$(BIN)/python -m bench.mesh

.PHONY: bench-evaluator
bench-evaluator: $(VENV)/installed  ## Measure one evaluator beside a bare loop; JSON=file writes the figures too
	$(BIN)/python -m bench.evaluator $(if $(JSON),--json $(JSON))

.PHONY: bench-converter
bench-converter: $(VENV)/installed  ## Measure the converter: time, memory, and its nets beside PyTorch's
	$(BIN)/python -m bench.converter

.PHONY: fuzz
fuzz: FUZZ_EXAMPLES ?= 4000
fuzz: $(VENV)/installed  ## Feed the converter FUZZ_EXAMPLES (4000) broken nets a test, from new seeds
	@echo 'Broken and random nets, $(FUZZ_EXAMPLES) a test; each has to give a valid model or one ConversionError.'
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest tests/caffe/test_hostile.py -v --timeout 0 --durations 0 \
		--hypothesis-show-statistics

.PHONY: clean
clean:  ## Remove the environment and what was built
	rm -rf $(VENV) demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

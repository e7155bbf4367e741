# `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 8080
WORKERS ?= 4
ENGINE ?= docker
IMAGES ?= gate registry evaluator evaluator-gpu
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' atserving/__init__.py)

# The tests start hundreds of processes, which read the compiled modules wherever nobody has forbidden to write them.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help

.PHONY: help
help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

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

# A file's tests run in one worker, as they share processes. tests/conftest.py has the order. Two more workers
# than CPUs: many tests mostly wait.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
.PHONY: test
test: $(VENV)/installed  ## Run the test suite in WORKERS (4) processes
	$(PYTEST)

.PHONY: test-fast
test-fast: $(VENV)/installed  ## Run the quick tests, in under a minute
	$(PYTEST) -q -m 'not slow'

# For the tests of what monitoring/ has. Debian's package is unpacked, not installed: nothing starts, and root is not needed.
# Without the lists of apt, or with old ones, these are fetched into build/ too.
PROMETHEUS := build/prometheus
APT := apt-get -q -o Dir::State::Lists=$(CURDIR)/build/apt/lists -o Dir::Cache=$(CURDIR)/build/apt/cache
.PHONY: prometheus
prometheus: export PATH := $(PATH):$(CURDIR)/$(PROMETHEUS)/usr/bin
prometheus:  ## Unpack Debian's Prometheus into build/prometheus/ for the tests, unless PATH has it
	@command -v prometheus >/dev/null && command -v promtool >/dev/null && exit; set -e; \
	rm -rf $(PROMETHEUS); mkdir -p $(PROMETHEUS) build/apt/lists/partial build/apt/cache/archives/partial; cd $(PROMETHEUS); \
	apt-get -q download prometheus || { $(APT) update && $(APT) download prometheus; }; \
	dpkg -x prometheus_*.deb . && rm prometheus_*.deb
	@promtool --version | head -1

.PHONY: lint
lint: $(VENV)/installed  ## Check format, lint, import contracts and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

.PHONY: format
format: $(VENV)/installed  ## Format the code and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: proto
proto: $(VENV)/installed  ## Generate stubs and Envoy's descriptor set from proto/
	$(BIN)/python proto/generate.py

.PHONY: envoy
envoy: $(VENV)/installed  ## Generate Envoy's bootstraps for TLS and for tracing from envoy/envoy.yaml
	$(BIN)/python -m atserving.local.envoy_tls
	$(BIN)/python -m atserving.local.envoy_tracing --kubernetes

# RUNBOOKS=https://...: the address of docs/alerts.md, as alerts name it.
RULE := k8s/components/monitoring-operator/rules.yaml
.PHONY: rules
rules:  ## Generate the rules for the Prometheus operator from monitoring/rules.yaml (RUNBOOKS=)
	$(if $(RUNBOOKS),sed -i 's|\(runbook_url:\) [^\#]*|\1 $(RUNBOOKS)|' monitoring/rules.yaml)
	printf '%s\n' '# Made from monitoring/rules.yaml: make rules' 'apiVersion: monitoring.coreos.com/v1' 'kind: PrometheusRule' \
		'metadata:' '  name: atserving' 'spec:' > $(RULE)
	sed -n -e '/^groups:/,$$ s/^./  &/' -e '/^  *groups:/,$$ p' monitoring/rules.yaml >> $(RULE)

# Run it again to renew the certificates: processes that use them follow.
CERTS ?= certs
APPS ?= digits,digits-detect,digits-segment,digits-feature,digits-similar
OPERATORS ?= local
ETCD ?=
.PHONY: certs
certs: $(VENV)/installed  ## Make a test authority and a certificate for each role in CERTS (APPS=, OPERATORS=, ETCD=)
	@$(BIN)/python -m atserving.local.authority $(CERTS) --apps '$(APPS)' --operators '$(OPERATORS)' --etcd '$(ETCD)'

.PHONY: k8s-render
k8s-render: $(VENV)/installed  ## Render the overlays and the example's evaluators into build/k8s/
	mkdir -p build/k8s
	for overlay in minimal demo production; do \
		kubectl kustomize k8s/overlays/$$overlay > build/k8s/$$overlay.yaml || exit; \
	done
	$(BIN)/atserving k8s evaluator digits v1 > build/k8s/digits-v1.yaml
	$(BIN)/atserving k8s evaluator digits v1 --gpu > build/k8s/digits-v1-gpu.yaml
	$(BIN)/atserving k8s evaluator digits v1 --tls > build/k8s/digits-v1-tls.yaml
	$(BIN)/atserving k8s evaluator digits v1 --tracing > build/k8s/digits-v1-tracing.yaml
	$(BIN)/atserving k8s certificate evaluator/digits > build/k8s/digits-certificate.yaml

.PHONY: k8s-test
k8s-test: $(VENV)/installed  ## Run the playbook on the cluster that KUBECONFIG names (IMAGE_PREFIX=, IMAGE_TAG=)
	IMAGE_PREFIX=$(IMAGE_PREFIX) IMAGE_TAG=$(IMAGE_TAG) $(BIN)/python -m pytest -v tests/k8s/test_cluster.py

.PHONY: boards
boards: $(VENV)/installed  ## Generate Grafana's boards in monitoring/boards/
	$(BIN)/python -m monitoring.grafana

# BOARDS='app mesh': some of them. SECONDS: how long to measure.
.PHONY: board-pictures
board-pictures: SECONDS := 90
board-pictures: $(VENV)/installed prometheus  ## Draw the boards of a mesh with load into docs/ (BOARDS=, SECONDS=)
	$(BIN)/python -m monitoring.pictures --seconds $(SECONDS) $(if $(BOARDS),--boards $(BOARDS))

# ONLY='etcd malformed': some faults; the page stays as it is then.
.PHONY: game-day
game-day: $(VENV)/installed prometheus  ## Break a mesh, and write into docs/game-day.md which alerts tell (ONLY=)
	$(BIN)/python -m monitoring.game_day $(if $(ONLY),--only $(ONLY))

# FULL=1: all that there is to measure, for longer. JSON=file: write the figures to a file too.
BENCH_FLAGS = $(if $(FULL),--full) $(if $(JSON),--json $(JSON))
.PHONY: bench
bench: $(VENV)/installed  ## Measure the whole mesh, every kind of request (FULL=1, JSON=file)
	$(BIN)/python -m bench.mesh $(BENCH_FLAGS)

.PHONY: bench-peers
bench-peers: $(VENV)/installed  ## Measure the mesh beside mosec, FastAPI and a bare loop (FULL=1, JSON=file)
	@$(BIN)/python -m bench.peers $(BENCH_FLAGS)

.PHONY: profile
profile: $(VENV)/installed  ## Tell where the CPU time goes, by function (NET=digits, CALLERS=32)
	@$(BIN)/python -m bench.profile $(if $(NET),--net $(NET)) $(if $(CALLERS),--callers $(CALLERS))

.PHONY: bench-evaluator
bench-evaluator: $(VENV)/installed  ## Measure one evaluator beside a bare loop (JSON=file)
	$(BIN)/python -m bench.evaluator $(if $(JSON),--json $(JSON))

.PHONY: bench-converter
bench-converter: $(VENV)/installed  ## Measure the converter: time, memory, and its nets beside PyTorch's (JSON=file)
	$(BIN)/python -m bench.converter $(if $(JSON),--json $(JSON))

.PHONY: bench-registry
bench-registry: $(VENV)/installed  ## Measure a registry and a gate of a large mesh (JSON=file)
	$(BIN)/python -m bench.registry $(if $(JSON),--json $(JSON))

.PHONY: bench-flood
bench-flood: $(VENV)/installed  ## Measure what a flood for one app costs a lone caller of another, at a gate
	$(BIN)/python -m bench.flood

# Run it on a quiet machine.
.PHONY: trace-picture
trace-picture: $(VENV)/installed  ## Draw docs/trace.svg, the trace of a request
	$(BIN)/python -m tests.e2e.trace_picture docs/trace.svg

# ONLY="'*frozen*'": some scenarios. SCALE=0.5: shorter ones. POD_LIMITS=1: Envoy and gates at their pods' memory limits.
# MARKDOWN=1: print the table of docs/reliability.md.
RELIABILITY_FLAGS = $(if $(ONLY),--only $(ONLY)) $(if $(SCALE),--scale $(SCALE)) $(if $(POD_LIMITS),--pod-limits) \
	$(if $(MARKDOWN),--markdown)
.PHONY: chaos
chaos: $(VENV)/installed  ## Break a mesh under load, count what callers lose (ONLY=, SCALE=, POD_LIMITS=1, MARKDOWN=1)
	@$(BIN)/python -m reliability.chaos $(RELIABILITY_FLAGS)

.PHONY: attack
attack: $(VENV)/installed  ## Attack a mesh, count what an honest caller loses (the same options)
	@$(BIN)/python -m reliability.attack $(RELIABILITY_FLAGS)

.PHONY: fuzz
fuzz: FUZZ_EXAMPLES ?= 4000
fuzz: $(VENV)/installed  ## Feed the converter FUZZ_EXAMPLES (4000) broken nets a test, from new seeds
	@echo 'Broken and random nets, $(FUZZ_EXAMPLES) a test; each has to give a valid model or one ConversionError.'
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest tests/caffe/test_hostile.py -v --timeout 0 --durations 0 \
		--hypothesis-show-statistics

.PHONY: images
images:  ## Build the images with ENGINE (docker, podman, buildah); IMAGES='gate registry' for some
	for image in $(IMAGES); do \
		$(ENGINE) build --target $$image --tag atserving/$$image:$(VERSION) \
			--label org.opencontainers.image.version=$(VERSION) \
			--label org.opencontainers.image.revision=$$(git rev-parse HEAD) . || exit; \
	done

# A file for each environment of the Dockerfile: every package in it, by version and hash.
PINS ?= docker
PIN = $(BIN)/uv pip compile --quiet $(UPGRADE) --generate-hashes --python-platform linux \
	--custom-compile-command 'make pins' --output-file
.PHONY: pins
pins: UPGRADE ?= --upgrade
pins: $(VENV)/installed  ## Renew what the images install, docker/*.txt
	sed -n -e 's/^requires = \["\(.*\)"\]/\1/p' -e 's/^ *\(uv[<>=].*\)/\1/p' pyproject.toml setup.cfg \
		| $(PIN) $(PINS)/build.txt --python-version 3.11 -
	$(PIN) $(PINS)/core.txt --python-version 3.11 --extra oidc --extra signatures --extra tracing setup.cfg
	$(PIN) $(PINS)/cpu.txt --python-version 3.11 --extra cpu --extra signatures --extra tracing setup.cfg
	$(PIN) $(PINS)/gpu.txt --python-version 3.12 --extra gpu --extra signatures --extra tracing setup.cfg

.PHONY: clean
clean:  ## Remove the environment and what was built
	rm -rf $(VENV) demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# `make help` lists the targets. Everything runs in .venv, which `make setup` makes from requirements.lock.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
CODE := $(wildcard raphael data_pipeline flows tests benchmarks)
SOURCE ?= scenes
SYSTEM ?= raphael
PARTS ?=
COCO_DIR ?=
PORT ?= 8000
WHEN_DONE = $(VENV)/.ready-$(shell cat requirements.lock pyproject.toml | cksum | tr -s ' ' '-')

export PATH := $(BIN):$(PATH)
# The same switches as flows/environment.py: nothing that runs here reports about itself to anyone.
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export NO_ALBUMENTATIONS_UPDATE := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export RAY_USAGE_STATS_ENABLED := 0
# DVC keeps pickles of its state where every user of the machine may write, unless it is told a place (docs/security.md).
export DVC_SITE_CACHE_DIR := $(CURDIR)/.run/dvc

.PHONY: help
help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

COMPILE = $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)

.PHONY: setup
setup: $(WHEN_DONE)  ## make .venv from requirements.lock (versions and hashes); at once when it is there

# uv comes out of the same lock. `sync` installs exactly the lock, without asking anyone what else might be needed.
# Where Python may not write bytecode, every process would compile torch and ray again: twice the time of their import.
$(WHEN_DONE):
	@./.ci/find-python >/dev/null
	test -x $(BIN)/python || "$$(./.ci/find-python)" -m venv $(VENV)
	awk '/^[^ ]/{on = /^uv==/} on' requirements.lock > $(VENV)/uv.lock
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement $(VENV)/uv.lock
	$(BIN)/uv pip sync --python $(BIN)/python --require-hashes $(COMPILE) requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --no-build-isolation --editable .
	$(BIN)/uv pip uninstall --quiet --python $(BIN)/python pip 2>/dev/null  # as old as this Python, and nobody needs it from here on
	install -d -m 700 .run
	dvc config --local core.site_cache_dir $(CURDIR)/.run/dvc
	@rm -f $(VENV)/.ready-* && touch $@

.PHONY: cluster
cluster: setup  ## add what a machine of a Ray cluster needs (ray job submit, ray up), from cluster/requirements.lock
	@uv pip install --quiet --python $(BIN)/python --require-hashes $(COMPILE) --requirement cluster/requirements.lock

.PHONY: browser
browser: setup  ## add what the tests of the page need: Debian's chromium, its driver from tests/serve/page, axe-core from npm
	@command -v chromium >/dev/null || { apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -yqq --no-install-recommends chromium >/dev/null; }
	@uv pip install --quiet --python $(BIN)/python --require-hashes --no-deps --requirement tests/serve/page/requirements.lock
	@npm ci --silent --ignore-scripts --no-audit --no-fund --prefix tests/serve/page

.PHONY: demo
demo: setup  ## the whole chain, from links to the report (SOURCE=coco COCO_DIR=folder: on photographs; SYSTEM=NAME: another model, PARTS=all: all of it)
	@python -m flows.demo --source "$(SOURCE)" --coco-dir "$(COCO_DIR)" --system "$(SYSTEM)" --parts "$(PARTS)"

.PHONY: repro
repro: setup  ## the same work without Prefect: what changed, in DVC's order
	@python -m raphael.base.code.stage_code check || echo "the stages named above are taken as they were recorded" >&2
	@dvc repro

.PHONY: ablation
ablation: setup  ## what each part of the network adds: arms and seeds of flows/plans/ablation.yaml (100 minutes on two cores)
	@python -m flows.run_ablation

.PHONY: systems
systems: setup  ## the systems side by side at equal counted FLOP: arms of flows/plans/systems.yaml (a night of two cores)
	@python -m flows.run_systems

.PHONY: sweep
sweep: setup  ## guidance, alpha and what else flows/plans/sweep.yaml tries on the trained model (reports/sweep.html)
	@python -m flows.run_sweep

.PHONY: up
up: setup  ## start the Prefect server, the MLflow page, the page of `serve` and the deployments raphael/{full,data,train,evaluate,ablation,sweep,systems}
	@python -m flows.serve up

.PHONY: serve
serve: setup  ## a page on which to try the trained model, or the one that comes with the package, and its API (PORT=8000)
	@raphael serve --port "$(PORT)"

.PHONY: down
down:  ## stop exactly what `make up` started
	@test ! -x $(BIN)/python || python -m flows.serve down

.PHONY: test
JOBS ?= 2
test: setup  ## the tests (without those marked slow or gpu), in two processes (JOBS=2); JOBS=0: in one
	@pytest -m "not slow and not gpu and not soak" --numprocesses "$(JOBS)" --dist loadfile --no-loadscope-reorder

.PHONY: test-all
test-all: setup  ## every test that this machine can run
	@pytest -m "not soak"

.PHONY: attack
attack: setup  ## attack our own servers for real, and print what was tried and refused
	@pytest tests/attacks

.PHONY: soak
soak: setup  ## stages and trainings killed at random moments, 200 times the bare loop, and what comes out compared (an hour)
	@pytest -m soak

.PHONY: lint
lint: setup  ## ruff and the byte compiler over all code, and whether every change of a stage's code was judged
	@ruff check .
	@python -m compileall -q $(CODE)
	@python -m raphael.base.code.stage_code check

.PHONY: audit
audit: setup  ## known vulnerabilities of what requirements.lock names, by pip-audit; needs the network, and says so without
	@./.ci/audit

.PHONY: licences
licences: setup  ## the packages' licences (reports/licences.md) and a bill of materials (reports/sbom.cdx.json)
	@python .ci/licences.py

.PHONY: bench
ONLY ?= $(patsubst benchmarks/%.py,%,$(wildcard benchmarks/[a-z]*.py))
bench: setup  ## the benchmarks, one after the other, then one table of all (hours; ONLY="space_moe frechet": those)
	@failed=""; for name in $(ONLY); do \
		echo "== $$name"; SECONDS=0; python "benchmarks/$$name.py" || failed="$$failed $$name"; \
		echo "== $$name took $$SECONDS s"; \
	done; \
	echo; python benchmarks/_table.py || failed="$$failed table"; \
	test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

.PHONY: lock
lock: setup  ## compile requirements.lock anew from pyproject.toml, and the cluster's and the page's tests' from that
	@uv pip compile pyproject.toml --group dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --quiet --output-file requirements.lock
	@uv pip compile cluster/requirements.in --constraint requirements.lock --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-header --quiet --output-file cluster/requirements.lock
	@uv pip compile tests/serve/page/requirements.in --constraint requirements.lock --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-header --quiet --output-file tests/serve/page/requirements.lock

.PHONY: clean
clean: down  ## remove what runs leave behind; data, models, reports, workspaces and DVC's cache stay
	@test ! -d work || find work -mindepth 1 -maxdepth 1 ! -name spaces -exec rm -rf {} +
	@rm -rf .run ray_results .pytest_cache .ruff_cache
	@install -d -m 700 .run
	@find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# The few verbs a person types: `make` lists them. All that they need is installed into .venv from hash-pinned locks.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= $(firstword $(shell command -v python3.11 python3) python3)
BIN := .venv/bin
LOCKS := plugin/locks
DEMO := plugin/demo/model
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --only-binary :all: --require-hashes --no-deps

# PyPI has no CPU-only torch. Where pip's own configuration does not find one, PyTorch's index is asked too; which file
# is taken is settled by the hash in the lock either way.
TORCH := $(shell grep -o '^torch==[^ ]*' $(LOCKS)/cpu.txt)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: help
help:
	@sed -n 's/^## /make /p' $(firstword $(MAKEFILE_LIST))

## demo    serve the small trained model on port 8001 (installs on first use; Ctrl-C ends it)
.PHONY: demo
demo: .venv/.runtime
	@found=$$($(BIN)/vqserve verify --quiet '$(DEMO)' 2>&1 >/dev/null) || { \
	problem=$$(grep -m 1 '^vqserve: error: ' <<<"$$found" || tail -n 1 <<<"$$found"); \
	printf >&2 '%s: git checkout -- %q && git clean -fdx %q\n' "$$problem" '$(DEMO)' '$(DEMO)'; exit 2; }
	@$(BIN)/vqserve serve '$(DEMO)'

## demo-model  make the demo model anew from its trained parent: encode, serve, measure, choose (an hour, resumable)
.PHONY: demo-model
demo-model: .venv/.runtime
	$(BIN)/python plugin/demo/make_model.py

## test    run all tests
.PHONY: test
test: .venv/.dev .venv-kernels/.done
	$(BIN)/pytest
	TRITON_INTERPRET=1 .venv-kernels/bin/python -m pytest tests/kernels

## lint    check style, types, import rules, change notes, YAML, shell and the chart
.PHONY: lint
lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo --cache-dir .venv/.cache/imports
	$(BIN)/mypy
	$(BIN)/yamllint --strict .
	$(BIN)/shellcheck .ci/run
	for values in charts/vqserve/ci/*.yaml; do $(BIN)/helm lint --quiet --strict charts/vqserve --values "$$values"; done
	$(BIN)/towncrier build --draft --version next >/dev/null

## format  rewrite the sources to the style that lint asks for
.PHONY: format
format: .venv/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

## chart   write the chart's values, their schema and table anew from charts/values.py
.PHONY: chart
chart: .venv/.dev
	$(BIN)/python charts/generate.py

## lock    resolve the locks anew; UPGRADE=--upgrade takes newer versions
.PHONY: lock
lock: .venv/.dev
	$(LOCK) plugin/pyproject.toml --extra cpu --extra plot --override $(LOCKS)/overrides.txt $(LOCK_TORCH) -o $(LOCKS)/cpu.txt
	$(LOCK) --group pyproject.toml:dev --constraint $(LOCKS)/cpu.txt -o $(LOCKS)/dev.txt
	$(LOCK) ops/pyproject.toml --constraint $(LOCKS)/cpu.txt --constraint $(LOCKS)/dev.txt -o ops/locks/ops.txt
	$(LOCK) --group pyproject.toml:kernels -o $(LOCKS)/kernels.txt

# Debian 12 has glibc 2.36. LOCK_TORCH says where uv finds the CPU build of torch: uv reads none of pip's configuration.
LOCK_TORCH ?= --torch-backend cpu
LOCK = UV_CUSTOM_COMPILE_COMMAND='make lock' $(BIN)/uv pip compile --quiet --generate-hashes --only-binary :all: \
	--python-version 3.11 --python-platform x86_64-manylinux_2_36 $(UPGRADE)

## clean   remove .venv and every cache
.PHONY: clean
clean:
	rm -rf .venv .venv-kernels .hypothesis
	find plugin ops charts tests -depth \( -name __pycache__ -o -name '*.egg-info' -o -path plugin/build -o -path ops/build \) -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import platform, sys; sys.exit((sys.version_info[:2], platform.system(), platform.machine()) != ((3, 11), "Linux", "x86_64"))' 2>/dev/null || \
	  { echo >&2 'make: Python 3.11 on x86-64 Linux is needed, and $(PYTHON) is not that.' \
	    'Install it (Debian 12: apt-get install python3-venv) or name it: make PYTHON=/path/to/python3.11 ...'; exit 2; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 2; }

.venv/.runtime: $(LOCKS)/cpu.txt plugin/pyproject.toml | $(BIN)/python
	@echo 'Installing into .venv: torch, vLLM for CPU and what they need (2.5 GB on disk; a few minutes, once)'
	@$(BIN)/pip install --quiet --dry-run --no-deps '$(TORCH)' >/dev/null 2>&1 || index='--extra-index-url $(TORCH_INDEX)'; \
	$(INSTALL) $${index:-} -r $<
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e plugin
	@touch $@

.venv/.dev: $(LOCKS)/dev.txt ops/pyproject.toml .venv/.runtime
	@$(INSTALL) -r $<
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e ops
	@touch $@

# On top of .venv, not in it: vLLM takes triton on a CPU for triton-cpu (plugin/locks/overrides.txt).
.venv-kernels/.done: $(LOCKS)/kernels.txt .venv/.dev
	@rm -rf $(@D)
	@$(BIN)/python -m venv $(@D)
	@site=lib/python3.11/site-packages; \
	echo "import site; site.addsitedir('$(CURDIR)/.venv/$$site')" >$(@D)/$$site/below.pth
	@$(INSTALL:$(BIN)/%=$(@D)/bin/%) -r $<
	@touch $@

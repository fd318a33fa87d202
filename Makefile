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
FINDS_TORCH = $(BIN)/pip install --quiet --dry-run --no-deps '$(TORCH)' >/dev/null 2>&1

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

## loadtest  load the server at HOST as loadtest/profiles/PROFILE.toml says, judged by SLO; LOCUST= for Locust's page
HOST ?= http://127.0.0.1:8001
PROFILE ?= smoke
SLO ?=
LOCUST ?= --headless --only-summary
.PHONY: loadtest
loadtest: .venv/.dev
	@$(BIN)/python -m loadtest --host '$(HOST)' --load-profile '$(PROFILE)' --slo '$(SLO)' $(LOCUST)

## demo-load  serve the demo model, load it for a minute (PROFILE=smoke) and open the report
.PHONY: demo-load
demo-load: .venv/.dev
	@$(BIN)/python -m loadtest.demo '$(DEMO)' --load-profile '$(PROFILE)' --slo '$(SLO)'

## test    run all tests, in two processes (PROCESSES=2)
PROCESSES ?= 2
.PHONY: test
test: .venv/.dev .venv-kernels/.done
	$(BIN)/pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder
	TRITON_INTERPRET=1 .venv-kernels/bin/python -m pytest --numprocesses $(PROCESSES) tests/kernels

## lint    check style, types, import rules, change notes, YAML, shell, images and the chart
.PHONY: lint
lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo --cache-dir .venv/.cache/imports
	$(BIN)/mypy
	$(BIN)/yamllint --strict .
	$(BIN)/shellcheck .ci/run images/base images/build images/*.sh
	$(BIN)/hadolint images/*/Containerfile
	for values in charts/vqserve/ci/*.yaml; do $(BIN)/helm lint --quiet --strict charts/vqserve --values "$$values"; done
	$(BIN)/towncrier build --draft --version next >/dev/null

## format  rewrite the sources to the style that lint asks for
.PHONY: format
format: .venv/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

## chart   write the chart's values, their schema and table, alerts and dashboards anew, and package it into build/
.PHONY: chart
chart: .venv/.dev
	$(BIN)/python charts/generate.py
	$(BIN)/python -m vqserve_ops.monitoring.generate charts/vqserve/files
	$(BIN)/helm package charts/vqserve --destination build

## lock    resolve the locks anew; UPGRADE=--upgrade takes newer versions
.PHONY: lock
lock: .venv/.dev
	$(LOCK) plugin/pyproject.toml --extra cpu --extra plot --override $(LOCKS)/overrides.txt $(LOCK_TORCH) -o $(LOCKS)/cpu.txt
	$(LOCK) --group pyproject.toml:dev --constraint $(LOCKS)/cpu.txt -o $(LOCKS)/dev.txt
	$(LOCK) ops/pyproject.toml --constraint $(LOCKS)/cpu.txt --constraint $(LOCKS)/dev.txt -o ops/locks/ops.txt
	$(LOCK) --group pyproject.toml:kernels -o $(LOCKS)/kernels.txt
	$(LOCK) plugin/pyproject.toml --extra cuda --override $(LOCKS)/cuda-overrides.txt --constraint <(sed -n \
	  '/^torch==\|^apache-tvm-ffi==/d; s/^\([a-z].*==[^ ]*\) .*/\1/p' $(LOCKS)/{cpu,kernels}.txt) -o $(LOCKS)/cuda.txt
	$(LOCK) --group pyproject.toml:loadtest --constraint $(LOCKS)/dev.txt -o loadtest/locks/loadtest.txt
	$(LOCK) --group pyproject.toml:crosscheck --constraint <(sed -n '/^click==\|^torch==/d; s/^\([a-z][^ ]*==[^ ]*\) .*/\1/p' $(LOCKS)/{cpu,dev}.txt) \
	  --override <(echo 'torch ; sys_platform == "never"') $(addprefix --no-emit-package ,$(filter-out click,$(IN_VENV))) \
	  -o loadtest/locks/crosscheck.txt
	$(LOCK) --group pyproject.toml:images --constraint $(LOCKS)/cpu.txt -o images/locks/tools.txt
	$(LOCK) --group pyproject.toml:checkov -o charts/locks/checkov.txt

# Packages of .venv, which folders on top of it leave out.
IN_VENV = $(shell sed -n 's/^\([a-z][a-z0-9-]*\)==.*/\1/p' $(LOCKS)/cpu.txt $(LOCKS)/dev.txt)

# Debian 12 has glibc 2.36. LOCK_TORCH says where uv finds the CPU build of torch: uv reads none of pip's configuration.
LOCK_TORCH ?= --torch-backend cpu
LOCK = UV_CUSTOM_COMPILE_COMMAND='make lock' $(BIN)/uv pip compile --quiet --generate-hashes --only-binary :all: \
	--python-version 3.11 --python-platform x86_64-manylinux_2_36 $(UPGRADE)

# As root in a container takes it, which CI is; elsewhere e.g. PODMAN=docker PODMAN_BUILD= PODMAN_RUN='--network host'.
# BASE: an image of Debian 12 to build on; empty: Docker Hub's. What `make image-base` makes is `$(LOCAL_BASE)`.
PODMAN ?= podman --cgroup-manager cgroupfs --runtime runc
LIMITS := --network host --ulimit nofile=$(shell ulimit -n) --ulimit nproc=32768
PODMAN_BUILD ?= --isolation chroot $(LIMITS)
PODMAN_RUN ?= $(LIMITS)
BASE ?=
LOCAL_BASE := localhost/vqserve-base:bookworm
IMAGES ?= localhost/vqserve
IMAGE_TAG ?= dev
export BIN PODMAN PODMAN_BUILD PODMAN_RUN BASE IMAGES IMAGE_TAG

## image-base  make a Debian 12 to build on from Debian's packages: `make image BASE=localhost/vqserve-base:bookworm`
.PHONY: image-base
image-base:
	images/base $(LOCAL_BASE)

## image   build the images serve-cpu, ops and loadtest, and test them in containers
.PHONY: image
image: .venv/.dev
	index='$(TORCH_INDEX)'; $(FINDS_TORCH) && index=; \
	images/build serve-cpu $(IMAGES)/serve-cpu:$(IMAGE_TAG) --build-arg "TORCH_INDEX=$$index"
	images/build ops $(IMAGES)/ops:$(IMAGE_TAG)
	images/build loadtest $(IMAGES)/loadtest:$(IMAGE_TAG)
	$(BIN)/pytest -m system tests/images/test_serve_cpu.py tests/images/test_ops.py tests/images/test_loadtest.py

## test-system  what needs Debian's podman, runc and prometheus, or other tools: images, monitoring, load tests, checkov
.PHONY: test-system
test-system: .venv-checkov/.done .venv-crosscheck/.done image
	$(BIN)/pytest -m system tests/monitoring tests/loadtest
	scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	for example in pvc download cpu-demo; do \
	  $(BIN)/helm template glm charts/vqserve --values charts/vqserve/ci/$$example-values.yaml >"$$scratch/$$example.yaml"; \
	done; \
	.venv-checkov/bin/checkov --config-file charts/checkov.yaml --directory "$$scratch"

.venv-checkov/.done: charts/locks/checkov.txt | $(BIN)/python
	@rm -rf $(@D)
	@$(BIN)/python -m venv $(@D)
	@$(INSTALL:$(BIN)/%=$(@D)/bin/%) -r $<
	@touch $@

# A cluster, a way to load an archive of an image into its nodes, and one to run commands with KUBECONFIG and kubectl. With
# kind: KUBE_UP='kind create cluster' KUBE_LOAD='kind load image-archive' KUBE_RUN= KUBE_HELM=helm KUBE_DOWN='kind delete cluster'.
KUBE ?= ../shared/kube/cluster
KUBE_UP ?= $(KUBE) up
KUBE_LOAD ?= $(KUBE) load
KUBE_RUN ?= $(KUBE) run --
KUBE_DOWN ?= $(KUBE) down
KUBE_HELM ?= helm4
KUBE_TESTS ?= tests/kube

## test-kube  install the chart on a real cluster (Debian: runc containernetworking-plugins iproute2 nftables; `make image`)
.PHONY: test-kube
test-kube: .venv/.dev
	images/build demo-model $(IMAGES)/demo-model:$(IMAGE_TAG)
	$(KUBE_UP)
	scratch=$$(mktemp -d -p /var/tmp); trap 'rm -rf "$$scratch"' EXIT; \
	for name in serve-cpu ops loadtest demo-model; do \
	  $(PODMAN) save --quiet --format oci-archive --output "$$scratch/$$name.tar" $(IMAGES)/$$name:$(IMAGE_TAG); \
	  $(KUBE_LOAD) "$$scratch/$$name.tar"; rm "$$scratch/$$name.tar"; \
	done
	$(KUBE_RUN) env HELM=$(KUBE_HELM) IMAGES=$(IMAGES) IMAGE_TAG=$(IMAGE_TAG) $(BIN)/pytest -m kube $(KUBE_TESTS)
	$(KUBE_DOWN)

## image-serve  build the CUDA image serve, FLAVOUR=dense or sparse, and test what can be without a GPU (gigabytes)
.PHONY: image-serve
image-serve: .venv/.dev
	images/build serve $(IMAGES)/serve:$(IMAGE_TAG)-$(FLAVOUR) --build-arg FLAVOUR=$(FLAVOUR) $(SERVE_BUILD)
	FLAVOUR=$(FLAVOUR) $(BIN)/pytest -m system tests/images/test_serve.py
FLAVOUR ?= dense
SERVE_BUILD ?=

## clean   remove .venv and every cache
.PHONY: clean
clean:
	rm -rf .venv .venv-kernels .venv-checkov .venv-crosscheck .hypothesis
	find plugin ops charts loadtest tests -depth \( -name __pycache__ -o -name '*.egg-info' -o -path plugin/build -o -path ops/build \) -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import platform, sys; sys.exit((sys.version_info[:2], platform.system(), platform.machine()) != ((3, 11), "Linux", "x86_64"))' 2>/dev/null || \
	  { echo >&2 'make: Python 3.11 on x86-64 Linux is needed, and $(PYTHON) is not that.' \
	    'Install it (Debian 12: apt-get install python3-venv) or name it: make PYTHON=/path/to/python3.11 ...'; exit 2; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 2; }

.venv/.runtime: $(LOCKS)/cpu.txt plugin/pyproject.toml | $(BIN)/python
	@echo 'Installing into .venv: torch, vLLM for CPU and what they need (2.5 GB on disk; a few minutes, once)'
	@$(FINDS_TORCH) || index='--extra-index-url $(TORCH_INDEX)'; \
	$(INSTALL) $${index:-} -r $<
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e plugin
	@touch $@

.venv/.dev: $(LOCKS)/dev.txt ops/pyproject.toml .venv/.runtime
	@$(INSTALL) -r $<
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e ops
	@touch $@

# On top of .venv, not in it: vLLM takes triton on a CPU for triton-cpu (plugin/locks/overrides.txt), and guidellm wants
# an older click.
ON_TOP = rm -rf $(@D); $(BIN)/python -m venv $(@D); site=lib/python3.11/site-packages; \
	echo "import site; site.addsitedir('$(CURDIR)/.venv/$$site')" >$(@D)/$$site/below.pth; \
	$(INSTALL:$(BIN)/%=$(@D)/bin/%) -r $<; touch $@
.venv-kernels/.done: $(LOCKS)/kernels.txt .venv/.dev
	@$(ON_TOP)
.venv-crosscheck/.done: loadtest/locks/crosscheck.txt .venv/.dev
	@$(ON_TOP)

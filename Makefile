# Everything a fresh clone needs. `make` alone lists the targets.
#
# HERD_TORCH  what pip installs as PyTorch. PyPI's is built for CUDA and several GB larger than the one for CPUs:
#             HERD_TORCH="torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu"
# VENV        where the environment lives; PYTHON which interpreter (3.11 or newer) makes it
# GGML        how `make rivals` builds llama.cpp, e.g. GGML="-DGGML_NATIVE=OFF" RIVALS=.venv-rivals-avx2 for AVX2 only
# RUN         the run whose page, pictures and numbers `make readme` shows

SHELL := /bin/bash
.DEFAULT_GOAL := help
HERD_TORCH ?= torch==2.13.0
VENV ?= .venv
RIVALS ?= .venv-rivals
GGML ?= -DGGML_NATIVE=ON
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := $(VENV)/bin
# The stamp's name holds the choice of torch, so that another choice installs anew.
STAMP := $(VENV)/.herd-$(shell echo '$(HERD_TORCH)' | cksum | cut -d' ' -f1)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help setup dev lint test soak demo rivals readme clean

help:  ## this list
	@grep -E '^[a-z]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 14

setup: $(STAMP)  ## make .venv, install what running Herd needs, pinned, and build the kernels; instant the second time
	@:

dev: $(STAMP)-dev  ## setup, and what lint, tests and benches need
	@:

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: no Python 3.11 or newer found: install one, or name it: make setup PYTHON=/path/to/python" >&2; exit 1; fi
	@if ! command -v "$${CXX:-g++}" >/dev/null; then \
		echo "warning: no C++ compiler ($${CXX:-g++}): Herd runs, but slower, without its kernels and torch.compile; install g++ for full speed" >&2; fi
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV) || { \
		echo "error: $(PYTHON) -m venv failed: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(VENV) has $$($(BIN)/python -V), Herd needs 3.11 or newer: remove $(VENV) and try again" >&2; exit 1; }
	@echo "installing $(HERD_TORCH) and the rest into $(VENV), a few minutes the first time"
	$(INSTALL) setuptools
	$(INSTALL) $(HERD_TORCH)
	$(INSTALL) --no-build-isolation -e '.[mcp,parquet]'
	@$(BIN)/python -m herd.kernels.build
	@rm -f $(VENV)/.herd-* && touch $@

$(STAMP)-dev: $(STAMP)
	$(INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@

lint: dev  ## ruff, mypy on src, and the floors of the house
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache | tail -n 6; exit $${PIPESTATUS[0]}

test: dev  ## every test except the long ones; no network
	$(OFFLINE) $(BIN)/python -m pytest

soak: dev  ## the long tests: kills and fuzz, one at a time
	$(OFFLINE) $(BIN)/python -m pytest -n 0 -m soak
	$(BIN)/python bench/kill_resume.py
	$(BIN)/python bench/mutations.py

demo: setup  ## raise a small herd on this machine and write its page
	$(BIN)/herd raise --resume

rivals:  ## llama-cpp-python, built for this machine from its source, in .venv-rivals; only benches want it
	@[ -x $(RIVALS)/bin/python ] || $(PYTHON) -m venv $(RIVALS)
	CMAKE_ARGS="$(GGML)" $(RIVALS)/bin/python -m pip install --quiet --no-binary llama-cpp-python llama-cpp-python==0.3.36

readme: setup  ## README tables from the receipts; with RUN=runs/NAME also that run's pictures and numbers
	$(BIN)/python bench/readme.py $(RUN)

clean:  ## remove caches, not the environment and not runs/
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

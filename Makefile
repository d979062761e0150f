# SPDX-License-Identifier: Apache-2.0
# make demo · make test · make bench · make lint: each sets up .venv first, which costs nothing
# when it is up to date. Needs python 3.10 or newer and a C++17 compiler; nvcc is used if found.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= $(or $(shell for p in python3 python3.12 python3.11 python3.13 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo $$p; break; }; \
	done),python3)
BUILD_TOOLS := setuptools wheel pybind11 cmake ninja
# Two workers, because the suite is written for two cores. A file's tests run in one of them, so that
# what they share (a wheel, a compiled emulator, a trained run) is made once.
TEST_WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest

.PHONY: install demo test lint codegen bench gpu benchmarks-doc clean
.DEFAULT_GOAL := install

install: $(STAMP)

# The directories of csrc are prerequisites too: their time changes when a file comes or goes.
$(STAMP): Makefile pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find csrc)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "disca-kernels needs python 3.10 or newer; set PYTHON=/path/to/it"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(BUILD_TOOLS) torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation \
		--editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/disca compare --preset demo --out demo-results

test: install
	OMP_NUM_THREADS=1 $(PYTEST) -n $(TEST_WORKERS) --dist loadfile $(TESTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Registers, spills, shared memory and matrix instructions of every Triton kernel, as a table, for
# three architectures and without a GPU. It takes some minutes and fails if a kernel has a fault.
codegen: install
	$(BIN)/python -m disca_kernels.testing.codegen

# One committed file per device: benchmarks/results/<device>.json
bench: install
	mkdir -p benchmarks/results
	$(PYTEST) benchmarks --benchmark-enable --benchmark-json \
		benchmarks/results/$$($(BIN)/python -m benchmarks.describe).json

# On a machine with an NVIDIA GPU: builds, tests and measures with the $(PYTHON) that has torch, in
# 8 minutes, without network and without .venv. GPU="--dry" rehearses it anywhere;
# GPU="--rival rcm=/path/to/kernel.py:attention" adds a rival. Copy OUT's .json to
# benchmarks/results to publish it.
OUT ?= out/gpu
gpu:
	$(PYTHON) -m benchmarks.gpu --out $(OUT) $(GPU)

# What benchmarks/results holds, as docs/benchmarks.md and the section of the README.
benchmarks-doc: install
	$(BIN)/python -m benchmarks.render

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find disca_kernels -name '_C.*.so' -delete

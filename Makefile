# Every target makes the environment it needs. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SP := $(BIN)/sparse-pathways
CPP := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh csrc/tests/cuda/*)

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

setup: $(VENV)/.ready  ## the environment alone, in .venv: pinned torch, the package (editable), its kernels, all tools

# torch first: the kernels are compiled against the torch that will load them, so the build is not isolated.
$(VENV)/.torch: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check torch==2.14.1 "setuptools>=77" "cmake>=3.22" "ninja>=1.11" wheel
	touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml setup.py CMakeLists.txt $(CPP)
	$(BIN)/pip install --disable-pip-version-check --no-build-isolation -e ".[asr,dev,lightning,transformers,tensorboard]"
	touch $@

demo: setup  ## the whole path on synthetic speech: corpus, dense model, pruning, packing, table, report (under 20 minutes)
	PATH="$(CURDIR)/$(BIN):$$PATH" ./examples/demo.sh runs/demo

test: setup  ## all tests
	$(BIN)/python -m pytest

test-fast: setup  ## without the slow ones
	$(BIN)/python -m pytest -m "not slow"

# Each check must also fail on a fault planted for it: a sanitizer that sees nothing proves nothing. Forks are tried
# without one: AddressSanitizer's own locks do not survive a fork beside other threads.
sanitize: setup  ## kernels under AddressSanitizer and UBSan, the thread pool under ThreadSanitizer
	$(call sanitized,address-undefined,check_kernels stress_pool)
	$(call sanitized,thread,stress_pool)
	build/sanitize/address-undefined/check_kernels
	build/sanitize/address-undefined/stress_pool --no-forks 10
	$(CXX) -std=c++20 -O2 -pthread -Icsrc csrc/core/pool.cpp csrc/tests/stress_pool.cpp -o build/sanitize/stress_pool
	build/sanitize/stress_pool 10
	build/sanitize/thread/stress_pool --no-forks 15
	for suite in products gradients lstm; do for fault in read write overflow; do \
	  build/sanitize/address-undefined/check_kernels --broken=$$fault $$suite 2>&1 \
	  | grep -q -e AddressSanitizer -e "runtime error" || { echo "planted fault not found: $$fault, $$suite"; exit 1; }; \
	done; done
	build/sanitize/thread/stress_pool --no-forks --broken 10 2>&1 | grep -q ThreadSanitizer
	@echo "sanitize: clean, and every planted fault was found"

comma := ,
sanitized = $(BIN)/cmake -S . -B build/sanitize/$(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DSP_SANITIZE=$(subst -,$(comma),$(1)) >/dev/null \
  && $(BIN)/cmake --build build/sanitize/$(1) --target $(2)

# A machine without a GPU proves the GPU code by Triton's interpreter, by an emulator of the CUDA sources, by compilation
# and by faults planted in it.
prove: setup  ## everything that proves the GPU kernels without a GPU (half an hour; its core is in `make test`)
	SPARSE_PATHWAYS_PROVE=1 $(BIN)/python -m pytest tests/kernels tests/cuda tests/benchmarks/test_gpu.py
	$(BIN)/python benchmarks/gpu/model.py
	$(BIN)/python tests/cuda/model.py

# The GPU machines have Triton 3.6; torch comes with a newer one. Beside it, in a folder of its own, 3.6 goes first, with
# the last numpy that its interpreter runs on.
TRITON_OLD := 3.6.0
compat: setup  ## the Triton kernels interpreted and compiled, and benchmarks/gpu tried, under Triton 3.6
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --upgrade \
	  --target build/compat/triton-$(TRITON_OLD) triton==$(TRITON_OLD) "numpy<2.4"
	PYTHONPATH=build/compat/triton-$(TRITON_OLD) $(BIN)/python -c \
	  "import triton; assert triton.__version__ == '$(TRITON_OLD)', triton.__version__"
	PYTHONPATH=$(CURDIR)/build/compat/triton-$(TRITON_OLD) $(BIN)/python -m pytest tests/kernels tests/benchmarks/test_gpu.py

bench: setup  ## dense against sparse, side by side: a part of the grid, printed (two minutes)
	$(BIN)/python -m benchmarks

bench-full: setup  ## the whole grid, LSTM and whole model, into benchmarks/results with a page (half an hour, quiet machine)
	$(BIN)/python -m benchmarks --full --results benchmarks/results
	$(BIN)/python -m benchmarks.page benchmarks/results

bench-page: setup  ## the page again, from the results that are there
	$(BIN)/python -m benchmarks.page benchmarks/results

experiments: setup  ## train and measure what is missing of the paper's comparisons (hours; goes on where it was)
	$(BIN)/python -m experiments run

tables: setup  ## tables and plots of the comparisons, from experiments/results alone
	$(BIN)/python -m experiments tables

lint: setup  ## ruff, clang-format, mypy
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .
	$(if $(CPP),$(BIN)/clang-format --dry-run --Werror $(CPP))
	$(BIN)/mypy

format: setup  ## rewrite sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

wheel: setup  ## build a wheel into dist/
	$(BIN)/pip wheel --no-build-isolation --no-deps -w dist .

clean:  ## remove build products and the environment; runs/ stays
	rm -rf $(VENV) build dist *.egg-info sparse_pathways/*.so

.PHONY: help setup demo test test-fast sanitize prove compat bench bench-full bench-page experiments tables lint format wheel clean
.DEFAULT_GOAL := help

# Each target but test-gpu sets up what it needs: a fresh machine with Python >= 3.10 has to do nothing first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
VERSIONS ?= -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all test-latest test-triton test-cuda test-gpu compile-report sanitize lint format bench clean

help:
	@echo "make train     train the paper's model, small, on rendered video; ARGS=... go to training.train"
	@echo "make test      run the test suite; ARGS=... go to pytest"
	@echo "make test-all  the same with every size, dtype and instruction set, as CI does"
	@echo "make test-latest   make test on the newest releases of torch and the rest, for the last commit"
	@echo "make test-triton   run the Triton kernels' tests in Triton's interpreter, without a GPU; ARGS as above"
	@echo "make test-cuda     run the CUDA kernels' tests emulated on the CPU: hostile schedules, sanitizers, mutations, parity"
	@echo "make test-gpu  run the parity suite at full size on a GPU; ARGS as above"
	@echo "make compile-report  compile the GPU kernels for GPUs that need not be here, within their budget"
	@echo "make sanitize  run the C++ kernels' tests under the address and undefined-behavior sanitizers; ARGS as above"
	@echo "make lint      ruff and mypy"
	@echo "make format    rewrite the sources as ruff likes them"
	@echo "make bench     measure the operators against eager PyTorch and torch.compile, and a training step; tables and drawings in build/bench"
	@echo "make setup     .venv with everything installed and built, which the others do first"
	@echo "make clean     remove .venv, caches and build output"

# The kernels are built last, for the torch that pip has installed, and again whenever their sources have changed.
setup: $(VENV)/.ready
	@"$(BIN)/python" -m build_tools

# Training takes a part of it.
$(VENV)/.ready: PACKAGES = -e ".[train,backbones,export,search,find,bench,dev]"
$(VENV)/.train: PACKAGES = ninja -e ".[train]"
$(VENV)/.ready $(VENV)/.train: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv "$(VENV)"
	RRU_FAST_NATIVE=0 RRU_FAST_CUDA= "$(BIN)/python" -m pip install --disable-pip-version-check -q \
		$(VERSIONS) $(PACKAGES)
	@rm -f rru_fast/_build.json  # that kernels were left out here is nothing that a user asked for
	@touch "$(VENV)/.train" "$@"

train: $(VENV)/.train
	@"$(BIN)/python" -m build_tools
	"$(BIN)/python" -m training.train --recipe quick $(ARGS)

# A process a core, each with a thread of its own: what needs more threads asks for them.
PYTEST := OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -q -n auto --maxprocesses 8 --dist loadfile

test: setup
	$(PYTEST) $(ARGS)

# Kernels for every instruction set that this machine can act as, not for its own alone.
test-all: export RRU_FAST_CAPABILITIES := all
test-all: setup
	$(PYTEST) -m "not nightly" $(ARGS)

# In a clone, whose kernels are built for that torch; its environment is kept beside this one's, and brought up to date.
LATEST := build/latest

test-latest:
	rm -rf "$(LATEST)"
	git clone -q . "$(LATEST)"
	ln -sfn ../../shared build/shared
	$(MAKE) -C "$(LATEST)" test VENV=../../.venv-latest VERSIONS="--upgrade --upgrade-strategy eager" ARGS="$(ARGS)"

# The interpreter replaces the kernels of a whole process. A test takes seconds there, the longest of them first.
test-triton: setup
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -q -n auto -k triton \
		tests/auto tests/benchmarks tests/ops tests/test_triton.py $(ARGS)

# The emulated kernels against float64, under ThreadSanitizer and AddressSanitizer, with every warp and CTA held behind
# every wait and with every synchronization left out; then the operator's tests, with the kernels behind it, and with
# Triton's interpreted for what they leave.
BACKEND := tests/cuda/test_backend.py tests/cuda/test_training_backend.py
EMULATED := $(addprefix tests/ops/test_,refine.py refine_operator.py refine_products.py autograd.py)

test-cuda: setup
	$(PYTEST) -m "not nightly" tests/cuda $(ARGS)
	RRU_FAST_CUDA_EMULATE=1 $(PYTEST) -m "not nightly" -k cuda $(BACKEND) $(EMULATED) $(ARGS)
	TRITON_INTERPRET=1 RRU_FAST_CUDA_EMULATE=1 $(PYTEST) $(BACKEND) $(ARGS)

# Sets up nothing: it needs torch, triton, numpy and pytest. Compiling takes most of the time: in 8 processes, where
# pytest-xdist is installed.
test-gpu:
	$(PYTHON) -m pytest -q -m gpu $(shell $(PYTHON) -c "import xdist" 2> /dev/null && printf -- '-n 8') \
		tests/test_gpu.py $(ARGS)

compile-report: setup
	"$(BIN)/python" -m benchmarks.compile_report $(ARGS)

# A package of its own under build/, with sanitized kernels; the tests find it before the checkout's. libstdc++ is loaded
# early too: the sanitizer has to find the function that throws. Leaks: torch's own are not ours. Tests of memory use are
# left out: the sanitizer's red zones would count. --capture=sys: a report ends the process, and with it what pytest has
# captured, so it goes straight to the terminal.
SANITIZED := build/sanitize
CXX_FILE = $(shell $(CXX) -print-file-name=$(1))

sanitize: setup
	RRU_FAST_SANITIZE=1 RRU_FAST_NATIVE=1 RRU_FAST_CUDA=0 RRU_FAST_CAPABILITIES=native \
		"$(BIN)/python" -m pip install --disable-pip-version-check -q --no-deps --upgrade --target "$(SANITIZED)" .
	LD_PRELOAD="$(call CXX_FILE,libasan.so) $(call CXX_FILE,libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		"$(BIN)/python" -m pytest -q --capture=sys -o pythonpath="$(SANITIZED) ." \
		tests/ops tests/test_properties.py -m "not gpu and not nightly" -k "cpu and not memory" $(ARGS)

lint: setup
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"

format: setup
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

# Each prints its tables and writes them as JSON, of which the last line makes a page with drawings.
RESULTS ?= build/bench
PAGE ?= $(RESULTS)/README.md
MACHINE ?= here

bench: setup
	@set -e; for op in refine scaling strip_pool batch_hard floors losses memory train_step; do \
		"$(BIN)/python" -m benchmarks.$$op --json "$(RESULTS)/$$op-$(MACHINE).json"; done
	"$(BIN)/python" -m benchmarks.report --results "$(RESULTS)" --readme "$(PAGE)"

clean:
	rm -rf "$(VENV)" .venv-latest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache rru_fast/_C.*.so rru_fast/_build.json

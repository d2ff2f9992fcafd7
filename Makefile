# The two commands for a newcomer are `make demo` and `make test`. Everything is installed into .venv and nowhere else.
#   PYTHON=python3.12   the interpreter of .venv (3.10 or later)
#   PYTEST="-n 2"       arguments of pytest
#   PARTS=coverage      what `make test-long` runs: files of tests, asan, coverage
#   PEERS=              test without PyTorch. The default is the plain package, which on some machines brings CUDA
#                       along (gigabytes): there, install a CPU-only torch of this version into .venv beforehand.

PYTHON ?= python3
PEERS ?= torch==2.13.0
PYTEST ?= -n 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
WHEEL := $$(ls dist/fastbn-*.whl)
# What the wheel is made from, without what builds leave there.
SOURCES := setup.py pyproject.toml MANIFEST.in README.md LICENSE $(shell find src_c fastbn -type f \
	! -path '*/__pycache__/*' ! -name '*.so' ! -name _build.json ! -name _core.c ! -name _windows.c)

.PHONY: help demo test test-long test-arm test-cuda test-valgrind test-tsan asan coverage mutants accuracy lint format \
	bench bench-cuda bench-quick develop clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.demo  ## train a CNN with and without batch normalization, draw the curves, measure this machine
	mkdir -p demo
	$(BIN)/fastbn train --compare --plot demo/curves.png
	$(BIN)/fastbn bench

test: export FASTBN_WERROR ?= 1
test: $(VENV)/.test  ## build the sdist, the wheel from it, and run all tests on the installed wheel
	FASTBN_TEST_WHEEL=1 $(BIN)/pytest $(PYTEST)

test-long: export PYTEST := $(PYTEST)
test-long: $(VENV)/.test  ## many times as many cases, also under ASan (an hour or two); into docs/reliability.md
	$(BIN)/python tests/long.py $(PARTS)

# setup.py, which knows how kernels are compiled, needs setuptools.
test-arm: $(VENV)/.venv  ## the kernels on aarch64, emulated by qemu: the bits that they give here
	$(PIP) install 'setuptools>=77'
	$(BIN)/python tests/emulated.py arm

test-valgrind: $(VENV)/.venv  ## the kernels under valgrind: nothing depends on memory that nobody has written
	$(PIP) install 'setuptools>=77'
	$(BIN)/python tests/emulated.py valgrind

test-tsan: $(VENV)/.test  ## the schedule under ThreadSanitizer: no two threads share what they must not
	$(BIN)/python tests/races.py $(TSAN_TESTS)

# The sanitizers' library must be loaded before Python; torch does not run under it, and leaks of Python are not ours.
asan: $(VENV)/.test  ## the tests of kernels and arguments on a build with the address and undefined-behaviour sanitizers
	FASTBN_SANITIZE=address,undefined $(PIP) install --upgrade --no-deps --target build/asan .
	PYTHONPATH=build/asan LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:handle_segv=0 UBSAN_OPTIONS=halt_on_error=1 $(BIN)/pytest $(PYTEST) $(ASAN_TESTS)

# Counts at -O1, where a line is a line: without the tests of the machine code that is installed. Nor do two tests bear
# Python's tracer: it refers to arrays that are to be resized, and an interrupt may reach it while it holds its lock.
# C: the tests of kernels once more in one process, for those of xdist leave without writing their counts. Instances of a
# line for each dtype and ISA count as one. Neither an ISA that this machine does not have nor Cython's C is counted.
coverage: OTHER_ISAS = $(shell $(BIN)/python -I -c \
	'from fastbn import _core; print(*(name for name, available in _core.isas() if not available))')
coverage: $(VENV)/.test  ## the lines of C kernels and of Python that the tests reach
	$(PIP) install gcovr pytest-cov
	rm -rf build/coverage build/lib.* build/temp.*
	FASTBN_DEBUG=1 CFLAGS=--coverage LDFLAGS=--coverage $(PIP) install --upgrade --no-deps --target build/coverage .
	rm -rf build/lib.*
	PYTHONPATH=$(CURDIR)/build/coverage $(BIN)/pytest $(PYTEST) --cov=build/coverage/fastbn --cov-report=term-missing \
	--cov-report=json:build/coverage/python.json --cov-fail-under=95 --ignore tests/test_build.py --ignore tests/test_machine_code.py \
	--deselect tests/test_memory.py::test_memory_results_copy_pickle_and_resize_as_arrays_do \
	--deselect tests/test_running_stats.py::test_running_statistics_are_whole_after_every_interrupt
	find build/temp.* -name '*.gcda' -delete
	PYTHONPATH=$(CURDIR)/build/coverage $(BIN)/pytest -n 0 $(KERNEL_TESTS) tests/test_memory.py
	rm build/temp.*/_*.gc* $(OTHER_ISAS:%=build/temp.*/isa_%.gc*)
	$(BIN)/gcovr --root . --filter src_c/ --merge-lines --gcov-suspicious-hits-threshold 0 --fail-under-line 95 \
	--txt - --json-summary build/coverage/c.json build/temp.*

# In the order of a seed, so many at a time as there are CPUs; an interrupted run goes on where it was.
mutants: $(VENV)/.test  ## bugs planted into kernels and schedule, and the tests that find them: docs/planted_bugs.md (an hour)
	$(PIP) install 'setuptools>=77' 'cython>=3.1'
	$(BIN)/python tests/mutants.py

accuracy: $(VENV)/.test  ## errors of fastbn, PyTorch, NumPy and JAX against exact arithmetic, into docs/numerics.md
	$(PIP) install jax || echo "fastbn: no jax: it will be missing in the tables"
	$(BIN)/python tests/accuracy.py

# The GPU as the default device of the tests that hold on any device; numba-cuda's simulator stays off.
test-cuda: $(VENV)/.test  ## all of that runs on a GPU, on one (needs an NVIDIA driver for CUDA 13)
	$(PIP) install "$(WHEEL)[cuda]"
	$(BIN)/python -c 'import fastbn; fastbn.show_config(); fastbn.cuda.require()'
	FASTBN_TEST_WHEEL=1 FASTBN_TEST_DEVICE=cuda $(BIN)/pytest $(CUDA_TESTS)

bench-cuda: $(VENV)/.bench  ## fastbn, PyTorch and the copy speed on a GPU (needs PyTorch with CUDA); docs/cuda.md
	$(PIP) install "$(WHEEL)[cuda]"
	$(BIN)/python benchmarks/gpu.py --output benchmarks/results/cuda.json $(BENCH)

lint: export FASTBN_WERROR ?= 1
lint: $(VENV)/.lint  ## formats, style and types of Python, Cython, C
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	PATH="$(CURDIR)/$(BIN):$$PATH" cython-lint fastbn
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)
	$(BIN)/mypy
	$(BIN)/stubtest --mypy-config-file pyproject.toml --ignore-missing-stub fastbn._core fastbn.nn._windows

format: $(VENV)/.lint  ## rewrite Python and C as `make lint` wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(C_FILES)

bench: $(VENV)/.bench  ## fastbn, everybody else and the limit on two networks (about 35 minutes); docs/benchmarks.md
	$(BIN)/python benchmarks/run.py --output benchmarks/results/networks.json $(BENCH)
	$(BIN)/python benchmarks/report.py

bench-quick: $(VENV)/.bench  ## the same on two shapes, to see that it works
	$(BIN)/python benchmarks/run.py --quick --output $(VENV)/bench-quick.json $(BENCH)

develop: $(VENV)/.venv  ## editable install with all tools; run it again after a change of C or Cython
	rm -f $(VENV)/.wheel
	$(PIP) install --editable '.[test,train,lint]'

clean:  ## remove all that make and builds have made
	rm -rf $(VENV) build dist demo *.egg-info .mypy_cache .pytest_cache .ruff_cache fastbn/_build.json
	find fastbn tests benchmarks \( -name '*.so' -o -name '*.pyc' \) -delete

KERNEL_TESTS = $(addprefix tests/test_,$(addsuffix .py,stats forward backward bits layouts))
ASAN_TESTS = $(KERNEL_TESTS) $(addprefix tests/test_,$(addsuffix .py,guard_pages inplace_and_out running_stats \
	validation fuzz))
# Not one test whose threads wait for each other, nor the one that takes longest, nor the one in which a part fails:
# Cython tells the other threads of it by a variable without a lock.
TSAN_TESTS = $(addprefix $(CURDIR)/tests/test_,stats.py layouts.py nn_windows.py bits.py::test_bits_of_a_drawn_call \
	processes.py::test_many_python_threads_get_the_bits_of_one) -k 'not several_threads and not 500-1 and not error_of_a_part'
LONG_TESTS = $(addprefix tests/test_,$(addsuffix .py,exact bits fuzz properties memory processes checkpoint))
PARTS = $(LONG_TESTS) asan
CUDA_TESTS = $(addprefix tests/test_,$(addsuffix .py,cuda cuda_plan cuda_machine_code cuda_device forward \
	backward layouts inplace_and_out running_stats layers large))
C_FILES = $(shell find src_c tests benchmarks -name '*.[ch]' -o -name '*.inc')

# Stamps: each says that .venv holds something.

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastbn needs Python 3.10 or later: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip build
	touch $@

# `build` makes the sdist, then the wheel from the sdist: what is missing in the sdist fails here.
dist/.built: $(SOURCES) | $(VENV)/.venv
	rm -rf dist && mkdir dist
	$(BIN)/python -m build > dist/log 2>&1 || { cat dist/log; exit 1; }
	touch $@

$(VENV)/.wheel: dist/.built
	$(PIP) install --force-reinstall --no-deps $(WHEEL)
	touch $@

$(VENV)/.demo: $(VENV)/.wheel
	$(PIP) install "$(WHEEL)[train]"
	touch $@

$(VENV)/.test: $(VENV)/.wheel
	$(PIP) install "$(WHEEL)[test,train]"
	@if [ -n "$(PEERS)" ]; then $(PIP) install $(PEERS) || echo "fastbn: no $(PEERS): tests against it will be skipped"; fi
	touch $@

$(VENV)/.bench: $(VENV)/.wheel
	$(PIP) install "$(WHEEL)[bench]"
	@if [ -n "$(PEERS)" ]; then $(PIP) install $(PEERS) || echo "fastbn: no $(PEERS): it will be missing in the tables"; fi
	$(PIP) install onednn-cpu-gomp || echo "fastbn: no onednn-cpu-gomp: it will be missing in the tables"
	touch $@

$(VENV)/.lint: $(VENV)/.wheel
	$(PIP) install "$(WHEEL)[lint,test,train]"
	touch $@

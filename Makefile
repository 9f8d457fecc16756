# Two commands do all the set-up on a fresh machine:
#   make quickstart   compress the embedded example on a local Ray, result in runs/quickstart/
#   make test         style, types and the whole test suite
# and one breaks readers and runs for three quarters of an hour: make chaos
# Both make .venv first, with the torch that constraints.txt pins; make TORCH=… CONSTRAINTS=… takes another.

PYTHON ?= python3
TORCH ?= torch==2.13.0
CONSTRAINTS ?= -c constraints.txt
BIN := .venv/bin

.PHONY: quickstart test chaos install clean

quickstart: install
	HF_HUB_OFFLINE=1 $(BIN)/fusegpt compress examples/quickstart.yaml

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder  # runs on Ray wait a lot; the dear ones first

chaos: install
	$(BIN)/python tests/chaos/fuzz.py
	$(BIN)/python tests/chaos/kills.py
	$(BIN)/python tests/chaos/races.py

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(if $(TORCH),$(BIN)/pip install --quiet $(CONSTRAINTS) $(TORCH))
	$(BIN)/pip install --quiet $(CONSTRAINTS) --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv runs

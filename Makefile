# Two commands do all the set-up on a fresh machine:
#   make quickstart   compress the embedded example on a local Ray, result in runs/quickstart/
#   make test         style, types, imports, and the tests of every promise in docs/reliability.md
# Four more take longer:
#   make test-all     the same with every test, the slow ones among them (tests/slow.py)
#   make chaos        breaks readers, runs and networks for an hour and a quarter
#   make sweep        tries every class of transformers, and writes docs/models.md: a quarter of an hour
#   make served VLLM=/path/to/python
#                     holds vLLM against transformers, and writes docs/serving.md: half an hour
# One builds the documentation:
#   make docs         the site in site/, every warning an error
# One chooses what the image has, each package by version and hash:
#   make lock         writes cluster/requirements.lock anew
# All make .venv first, with the torch that constraints.txt pins; TORCH=… CONSTRAINTS=… take another.

PYTHON ?= python3
TORCH ?= torch==2.13.0
CONSTRAINTS ?= -c constraints.txt
BIN := .venv/bin

.PHONY: quickstart test test-all style chaos sweep served docs lock install clean

quickstart: install
	HF_HUB_OFFLINE=1 $(BIN)/fusegpt compress examples/quickstart.yaml

# Tests wait a lot, so three processes share two cores well; those on Ray come first. All of the many
# processes read bytecode that one of them compiled, whatever the environment says.
PYTEST := PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 $(BIN)/python -m pytest \
	-n 3 --dist loadfile --no-loadscope-reorder

test: style
	$(PYTEST) -m "not slow"

test-all: style
	$(PYTEST)

style: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

chaos: install
	$(BIN)/python tests/chaos/fuzz.py
	$(BIN)/python tests/chaos/kills.py
	$(BIN)/python tests/chaos/races.py
	$(BIN)/python tests/chaos/networks.py

sweep: install
	$(BIN)/python tests/sweep/sweep.py

# VLLM is the Python of an environment of its own: vLLM pins other versions than ours.
served: install
	$(BIN)/python tests/sweep/served.py --vllm $(VLLM)

docs: .venv/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/docs-installed: .venv/installed
	$(BIN)/pip install --quiet $(CONSTRAINTS) --editable '.[docs]'
	@touch $@

# For the Python and the system of the Dockerfile's base image.
lock: install
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra vision --extra eval --extra gcs \
		--extra launcher $(CONSTRAINTS) --upgrade \
		--generate-hashes --python-version 3.12 --python-platform x86_64-manylinux_2_39 \
		--no-annotate --custom-compile-command "make lock" --output-file cluster/requirements.lock

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(if $(TORCH),$(BIN)/pip install --quiet $(CONSTRAINTS) $(TORCH))
	$(BIN)/pip install --quiet $(CONSTRAINTS) --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv runs site

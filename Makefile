# make demo: the main job on this machine.  make test: everything, real parts included (root, Debian).
# /usr/bin/python3 first: other accounts of the testbed must be able to run a virtual environment made from it.
PYTHON ?= $(shell for p in /usr/bin/python3 python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
BIN = .venv/bin

.PHONY: demo test lint bench bench-aggregate bench-train chaos chaos-all chaos-table docs fuzz setup setup-test soak testbed-packages

setup: .venv/.setup

.venv/.setup: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "flctl needs Python 3.11 or newer; $(PYTHON) is older: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing. On Debian: apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

setup-test: .venv/.setup-test

.venv/.setup-test: .venv/.setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	@touch $@

demo: setup
	@$(BIN)/flctl demo

testbed-packages:
	@$(BIN)/python -m tests.testbed packages

# Three at a time, because most of them wait: see tests/conftest.py for what keeps out of each other's way. What fails
# beside others is run once more alone, and only what fails then fails.
test: setup-test testbed-packages
	$(BIN)/python -m pytest -n 3 --no-loadscope-reorder || \
		{ [ $$? -eq 1 ] && $(BIN)/python -m pytest --last-failed --last-failed-no-failures none; }

lint: setup-test
	$(BIN)/ruff check flctl tests bench examples
	$(BIN)/ruff format --check flctl tests bench examples
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vermin -q -t=3.6- --no-tips flctl/payload/seal.py flctl/payload/batch.py flctl/model/__main__.py

docs: setup
	@$(BIN)/python -m tests.commands_page

bench: setup
	@$(BIN)/python tests/bench_startup.py

# Minutes, and tens of gigabytes of disk. SCALING=1: how time and memory grow with the model instead.
bench-aggregate: setup
	@$(BIN)/python -m bench.aggregate $(if $(SCALING),--scaling) $(if $(JSON),--json $(JSON))

# Minutes. On the GPU if there is one. ARGS: python -m bench.train --help
bench-train: setup-test
	@$(BIN)/python -m bench.train $(if $(JSON),--json $(JSON)) $(ARGS)

# With atheris, if it is installed (pip install -e '.[fuzz]'); else with a mutator of its own.
fuzz: setup-test
	@$(BIN)/python -m tests.fuzz_header $(or $(SECONDS),60)

# Faults on purpose, see docs/reliability.md. chaos: a seeded sample of every row, under an hour. chaos-all: a part of the
# full aims, under 90 minutes each, what this commit has done already left out. Both add to tests/chaos/results.jsonl.
chaos: setup-test testbed-packages
	@$(BIN)/python -m tests.chaos sample --seed $(or $(SEED),1); status=$$?; $(BIN)/python -m tests.chaos table; exit $$status

chaos-all: setup-test testbed-packages
	@$(BIN)/python -m tests.chaos all --part $(or $(PART),1/1); status=$$?; $(BIN)/python -m tests.chaos table; exit $$status

chaos-table: setup-test
	@$(BIN)/python -m tests.chaos table

# By hand, hours: ROUNDS of a campaign, and new campaigns until HOURS are over.
soak: setup-test testbed-packages
	@$(BIN)/python -m tests.chaos.soak --rounds $(or $(ROUNDS),100) --hours $(or $(HOURS),0)

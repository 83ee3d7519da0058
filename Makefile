# One way to run things. PYTHON must be 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FUZZ_ROUNDS ?= 50

.PHONY: help demo test test-fast test-newest test-lowest fuzz lint man docs tour bench evidence evaluated picture clean

help:  ## the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' Makefile

# torch is installed by its pinned version first: a looser range may fetch gigabytes of CUDA packages.
$(BIN)/sinder: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.tested: $(BIN)/sinder
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(BIN)/sinder  ## predict, repair and export the demo backbone
	$(BIN)/sinder demo

# A process a core, each with one thread; the tests of a file stay together, and share what they make.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test: $(VENV)/.tested  ## the whole suite
	$(PYTEST)

test-fast: lint  ## what takes no process and no seconds, after style and types
	$(PYTEST) -m "not slow"

test-newest:  ## every plugin and export once, with every extra, the newest of everything (gigabytes, minutes)
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip
	.venv-newest/bin/python -m pip install --quiet '.[all]'
	.venv-newest/bin/python tests/install/smoke.py

test-lowest:  ## the same with the lowest versions that pyproject.toml allows
	rm -rf .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --upgrade pip uv
	.venv-lowest/bin/uv pip compile --quiet --resolution lowest-direct --extra all pyproject.toml \
	  --output-file .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet --constraint .venv-lowest/constraints.txt '.[all]'
	.venv-lowest/bin/python tests/install/smoke.py

fuzz: $(VENV)/.tested  ## damaged input of every kind, FUZZ_ROUNDS times what the suite has
	$(BIN)/python -m pytest tests/fuzz --fuzz-rounds $(FUZZ_ROUNDS) --timeout 0 -s

lint: $(VENV)/.tested  ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

man: $(VENV)/.tested  ## write the man pages anew from the command tree
	$(BIN)/python -m sinder_cli.cli.manpage man

docs: $(VENV)/.tested  ## the documentation as a site that works offline: site/index.html; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site/index.html"

tour: $(VENV)/.tested  ## execute docs/tour.ipynb anew
	$(BIN)/python docs/tour.py

bench: $(VENV)/.tested  ## all workloads beside their opponents, in one table: tests/benchmarks/RESULTS.md
	$(BIN)/python tests/benchmarks/bench.py --write

evidence: $(VENV)/.tested  ## repairs of a real model, into tests/real/EVIDENCE.md; fetches 200 MB once
	$(BIN)/python tests/real/evidence.py --anew

evaluated: $(VENV)/.tested  ## tasks on a real model before and after a repair, into tests/real/EVIDENCE.md
	$(BIN)/python tests/real/evaluated.py --anew

picture: $(VENV)/.tested  ## the picture of before and after that README shows, of a real model
	$(BIN)/python tests/real/picture.py

clean:  ## remove what these targets made
	rm -rf $(VENV) .venv-newest .venv-lowest build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache sinder-runs

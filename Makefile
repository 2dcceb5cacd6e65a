# Every target makes what it needs: on a machine with Python (>= 3.11, with venv) and make, `make demo` is enough.
#
#   PYTHON        the interpreter the environment is made with    (python3)
#   VENV          where the environment is                        (.venv)
#   FUZZ_SECONDS  how long `make fuzz` runs each target           (60)
#   FUZZ_TARGETS  which targets `make fuzz` runs                  (all of them)
#   PYTEST_ARGS   more arguments for pytest in `make test`

PYTHON ?= python3
VENV ?= .venv
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
FUZZ_INSTALLED := $(VENV)/.installed-fuzz
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --retries 10

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test lint fuzz constraints clean

help: ## this list
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

install: $(INSTALLED) ## make the environment, hash-checked; does nothing when it is up to date

$(INSTALLED): pyproject.toml constraints.txt
	@echo "==> $(VENV): an environment of $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say which one with make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV) || { echo "this Python makes no environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "==> $(VENV): the packages of constraints.txt, each checked against its hash"
	@$(PIP) install --quiet --require-hashes --requirement constraints.txt
	@echo "==> $(VENV): chutes-proto itself, editable"
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

clean: ## remove the environment and everything that was made
	rm -rf $(VENV) build dist .coverage .coverage.* htmlcov .hypothesis .pytest_cache .mypy_cache .ruff_cache .fuzz
	find src tests examples -name __pycache__ -prune -exec rm -rf {} +

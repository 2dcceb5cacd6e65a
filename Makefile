# Every target makes what it needs: on a machine with Python (>= 3.11, with venv) and make, `make demo` is enough.
#
#   PYTHON        the interpreter the environment is made with    (python3)
#   VENV          where the environment is                        (.venv)
#   FUZZ_SECONDS  how long `make fuzz` runs each target           (60)
#   FUZZ_TARGETS  which targets `make fuzz` runs                  (all of them)
#   BENCH_SUBJECTS  what `make bench` measures                    (everything)
#   BENCH_VMS     VMs in the store of the subject `operators`     (10000)
#   BENCH_STORES, BENCH_COMMANDS   which stores and commands it measures (everything)
#   SOAK_TESTS    which tests `make soak` runs                   (of units, stores, the audit log, lives, killed servers, virtual machines, containers, restarts, recoveries, Patroni, verifiers, flipped bits)
#   TARGET_PYTHON  whose byte code `make zipapp` carries         (/usr/bin/python3 where there is one)
#   PYTEST_ARGS   pytest's arguments in `make test`             (all tests, on all processors)

PYTHON ?= python3
VENV ?= .venv
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?=
BENCH_SUBJECTS ?=
PYTEST_ARGS ?= -n auto --dist worksteal
TARGET_PYTHON ?= $(or $(wildcard /usr/bin/python3),$(PYTHON))
SOAK_TESTS ?= tests/lifecycle tests/store tests/units tests/cli/test_audit_log.py tests/cli/test_processes.py tests/scenario/test_reload.py tests/cli/test_store_faults.py \
	tests/scenario/test_virtual_machine.py tests/scenario/test_server_unit.py tests/scenario/test_container.py tests/scenario/test_restarts.py tests/scenario/test_recipes.py tests/cluster tests/quote/test_differential.py \
	tests/gpu/test_flipped_bits.py

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
FUZZ_INSTALLED := $(VENV)/.installed-fuzz
DOCS_INSTALLED := $(VENV)/.installed-docs
SCRIPTS := .ci/run tests/scenario/initramfs.sh tests/scenario/image_1_4_0.sh examples/initramfs/hooks/chutes-proto \
	examples/initramfs/scripts/local-top/chutes-proto
# The pins are complete and installed with --no-deps: an older pip would look for the newest release of an extra.
PIP_OPTIONS := --disable-pip-version-check --no-input --retries 10
PIP := $(BIN)/python -m pip $(PIP_OPTIONS)
RESOLVE := $(VENV)-uv/bin/uv pip compile --quiet --universal --python-version 3.11 --upgrade --generate-hashes \
	--no-annotate --custom-compile-command "make constraints"

# Byte code is kept: hundreds of programs that the tests start would each compile this project anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
QUICK_TESTS := $(addprefix tests/,auth keys luks quote units wire server testing test_purity.py test_public.py \
	test_waits.py) --ignore tests/units/test_machine_postgres.py

.PHONY: help install demo test oldest coverage quick lint soak fuzz bench docs zipapp man constraints clean

help: ## this list
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

install: $(INSTALLED) ## make the environment, hash-checked; does nothing when it is up to date

$(INSTALLED): pyproject.toml constraints.txt
	@echo "==> $(VENV): an environment of $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say which one with make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV) || { echo "this Python makes no environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "==> $(VENV): the packages of constraints.txt, each checked against its hash"
	@$(BIN)/python -m tools.pip_progress $(PIP_OPTIONS) --require-hashes --no-deps constraints.txt
	@echo "==> $(VENV): chutes-proto itself, editable"
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@$(PIP) check >/dev/null || { $(PIP) check; echo "constraints.txt lacks something; make constraints" >&2; exit 1; }
	@touch $@

demo: $(INSTALLED) ## a VM boots against a key server, and attacks are refused, on this machine
	@$(BIN)/chutes-proto demo

test: $(INSTALLED) ## all tests
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

oldest: $(VENV)-uv ## all tests, with the oldest release that pyproject.toml takes of each dependency
	@$(PYTHON) -m venv --clear $(VENV)-oldest
	@$(VENV)-oldest/bin/python -m pip $(PIP_OPTIONS) install --quiet --require-hashes --no-deps -r constraints.txt
	@$(VENV)-uv/bin/uv pip install --quiet --upgrade --python $(VENV)-oldest/bin/python --resolution lowest-direct --editable '.[all]'
	@$(VENV)-oldest/bin/python -m pytest $(PYTEST_ARGS)

coverage: $(INSTALLED) ## all tests, measured, and the floor of coverage
	@$(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=
	@$(BIN)/python tests/coverage_floor.py 95

quick: $(INSTALLED) ## the tests of the pure packages and of what is public, in a minute: for before a commit
	@$(BIN)/python -m pytest -n auto --dist worksteal -q $(QUICK_TESTS)

soak: $(INSTALLED) ## the tests of what must never be lost, in their long form: SOAK_TESTS for hours
	@CHUTES_PROTO_SOAK=1 $(BIN)/python -m pytest -n auto --hypothesis-profile soak $(SOAK_TESTS)

lint: $(DOCS_INSTALLED) ## ruff, mypy, basedpyright; shellcheck where it is installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/basedpyright --warnings
	@for package in chutes_proto chutes_proto_trio chutes_proto_asyncio; do \
	PATH="$(abspath $(BIN)):$$PATH" basedpyright --verifytypes $$package --ignoreexternal >.verifytypes || \
	{ cat .verifytypes; exit 1; }; grep score .verifytypes; rm .verifytypes; done
	@if command -v shellcheck >/dev/null; then echo "shellcheck $(SCRIPTS)"; shellcheck $(SCRIPTS); \
	else echo "shellcheck is not installed: $(SCRIPTS) are not checked"; fi

fuzz: $(FUZZ_INSTALLED) ## coverage-guided fuzzing, FUZZ_SECONDS for each of FUZZ_TARGETS
	@$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_TARGETS)

bench: $(INSTALLED) ## what takes how long, beside others and beside what cannot be done without; prints ratios
	@$(BIN)/python -m bench $(BENCH_SUBJECTS)

docs: $(DOCS_INSTALLED) ## the documentation site in build/site; every link and anchor in it is checked
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean
	@$(BIN)/python -m tools.docs.check build/site

zipapp: $(INSTALLED) ## the boot agent as one file, build/chutes-proto-agent.pyz, for TARGET_PYTHON and its cryptography
	@$(BIN)/python -m tools.agent_zipapp build/chutes-proto-agent.pyz --python $(TARGET_PYTHON)

man: $(INSTALLED) ## the manual pages of all commands, build/man/*.1
	@$(BIN)/python -m tools.man_pages build/man

$(FUZZ_INSTALLED): tests/fuzz/requirements.txt $(INSTALLED)
	@echo "==> $(VENV): atheris, checked against its hash (there are wheels for Linux on x86-64)"
	@$(PIP) install --quiet --require-hashes --no-deps --only-binary :all: --requirement $<
	@touch $@

$(DOCS_INSTALLED): tools/docs-requirements.txt $(INSTALLED)
	@echo "==> $(VENV): the site's builder, checked against its hashes"
	@$(PIP) install --quiet --require-hashes --no-deps --requirement $<
	@touch $@

$(VENV)-uv:
	@$(PYTHON) -m venv $@
	@$@/bin/python -m pip --disable-pip-version-check install --quiet uv

constraints: $(VENV)-uv ## resolve all pins anew, for every Python from 3.11 on, and hash them
	@$(RESOLVE) --all-extras --group build pyproject.toml --output-file constraints.txt
	@$(RESOLVE) --group fuzz --output-file tests/fuzz/requirements.txt
	@$(RESOLVE) --group docs --output-file tools/docs-requirements.txt

clean: ## remove the environment and everything that was made
	rm -rf $(VENV) $(VENV)-uv build dist .coverage .coverage.* htmlcov .hypothesis .pytest_cache .mypy_cache .ruff_cache .fuzz
	find src tests examples -name __pycache__ -prune -exec rm -rf {} +

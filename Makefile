# One word each: `make setup`, `make quickstart`, `make test`, `make lint`. Each does all the set-up that it needs,
# into .venv, once; again only when pyproject.toml or a lock file has changed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: setup quickstart test lint format docs lock clean help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RUN := runs/quickstart
export PYTHONUNBUFFERED := 1
# Two processes of one thread each take little more than half the time of one process of two.
TEST_PROCESSES ?= 2
# What no test can ask for: SkyPilot takes 430 MB and wants another click than huggingface-hub does. To test with it as well,
# install it into an environment of its own: make test ULTRAVOX_SKYPILOT_PYTHON=/path/to/its/python
export ULTRAVOX_WITHOUT ?= skypilot

help:
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(VENV)/.installed ## make .venv with every locked package

$(VENV)/.created:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
		echo "UltraVox needs Python 3.11 or newer, found: $$("$(PYTHON)" --version 2>&1); install python3.11, or say make PYTHON=/path/to/python" >&2
		exit 1
	}
	"$(PYTHON)" -m venv --clear $(VENV) || {
		echo "no virtual environment could be made: on Debian, apt-get install python3-venv (or python3.11-venv)" >&2
		exit 1
	}
	touch $@

# Everything but torch is checked against its hash; torch comes last, so that what it needs is already there, pinned.
# --no-deps: the lock is complete. --only-binary: nothing is compiled here, so no compiler is needed.
# What slows every start where it can be imported lies beside, for the tests that want it, as does DeepSpeed, which is
# published as source alone, and of which nothing is compiled.
$(VENV)/.locked: $(VENV)/.created requirements.lock requirements-torch.lock requirements-side.lock requirements-deepspeed.lock
	$(PIP) install --quiet --no-deps --only-binary :all: --require-hashes -r requirements.lock
	$(PIP) install --quiet -r requirements-torch.lock
	$(PIP) install --quiet --no-deps --only-binary :all: --require-hashes --target $(VENV)/side --upgrade -r requirements-side.lock
	DS_BUILD_OPS=0 $(PIP) install --quiet --no-deps --no-build-isolation --require-hashes --target $(VENV)/deepspeed --upgrade -r requirements-deepspeed.lock
	touch $@

$(VENV)/.installed: $(VENV)/.locked pyproject.toml
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	touch $@

quickstart: $(VENV)/.installed ## fetch, train, evaluate, report, and one spoken question (15 to 30 minutes)
	$(BIN)/ultravox models fetch smollm2-135m-instruct whisper-tiny.en
	$(BIN)/ultravox data fetch asterisk-en synthetic-en spoken-requests-en
	$(BIN)/ultravox train configs/quickstart.yaml --overwrite
	$(BIN)/ultravox evaluate $(RUN)
	$(BIN)/ultravox ask $(RUN) --audio examples/question.wav
	@echo "The report is $(RUN)/report.html; open it in a browser."

test: $(VENV)/.installed ## run the tests (set PYTEST_ARGS to choose, TEST_PROCESSES); what they read is fetched first
	$(BIN)/ultravox models fetch smollm2-135m-instruct whisper-tiny.en whisper-base
	$(BIN)/ultravox data fetch asterisk-en synthetic-en spoken-requests-en
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) $(PYTEST_ARGS)

lint: $(VENV)/.installed ## style, types and import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=src $(BIN)/lint-imports

format: $(VENV)/.installed ## put the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed ## write the generated documents anew
	$(BIN)/python -m ultravox.config.describe > docs/configuration.md.new
	mv docs/configuration.md.new docs/configuration.md

# torch is left out of the hashed file (see its head); its few dependencies on every platform are named in its place.
lock: ## resolve pyproject.toml anew into requirements.lock
	mkdir -p build/lock
	test -x build/lock/venv/bin/uv || { "$(PYTHON)" -m venv build/lock/venv && build/lock/venv/bin/pip install --quiet uv==0.13.9; }
	echo "torch==2.13.0 ; sys_platform == 'never'" > build/lock/overrides.txt
	printf '%s\n' filelock fsspec jinja2 networkx setuptools sympy typing-extensions > build/lock/torch-needs.in
	build/lock/venv/bin/uv pip compile pyproject.toml build/lock/torch-needs.in --extra dev --universal \
		--python-version 3.11 --overrides build/lock/overrides.txt --no-emit-package torch --generate-hashes --no-annotate --no-header --upgrade \
		--quiet --output-file build/lock/requirements.lock
	{
		echo "# Written by make lock; do not edit. Every version is pinned and every file checked: use it as"
		echo "#     pip install --no-deps --require-hashes -r requirements.lock"
		echo "# and after it install requirements-torch.lock. torch==2.13.0 stands there, without a hash: its build differs"
		echo "# between CPU, CUDA and Apple machines, and pip takes either all hashes or none."
		cat build/lock/requirements.lock
	} > requirements.lock

clean: ## remove the environment and the caches of the tools
	rm -rf $(VENV) build .pytest_cache .ruff_cache .mypy_cache .import_linter_cache

# Each target is one command of the project; `make` lists them. Needs make, python3 (3.10 or later) and python3-venv.

PYTHON ?= python3
OUTPUT ?= bin/livenessprobe
# What to pack for, where it isn't this interpreter on this machine: PYTHON_VERSION=3.13 PLATFORM=linux/arm64
PYTHON_VERSION ?=
PLATFORM ?=

python := .venv/bin/python
target := $(strip $(PYTHON_VERSION) $(PLATFORM))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format livenessprobe proto lock clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

demo: .venv/done bin/livenessprobe  ## show the built file beside an example driver: healthy, failing, gone and back
	@$(python) examples/demo.py bin/livenessprobe

test: lint bin/livenessprobe  ## lint, then all tests, on the built file too; every line and branch must be reached
	@rm -f .coverage .coverage.*
	$(python) -m coverage run -m pytest
	@$(python) -m coverage combine --quiet
	$(python) -m coverage report

lint: .venv/done  ## check format, style and types
	$(python) -m ruff format --check
	$(python) -m ruff check
	$(python) -m mypy

format: .venv/done  ## put the sources into the format that lint wants
	$(python) -m ruff check --fix-only
	$(python) -m ruff format

livenessprobe: $(OUTPUT)  ## build bin/livenessprobe, one file (OUTPUT= PYTHON_VERSION=3.13 PLATFORM=linux/arm64)
	@ls -l $(OUTPUT)

proto: .venv/done  ## generate livenessprobe/identity_pb2.py from proto/
	$(python) build/proto.py .

lock: .venv/done  ## renew the lock files to the newest versions that pyproject.toml allows
	$(python) build/lock.py

clean:  ## remove everything that was built
	rm -rf .venv bin dist .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -exec rm -rf {} +

.venv/done: build/requirements-dev.lock build/venv.sh
	@build/venv.sh "$(PYTHON)"

# Packed anew too when asked for another target than it holds now.
ifneq ($(target),$(shell cat $(OUTPUT).target 2>/dev/null))
.PHONY: $(OUTPUT)
endif
$(OUTPUT): $(wildcard livenessprobe/*.py) build/requirements.lock build/pyz.py build/start.py build/unpack.py LICENSE .venv/done
	$(python) build/pyz.py $(PYTHON_VERSION:%=--python-version %) $(PLATFORM:%=--platform %) $@
	@echo '$(target)' > $@.target

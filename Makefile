# Each target is one command of the project; `make` lists them. Needs make, python3 (3.10 or later) and python3-venv.

# By default the one that made .venv, or else python3.
PYTHON ?=
OUTPUT ?= bin/livenessprobe
# What to pack for, if not this interpreter on this machine: PYTHON_VERSION=3.13 PLATFORM=linux/arm64
PYTHON_VERSION ?=
PLATFORM ?=
# The image's name, the image it is built in, if that isn't debian:trixie-slim, and the address of its sources, if that isn't
# the clone's origin.
REGISTRY ?= quay.io/k8scsi
IMAGE ?= livenessprobe
TAG ?= canary
export BUILD_IMAGE ?=
export SOURCE ?=
# What bench and soak measure, and beside what: any program with the same flags.
PROGRAM ?= bin/livenessprobe
REFERENCE ?=
BLOCKS ?= 24
CPUS ?= 0
# How many checks a soak makes; how often steady runs the tests.
N ?=
SECONDS ?= 60
# How many minutes of torture; the seed of a round to play again.
MINUTES ?= 5
SEED ?=
# How many processes run the tests, or judge mutants: more than there are processors, since they spend more than half of their
# time waiting.
WORKERS ?= $(shell n=$$(nproc) && echo $$((n < 6 ? 3 * n : 16)))
# Which tests need no build and wait for nothing.
QUICK ?= config exchange goflags health imports log promises quoting writer
# When to give up on a run of the tests.
LIMIT ?= 30m
# Which modules to change, if not all that mutants knows.
MODULES ?=
# The manifests that check-manifest reads, and the image it suggests, if not registry.example's.
FILE ?=
SUGGEST ?=
# A database of vulnerabilities with the interface of https://osv.dev.
ADVISORIES ?= https://api.osv.dev/v1/query

python := .venv/bin/python
target := $(strip $(PYTHON_VERSION) $(PLATFORM))
# What .venv holds, as a copy of the lock file: for building, and for testing.
builds := .venv/requirements-build.lock
tests := .venv/requirements-test.lock

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo play test quick lint format livenessprobe livenessprobe-container release base-image image-budget bench soak load bare steady torture mutants check-manifest picture proto lock audit clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 26

demo: $(builds) bin/livenessprobe  ## show the built file beside an example driver: healthy, failing, gone and back
	@SHIV_ROOT=$(CURDIR)/.cache/unpacked LIVENESSPROBE_PYTHON=$(CURDIR)/$(python) $(python) examples/demo.py bin/livenessprobe

play: $(builds) bin/livenessprobe  ## break and mend the example driver by pressing keys, and see live what the built file says
	@$(python) examples/play.py bin/livenessprobe

test: lint bin/livenessprobe  ## lint, then all tests, on the built file too; every line and branch must be reached, unless tests are skipped
	@rm -rf .cache/coverage
	@# With a bound of its own: a test that fails must leave nobody waiting.
	LIVENESSPROBE_PYTHON=$(CURDIR)/$(python) timeout --foreground --signal=INT --kill-after=60 $(LIMIT) $(python) -m coverage run -m pytest --numprocesses=$(WORKERS)
	@$(python) -m coverage combine --quiet
	@if [ -e .cache/skipped ]; then \
		echo "Tests were skipped, see above; by those that ran, this was not reached:"; \
		$(python) -m coverage report --fail-under=0; \
	else \
		$(python) -m coverage report; \
	fi

quick: $(tests)  ## run the tests that need no build and no waiting, after each changed line
	@$(python) -m ruff format --check --quiet && $(python) -m ruff check --quiet
	@$(python) -m pytest --quiet --numprocesses=$(WORKERS) $(QUICK:%=tests/test_%.py)

lint: $(tests)  ## check format, style and types
	$(python) -m ruff format --check
	$(python) -m ruff check
	$(python) -m mypy

format: $(tests)  ## format the sources the way lint wants them
	$(python) -m ruff check --fix-only
	$(python) -m ruff format

livenessprobe: $(OUTPUT)  ## build bin/livenessprobe, one file (OUTPUT= PYTHON_VERSION=3.13 PLATFORM=linux/arm64)
	@ls -l $(OUTPUT)

livenessprobe-container: $(tests)  ## build the image and its list of contents (REGISTRY= IMAGE= TAG= PLATFORM=linux/arm64 BUILD_IMAGE= SOURCE=)
	$(python) build/here/image.py $(PLATFORM:%=--platform %) $(REGISTRY)/$(IMAGE):$(TAG)

release: $(tests)  ## build everything in a release into dist/: files, wheel, images as one OCI layout, contents, checksums (REGISTRY= IMAGE=)
	$(python) build/here/release.py $(REGISTRY)/$(IMAGE)

base-image:  ## make the image to build in, with debootstrap, if debian:trixie-slim cannot be pulled
	build/here/base.sh livenessprobe-base:trixie

image-budget: $(builds)  ## measure the image beside another image or program (REFERENCE=path-or-image)
	$(python) benchmarks/image_budget.py $(REGISTRY)/$(IMAGE):$(TAG) $(if $(REFERENCE),'$(REFERENCE)')

bench: $(builds) bin/livenessprobe  ## measure the program against its budgets (REFERENCE=path BLOCKS=8, which is quick, CPUS=192)
	@$(python) benchmarks/bench.py --program '$(PROGRAM)' --reference '$(REFERENCE)' --blocks $(BLOCKS) --cpus $(CPUS)

soak: $(builds) bin/livenessprobe  ## check that nothing grows over N=100000 checks, driver healthy, failing, hung, gone
	@$(python) benchmarks/soak.py --program '$(PROGRAM)' --reference '$(REFERENCE)' --checks $(or $(N),100000)

load: $(builds) bin/livenessprobe  ## hit it with storms of requests and a flood of half-open connections (SECONDS=60 of flood)
	@$(python) benchmarks/load.py --program '$(PROGRAM)' --seconds $(SECONDS)

bare:  ## make demo and make test on bare machines of Debian 12 and 13, as a user and as root (needs root, debootstrap; BARE=trixie:user)
	PYTHONPATH=build/here:build/builder $(or $(PYTHON),python3) tests/helpers/bare_machine.py $(BARE)

steady: $(tests) bin/livenessprobe  ## run the tests N=20 times beside two busy loops per processor, and say what failed
	@$(python) tests/helpers/steady.py --runs $(or $(N),20) --workers $(WORKERS)

torture: $(tests) bin/livenessprobe  ## run random lives of the driver, and random junk, for MINUTES=5 (SEED=… plays one round again)
	@$(python) tests/helpers/torture.py --minutes $(MINUTES) --seed '$(SEED)'

mutants: $(tests)  ## change the modules in one place after another, and say which changes no test notices (MODULES='health web')
	@$(python) tests/helpers/mutants.py --workers $(WORKERS) $(MODULES)

check-manifest: bin/check-manifest  ## say what would change if this took upstream's place in a manifest (FILE=path, or - for standard input; SUGGEST=image)
	@$(python) bin/check-manifest $(if $(SUGGEST),--image '$(SUGGEST)') $(if $(FILE),'$(FILE)')

bin/check-manifest: build/here/checker.py $(wildcard deploy/migration/*.py) $(wildcard livenessprobe/*.py) $(builds)
	@mkdir -p bin
	@$(python) build/here/checker.py $@

picture: $(tests) bin/livenessprobe  ## draw docs/demo.svg, the picture in README.md: plays the demo, and draws what it printed
	@$(python) examples/demo_picture.py bin/livenessprobe docs/demo.svg

proto: $(tests)  ## generate livenessprobe/identity_pb2.py from proto/
	$(python) build/here/proto.py .

lock: $(tests)  ## update the lock files to the newest versions that pyproject.toml allows
	$(python) build/here/lock.py

audit: $(tests)  ## look the locked packages up in a database of known vulnerabilities, if it can be reached (ADVISORIES=address)
	@$(python) build/here/audit.py $(ADVISORIES)

clean:  ## remove everything that was built
	rm -rf .venv .cache bin dist tests/helpers/node/node_modules
	find . -name __pycache__ -type d -exec rm -rf {} +

# Each time, which takes a moment: what .venv holds is compared with what it should hold.
$(builds): FORCE
	@build/here/venv.sh requirements-build.lock 'to build it and to run the demo: 15 MB to fetch' '$(PYTHON)'

$(tests): $(builds) FORCE
	@build/here/venv.sh requirements-test.lock 'to test it: 130 MB to fetch' '$(PYTHON)'

# Also packed again if it was packed for another target.
ifneq ($(target),$(shell cat $(OUTPUT).target 2>/dev/null))
.PHONY: $(OUTPUT)
endif
$(OUTPUT): $(wildcard livenessprobe/*.py) build/here/requirements.lock build/here/kept.py build/here/pyz.py $(wildcard build/product/*.py) LICENSE $(builds)
	@[ -d bin/kept ] || echo "Fetching what $@ takes from other projects, once for these Pythons: at most 40 MB"
	$(python) build/here/pyz.py $(PYTHON_VERSION:%=--python-version %) $(PLATFORM:%=--platform %) $@
	@echo '$(target)' > $@.target

FORCE:

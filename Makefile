# Each target is one command of the project; `make` lists them. Needs make, python3 (3.10 or later) and python3-venv.

PYTHON ?= python3
OUTPUT ?= bin/livenessprobe
# What to pack for, where it isn't this interpreter on this machine: PYTHON_VERSION=3.13 PLATFORM=linux/arm64
PYTHON_VERSION ?=
PLATFORM ?=
# What the image is called, in which other image it is built, where that isn't debian:trixie-slim, and the address of
# its sources, where that isn't the clone's origin.
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
N ?= 100000
SECONDS ?= 60
# How long to torture, or the seed of one round to play again.
MINUTES ?= 5
SEED ?=
# The manifests that check-manifest reads, and the image that it suggests, where that isn't registry.example's.
FILE ?=
SUGGEST ?=
# A database of vulnerabilities with the interface of https://osv.dev.
ADVISORIES ?= https://api.osv.dev/v1/query

python := .venv/bin/python
target := $(strip $(PYTHON_VERSION) $(PLATFORM))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo play test lint format livenessprobe livenessprobe-container release base-image image-budget bench soak load torture check-manifest picture dashboard proto lock audit clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 26

demo: .venv/done bin/livenessprobe  ## show the built file beside an example driver: healthy, failing, gone and back
	@$(python) examples/demo.py bin/livenessprobe

play: .venv/done bin/livenessprobe  ## break and mend the example driver by keys, and see live what the built file says
	@$(python) examples/play.py bin/livenessprobe

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

livenessprobe-container: .venv/done  ## build the image and its list of contents (REGISTRY= IMAGE= TAG= PLATFORM=linux/arm64 BUILD_IMAGE= SOURCE=)
	$(python) build/here/image.py $(PLATFORM:%=--platform %) $(REGISTRY)/$(IMAGE):$(TAG)

release: .venv/done  ## build all of a release into dist/: files, images as one OCI layout, contents, checksums (REGISTRY= IMAGE=)
	$(python) build/here/release.py $(REGISTRY)/$(IMAGE)

base-image:  ## make the image to build in, by debootstrap, where debian:trixie-slim cannot be pulled
	build/here/base.sh livenessprobe-base:trixie

image-budget: .venv/done  ## measure the image, beside another image or program (REFERENCE=path-or-image)
	$(python) benchmarks/image_budget.py $(REGISTRY)/$(IMAGE):$(TAG) $(if $(REFERENCE),'$(REFERENCE)')

bench: .venv/done bin/livenessprobe  ## measure the program and its budgets (REFERENCE=path BLOCKS=8, which is quick, CPUS=192)
	@$(python) benchmarks/bench.py --program '$(PROGRAM)' --reference '$(REFERENCE)' --blocks $(BLOCKS) --cpus $(CPUS)

soak: .venv/done bin/livenessprobe  ## see whether anything grows over N=100000 checks, driver healthy, failing, hung, gone
	@$(python) benchmarks/soak.py --program '$(PROGRAM)' --reference '$(REFERENCE)' --checks $(N)

load: .venv/done bin/livenessprobe  ## put storms of requests and a flood of half-open connections on it (SECONDS=60 of flood)
	@$(python) benchmarks/load.py --program '$(PROGRAM)' --seconds $(SECONDS)

torture: .venv/done bin/livenessprobe  ## run random lives of the driver, and random junk, for MINUTES=5 (SEED=… plays one round again)
	@$(python) tests/helpers/torture.py --minutes $(MINUTES) --seed '$(SEED)'

check-manifest: bin/check-manifest  ## say what would change where this takes upstream's place in a manifest (FILE=path, or - for standard input; SUGGEST=image)
	@$(python) bin/check-manifest $(if $(SUGGEST),--image '$(SUGGEST)') $(if $(FILE),'$(FILE)')

bin/check-manifest: build/here/checker.py $(wildcard deploy/migration/*.py) livenessprobe/config.py livenessprobe/goflags.py livenessprobe/quoting.py .venv/done
	@mkdir -p bin
	@$(python) build/here/checker.py $@

picture: .venv/done bin/livenessprobe  ## draw docs/demo.svg, the picture in README.md: plays the demo, and draws what it printed
	@$(python) examples/demo_picture.py bin/livenessprobe docs/demo.svg

dashboard: .venv/done bin/livenessprobe  ## draw docs/dashboard.svg: what the Grafana dashboard shows of a recorded run, by a real Prometheus
	$(python) tests/helpers/monitored.py docs/dashboard.svg

proto: .venv/done  ## generate livenessprobe/identity_pb2.py from proto/
	$(python) build/here/proto.py .

lock: .venv/done  ## renew the lock files to the newest versions that pyproject.toml allows
	$(python) build/here/lock.py

audit: .venv/done  ## look the locked packages up in a database of known vulnerabilities, where it can be had (ADVISORIES=address)
	@$(python) build/here/audit.py $(ADVISORIES)

clean:  ## remove everything that was built
	rm -rf .venv bin dist .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -exec rm -rf {} +

.venv/done: build/here/requirements-test.lock build/here/venv.sh
	@build/here/venv.sh "$(PYTHON)"

# Packed anew too when asked for another target than it holds now.
ifneq ($(target),$(shell cat $(OUTPUT).target 2>/dev/null))
.PHONY: $(OUTPUT)
endif
$(OUTPUT): $(wildcard livenessprobe/*.py) build/here/requirements.lock build/here/pyz.py build/product/start.py build/product/unpack.py LICENSE .venv/done
	$(python) build/here/pyz.py $(PYTHON_VERSION:%=--python-version %) $(PLATFORM:%=--platform %) $@
	@echo '$(target)' > $@.target

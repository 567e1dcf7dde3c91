# Every target but clean sets up what it needs: Debian packages (as root) and the virtual environment.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
# Debian's own Python rather than another one that happens to be first in PATH.
PYTHON := $(firstword $(wildcard /usr/bin/python3) python3)
STAMP := $(VENV)/.installed

# What the benchmarks compare with, as far as it can be installed.
PEERS := bindfs mergerfs rclone git

# A file of tests stays in one process: its tests share what is slow to make. Each process is busy with one core.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.PHONY: demo test check crash soak bench bench-quick bench-lab storm lab lint packages lab-packages clean

demo: $(STAMP)
	$(BIN)/python bench/demo.py

test: lint crash lab-packages
	$(PYTEST)

check: lint
	$(PYTEST) -m "not slow" tests/t[0-3]_*.py tests/support_tests

# Crash images and seeded faults in the simulator, the same ones every time; more images for at least SECONDS, or one
# UNIT of work again.
crash: SECONDS := 0
crash: UNIT :=
crash: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m sim.crashes $(if $(UNIT),--unit $(UNIT),--seconds $(SECONDS))

# All questions of bench/questions, or some: `make bench QUESTION="3 5"`; bench-quick takes less than 5 minutes.
bench: QUESTION :=
bench: $(STAMP).bench
	-@.ci/packages $(PEERS)
	$(BIN)/python -m bench $(QUESTION)

bench-quick: QUESTION :=
bench-quick: $(STAMP).bench
	-@.ci/packages $(PEERS)
	$(BIN)/python -m bench --quick $(QUESTION)

# Kills of the daemon, starts of two at once, rounds of each fault of the backing, kills of clients; and a seed.
storm: KILLS ?= 400
storm: RACES ?= 40
storm: FAULTS ?= 10
storm: CANCELS ?= 1000
storm: SEED ?=
storm: $(STAMP)
	CACHEFSD_KILLS=$(KILLS) CACHEFSD_RACES=$(RACES) CACHEFSD_FAULTS=$(FAULTS) CACHEFSD_CANCELS=$(CANCELS) \
	CACHEFSD_SEED=$(SEED) $(BIN)/python -m pytest -x tests/t5_storm.py tests/t5_faults.py tests/t5_cancel.py

# The same campaigns for HOURS (0.5 is half an hour): a third of the time crash images, then rounds with a new SEED each,
# of storms, random histories and power cuts in emulated machines. The last round is finished.
soak: HOURS ?= 1
soak: SEED ?=
soak: $(STAMP) lab-packages
	.ci/soak $(HOURS) $(SEED)

# All scenarios of tests/lab, or some: `make lab SCENARIO=powercut CUTS=100 SEED=1`.
lab: $(STAMP) lab-packages
	PYTHONPATH=tests $(BIN)/python -m lab $(SCENARIO)

# The cache against dm-writecache, dm-cache and bcache in one emulated machine; about half an hour as it is.
bench-lab: ROUNDS ?= 3
bench-lab: SECONDS ?= 2
bench-lab: DELAYS ?= 0 2 8
bench-lab: OPTIONS ?=
bench-lab: $(STAMP).bench lab-packages
	PYTHONPATH=tests $(BIN)/python -m bench.lab --rounds $(ROUNDS) --seconds $(SECONDS) --delays $(DELAYS) $(OPTIONS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet
	$(BIN)/mypy --strict -p cachefsd
	$(BIN)/mypy --config-file tests/mypy.ini tests bench

packages:
	@.ci/packages

lab-packages:
	@.ci/packages qemu-system-x86 mmdebstrap

# pip takes its index and proxies from PIP_* in the environment.
$(STAMP): pyproject.toml | packages
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

$(STAMP).bench: $(STAMP)
	$(BIN)/pip install --quiet -e '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis bench/results
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

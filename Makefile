# SPDX-License-Identifier: MIT
# The two commands a newcomer needs are `make run` and `make test`; `make help` lists the rest.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
PYTEST := $(VENV)/bin/pytest
HOST ?= lab
NAME ?= lab
LIVES ?= 10000
TARGET ?= all
SECONDS ?= 60

.DEFAULT_GOAL := help

# What `python3 -m venv` itself needs comes first; everything else is installed by tools from that environment.
$(VENV)/ready: requirements/dev.txt
	@python3 -c 'import ensurepip' 2>/dev/null || { echo "installing python3-venv"; \
	  apt-get -q update >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get -q -y install python3-venv >/dev/null; }
	@echo "making $(VENV)"
	@python3 -m venv $(VENV)
	@$(PY) -m pip install -q --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@echo $(CURDIR)/src > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/banger-src.pth"
	@touch $@

.PHONY: run test lint unit contract root lab long rights soak fuzz coverage strict guest wheel setup lab-up lab-ssh lab-down screens bench clean help

run: setup guest  ## Boot a microVM and run a command in it, in the lab (HOST=local OWNER=you: on this machine)
	$(PY) -m lab.demo --host $(HOST) $(if $(OWNER),--owner $(OWNER))

# The tests whose reach into the helper is measured; without the lab: what only real KVM and device-mapper reach is
# asked there, and not counted.
HELPER_TESTS := $(wildcard tests/unit/test_helper_*.py tests/root/test_helper_*.py tests/root/test_console.py \
  tests/root/test_spare_taps.py tests/root/test_packet_rules*.py tests/root/test_*_firewalls.py)
COVERAGE := $(VENV)/bin/coverage

# What labs start from is made beside the first checks and tests; a lab that needs it before waits for it. Three
# workers for two processors: tests that wait leave one to the labs (tests/order.py). What is compiled is kept,
# whatever the environment says: workers, and the hundreds of daemons that tests start, would each compile it again.
test: setup guest  ## Install what is missing and run the tests
	@mkdir -p build && { $(PY) -m lab build >build/lab.log 2>&1 & }
	@$(MAKE) --no-print-directory lint
	@rm -rf build/coverage
	PYTHONDONTWRITEBYTECODE= BANGER_COVERAGE="$(HELPER_TESTS)" \
	$(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder --maxfail 20 --durations 20 \
	  tests/contract tests/lab tests/root tests/unit tests/style
	@$(COVERAGE) combine -q
	@$(COVERAGE) report >build/coverage/report || { cat build/coverage/report; exit 1; }

setup: $(VENV)/ready
	@$(PY) -m lab setup

lint: $(VENV)/ready  ## Check format, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

unit: guest  ## Run the style and unit tests
	$(PYTEST) tests/style tests/unit

contract: guest  ## Run the contract tests: the pipeline on fakes
	$(PYTEST) tests/contract

root: setup guest  ## Run the tests that need root on this machine
	$(PYTEST) tests/root

lab: setup guest  ## Run the tests that boot real microVMs in the lab
	$(PYTEST) tests/lab

long: setup guest  ## Run the lab tests that `make test` leaves out for their time
	BANGER_LONG=only $(PYTEST) tests/lab

# Where the helper does all that it can do. None of them restarts the host: what is counted is in its kernel. None
# of them upgrades: what the unit runs is replaced while it is recorded.
RIGHTS := $(addprefix tests/lab/test_,main_path.py network_lab.py failures.py helper_lab.py \
  crash_drill.py::test_a_random_walk_of_kills)
rights: setup guest  ## Record in the lab what the helper asks of the kernel; compare with tests/rights.txt
	@rm -rf build/rights
	BANGER_LONG=also BANGER_RIGHTS=build/rights BANGER_DRILL_KILLS=10 $(PYTEST) $(RIGHTS)
	@$(PY) -m lab.rights build/rights build/rights.txt

soak: guest  ## Live LIVES (10000) VM lives with faults on the fakes, in a simulated day
	BANGER_SOAK_LIVES=$(LIVES) $(PYTEST) -s tests/contract/test_soak.py

fuzz: guest  ## Fuzz one parser for longer (TARGET=dns SECONDS=3600)
	$(PY) -m tests.fuzz $(TARGET) $(SECONDS)

# Not in `lint`: it comes by npm, which nothing else here needs.
strict: $(VENV)/ready  ## Check types of the helper and the contract with pyright, strictly; needs npm
	npm exec --yes --package=pyright@1.1.414 -- pyright

coverage: setup guest  ## Measure how much of the helper its own tests reach, as `make test` does; fails below 95 %
	@rm -rf build/coverage
	BANGER_COVERAGE="$(HELPER_TESTS)" $(PYTEST) -q -n 3 --dist loadfile $(HELPER_TESTS)
	@$(COVERAGE) combine -q
	$(COVERAGE) report

guest: $(VENV)/ready  ## Build the guest binary
	@$(PY) guest/build_hook.py

wheel: guest  ## Build banger's wheel into dist/
	$(PY) -m build --wheel --no-isolation

lab-up: setup  ## Bring up a lab with banger installed, to use by hand (NAME=lab)
	$(PY) -m lab.demo --up $(NAME)

lab-ssh:  ## Open a shell in that lab
	$(PY) -m lab ssh --name $(NAME) --user dev

lab-down:  ## End that lab
	$(PY) -m lab down --name $(NAME)

screens: setup guest  ## Take the documentation's pictures of a terminal anew, in a lab
	$(PY) -m lab.screens

bench: setup guest  ## Measure, each figure beside its rival in one run
	$(PY) -m bench

clean:  ## Remove what the build made in this tree
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis src/banger/_guest

help:  ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

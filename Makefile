# SPDX-License-Identifier: MIT
# The two commands a newcomer needs are `make run` and `make test`; `make help` lists the rest.
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python

.DEFAULT_GOAL := help

$(VENV)/ready: requirements/dev.txt
	python3 -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@echo $(CURDIR)/src > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/banger-src.pth"
	@touch $@

.PHONY: lint unit clean help

lint: $(VENV)/ready  ## Check format, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

unit: $(VENV)/ready  ## Run the unit tests
	$(VENV)/bin/pytest tests/style tests/unit

clean:  ## Remove what the build made in this tree
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis src/banger/_guest

help:  ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

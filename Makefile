# Two commands: make run, make test. Each target sets up .venv first and then calls the package.
PYTHON ?= python3
BIN := .venv/bin
# these run two processes of their own; of the others, two at a time
PAIRED := tests/test_notebooks.py tests/test_mutants.py
.DEFAULT_GOAL := help
.PHONY: help run test lab docs clean

help:  ## show this help
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 8

run: .venv/labs  ## run every chapter; report in _run/index.html
	@$(BIN)/tunebook run

test: .venv/dev  ## run all tests, on two cores
	@bad=0; $(BIN)/python -m pytest $(PAIRED) || bad=1; \
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PAIRED:%=--ignore=%) || bad=1; exit $$bad

lab: .venv/labs  ## open JupyterLab at the labs' index; the chapters are in nbs
	@$(BIN)/jupyter lab --LabApp.app_settings_dir=tutorial/.lab --LabApp.default_url=/lab/tree/tutorial/README.md

docs: .venv/labs  ## render the chapters as they stand into _docs/index.html
	@$(BIN)/tunebook docs

clean:  ## remove everything that was made
	rm -rf .venv _run _docs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

.venv/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tunebook needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv .venv && touch $@

.venv/labs: .venv/pip settings.ini setup.py constraints.txt
	@echo "Installing into .venv (a few minutes, once)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[labs]' && touch $@

.venv/dev: .venv/labs
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[labs,dev]' && touch $@

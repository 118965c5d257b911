# Two commands matter: `make tune` and `make test`. Each sets up what it needs, from nothing; `make help` lists the rest.

VENV    ?= .venv
SPACE   ?= nuclei.yaml
PYTHON  ?= $(shell for p in python3.11 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
RUN     := $(VENV)/bin/python
JOBS    ?= 2
# A process that dies ends the run: pytest-xdist would wait for ever for the files of its successor.
PYTEST  := $(RUN) -m pytest -n $(JOBS) --dist loadfile --max-worker-restart=0
READY   := $(VENV)/.ready
PENDING := $(VENV)/.installing
POSTGRES := $(shell command -v initdb || ls -d /usr/lib/postgresql/*/bin/initdb 2>/dev/null)
BROWSER := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

# An environment whose interpreter is gone (Python was upgraded, the folder was copied) counts as none.
BROKEN := $(shell test -e $(READY) && ! $(RUN) -c '' 2>/dev/null && echo broken)

# $(call apt_install,PACKAGE): succeeds only as root where there is apt-get.
apt_install = { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && timeout 600 apt-get update -qq \
	&& DEBIAN_FRONTEND=noninteractive timeout 900 apt-get install -y -qq --no-install-recommends $(1); } </dev/null >/dev/null 2>&1

.DEFAULT_GOAL := help
.PHONY: help setup tune test faults lint lock bench report-browser postgres clean broken

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

setup: $(READY) ## make the environment .venv as locked; does nothing where it is current

# Made in place where an environment works, so that a changed lock is seconds. One whose installation was
# interrupted may hold half a package that pip takes for whole, so it is made anew.
$(READY): requirements.lock $(BROKEN)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "setup: no Python 3.11 or newer found; install it or give make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "setup: installing python3-venv"; $(call apt_install,python3-venv); } \
		|| { echo "setup: $(PYTHON) cannot make environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@if [ -e $(PENDING) ] || ! $(RUN) -m pip --version >/dev/null 2>&1; then \
		echo "setup: making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); fi
	@touch $(PENDING)
	@echo "setup: installing $$(grep -c '^[a-z]' requirements.lock) locked packages into $(VENV) (on a first run about 3 GB to download, some minutes)"
	@$(RUN) -m pip install -qq --no-input --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@rm $(PENDING) && touch $@ && echo "setup: done"

tune: setup ## search: SPACE=nuclei.yaml, more flags in ARGS="--set search.trials=64"
	@$(RUN) tune.py --space $(SPACE) $(ARGS)

test: setup report-browser postgres lint ## lint and all tests that need neither a GPU nor patience; JOBS processes, more flags in ARGS
	@$(PYTEST) $(ARGS)

faults: setup ## break searches in every way and count what is lost: a table
	@$(PYTEST) -m faults tests/faults $(ARGS)

lint: setup ## ruff, mypy and the rules about imports
	@echo "lint: ruff, mypy, imports"
	@$(RUN) -m ruff check -q .
	@$(RUN) -m ruff format --check -q . || { echo "lint: format with $(VENV)/bin/ruff format ." >&2; exit 1; }
	@$(RUN) -m mypy --no-error-summary
	@found=$$($(VENV)/bin/lint-imports --no-logo 2>&1) || { echo "$$found" >&2; exit 1; }

lock: setup ## resolve pyproject.toml into requirements.lock; ARGS=--upgrade takes the newest versions
	@echo "lock: resolving and hashing (some minutes)"
	@CUSTOM_COMPILE_COMMAND="make lock" $(RUN) -m piptools compile -q --extra dev --generate-hashes --allow-unsafe \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options --no-annotate --strip-extras \
		--output-file requirements.lock $(ARGS) pyproject.toml

bench: setup ## measure: NAME=..., without it all are listed
	@$(RUN) -m benchmarks $(NAME) $(ARGS)

report-browser: ## the browser that the report's test opens; without one that test is skipped
	@[ -n "$(BROWSER)" ] || { echo "report-browser: installing chromium" && $(call apt_install,chromium); } \
		|| echo "report-browser: no chromium here and no way to install it: the report's browser test will be skipped"

postgres: ## the database that tests start for themselves; without one those tests are skipped
	@[ -n "$(POSTGRES)" ] || { echo "postgres: installing postgresql" && $(call apt_install,postgresql); } \
		|| echo "postgres: no PostgreSQL here and no way to install it: tests of a study in a database will be skipped"

clean: ## remove the environment and all caches; runs/ stays
	@rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

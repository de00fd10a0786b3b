# Thin: every command here can be typed by hand. Needs Python 3.11, make and git, and nothing installed before.
# Another interpreter: make test PYTHON=/path/to/python3.11

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
S3RVER := $(VENV)/s3rver/.installed
PYTHON ?= $(firstword $(foreach p,python3.11 python3 python,$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1 && echo $(p))))

.PHONY: demo test lint format setup hooks images clean

demo: $(STAMP)
	$(BIN)/python -m swav.pretrain --recipe demo --output runs/demo

test: lint $(S3RVER)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(STAMP)

# Versions come from constraints.txt alone, the build's own included.
$(STAMP): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 is needed, and '$(or $(PYTHON),python3.11)' is not it. Install it, or say where it is:" \
			"make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up $(VENV): a few minutes, most of them for PyTorch"
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check --quiet \
		--editable '.[train,launch,eval,dev]'
	@touch $@

# The tests' second S3 server, its versions and checksums from the lock file; without npm its tests are skipped.
$(S3RVER): tests/support/s3rver/package-lock.json $(STAMP)
	@if command -v npm >/dev/null; then \
		mkdir -p $(@D) && cp tests/support/s3rver/package*.json $(@D) && \
		npm ci --prefix $(@D) --ignore-scripts --no-audit --no-fund --loglevel=error && touch $@; \
	else echo "npm is missing: the tests on s3rver will be skipped" >&2; fi

hooks: $(STAMP)
	$(BIN)/pre-commit install

images:
	docker build --tag swav-pretrain:$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' swav/__init__.py) .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache

# Thin: every command here can be typed by hand. Needs Python 3.11, make and git, and nothing installed before.
# Another interpreter: make test PYTHON=/path/to/python3.11

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
S3RVER := $(VENV)/s3rver/.installed
PYTHON ?= $(firstword $(foreach p,python3.11 python3 python,$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1 && echo $(p))))

.PHONY: demo test lint format setup hooks images lock clean

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
		--editable '.[train,launch,eval,export,dev]'
	@touch $@

# The tests' second S3 server, its versions and checksums from the lock file; without npm its tests are skipped.
$(S3RVER): tests/support/s3rver/package-lock.json $(STAMP)
	@if command -v npm >/dev/null; then \
		mkdir -p $(@D) && cp tests/support/s3rver/package*.json $(@D) && \
		npm ci --prefix $(@D) --ignore-scripts --no-audit --no-fund --loglevel=error && touch $@; \
	else echo "npm is missing: the tests on s3rver will be skipped" >&2; fi

hooks: $(STAMP)
	$(BIN)/pre-commit install

# Images: TAG, another engine (DOCKER), and arguments of every build (IMAGE_ARGS, see docs/images.md) may be given.
DOCKER ?= docker
TAG ?= $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' swav/__init__.py)
SOURCE = $(or $(shell git config --get remote.origin.url | sed 's|//[^@/]*@|//|'),unknown)
BUILD = DOCKER_BUILDKIT=1 $(DOCKER) build $(IMAGE_ARGS) --build-arg VERSION=$(TAG) \
	--build-arg REVISION=$$(git describe --always --abbrev=40 --dirty) \
	--build-arg CREATED=$$(git log -1 --format=%cI) --build-arg SOURCE=$(SOURCE)

images:
	$(BUILD) --target python --tag swav-python:$(TAG) .
	$(BUILD) --target wheel --tag swav-wheel:$(TAG) .
	$(BUILD) --target pretrain --tag swav-pretrain:$(TAG) .
	$(BUILD) --build-arg BASE=swav-pretrain:$(TAG) --tag swav-assign:$(TAG) images/assign
	$(BUILD) --build-arg BASE=swav-pretrain:$(TAG) --build-arg WHEEL=swav-wheel:$(TAG) --tag swav-eval:$(TAG) \
		--file images/eval/Dockerfile .
	$(BUILD) --build-arg BASE=swav-python:$(TAG) --build-arg WHEEL=swav-wheel:$(TAG) --tag swav-launcher:$(TAG) \
		--file images/launcher/Dockerfile .

# The images' packages with their hashes, from constraints.txt. GPU: what comes with torch, and with another torch does not.
LOCK = uv pip compile --quiet --generate-hashes --no-annotate --custom-compile-command "make lock" --python-version 3.11 \
	--python-platform x86_64-manylinux_2_28 --constraint constraints.txt
GPU = $(shell sed -nE 's/^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==.*/--no-emit-package \1/p' constraints.txt)

lock:
	echo torch torchvision | tr ' ' '\n' | $(LOCK) --output-file images/locks/torch.txt -
	$(LOCK) --extra train $(GPU) --output-file images/locks/train.txt pyproject.toml
	$(LOCK) --extra eval $(GPU) $$(sed -nE 's/^([a-z0-9-]+)==.*/--no-emit-package \1/p' images/locks/train.txt) \
		--output-file images/locks/eval.txt pyproject.toml
	$(LOCK) --extra launch --output-file images/locks/launch.txt pyproject.toml
	echo setuptools cyclonedx-bom | tr ' ' '\n' | $(LOCK) --output-file images/locks/build.txt -

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache

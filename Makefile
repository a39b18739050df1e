# Each target is enough by itself on a fresh machine: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

# MLX needs one backend package on Linux and none on macOS.
ifeq ($(shell uname -s),Linux)
BACKEND ?= $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)
endif
comma := ,
EXTRAS := $(if $(BACKEND),$(BACKEND)$(comma))dev

.PHONY: install demo test test-fast test-sd3 lint blas browser clean

install: $(VENV)/installed blas

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) has no venv; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

# MLX's CPU wheel multiplies some 40 to 90 times slower without OpenBLAS, but it does multiply.
blas:
	@sh tools/install_blas.sh

# The tests look at the report's page in a real browser; nothing else needs one.
browser: $(VENV)/installed
	@sh tools/install_browser.sh $(BIN)/python

demo: install
	$(BIN)/ditq doctor
	$(BIN)/ditq demo

test: install browser
	$(BIN)/python -m pytest -m "not sd3"

test-fast: install
	$(BIN)/python -m pytest -m "not slow and not sd3"

test-sd3: install
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS),sd3,parity]'
	$(BIN)/python -m pytest -m sd3

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .ruff_cache .hypothesis

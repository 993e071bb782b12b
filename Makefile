# make demo | demo-small | test | test-all | fuzz | lint | docs | bench | report | gpu | clean
# Everything runs in .venv, which the first target makes from nothing; a changed pin installs again.

PYTHON ?= python3
VENV ?= .venv
OUT ?= benchmarks/results/gpu
BUDGET ?= 530
# How long `make fuzz` looks.
SECONDS ?= 600
# Processes that the tests run in: one a core, and no more than fit in memory.
WORKERS ?= auto --maxprocesses 8

# Every process that starts would compile the sources of torch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt
PINS := $(shell cat constraints.txt requirements-faces.txt setup.py | cksum | cut -d' ' -f1)
DEMO_READY := $(VENV)/.demo-$(PINS)
DEV_READY := $(VENV)/.dev-$(PINS)
# There while packages are being installed: an installation that was cut off is started over.
INSTALLING := $(VENV)/.installing
# How long it took, for the demo's account of its time.
INSTALL_SECONDS := $(VENV)/.install-seconds
EXTENSION := kernels/unif2ace_kernels/_build.json

.PHONY: demo demo-small test test-all fuzz lint docs bench report gpu clean

demo: $(DEMO_READY) $(EXTENSION)
	UNIF2ACE_INSTALL_SECONDS=$$(cat $(INSTALL_SECONDS)) $(VENV)/bin/unif2ace demo

demo-small: $(DEMO_READY) $(EXTENSION)
	UNIF2ACE_INSTALL_SECONDS=$$(cat $(INSTALL_SECONDS)) $(VENV)/bin/unif2ace demo --small

test: $(DEV_READY) $(EXTENSION)
	$(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-all: $(DEV_READY) $(EXTENSION)
	$(PY) -m pytest -n $(WORKERS) --dist worksteal

fuzz: $(DEV_READY) $(EXTENSION)
	$(PY) tests/fuzz/long.py --seconds $(SECONDS) -n $(WORKERS) --dist worksteal

lint: $(DEV_READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# The pages of the kernels' public functions, in build/site.
docs: $(DEV_READY)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict -q

bench: $(DEV_READY) $(EXTENSION)
	$(PY) -m benchmarks.cpu

report: $(DEV_READY)
	$(PY) -m benchmarks.report

# On a GPU machine with its own torch: no environment is made and nothing is fetched.
gpu:
	$(PYTHON) -m benchmarks.gpu --out $(OUT) --budget $(BUDGET)

clean:
	rm -rf $(VENV) build *.egg-info kernels/*.egg-info kernels/unif2ace_kernels/_C*.so $(EXTENSION)
	rm -rf .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch, setuptools and pybind11 come first: the extension is built against the torch that is installed.
$(DEMO_READY):
	if [ -e $(INSTALLING) ] || ! $(PY) -m pip --version >/dev/null 2>&1; then \
	  rm -rf $(VENV); \
	  $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "make: '$(PYTHON) -m venv' failed: install Python's venv module (Debian, Ubuntu: python3-venv)," \
	      "or name another Python >= 3.10: make PYTHON=..." >&2; exit 1; }; \
	fi
	rm -f $(VENV)/.demo-* $(VENV)/.dev-*
	date +%s >$(INSTALLING)
	$(PIP) torch setuptools pybind11
	$(PIP) --no-build-isolation -e '.[demo]'
	$(PIP) --no-deps --require-hashes -r requirements-faces.txt
	echo $$(($$(date +%s) - $$(cat $(INSTALLING)))) >$(INSTALL_SECONDS)
	rm $(INSTALLING)
	touch $@

$(DEV_READY): $(DEMO_READY)
	mv $(DEMO_READY) $(INSTALLING)
	$(PIP) --no-build-isolation -e '.[demo,dev]'
	mv $(INSTALLING) $(DEMO_READY)
	touch $@

$(EXTENSION): kernels/build_extension.py $(shell find csrc -type f) | $(DEMO_READY)
	$(PY) setup.py -q build_ext --inplace

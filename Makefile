# Needs make, Python >= 3.11 and a package index; everything else goes into $(VENV). `make help` lists the commands.
PYTHON      ?= python3
VENV        ?= .venv
VENV_ARGS   ?=
CONSTRAINTS ?= constraints.txt
PROFILE     ?= cpu
ARGS        ?=

PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers

# The kernel called python3 is this environment's, whatever kernels the home folder holds.
export JUPYTER_PREFER_ENV_PATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install reproduce smoke test bench lab clean distclean
.NOTPARALLEL:

help:
	@echo "make reproduce   create $(VENV), install, run every notebook headless, write figures/ and notebooks/rendered/   (PROFILE=$(PROFILE))"
	@echo "make test        create $(VENV) if absent, install, run the tests and the notebooks (pytest + nbval)"
	@echo "make smoke       every notebook with the smallest settings, in a few minutes"
	@echo "make bench       measure what curvature and routers cost beside the model's own passes, write data/bench/ (ten minutes)"
	@echo "make lab         open the notebooks in JupyterLab"
	@echo "make install     only create $(VENV) and install"
	@echo "make clean       remove finished artefacts, executed copies and caches; figures/ stays (distclean: $(VENV) too)"
	@echo ""
	@echo "Variables: PROFILE=smoke|cpu|gpu|paper, PYTHON=python3.12 (any >= 3.11), VENV=.venv, ARGS=... is passed on:"
	@echo "  make reproduce ARGS=\"--only 04\"          one chapter"
	@echo "  make reproduce ARGS=\"--task FOLDER\"      your own questions (train and test, parquet or jsonl)"
	@echo "  make test ARGS=\"tests -k store\"          some tests"
	@echo "Versions: constraints.txt pins them; CONSTRAINTS= installs within the ranges of pyproject.toml instead."
	@echo "A torch outside the environment is used with VENV_ARGS=--system-site-packages CONSTRAINTS="
	@echo "More: $(PY) -m bmoe_utils --help"

install: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "error: $(PYTHON) is missing or older than Python 3.11. Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }; \
	  echo "== creating $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv $(VENV_ARGS) $(VENV) || { \
	    echo "error: $(PYTHON) -m venv failed; on Debian and Ubuntu the package python3-venv holds it." >&2; exit 1; }; }
	@echo "== installing into $(VENV) ($(if $(CONSTRAINTS),versions of $(CONSTRAINTS),newest versions in range)); minutes where nothing is cached"
	@$(PY) -m pip install -qq --no-compile $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[study,test]' || { \
	  echo "error: the installation failed; pip says why above (more: $(PY) -m pip install $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[study,test]')" >&2; \
	  $(if $(CONSTRAINTS),echo "If a pinned version does not exist for this Python or platform ($(CONSTRAINTS) was made with Python 3.11 on Linux):" >&2; \
	  echo "  repeat with CONSTRAINTS= to install within the ranges of pyproject.toml; figures may then differ in the last digits." >&2;) exit 1; }
	@# by all cores, where pip would use one, and without the libraries' own tests; what does not compile is no loss
	@$(PY) -m compileall -qq -j 0 -x /tests/ $(VENV)/lib >/dev/null 2>&1 || true
	@touch $(STAMP)

# The libraries that tests and benchmarks compare with are optional: where they cannot be installed, those tests skip and say why. Without
# their dependencies, which are listed too, since these would bring a torchvision that does not fit torch.
$(PEERS): tests/benchmarks/peers.txt $(STAMP)
	@$(PY) -m pip install -qq --retries 1 --timeout 10 --no-deps -r $< >/dev/null 2>&1 && touch $@ || \
	  echo "note: $< could not be installed; what compares with these libraries is left out (by hand: $(PY) -m pip install --no-deps -r $<)"

reproduce: $(STAMP)
	@echo "== running the notebooks, profile $(PROFILE)"
	@$(PY) -m bmoe_utils reproduce --profile $(PROFILE) $(ARGS)

smoke:
	@$(MAKE) --no-print-directory reproduce PROFILE=smoke

# Neither tests nor notebooks may need the network: the hub is switched off. A file or notebook to a process, one a core, in the
# order of tests/conftest.py: by their numbers of tests, the longest file would come last.
test: $(STAMP) $(PEERS)
	@echo "== running the tests and the notebooks with their smoke values"
	@HF_HUB_OFFLINE=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

# One thread each, one after another: the figures are ratios within a run. gpu_shapes.py needs a large GPU and is run by hand.
BENCHMARKS := curvature_floor curvature_scaling accuracy_and_time peers router_latency

bench: $(STAMP) $(PEERS)
	@for name in $(BENCHMARKS); do echo "== $$name"; $(PY) tests/benchmarks/$$name.py || exit 1; done
	@$(PY) tests/benchmarks/targets.py

lab: $(STAMP)
	@echo "== JupyterLab on notebooks/; a chapter runs with its smoke values unless its parameters cell is changed"
	@$(PY) -m jupyterlab $(ARGS) notebooks

clean:
	rm -rf data/cache data/runs .pytest_cache build *.egg-info
	find bmoe_utils tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv

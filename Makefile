# Needs Python >= 3.11 and make; everything else goes into .venv on first use.
PYTHON ?= python3
OUT ?= runs/demo
SEED ?= 0

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SCRIPTS := $(wildcard *.py)
# One word for the shell, whatever spaces and quotes it holds.
quoted = '$(subst ','\'',$(1))'
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.DEFAULT_GOAL := help
.PHONY: help install demo serve test check integration cluster e2e proof avalanche peers clean \
	lint types layers doctest unit

help: ## print this list
	@echo "lifelong_ray: make <target>"
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED) ## make .venv with the tested versions

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python >= 3.11 is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1);" \
	       "name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV) (some minutes and 7 GB the first time)"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## the whole loop on real images: OUT=runs/demo SEED=0 [DATA=source]
	$(BIN)/lifelong demo --out $(call quoted,$(OUT)) \
	  --seed $(call quoted,$(SEED)) $(if $(DATA),--data $(call quoted,$(DATA)))

# Serve reads these two when it starts, so they cannot come from the application.
serve: $(INSTALLED) ## the HTTP application on this machine: [ARGS="config=conf/local.yaml"]
	RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1 \
	  $(BIN)/serve run serve_app:app $(ARGS)

test: $(INSTALLED) ## everything that must pass before a change goes in
	@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory integration
	@$(MAKE) --no-print-directory cluster
	@$(MAKE) --no-print-directory e2e

check: $(INSTALLED) ## the fast part: ruff, mypy, import-linter, doctests, unit tests
	@$(MAKE) --no-print-directory -k -j2 --output-sync=target unit types doctest lint layers

integration: $(INSTALLED) ## real files and a real S3 server, no Ray
	$(PYTEST) tests/integration

cluster: $(INSTALLED) ## a real Ray on this machine
	$(PYTEST) tests/cluster

e2e: $(INSTALLED) ## the whole loop, from the outside
	$(PYTEST) tests/e2e

proof: $(INSTALLED) ## the long forms of statistical claims (many minutes)
	$(PYTEST) -m proof --timeout=7200

# Only the comparisons in benchmarks/ use it: no dependency, so not in constraints.txt.
AVALANCHE := avalanche-lib==0.6.0
PEER := .venv-avalanche

avalanche: $(PEER)/.installed ## make .venv-avalanche: Avalanche 0.6.0, which benchmarks/ compares with

$(PEER)/.installed: constraints.txt
	@test -x $(PEER)/bin/python || $(PYTHON) -m venv $(PEER)
	@echo "installing into $(PEER) (some minutes and 7 GB the first time)"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(PEER)/bin/python -m pip install -q \
	  $$(grep -E '^(torch|torchvision|numpy)==' constraints.txt) '$(AVALANCHE)'
	@$(PEER)/bin/python -W ignore -c 'import avalanche.training'
	@touch $@

# The servers that benchmarks/serving.py compares with: each in an environment of its own, on top of
# this project's, from which it takes the model and torch.
PEERS := fastapi litserve bentoml
PEER_PACKAGES_fastapi := fastapi uvicorn[standard]
PEER_PACKAGES_litserve := litserve==0.2.19
PEER_PACKAGES_bentoml := bentoml==1.4.40
LIBRARIES := -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'

peers: $(PEERS:%=.venv-peers/%/.installed) ## make .venv-peers: servers to compare ours with

.venv-peers/%/.installed: $(INSTALLED)
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@$(BIN)/python $(LIBRARIES) > "$$($(@D)/bin/python $(LIBRARIES))/project.pth"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(@D)/bin/python -m pip install -q $(PEER_PACKAGES_$*)
	@touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy lifelong_ray $(SCRIPTS)

layers: $(INSTALLED)
	$(BIN)/lint-imports --no-logo

doctest: $(INSTALLED)
	$(PYTEST) --doctest-modules -p no:cacheprovider lifelong_ray

unit: $(INSTALLED)
	$(PYTEST) tests/unit

clean: ## remove caches and build outputs; .venv and runs stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

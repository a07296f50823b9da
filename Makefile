# Needs only make and Python 3.11 to 3.13; everything else goes into .venv.
PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
TORCH ?= 2.13.0

BIN := .venv/bin
INSTALLED := .venv/.installed
INSTALLING := .venv/.installing
KERNELS := .venv/.kernels
CPU := implicit_attention/causal/cpu

.DEFAULT_GOAL := help
.PHONY: help demo test lint types bench gpu constraints clean

help: ## this list
	@echo 'make TARGET [PYTHON=python3.12] [ARGS="..."]'
	@echo
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

demo: $(KERNELS) ## watch the layer settle and win the recall race; writes demo/ (ARGS=--quick: 30 seconds)
	$(BIN)/implicit-attention demo --out demo $(ARGS)

# One thread per worker: the workers fill the cores, and torch's own threads would only get in their way.
test: $(KERNELS) lint types ## lint, types, every test, and coverage (ARGS='-k picard --no-cov': a part of them)
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov $(ARGS)

lint: $(INSTALLED) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## mypy, strict on the package
	$(BIN)/mypy

bench: $(KERNELS) ## the benchmarks (ARGS=bidirectional: that one)
	$(BIN)/python -m benchmarks $(ARGS)

gpu: $(INSTALLED) ## on a CUDA device: the kernels' tests there, then what they cost (ARGS='--lengths 8192')
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch finds no CUDA device here")'
	$(BIN)/python -m pytest -q --no-cov tests/causal/triton tests/attention/test_flash_cuda.py tests/test_precision.py
	$(BIN)/python -m benchmarks gpu $(ARGS)

# The newest versions that go with torch $(TORCH), from a fresh environment.
constraints: ## write constraints.txt anew (TORCH=2.13.0)
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT INT TERM && set -e && \
	$(PYTHON) -m venv "$$scratch" && \
	"$$scratch/bin/python" -m pip install "torch==$(TORCH)" -e '.[all]' && \
	{ echo '# The versions this project is tested against; `make constraints` writes this file.'; \
	  "$$scratch/bin/python" -m pip freeze --all --exclude pip --exclude-editable | sed 's/+.*//'; \
	} > "$$scratch/constraints.txt" && cp "$$scratch/constraints.txt" constraints.txt

clean: ## remove .venv, demo/ and everything built or cached
	rm -rf .venv demo build dist htmlcov .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f .coverage .coverage.* coverage.xml
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# .installing stands while pip works: an environment found with it was cut off half-way and is built from nothing.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] < (3, 14)))' 2>/dev/null || { \
	  echo 'implicit-attention needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is' \
	    "$$($(PYTHON) --version 2>/dev/null || echo not found)." 'Name one that fits: make ... PYTHON=python3.12' >&2; exit 1; }
	@if [ -e $(INSTALLING) ]; then rm -rf .venv; fi
	@mkdir -p .venv && rm -f $(INSTALLED) && touch $(INSTALLING)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[all]'
	@mv $(INSTALLING) $(INSTALLED) && touch $(INSTALLED) $(KERNELS)

# pip has built the C++ kernels; they are built again when their sources change.
$(KERNELS): $(INSTALLED) $(wildcard $(CPU)/csrc/*) $(CPU)/build.py
	$(BIN)/python $(CPU)/build.py
	@touch $(KERNELS)

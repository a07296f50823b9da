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
.PHONY: help demo check test docs kernels sanitize lint types bench gpu constraints clean

help: ## show this list
	@echo 'make TARGET [PYTHON=python3.12] [ARGS="..."]'
	@echo
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-14s %s\n", $$1, $$2 }'

demo: $(KERNELS) ## solve the original example, compare solvers, train three small models; writes demo/ (half a minute; ARGS=--quick: less)
	$(BIN)/implicit-attention demo --out demo $(ARGS)

# The tests that find most mistakes for their time: inputs, the map, the solvers, the causal engine against its oracle.
QUICK := tests/test_scaffold.py tests/test_bad_input.py tests/test_oracle.py tests/test_cache.py tests/test_seed.py \
	tests/attention/test_attention.py tests/equilibrium/test_linear.py tests/equilibrium/test_solvers.py \
	tests/causal/test_engine_oracle.py tests/causal/test_gains.py
check: $(KERNELS) lint types ## lint, types, and a quick part of the tests (1 to 2 minutes)
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(QUICK) $(ARGS)

# One thread per worker: the workers fill the cores, and threads of torch's own would compete with them.
test: $(KERNELS) lint types ## lint, types, every test, and coverage (15 to 25 minutes; ARGS='-k picard --no-cov': a part of them)
	OMP_NUM_THREADS=1 MPLBACKEND=Agg $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov $(ARGS)

# The tests build it too (tests/test_site.py), so that CI needs no step of its own.
docs: $(KERNELS) ## the documentation site, in build/site: tutorials run, warnings are errors (1 minute)
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -E -W --keep-going -j $(WORKERS) -c docs -d build/doctrees . build/site $(ARGS)
	@echo 'Open build/site/index.html'

# Minutes of interpreter for each change of a few files: apart, so that `make test` stays short.
kernels: $(KERNELS) ## Triton's sweeps in the interpreter, every access to memory checked, kernels compiled (15 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --no-cov -m kernels $(ARGS)

# Torch itself leaks on purpose. One thread: the sanitizers' own work is enough for a core.
SETS ?= $(if $(filter x86_64,$(shell uname -m)),baseline avx2) native
WATCHED := tests/causal/cpu/test_forward_and_adjoint.py tests/causal/test_feedback.py \
	-k '(edges and (N17 or N65) and not H8) or (every_option and N70) or edges_of_blocks or biases or given_up or hard_weights'
sanitize: $(KERNELS) ## the C++ kernels under AddressSanitizer and UBSan, by instruction set (3 minutes; SETS=native: 1)
	@command -v '$(CXX)' >/dev/null || { echo 'make sanitize needs a C++ compiler (CXX=$(CXX) is not found).' >&2; exit 1; }
	@set -e; for set in $(SETS); do echo "instruction set: $$set"; \
	  $(BIN)/python $(CPU)/build.py "build/sanitized/$$set" "--sanitize=$$set"; \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
	    IMPLICIT_ATTENTION_CPU_LIBRARY="build/sanitized/$$set/libimplicit_attention_cpu.so" \
	    $(BIN)/python -m pytest -q --no-cov -p no:cacheprovider $(WATCHED) $(ARGS); \
	done

lint: $(INSTALLED) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## mypy, strict on the package
	$(BIN)/mypy

bench: $(KERNELS) ## run a benchmark (ARGS=bidirectional)
	$(BIN)/python -m benchmarks $(ARGS)

# A device may be lent for minutes: the kernels' tests that matter most come first, figures are kept row by row in
# $(GPU)/gpu.json, and a second call measures what the first one left.
GPU := build/gpu
GPU_PYTHON = $(BIN)/python
GPU_TESTS := $(patsubst %,tests/causal/triton/test_triton_%.py,sweeps decoding kernels blocks) \
	tests/attention/test_flash_cuda.py tests/test_precision.py
GPU_SELECTED := not compiles_for and not registers# compilers need no device
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(INSTALLED)) ## on a CUDA device, 6 minutes: test the kernels, measure them (GPU_PYTHON=python3: without .venv)
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch finds no CUDA device here")'
	@mkdir -p $(GPU)
	@{ timeout -s INT 150 $(GPU_PYTHON) -m pytest -q -m '' -k '$(GPU_SELECTED)' $(GPU_TESTS) 2>&1; echo "exit status $$?"; } \
		| tee $(GPU)/tests.txt
	@timeout 200 $(GPU_PYTHON) -m benchmarks gpu --budget 110 --out $(GPU)/gpu.json --trace $(GPU)/trace.json $(ARGS); \
		measured=$$?; grep -qx 'exit status 0' $(GPU)/tests.txt \
		|| { echo 'the tests failed or took over 150 s: see $(GPU)/tests.txt'; exit 1; }; exit $$measured

# The newest versions that go with torch $(TORCH), from a fresh environment.
constraints: ## write constraints.txt again (TORCH=2.13.0)
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT INT TERM && set -e && \
	$(PYTHON) -m venv "$$scratch" && \
	"$$scratch/bin/python" -m pip install "torch==$(TORCH)" -e '.[all]' && \
	{ echo '# The versions this project is tested against; `make constraints` writes this file.'; \
	  "$$scratch/bin/python" -m pip freeze --all --exclude pip --exclude-editable | sed 's/+.*//'; \
	} > "$$scratch/constraints.txt" && cp "$$scratch/constraints.txt" constraints.txt

clean: ## remove .venv, demo/, builds and caches
	rm -rf .venv demo build dist htmlcov .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f .coverage .coverage.* coverage.xml
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# .installing exists while pip works. An environment that still has it was cut off, and is built again from nothing.
# --no-compile: Python compiles what is imported, a small part of all that pip installs; this saves two minutes.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] < (3, 14)))' 2>/dev/null || { \
	  echo 'implicit-attention needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is' \
	    "$$($(PYTHON) --version 2>/dev/null || echo not found)." 'Name one that fits: make ... PYTHON=python3.12' >&2; exit 1; }
	@if [ -e $(INSTALLING) ]; then rm -rf .venv; fi
	@mkdir -p .venv && rm -f $(INSTALLED) && touch $(INSTALLING)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt -e '.[all]'
	@mv $(INSTALLING) $(INSTALLED) && touch $(INSTALLED) $(KERNELS)

# pip has built the C++ kernels; they are built again when their sources change.
$(KERNELS): $(INSTALLED) $(wildcard $(CPU)/csrc/*) $(CPU)/build.py
	@if [ ! -e $(KERNELS) ] || [ -n "$$(find $(CPU)/csrc $(CPU)/build.py -newer $(KERNELS))" ]; then \
	  $(BIN)/python $(CPU)/build.py; fi
	@touch $(KERNELS)

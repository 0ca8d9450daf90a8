# Two commands are enough: `make demo` and `make test`. Everything they need, they make.

# The first that runs and is new enough; the locks were made with 3.11. Without any, setup says what is missing.
PYTHON ?= $(or $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && echo $$p && break; done),python3)
# Any of: TORCH=torch==2.13.0 (requirement or wheel file), QAT_TORCH_INDEX=<index with CPU builds>, QAT_ENGINE=<folder>
export TORCH QAT_TORCH_INDEX QAT_ENGINE
export TOKENIZERS_PARALLELISM = false

BIN := .venv/bin
RECIPE ?= annie_tiny
FRESH ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint docs clean

help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

setup:  ## Make .venv and .venv-vllm from the lock files; nothing where they are up to date
	@$(PYTHON) scripts/setup_env.py

demo: setup  ## The whole chain on two cores: train, quantize, distil, serve, judge (FRESH=1 starts over)
	@$(BIN)/qat run --recipe $(RECIPE) $(if $(FRESH),--fresh)

test: setup  ## Unit tests and one chain
	@$(BIN)/pytest -m "not slow"

test-all: setup  ## Everything: linters, types, import rules, slow tests, real vLLM
	@lint=0; $(MAKE) --no-print-directory lint || lint=1; $(BIN)/pytest && exit $$lint

lint: setup  ## ruff, mypy --strict, import rules
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

docs: setup  ## Rewrite the generated pages of docs/
	@$(BIN)/python scripts/make_docs.py

clean:  ## Remove runs, caches and both environments
	rm -rf runs .venv .venv-vllm build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

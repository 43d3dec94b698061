# `make` lists the targets. Everything is installed into .venv here; nothing outside the folder is changed.

PYTHON ?= python3.11
BIN := .venv/bin
CXX ?= g++
SEEDS ?= 1 2 3
INPUTS ?= 100000
EXECUTIONS ?= 10000000
, := ,

CSRC := $(wildcard csrc/*.h csrc/*.cpp csrc/test/*.h csrc/test/*.cpp)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test gate gpu peers lint format asan tsan sanitize fuzz clean distclean

help:  ## list the targets
	@echo "attr_engine: which training tracks made this piece?"
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18
	@echo "The first call makes .venv with $(PYTHON); take another Python with: make PYTHON=python3.10 test"

venv:  ## make .venv, or bring it up to date
	@$(PYTHON) -c "" 2>/dev/null || { \
	  echo "make: $(PYTHON) does not run here. Install Python 3.11 (Debian: apt install python3.11" \
	       "python3.11-venv python3.11-dev; or https://www.python.org, pyenv, conda) or name a Python" \
	       "3.10 or 3.11 that you have: make PYTHON=/path/to/python3.10 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) tools/setup_venv.py

demo: venv  ## compose a corpus, train on it, attribute and report, into demo-run/ (10 min)
	@$(BIN)/attr-engine demo --out demo-run

test: venv  ## style, types and tests, as the continuous integration runs them
	@echo "[1/4] ruff check: style, imports, docstrings (1 s; about 12 min left)"
	@$(BIN)/ruff check .
	@echo "[2/4] ruff format: layout (1 s; about 12 min left)"
	@$(BIN)/ruff format --check .
	@echo "[3/4] mypy: types (about 30 s the first time; about 12 min left)"
	@$(BIN)/mypy
	@echo "[4/4] pytest, two processes (about 11 min left)"
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n 2

gate: venv  ## compile every shipped kernel for three GPU architectures, without a GPU, and print the table (1 min)
	@$(BIN)/python -m attr_engine.kernels.gate

gpu: venv  ## the tests that need a GPU
	@$(BIN)/python -m pytest -m gpu -rs

peers: venv  ## measure the engine beside other libraries, which are installed under bench/, and print one table (1 h; 25 GB of disk)
	@$(BIN)/python bench/run.py --full peers; code=$$?; $(BIN)/python bench/peers.py && exit $$code

lint: venv  ## style and types without the tests, and clang-format and clang-tidy for csrc (2 min)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run -Werror $(CSRC)
	@$(BIN)/clang-tidy --quiet $(wildcard csrc/*.cpp csrc/test/*.cpp) -- -std=c++17 -Icsrc \
	  $$($(BIN)/python -m pybind11 --includes | sed 's/-I/-isystem /g')

format: venv  ## put Python and C++ into the project's layout
	@$(BIN)/ruff check --select I --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CSRC)

# The checks of csrc without Python, built once for each sanitizer: build/asan/driver, build/tsan/driver, ...
CHECKED := -std=c++17 -g -O1 -pthread -Wall -Wextra -Werror -D_GLIBCXX_ASSERTIONS -fno-sanitize-recover=all -Icsrc
CORE := $(filter-out csrc/bindings.cpp,$(wildcard csrc/*.cpp))
DRIVER := driver support bytes streams faults
MUTATE := mutate inputs support

define flavour
build/$(1)/%.o: csrc/%.cpp $(wildcard csrc/*.h csrc/test/*.h)
	@mkdir -p $$(@D)
	@$(CXX) $(CHECKED) -fsanitize=$(2) -c $$< -o $$@
build/$(1)/driver: $(CORE:csrc/%.cpp=build/$(1)/%.o) $(DRIVER:%=build/$(1)/test/%.o)
	@$(CXX) -fsanitize=$(2) -pthread $$^ -o $$@
build/$(1)/mutate: $(CORE:csrc/%.cpp=build/$(1)/%.o) $(MUTATE:%=build/$(1)/test/%.o)
	@$(CXX) -fsanitize=$(2) -pthread $$^ -o $$@
endef
$(eval $(call flavour,asan,address$(,)undefined))
$(eval $(call flavour,tsan,thread))

asan: build/asan/driver build/asan/mutate  ## run the C++ checks under the address and undefined-behaviour sanitizers
	@for seed in $(SEEDS); do build/asan/driver $$seed || exit 1; done
	@build/asan/mutate $(INPUTS) $(firstword $(SEEDS))

tsan: build/tsan/driver  ## run the C++ checks under the thread sanitizer
	@for seed in $(SEEDS); do build/tsan/driver $$seed || exit 1; done

sanitize: asan tsan  ## run the C++ checks under all sanitizers (3 min)

fuzz:  ## fuzz the header parser with libFuzzer, and streams for a minute (10 min)
	@csrc/test/fuzz.sh $(EXECUTIONS)

clean:  ## remove what was built and what the demo wrote; .venv stays
	rm -rf build dist *.egg-info demo-run .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f attr_engine/_native*.so
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf .venv

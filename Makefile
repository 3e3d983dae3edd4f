# Every target makes its own environment in .venv first. No GPU and no CUDA toolkit are needed, except by `extension`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint extension bench clean

quickstart: .venv/installed
	$(BIN)/python -m controlnet.quickstart

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=10 tests

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

extension: .venv/installed
	$(BIN)/python setup.py build_ext --inplace

bench: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.host_cost
	$(BIN)/python -m benchmarks.report --plots benchmarks/results/plots

# CNKERNELS_BUILD=0: compiling the CUDA kernels takes minutes, and nothing here but `extension` asks for them.
.venv/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	CNKERNELS_BUILD=0 $(BIN)/pip install -q -c constraints.txt -e '.[train,diffusers,test]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info

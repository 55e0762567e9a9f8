# make demo   a generic teacher, two students, and the comparison: under 5 minutes on two CPU cores
# make test   lint and all tests
# make gpu-check   on a machine with an NVIDIA GPU: the kernels' whole test grid and their benchmark, under 8 minutes
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo compare test lint benchmark gpu-check clean

demo: .venv/installed
	$(BIN)/python -m benchmarks.compare --students pool:1 pool:3 --seeds 0 --output_dir runs/demo

compare: .venv/installed
	$(BIN)/python -m benchmarks.compare --students pool:1 pool:2 pool:3 --seeds 0 1 2 --output_dir runs/compare

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

benchmark: .venv/installed
	$(BIN)/python -m benchmarks.steps
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.methods
	$(BIN)/python -m benchmarks.cost
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.processes
	$(BIN)/python -m benchmarks.alike

gpu-check: .venv/installed
	@$(BIN)/python -c "import torch; raise SystemExit(None if torch.cuda.is_available() else 'no NVIDIA GPU here')"
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 12 tests/triton_grid.py \
		tests/test_loop.py tests/test_triton.py::test_both_scripts_train_alike_with_either_implementation
	$(BIN)/python -m benchmarks.kernels

.venv/installed: requirements.txt requirements-timm.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-timm.txt
	touch $@

clean:
	rm -rf runs .pytest_cache .ruff_cache

# make demo   a vanilla and a generic teacher, two students of each: under 3 minutes on two CPU cores
# make test   lint and all tests
# make mutate   plants faults in a copy of the code, one at a time, and counts those that the tests notice
# make compare   the same with ten seeds
# make torture   kills, file-system faults and odd inputs for ten minutes; MINUTES=2 for the short form
# make browser-check   report.html in a real Chromium
# make executors-check   compare.py on Ray, by submitit, and with Optuna, which it installs beside .venv
# make executorch-check   ExecuTorch files, with what it installs beside .venv
# make gpu-check   on a machine with an NVIDIA GPU: the kernels' whole test grid, CUDA graphs and fused teachers against eager steps
# make gpu-bench   there: what kernels, teachers and training steps take, some 9 minutes
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo compare test mutate torture lint benchmark browser-check executors-check executorch-check \
	gpu-check gpu-bench gpu-evidence clean

demo: .venv/installed
	$(BIN)/python compare.py benchmarks/plans/digits.yaml --seeds 0 --verbose --output_dir runs/demo
	@echo "next: your own images, on one GPU or on this CPU:"
	@echo "  accelerate launch --config_file accelerate_config.yaml train_teacher.py --model resnet32 --dataset folder:PATH \\"
	@echo "      --image_size 32 --epochs 60 --output_dir runs/mine"

compare: .venv/installed
	$(BIN)/python compare.py benchmarks/plans/digits.yaml --output_dir runs/compare

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

mutate: .venv/installed
	$(BIN)/python -m tests.mutate --jobs 2

MINUTES ?= 10
torture: .venv/installed
	$(BIN)/python -m tests.torture --minutes $(MINUTES)

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
	$(BIN)/python -m benchmarks.evaluation
	$(BIN)/python -m benchmarks.together
	$(BIN)/python -m benchmarks.recipe_cost

browser-check: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-browser.txt
	@$(BIN)/python -c "from tests.test_page_browser import *; raise SystemExit(None if chromium() else NO_CHROMIUM)"
	$(BIN)/python -m pytest tests/test_page_browser.py

# Apart, since forks of a process that has met Ray crash: its threads are not in them. compare.py forks before it starts Ray.
executors-check: .venv-executors/installed
	.venv-executors/bin/python -m pytest tests/test_executors.py
	.venv-executors/bin/python -m pytest tests/test_optuna.py

executorch-check: .venv-executorch/installed
	.venv-executorch/bin/python -m pytest tests/test_pte.py

gpu-check: .venv/installed
	@$(BIN)/python -c "import torch; raise SystemExit(None if torch.cuda.is_available() else 'no NVIDIA GPU here')"
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 12 \
		tests/test_piece_graphs.py tests/test_fused.py tests/test_loop.py \
		tests/test_triton.py::test_both_scripts_train_alike_with_either_implementation tests/triton_grid.py

gpu-bench: .venv/installed
	$(BIN)/python -m benchmarks.kernels --minutes 4
	$(BIN)/python -m benchmarks.fused
	$(BIN)/python -m benchmarks.gpu_steps --minutes 4

# DATA is a parquet glob of 100 classes, for example parquet:data/tin100-*.parquet; TEACHER is resnet32x4 or wrn40_2. Each
# call goes on for 9 minutes.
TEACHER ?= resnet32x4
gpu-evidence: .venv/installed
	$(BIN)/python compare.py benchmarks/plans/gpu_$(TEACHER).yaml --data "tin100=$(DATA)" --minutes 8.5 \
		--records benchmarks/results/evidence/gpu_$(TEACHER) --output_dir runs/gpu-evidence-$(TEACHER)

.venv/installed: requirements.txt requirements-timm.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-timm.txt
	touch $@

# Each sees what .venv holds, and leaves that as it is.
BESIDE := .venv-executors .venv-executorch
$(BESIDE:=/beside): %/beside: .venv/installed
	$(BIN)/python -m venv $*
	$(BIN)/python -c "import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"purelib\")!r})')" \
		> $$($*/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/beside.pth
	touch $@

.venv-executors/installed: .venv-executors/beside requirements-ray.txt requirements-slurm.txt requirements-search.txt
	.venv-executors/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-ray.txt \
		-r requirements-slurm.txt -r requirements-search.txt
	touch $@

.venv-executorch/installed: .venv-executorch/beside requirements-executorch.txt
	.venv-executorch/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-executorch.txt
	touch $@

clean:
	rm -rf runs .pytest_cache .ruff_cache

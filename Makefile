# Every target does its own set-up: a virtual environment in .venv, torch constrained by constraints.txt.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
EXTRAS := dev,demo,docs,examples
CACHE  := .cache
# The peers are measured side by side; each lives in its own folder, never in the environment.
PEERS  := $(CACHE)/peers

.PHONY: help demo demo-quick examples test torture torture-quick gpu faults fuzz soak mutation check format docs \
        dist matrix bench peers clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "-- setting up $(VENV) (the first run takes a minute or two)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: $(VENV)/.installed  ## train five ways on real data: table, plots, JSON (under 4 minutes)
	$(BIN)/python -m demo

demo-quick: $(VENV)/.installed  ## the same in its quick form (under 40 seconds)
	$(BIN)/python -m demo --quick

EXAMPLE  := OMP_NUM_THREADS=1 $(BIN)/python
TORCHRUN := $(EXAMPLE) -m torch.distributed.run --standalone --nproc-per-node 2

examples: $(VENV)/.installed  ## run every example: frameworks, what you are judged by, two processes (some minutes)
	$(EXAMPLE) examples/plain.py
	$(EXAMPLE) examples/lightning_module.py
	HF_HUB_OFFLINE=1 $(EXAMPLE) examples/huggingface_trainer.py
	$(EXAMPLE) examples/skorch_grid.py
	$(EXAMPLE) examples/torchmetrics_eval.py
	$(EXAMPLE) examples/multilabel.py
	$(EXAMPLE) examples/sequence_tagging.py
	$(EXAMPLE) examples/alerts_per_day.py
	$(EXAMPLE) examples/per_query.py
	$(EXAMPLE) examples/money_found.py
	$(TORCHRUN) examples/ddp.py
	$(TORCHRUN) examples/fsdp.py
	$(TORCHRUN) examples/accelerate_ddp.py
	$(EXAMPLE) examples/lightning_ddp.py

test: $(VENV)/.installed  ## run the tests and the docstring examples, on two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

torture: peers  ## everything that is claimed, family by family, with a table of cases
	$(BIN)/python -m tests.torture

torture-quick: peers  ## the same with half of the random examples
	$(BIN)/python -m tests.torture --quick

gpu: peers  ## on a machine with a CUDA device: test the kernels there, measure and plot (some 10 minutes)
	$(BIN)/python -m benchmarks.gpu --is-there
	$(BIN)/python -m pytest -q tests/test_fused.py tests/test_gpu_benchmark.py
	$(BIN)/python -m benchmarks.gpu

faults: $(VENV)/.installed  ## kill processes and ranks, again and again: the longer form of its tests
	$(BIN)/python -m pytest -q -m slow tests/test_faults.py tests/test_kills.py

# Executions in all; seven in ten are of forward.
RUNS ?= 1000000

fuzz: $(VENV)/.installed  ## look for inputs that break forward or load_state_dict (RUNS=1000000)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	OMP_NUM_THREADS=1 $(BIN)/python -m fuzz forward -runs=$$(($(RUNS) * 7 / 10))
	OMP_NUM_THREADS=1 $(BIN)/python -m fuzz load_state_dict -runs=$$(($(RUNS) * 3 / 10))

soak: $(VENV)/.installed  ## 100,000 steps with checkpoints, and 20,000 on two ranks: memory flat, ranks equal
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak

MODULE := _loss _state _rows* _ranking*

mutation: $(VENV)/.installed  ## mutate MODULE="…" and see which tests notice (hours; resumes where it stopped)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[mutation]'
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.mutation run $(foreach name,$(MODULE),'$(name)')
	$(BIN)/python -m benchmarks.mutation report

check: $(VENV)/.installed  ## formatting, lint, strict types, and those of a user's strict project
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	cd tests/typing && ../../$(BIN)/mypy
	cd tests/typing && ../../$(BIN)/basedpyright --pythonpath ../../$(BIN)/python

format: $(VENV)/.installed  ## put the formatting right
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed  ## build the documentation into site/
	$(BIN)/mkdocs build --strict

dist: $(VENV)/.installed  ## build sdist and wheel, and try them in an empty environment
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m tests.check_dist dist

# Environments of their own, with whatever build of torch the registry has: some gigabytes where
# that is one for CUDA. `make matrix TORCH="2.6.0 2.15.0" PYTHON=python3.10`
TORCH  ?= 2.6.0
MATRIX := $(CACHE)/matrix/torch-
# What needs more packages.
MATRIX_WITHOUT := demo docs examples quality predecessor predecessor_differences

matrix: $(TORCH:%=matrix-%)  ## what compiles, and the tests, on other versions (TORCH="2.6.0 2.15.0", PYTHON=python3.10)

matrix-%:
	@test -x $(MATRIX)$*/bin/python || $(PYTHON) -m venv $(MATRIX)$*
	$(MATRIX)$*/bin/python -m pip install -qq --disable-pip-version-check torch==$* -e '.[test]'
	OMP_NUM_THREADS=1 $(MATRIX)$*/bin/python -m tests.compile_matrix
	$(MATRIX)$*/bin/python -m pytest -q $(MATRIX_WITHOUT:%=--ignore tests/test_%.py)

$(PEERS)/.installed:
	@echo "-- fetching the peers into $(PEERS)"
	$(BIN)/python -m pip install -qq --no-deps --target $(PEERS)/predecessor imbalanced-losses==0.6.0
	$(BIN)/python -m pip install -qq --no-deps --target $(PEERS)/pytorch-metric-learning pytorch-metric-learning==2.9.0
	$(BIN)/python -m pip install -qq --no-deps --target $(PEERS)/libauc libauc==2.0.1
	$(BIN)/python -m pip install -qq --no-deps --target $(PEERS)/allrank allRank==1.4.3
	@touch $@

peers: $(VENV)/.installed $(PEERS)/.installed  ## fetch the peers that benchmarks compare with

bench: peers  ## measure speed, memory and accuracy beside the peers (some 20 minutes)
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.gather
	$(BIN)/python -m benchmarks.family
	$(BIN)/python -m benchmarks.plots

clean:  ## remove the environment and every cache
	rm -rf $(VENV) $(CACHE) site dist demo/output .pytest_cache .mypy_cache .ruff_cache .hypothesis mutants

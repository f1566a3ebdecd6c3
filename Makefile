# Every target does its own set-up: a virtual environment in .venv, torch constrained by constraints.txt, and of the
# extras in pyproject.toml those that it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CACHE  := .cache
# The peers are measured side by side; each lives in its own folder, never in the environment.
PEERS  := $(CACHE)/peers
TESTS  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help help-all demo demo-quick examples test test-all torture torture-quick gpu faults fuzz soak mutation \
        telling-mutants check format docs dist matrix bench quality peers clean
.DEFAULT_GOAL := help

help:
	@grep -E '^[a-z-]+:.*[^#]## ' Makefile | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'
	@echo "  make help-all         list the other targets, too"

help-all:
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

# The environment, with an extra.
$(VENV)/.with-%: pyproject.toml constraints.txt
	@echo "-- setting up $(VENV) for $* (the first time takes a minute or two)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

test: $(VENV)/.with-test  ## run the fast suite, which guards the contract, and the docstring examples (2 minutes)
	$(TESTS)

test-all: $(VENV)/.with-dev  ## run every test: examples, documentation, other packages' tools, many processes
	$(TESTS) -m "slow or not slow"

check: $(VENV)/.with-check  ## formatting, lint, strict types, and those of a user's strict project
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	cd tests/typing && ../../$(BIN)/mypy --cache-dir=/dev/null  # a cache of another run changes what is told
	cd tests/typing && ../../$(BIN)/basedpyright --pythonpath ../../$(BIN)/python

format: $(VENV)/.with-check  ## put the formatting right
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: $(VENV)/.with-demo  ## train five ways on real data: table, plots, JSON (under 4 minutes)
	$(BIN)/python -m demo

docs: $(VENV)/.with-docs  ## build the documentation into site/
	$(BIN)/mkdocs build --strict

demo-quick: $(VENV)/.with-demo  ### the demo in its quick form (under 40 seconds)
	$(BIN)/python -m demo --quick

EXAMPLE  := OMP_NUM_THREADS=1 $(BIN)/python
TORCHRUN := $(EXAMPLE) -m torch.distributed.run --standalone --nproc-per-node 2

examples: $(VENV)/.with-examples  ### run every example: frameworks, what you are judged by, two processes (some minutes)
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

torture: $(VENV)/.with-dev peers  ### every test by what it claims, with twice the random examples and a table of cases
	$(BIN)/python -m tests.hardening.torture

torture-quick: $(VENV)/.with-dev peers  ### the fast suite by what it claims
	$(BIN)/python -m tests.hardening.torture --quick

gpu: $(VENV)/.with-dev peers  ### on a machine with a CUDA device: test the kernels there, measure and plot (some 10 minutes)
	$(BIN)/python -m benchmarks.gpu --is-there
	$(BIN)/python -m pytest -q -m "slow or not slow" tests/unit/test_cuda.py tests/unit/test_facts.py tests/project/test_gpu_benchmark.py
	$(BIN)/python -m benchmarks.gpu

faults: $(VENV)/.with-test  ### kill processes, interrupt any line: the longer form of those tests
	$(BIN)/python -m pytest -q -m "slow or not slow" tests/hardening/test_faults.py tests/hardening/test_kills.py

# Executions in all; seven in ten are of forward.
RUNS ?= 1000000

fuzz: $(VENV)/.with-fuzz  ### look for inputs that break forward or load_state_dict (RUNS=1000000)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.hardening.fuzz forward -runs=$$(($(RUNS) * 7 / 10))
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.hardening.fuzz load_state_dict -runs=$$(($(RUNS) * 3 / 10))

soak: $(VENV)/.with-test  ### 100,000 steps with checkpoints, and 20,000 on two processes: memory flat, processes equal
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.hardening.soak

MODULE := _loss _state _rows* _ranking*

mutation: $(VENV)/.with-mutation  ### mutate MODULE="…" and see which tests notice (hours; resumes where it stopped)
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m tests.hardening.mutation run $(foreach name,$(MODULE),'$(name)')
	$(BIN)/python -m tests.hardening.mutation report

telling-mutants: $(VENV)/.with-test  ### fifty mistakes in _ranking and _rows, which the fast suite must notice (5 minutes)
	$(BIN)/python -m tests.hardening.telling_mutants

dist: $(VENV)/.with-dist  ### build sdist and wheel, and try them in an empty environment
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m tests.project.check_dist dist

# Environments of their own, with whatever build of torch the registry has: some gigabytes where
# that is one for CUDA. `make matrix TORCH="2.6.0 2.15.0" PYTHON=python3.10`
TORCH  ?= 2.6.0
MATRIX := $(CACHE)/matrix/torch-

matrix: $(TORCH:%=matrix-%)  ### what compiles, and the fast suite, on other versions (TORCH="2.6.0 2.15.0", PYTHON=python3.10)

matrix-%:
	@test -x $(MATRIX)$*/bin/python || $(PYTHON) -m venv $(MATRIX)$*
	$(MATRIX)$*/bin/python -m pip install -qq --disable-pip-version-check torch==$* -e '.[test]'
	OMP_NUM_THREADS=1 $(MATRIX)$*/bin/python -m tests.project.compile_matrix
	$(MATRIX)$*/bin/python -m pytest -q

$(PEERS)/.installed:
	@echo "-- fetching the peers into $(PEERS)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --no-deps --target $(PEERS)/predecessor imbalanced-losses==0.6.0
	$(BIN)/python -m pip install -qq --no-deps --target $(PEERS)/pytorch-metric-learning pytorch-metric-learning==2.9.0
	$(BIN)/python -m pip install -qq --no-deps --target $(PEERS)/libauc libauc==2.0.1
	$(BIN)/python -m pip install -qq --no-deps --target $(PEERS)/allrank allRank==1.4.3
	@touch $@

peers: $(PEERS)/.installed  ### fetch the peers that benchmarks and some tests compare with

bench: $(VENV)/.with-bench peers  ### measure speed, memory and accuracy beside the peers (some 20 minutes)
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.speed.memory
	$(BIN)/python -m benchmarks.speed.accuracy
	$(BIN)/python -m benchmarks.speed.gather
	$(BIN)/python -m benchmarks.speed.family
	$(BIN)/python -m benchmarks.speed.plots

quality: $(VENV)/.with-bench peers  ### which loss gains by which number, on real data (hours; resumes where it stopped)
	$(BIN)/python -m benchmarks.quality

clean:  ### remove the environment and every cache
	rm -rf $(VENV) $(CACHE) site dist demo/output .pytest_cache .mypy_cache .ruff_cache .hypothesis mutants

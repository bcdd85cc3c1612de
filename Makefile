# make train: install, then the main job on the embedded model, on two ranks where a CPU has two cores (RANKS=N).
# make test: install, then every test, on two cores.
# make bench NAME=logprob: one microbenchmark; without NAME the whole table, into bench/results/cpu.json or cuda.json.
# make capture OUT=DIR ARGS="--kernels eager": a GRPO run under a profiler (TOOL=nsys|ncu|torch).
# make compare A=DIR B=DIR OUT=DIR: the report of two captures.  make readme: the tables of both README.md from bench/results.
PYTHON ?= python3
BIN := .venv/bin
TOOL ?= torch
WORKERS ?= 2
DEVICE := $(if $(shell command -v nvidia-smi),cuda,cpu)
RANKS ?= $(if $(filter cuda,$(DEVICE)),1,$(if $(filter 1,$(shell nproc)),1,2))

.PHONY: train test bench capture compare readme

train: .venv/installed
	$(BIN)/torchrun --nproc_per_node=$(RANKS) train.py --algo grpo

test: .venv/test-tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		-m "not alone" --durations=10
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -m alone

bench: .venv/installed
	$(BIN)/python -m bench.run $(NAME) --device $(DEVICE) $(if $(NAME),,--json bench/results/$(DEVICE).json)

capture: .venv/installed
	$(BIN)/python profiling/capture.py --tool $(TOOL) -o $(OUT) -- train.py --algo grpo $(ARGS)

compare: .venv/installed
	$(BIN)/python profiling/report.py $(A) $(B) -o $(OUT)

readme: .venv/installed
	$(BIN)/python -m bench.report

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test-tools: .venv/installed requirements-test.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

# make train: install, then the main job on the embedded model.  make test: install, then every test.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test

train: .venv/installed
	$(BIN)/torchrun train.py --algo grpo

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q --durations=10

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

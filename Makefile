# One environment for everything, made anew when a requirements file is newer than its stamp.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint

demo: .venv/stamp  ## train on synthetic news: no network, no GPU, about a minute
	$(BIN)/python train_bert.py --model tiny --data synthetic --epochs 6 --learning-rate 1e-3 --threads 1

test: .venv/stamp-dev
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/stamp-dev  ## kills at random moments, the README's commands
	$(BIN)/python -m pytest -m slow

lint: .venv/stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/stamp: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/stamp-dev: .venv/stamp requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

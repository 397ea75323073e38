# One environment for everything but vLLM, updated when a requirements file is newer than its stamp.
PYTHON ?= python3
BIN := .venv/bin
# vLLM: the build for this machine. It pins its own versions, so it has an environment of its own.
GPU := $(shell command -v nvidia-smi)
VLLM := requirements-vllm$(if $(GPU),,-cpu).txt
# Without a GPU, install PyTorch's CPU build first. Plain pip, which fetches gigabytes of CUDA, is the fallback if that index is unreachable.
CPU_TORCH := --quiet --retries 0 --timeout 20 $(shell grep ^torch== requirements.txt) --index-url https://download.pytorch.org/whl/cpu
DEMO := runs/demo-$(shell date +%Y%m%d-%H%M%S)
# The files to read first, in this order; their lines have 100 columns at most, other files' 120.
EVENING := train_bert.py train_qwen.py $(addprefix minicls/,bert.py decoder.py attention.py prompt.py scorer.py optim.py)
SYNTHETIC := --model tiny --data synthetic --dtype fp32 --threads 1

.PHONY: help demo bench test test-slow test-vllm lint readme
# Includes vLLM if `make test-vllm` has installed it; DATA names the texts.
DATA ?= synthetic
BENCH := $(if $(wildcard .venv-vllm/stamp),--vllm-python .venv-vllm/bin/python,--engines minicls transformers)

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 14

demo: .venv/stamp  ## train a BERT, a decoder and a baseline on synthetic news and compare them: no hub, no GPU, three minutes
	$(BIN)/python -m minicls baseline --data synthetic --threads 1 --output-dir $(DEMO)/tfidf
	$(BIN)/python train_bert.py $(SYNTHETIC) --epochs 8 --learning-rate 2e-3 --warmup-ratio 0.1 --eval-every 0.25 \
		--global-batch-size 32 --micro-batch-size 32 --output-dir $(DEMO)/bert
	$(BIN)/python train_qwen.py $(SYNTHETIC) --epochs 2 --learning-rate 2e-3 --warmup-ratio 0.1 --eval-every 0.25 --train-on letter \
		--global-batch-size 16 --micro-batch-size 16 --output-dir $(DEMO)/qwen
	$(BIN)/python bench.py --bert $(DEMO)/bert --qwen $(DEMO)/qwen --data synthetic \
		--dtype fp32 --threads 1 --num-requests 50 --min-seconds 0.5 --rounds 1 --output-dir $(DEMO)/bench
	$(BIN)/python -m minicls report $(DEMO)/tfidf $(DEMO)/bert $(DEMO)/qwen --bench $(DEMO)/bench/bench.json --out $(DEMO)/report
	@printf '%s\n' '' \
		'The demo compared a two-layer BERT with a linear head, a two-layer Qwen3 that answers with a letter (both trained from' \
		'random weights) and logistic regression on word counts, on 4,000 synthetic news texts for training and 1,000 for testing.' \
		'The lines above say which one is better, or "neither" where the difference is within the error bar. Tiny models on' \
		'synthetic text say nothing about real ones: the demo shows that everything runs, and which files and reports it writes.' \
		'Now classify a text:' \
		'    .venv/bin/python -m minicls predict $(DEMO)/bert "The striker scored in the final."' \
		'and train on your own data (DIR has train.csv with columns text and label, and test.csv, or else add --test-size 0.2):' \
		'    .venv/bin/python -m minicls baseline --data DIR' \
		'    .venv/bin/python train_bert.py --model MODEL_DIR --data DIR --epochs 15 --learning-rate 5e-4 --global-batch-size 32 --warmup-ratio 0.1'

bench: .venv/stamp-dev  ## requests per second of BERT-base and Qwen3-0.6B with random weights: no hub, minutes per model
	$(BIN)/python bench.py --init random --bert bert-base-cased --qwen Qwen3-0.6B --qwen-linear Qwen3-0.6B \
		--data $(DATA) $(BENCH) --rounds 1

test: .venv/stamp-dev  ## run the tests that take seconds each
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/stamp-dev  ## run the slow tests: kills at random moments, the README's commands, torch.compile
	$(BIN)/python -m pytest -m slow

test-vllm: .venv-vllm/stamp  ## install vLLM and test that it answers as minicls does
	.venv-vllm/bin/python -m pytest tests/test_vllm.py

readme: .venv/stamp  ## write the pages' tables from the files in results/
	$(BIN)/python results/readme.py

lint: .venv/stamp-dev  ## check style and format with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ruff format --check --isolated --line-length 100 $(EVENING)

.venv/stamp: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(if $(GPU),,-$(BIN)/python -m pip install $(CPU_TORCH))
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/stamp-dev: .venv/stamp requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

.venv-vllm/stamp: requirements.txt $(VLLM)
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet -r $(VLLM)
	$(if $(findstring cpu,$(VLLM)),.venv-vllm/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec)
	touch $@

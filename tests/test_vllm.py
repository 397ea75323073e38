"""vLLM opens what the training scripts write.   make test-vllm   (skipped where vllm is not installed)

Each model in a process of its own: vLLM changes thread settings and keeps its memory. fp32 rounds in another order there
(log-probabilities within 1e-4, answers the same); bf16 has three digits, so log-probabilities of about -5 are within 0.1.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from runs import train
from test_train_qwen import family_dir

import train_qwen
from minicls import weights
from minicls.data import load_data, split_data
from minicls.engines import vllm_environment
from minicls.generate import generate
from minicls.predict import classify_rows
from minicls.prompt import Chat, make_template
from minicls.scorer import score
from minicls.tokenizer import bert_rows, load_tokenizer, text_rows

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("vllm"), reason="vllm is not installed; `make test-vllm` does it"
)
CPU = torch.device("cpu")

ENGINE = """
import json, sys
from pathlib import Path
import torch
from minicls import engines
name, model, dtype, rows, options, stop = json.load(sys.stdin)
engine = getattr(engines, name)(Path(model), getattr(torch, dtype), torch.device("cpu"), 256, eager=True)
try:
    if engines.is_classifier(Path(model)):
        found = engine.classify(rows).tolist()
    else:
        engine.score(rows, options), engine.forget()
        found = [engine.generate(rows, 8, stop), engine.score(rows, options).tolist()]
    assert engine.peak_memory_bytes > 2**27 and engine.version
finally:
    engine.close()
print("FOUND", json.dumps(found))
"""


def ask_vllm(model, dtype, rows, options=(), stop=(), name="VLLM"):
    env = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    env |= vllm_environment(1) | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    request = json.dumps([name, str(model), dtype, rows, list(options), list(stop)])
    done = subprocess.run(
        [sys.executable, "-c", ENGINE], input=request, capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND "))


def load(run, kind):
    model, fresh, _ = weights.build_model(kind, weights.read_config(run), run, 0, CPU)
    assert not fresh
    return model.eval()


@pytest.fixture(scope="module")
def texts():
    return split_data(load_data("synthetic"), max_eval_rows=24).test.texts


@pytest.mark.parametrize(
    ("engine", "dtype", "tolerance"),
    [("VLLM", "float32", 1e-4), ("VLLM", "bfloat16", 0.1), ("VLLMServer", "float32", 1e-4)],
)
def test_options(engine, dtype, tolerance, qwen_run, texts):
    """Greedy tokens up to a stop token, and the options' log-probabilities, in the engine's process and over HTTP."""
    tokenizer, model = load_tokenizer(qwen_run), load(qwen_run, weights.DECODER)
    chat = Chat(tokenizer, make_template(load_data("synthetic").label_names, no_think=True), 4, 256)
    questions, _ = chat.questions(texts)
    stop = tokenizer.control_ids(["<|im_end|>", "<|endoftext|>"])
    stop += generate(model, questions[:1], 3, [], CPU)[0][2:]  # and one that does come
    answers, found = ask_vllm(qwen_run, dtype, questions, chat.options, stop, engine)
    expected = score(model, questions, chat.options, CPU)
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=tolerance)
    if dtype == "float32":
        assert answers == generate(model, questions, 8, stop, CPU)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def start(request, tmp_path_factory):
    """A small model of another family with its chat template."""
    return family_dir(request.param, tmp_path_factory.mktemp(request.param) / "start")


def test_options_of_another_family(start, tmp_path, texts):
    run = train(tmp_path / "run", "--model", str(start), "--max-steps", "16", "--dtype", "fp32", script=train_qwen)
    tokenizer, model = load_tokenizer(run), load(run, weights.DECODER)
    chat = Chat(tokenizer, make_template(load_data("synthetic").label_names), 4, 240)
    questions, _ = chat.questions(texts)
    stop = chat.stop_ids + generate(model, questions[:1], 3, [], CPU)[0][2:]  # and one that does come
    answers, found = ask_vllm(run, "float32", questions, chat.options, stop)
    torch.testing.assert_close(torch.tensor(found), score(model, questions, chat.options, CPU), rtol=0, atol=1e-4)
    assert answers == generate(model, questions, 8, stop, CPU)


def test_linear_head_of_another_family(start, tmp_path, texts):
    flags = ["--model", str(start), "--head", "linear", "--max-steps", "16", "--dtype", "fp32"]
    run = train(tmp_path / "run", *flags, script=train_qwen)
    rows, _ = text_rows(load_tokenizer(run), texts, 256)
    expected = classify_rows(load(run, weights.DECODER_LINEAR), rows, CPU).log_softmax(1)
    torch.testing.assert_close(torch.tensor(ask_vllm(run, "float32", rows)), expected, rtol=0, atol=1e-4)


def test_linear_head(tmp_path, texts):
    run = train(tmp_path / "run", "--head", "linear", "--max-steps", "16", "--dtype", "fp32", script=train_qwen)
    rows, _ = text_rows(load_tokenizer(run), texts, 256)
    expected = classify_rows(load(run, weights.DECODER_LINEAR), rows, CPU).log_softmax(1)
    torch.testing.assert_close(torch.tensor(ask_vllm(run, "float32", rows)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", ["VLLM", "VLLMServer"])
def test_bert(engine, bert_run, texts):
    """A run, and over HTTP its last checkpoint, whose optimizer vLLM must not take for weights."""
    directory = bert_run if engine == "VLLM" else max((bert_run / "checkpoints").iterdir())
    rows, _ = bert_rows(load_tokenizer(bert_run), texts, 256)
    expected = classify_rows(load(bert_run, weights.BERT), rows, CPU).log_softmax(1)
    found = torch.tensor(ask_vllm(directory, "float32", rows, name=engine))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

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

import train_qwen
from minicls import weights
from minicls.data import load_data, split_data
from minicls.generate import generate
from minicls.predict import classify_rows
from minicls.prompt import Chat, make_template
from minicls.scorer import score
from minicls.tokenizer import bert_rows, load_tokenizer, text_rows

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="vllm is not installed; `make test-vllm` does it")
CPU = torch.device("cpu")

ENGINE = """
import json, sys
model, dtype, runner, rows, options, new = json.load(sys.stdin)
import vllm
from vllm import LLM, SamplingParams
llm = LLM(model, dtype=dtype, runner=runner, max_model_len=256, max_num_seqs=16, enforce_eager=True)
prompts = [{"prompt_token_ids": ids} for ids in rows]
if runner == "pooling":
    found = [o.outputs.probs for o in llm.classify(prompts, use_tqdm=False)]
else:
    greedy = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=new), use_tqdm=False)
    scored = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=options), use_tqdm=False)
    found = [
        [list(g.outputs[0].token_ids), [s.outputs[0].logprobs[0][o].logprob for o in options]]
        for g, s in zip(greedy, scored)
    ]
print("FOUND", json.dumps(found))
"""


def ask_vllm(model, dtype, runner, rows, options=(), new=8):
    env = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    request = json.dumps([str(model), dtype, runner, rows, list(options), new])
    done = subprocess.run([sys.executable, "-c", ENGINE], input=request, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND "))


def load(run, kind):
    model, fresh, _ = weights.build_model(kind, weights.read_config(run), run, 0, CPU)
    assert not fresh
    return model.eval()


@pytest.fixture(scope="module")
def texts():
    return split_data(load_data("synthetic"), max_eval_rows=24)[0].test.texts


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_options(dtype, tolerance, qwen_run, texts):
    """Greedy tokens, up to and with the stop token that generation_config.json names, and the options' log-probabilities."""
    tokenizer, model = load_tokenizer(qwen_run), load(qwen_run, weights.QWEN3)
    chat = Chat(tokenizer, make_template(load_data("synthetic").label_names), 4, 256)
    questions, _ = chat.questions(texts)
    options = [option[0] for option in chat.options]
    found = ask_vllm(qwen_run, dtype, "generate", questions, options)
    expected = score(model, questions, chat.options, CPU)
    torch.testing.assert_close(torch.tensor([logprobs for _, logprobs in found]), expected, rtol=0, atol=tolerance)
    if dtype == "float32":
        stop = tokenizer.control_ids(["<|im_end|>", "<|endoftext|>"])
        answers = [[i for i in ids if i not in stop] for ids, _ in found]
        assert answers == generate(model, questions, 8, stop, CPU)


def test_linear_head(tmp_path, texts):
    run = train(tmp_path / "run", "--head", "linear", "--max-steps", "16", "--dtype", "fp32", script=train_qwen)
    rows, _ = text_rows(load_tokenizer(run), texts, 256)
    found = torch.tensor(ask_vllm(run, "float32", "pooling", rows))
    torch.testing.assert_close(found, classify_rows(load(run, weights.QWEN3_LINEAR), rows, CPU).softmax(1), rtol=0, atol=1e-4)


def test_bert(bert_run, texts):
    rows, _ = bert_rows(load_tokenizer(bert_run), texts, 256)
    found = torch.tensor(ask_vllm(bert_run, "float32", "pooling", rows))
    torch.testing.assert_close(found, classify_rows(load(bert_run, weights.BERT), rows, CPU).softmax(1), rtol=0, atol=1e-4)

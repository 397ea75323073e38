"""Questions per second of lm-evaluation-harness and of minicls' scorer: the same prompts, weights and cores, in turn.

    LM_EVAL/bin/python results/lm_harness.py --model RUN --data DIR --minicls-python .venv/bin/python --output FILE

Runs in an environment of its own (`pip install torch==2.13.0 "lm-eval[hf]==0.4.13"`). RUN is a finished run of
train_qwen.py. The harness gets each prompt as one text, with the letters as options, in batches of 16. Both clocks
include tokenization.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from string import ascii_uppercase

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from minicls.data import load_data, stratified_rows
from minicls.predict import Reader

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--minicls-python", required=True)
parser.add_argument("--output", type=Path, required=True)
parser.add_argument("--num-questions", type=int, default=64)
parser.add_argument("--rounds", type=int, default=2)
parser.add_argument("--threads", type=int, default=2)
args = parser.parse_args()

torch.set_num_threads(args.threads)
data = load_data(args.data)
reader = Reader(args.model, 512)
test = data.test.select(stratified_rows(data.test, args.num_questions))
questions = reader.rows(test.texts)
flags = ["--side", "minicls", "--qwen", args.model, "--data", args.data, "--mode", "offline", "--min-seconds", 0]
flags += ["--num-requests", args.num_questions, "--threads", args.threads]

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "questions.jsonl"
    texts = [reader.tokenizer.decode(ids) for ids in questions]
    rows = [{"text": text, "label": int(label)} for text, label in zip(texts, test.labels, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "options",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": folder},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "target_delimiter": "",
        "doc_to_target": "label",
        "doc_to_choice": list(ascii_uppercase[: len(data.label_names)]),
        "metric_list": [{"metric": "acc"}],
    }
    model = HFLM(pretrained=str(args.model), dtype="bfloat16", device="cpu", batch_size=16)
    assert [model.tok_encode(text) for text in texts] == questions, "the harness reads other ids"
    lm_eval.simple_evaluate(model=model, tasks=[task], limit=16, bootstrap_iters=0)
    rounds = []
    for _ in range(args.rounds):
        command = [args.minicls_python, ROOT / "bench.py", *flags]
        output = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True).stdout
        rows = [json.loads(line.removeprefix("ROW ")) for line in output.splitlines() if line.startswith("ROW ")]
        (ours,) = (row for row in rows if row["method"] == "score")
        started = time.perf_counter()
        results = lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0, log_samples=True)
        seconds = {"minicls_seconds": len(questions) / ours["requests_per_second"]}
        seconds["lm_eval_seconds"] = time.perf_counter() - started
        samples = [sample["filtered_resps"] for sample in results["samples"]["options"]]
        answers = [max(range(len(options)), key=lambda o: options[o][0]) for options in samples]
        same = sum(a == b for a, b in zip(answers, ours["predictions"], strict=True))
        rounds.append(seconds | {"same_answers": same})
        print(rounds[-1], flush=True)
result = {
    "rounds": rounds,
    "num_questions": args.num_questions,
    "threads": args.threads,
    "dtype": "bf16",
    "batch_size": 16,
}
result |= {"lm_eval": lm_eval.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

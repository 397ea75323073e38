"""The other side of the BERT quality figure: the same rows and settings through transformers' Trainer.

    python results/hf_trainer.py --model DIR --data DIR --learning-rate 3e-4 --output results/NAME.json

Rows come from minicls.data, so both sides see the same ones. `--group-by-length` is the Trainer's own way to waste less
on padding (rows of similar length meet in a batch); without it the Trainer needs about twice the time here.
Needs requirements-dev.txt and accelerate. Prints and writes one JSON object.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from minicls.data import load_data, stratified_rows
from minicls.metrics import classification_metrics, confusion_matrix, f1_interval

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--output", required=True)
parser.add_argument("--learning-rate", type=float, default=1e-5)
parser.add_argument("--epochs", type=float, default=1)
parser.add_argument("--max-train-rows", type=int)
parser.add_argument("--global-batch-size", type=int, default=64)
parser.add_argument("--weight-decay", type=float, default=1e-6)
parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
parser.add_argument("--group-by-length", action="store_true")
parser.add_argument("--seed", type=int, default=42)
args = parser.parse_args()

data = load_data(args.data)
train = data.train.select(stratified_rows(data.train, args.max_train_rows)) if args.max_train_rows else data.train
tokenizer = AutoTokenizer.from_pretrained(args.model)


def examples(split):
    ids = tokenizer(split.texts, truncation=True, max_length=512)["input_ids"]
    return [
        {"input_ids": i, "attention_mask": [1] * len(i), "labels": int(y)}
        for i, y in zip(ids, split.labels, strict=True)
    ]


with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(data.label_names)),
        args=TrainingArguments(
            folder,
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=args.global_batch_size,
            per_device_eval_batch_size=256,
            train_sampling_strategy="group_by_length" if args.group_by_length else "random",
            weight_decay=args.weight_decay,
            bf16=args.dtype == "bf16",
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=50,
            report_to=[],
            seed=args.seed,
        ),
        train_dataset=examples(train),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    start = time.perf_counter()
    trainer.train()
    train_seconds = time.perf_counter() - start
    # With --group-by-length the Trainer regroups the test rows too: only its own labels match its predictions.
    test = trainer.predict(examples(data.test))
confusion = confusion_matrix(test.label_ids, np.asarray(test.predictions).argmax(-1), len(data.label_names))
low, high = f1_interval(confusion)
result = classification_metrics(confusion) | {
    "f1_low": low,
    "f1_high": high,
    "num_train_rows": len(train),
    "num_test_rows": len(data.test),
    "final_step": trainer.state.global_step,
    "train_seconds": train_seconds,
    "eval_seconds": time.perf_counter() - start - train_seconds,
    "samples_per_second": len(train) * args.epochs / train_seconds,
    "threads": torch.get_num_threads(),
    "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    "settings": vars(args) | {"model": Path(args.model).name, "data": Path(args.data).name},
}
Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
print(json.dumps(result))

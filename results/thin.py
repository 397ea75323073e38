"""Reduces a run to the parts that `python -m minicls report` reads, a small fraction of its size, as kept in results/.

    python results/thin.py runs/bert results/bert      # from a run directory into a new directory
    python results/thin.py results/bert                # in place
    python results/thin.py runs/bert results/bert --no-text-hash

A thin run has run.json without absolute paths; results.json without the confusion matrix and the scores of each class,
which predictions.parquet gives; of metrics.jsonl all evaluations and the mean losses of at most 10 groups of steps
before each test; and of predictions.parquet the columns row, label, prediction, probability (of the prediction, with
two decimals), text_hash (its lowest byte) and num_tokens, in small types. Runs of 20,000 training rows and more keep
validation.parquet, too, and a third decimal. The hash tells which rows two samples of the test rows have in common;
where all runs are tested on the same rows, it can stay out, which leaves room for validation.parquet from 2,000 rows.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MAX_TRAIN_LINES = 10  # between two tests
LARGE = 20_000  # training rows
TYPES = {"row": np.int32, "label": np.int16, "prediction": np.int16, "text_hash": np.uint8, "num_tokens": np.int32}
ENCODINGS = {"row": "DELTA_BINARY_PACKED", "text_hash": "PLAIN"}


def thin_predictions(source: Path, target: Path, decimals: int, text_hash: bool) -> None:
    """Reduces one parquet file. Columns that are missing or null in it stay out."""
    table = pq.read_table(source)
    columns = {name: table[name].to_numpy() for name in table.column_names if not table[name].null_count}
    thin = {name: columns[name].astype(dtype) for name, dtype in TYPES.items() if name in columns}
    if "probability" not in columns:
        probabilities = np.stack([values for name, values in columns.items() if name.startswith("probability_")])
        columns["probability"] = probabilities[thin["prediction"], np.arange(len(thin["prediction"]))]
    thin["probability"] = columns["probability"].astype(np.float32).round(decimals)
    small = {"compression": "zstd", "compression_level": 19, "write_statistics": False, "store_schema": False}
    if not text_hash:
        thin.pop("text_hash", None)
    words = [name for name in thin if name not in ENCODINGS]
    encodings = {name: encoding for name, encoding in ENCODINGS.items() if name in thin}
    pq.write_table(pa.table(thin), target, use_dictionary=words, column_encoding=encodings, **small)


def thin_metrics(source: Path, target: Path) -> None:
    """Keeps all evaluations; merges the training lines between two tests into equal parts, which keeps their mean."""
    thin, train = [], []
    for event in [*map(json.loads, source.read_text(encoding="utf-8").splitlines()), None]:
        if event and event["event"] == "train":
            train.append(event)
            continue
        if train and (event is None or event["split"] == "test"):
            parts = max(n for n in range(1, MAX_TRAIN_LINES + 1) if len(train) % n == 0)
            for part in np.split(np.array(train), parts):
                losses = {key: [e[key] for e in part] for key in ("loss", "answer_loss") if key in part[0]}
                means = {key: float(np.mean(values)) for key, values in losses.items()}
                thin.append({"event": "train", "step": part[-1]["step"]} | means)
            train = []
        thin += [event] if event else []
    target.write_text("".join(json.dumps(event, separators=(",", ":")) + "\n" for event in thin), encoding="utf-8")


def write_object(file: Path, values: dict) -> None:
    """JSON with a line for each key of the object."""
    shown = {key: json.dumps(value, ensure_ascii=False, separators=(",", ":")) for key, value in values.items()}
    lines = ",\n".join(f"{json.dumps(key)}: {value}" for key, value in shown.items())
    file.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def thin_run(source: Path, target: Path, text_hash: bool = True) -> None:
    """Writes the thin form of a run into a directory, results.json last: a run with it is complete."""
    target.mkdir(parents=True, exist_ok=True)
    info, results = (json.loads((source / f"{name}.json").read_text("utf-8")) for name in ("run", "results"))
    for name in {"model", "data", "features", "output_dir", "soft_labels"} & info["settings"].keys():
        if Path(info["settings"][name] or "").is_absolute():
            info["settings"][name] = Path(info["settings"][name]).name
    write_object(target / "run.json", info)
    thin_metrics(source / "metrics.jsonl", target / "metrics.jsonl")
    decimals = 3 if info["num_train_rows"] >= LARGE else 2
    for name in ("predictions.parquet", "validation.parquet"):
        kept = name == "predictions.parquet" or info["num_train_rows"] >= (LARGE if text_hash else 2000)
        if kept and (source / name).is_file():
            thin_predictions(source / name, target / name, decimals, text_hash)
    if (target / "predictions.parquet").is_file():
        results.pop("confusion", None)  # `report` counts it again, and the scores of each class
        results["per_class"] = [*results["per_class"]]
    write_object(target / "results.json", results)


if __name__ == "__main__":
    directories = [Path(argument) for argument in sys.argv[1:] if argument != "--no-text-hash"]
    thin_run(directories[0], directories[-1], "--no-text-hash" not in sys.argv)

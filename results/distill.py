"""Distillation with controls: MiniLM learns from SmolLM2's probabilities on texts without labels.

    python results/distill.py --data DIR --banking77 DIR --minilm DIR --smollm2 DIR --out runs/distill --workers 6
    python results/distill.py ... --summary results/distill.json         # only the tables, from finished runs

For each data set and seed: the teacher (SmolLM2) and MiniLM alone are trained on the labelled rows, as in decoders.py.
The teacher then scores all training texts, and MiniLM is trained on the labelled rows and the texts without labels,
once with the teacher's probabilities and once with its answers alone (hard labels, the control). The temperature is
chosen on the validation rows of the first seed. Temperature scaling alone is the second control. Finished runs are
skipped. The summary pairs the runs of a seed on the same test rows.
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from minicls import metrics
from minicls.config import DataSettings
from minicls.data import load_splits
from minicls.results import read_predictions
from results import decoders

SEEDS, TEMPERATURES = (42, 43, 44), (1, 2, 4)
# Teacher, labelled rows, rows of the sample that contains them, learning rates of teacher and student (decoders.py's).
PLANS = {
    "data": ("smollm2-options", 1000, 21_000, 5e-5, 2e-4),
    "banking77": ("smollm2-linear", 770, 9003, 2e-4, 2e-4),  # all but the validation rows
}


def num_steps(data: str, rows: int) -> int:
    return decoders.num_steps(rows) if data == "data" else decoders.banking_steps(rows)


def job(data: str, name: str, recipe: str, seed: int, rate: float, steps: int, *flags: str) -> dict:
    rows = PLANS[data][1]
    shared = {"data": data, "rows": rows, "steps": steps, "seed": seed, "rate": rate, "flags": [*flags]}
    return shared | {"recipe": recipe, "name": f"{data}-{name}-{seed}"}


def soft_file(args: argparse.Namespace, data: str, seed: int, kind: str) -> Path:
    return Path(args.work) / f"{data}-{kind}-{seed}.parquet"


def write_soft_labels(args: argparse.Namespace, data: str, seed: int) -> None:
    """The teacher's probabilities for all training texts of a seed, and the same file with its answers alone."""
    from minicls.__main__ import main

    soft, hard = (soft_file(args, data, seed, kind) for kind in ("soft", "hard"))
    if hard.is_file():
        return
    settings = DataSettings(
        data=getattr(args, data), validation_size=1000, max_train_rows=PLANS[data][2], seed=seed, max_eval_rows=None
    )
    texts = soft.with_suffix(".texts.parquet")
    pq.write_table(pa.table({"text": load_splits(settings).train.texts}), texts)
    device = ["--device", args.device] if args.device else []
    main(["predict", str(Path(args.work) / f"{data}-teacher-{seed}"), str(texts), "--out", str(soft), *device])
    table = pq.read_table(soft)
    columns = [name for name in table.column_names if name.startswith("probability_")]
    probabilities = np.stack([table[name].to_numpy() for name in columns], axis=1)
    answers = np.eye(len(columns))[probabilities.argmax(1)]
    pq.write_table(pa.table({"text": table["text"]} | dict(zip(columns, answers.T, strict=True))), hard)


def train(jobs: list[dict], args: argparse.Namespace) -> None:
    workers = decoders.Workers(args)
    workers.do(jobs)
    workers.stop()


def chain(data: str, args: argparse.Namespace) -> None:
    """All runs of one data set."""
    teacher, rows, all_rows, teacher_rate, rate = PLANS[data]
    steps, all_steps = num_steps(data, rows), num_steps(data, all_rows)
    teachers = [job(data, "teacher", teacher, seed, teacher_rate, steps) for seed in SEEDS]
    alone = [job(data, "alone", "minilm", seed, rate, steps) for seed in SEEDS]
    train(teachers + alone, args)
    for seed in SEEDS:
        write_soft_labels(args, data, seed)

    def student(name: str, seed: int, kind: str, temperature: float) -> dict:
        flags = "--soft-labels", str(soft_file(args, data, seed, kind)), "--temperature", str(temperature)
        return job(data, name, "minilm", seed, rate, all_steps, *flags)

    grid = [student(f"soft-T{temperature}", SEEDS[0], "soft", temperature) for temperature in TEMPERATURES]
    hard = [student("hard", seed, "hard", 1) for seed in SEEDS]
    train(grid + hard, args)
    scores = {t: decoders.validation_f1(f"{data}-soft-T{t}-{SEEDS[0]}", args) for t in TEMPERATURES}
    best = max(scores, key=scores.get)
    print(f"{data}: validation F1 by temperature {scores}", flush=True)
    train([student(f"soft-T{best}", seed, "soft", best) for seed in SEEDS[1:]], args)


def read_run(directory: Path) -> tuple[dict, dict | None]:
    """results.json, and the columns of predictions.parquet if it was kept."""
    return json.loads((directory / "results.json").read_text()), read_predictions(directory / "predictions.parquet")


def summarize(args: argparse.Namespace) -> dict:
    """Scores of each seed by kind of run, and paired differences between the kinds that have all seeds."""
    out, summary = Path(args.out), {}
    for data in PLANS:
        kinds = sorted({path.name.rsplit("-", 1)[0].removeprefix(f"{data}-") for path in out.glob(f"{data}-*")})
        runs = {kind: {s: read_run(d) for s in SEEDS if (d := out / f"{data}-{kind}-{s}").is_dir()} for kind in kinds}
        keys = ("accuracy", "f1", "calibration_error", "temperature", "calibration_error_scaled")
        scores = {
            kind: {key: [run[0][key] for run in by_seed.values()] for key in keys} for kind, by_seed in runs.items()
        }
        for kind, by_seed in runs.items():
            scores[kind]["validation_f1"] = [decoders.validation_f1(f"{data}-{kind}-{seed}", args) for seed in by_seed]
        predicted = {kind: [by_seed[seed][1] for seed in by_seed] for kind, by_seed in runs.items()}
        whole = [kind for kind, files in predicted.items() if len(files) == len(SEEDS) and None not in files]
        pairs = []
        for a, b in itertools.combinations(whole, 2):
            files = predicted[a] + predicted[b]
            if any(not np.array_equal(file["row"], files[0]["row"]) for file in files):
                raise SystemExit(f"{data}: {a} and {b} were tested on different rows")
            right = [[file["label"] == file["prediction"] for file in predicted[kind]] for kind in (a, b)]
            means, replicates = metrics.resampled_accuracies(right)
            low, high = np.quantile(replicates[:, 0] - replicates[:, 1], [0.025, 0.975])
            tests = [
                metrics.mcnemar(of_a["label"], of_a["prediction"], of_b["prediction"])
                for of_a, of_b in zip(predicted[a], predicted[b], strict=True)
            ]
            pairs.append(
                {"a": a, "b": b, "difference": means[0] - means[1], "low": low, "high": high, "mcnemar": tests}
            )
        test_rows = len(predicted[whole[0]][0]["row"])
        summary[data] = {"test_rows": test_rows, "scores": scores, "pairs": pairs}
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "banking77", "minilm", "smollm2", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--sets", nargs="+", default=[*PLANS], choices=[*PLANS])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--work", default="runs/distill-work")
    parser.add_argument("--summary", help="write the tables of the finished runs to this file, and train nothing")
    args = parser.parse_args()
    if args.summary:
        Path(args.summary).write_text(json.dumps(summarize(args)) + "\n")
        return
    Path(args.work).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    args.keep = [f"{data}-teacher-{seed}" for data in PLANS for seed in SEEDS]
    for data in args.sets:
        chain(data, args)


if __name__ == "__main__":
    main()

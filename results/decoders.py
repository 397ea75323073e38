"""Encoder against decoder with pretrained weights on both sides: every run of results/decoders, from one command.

    python results/decoders.py --data DIR --banking77 DIR --minilm DIR --smollm2 DIR --out results/decoders
    python results/decoders.py ... --parts rows extras --workers 6      # some parts; runs at once on one device

`--data` is AG News with its `labels.txt`; `--minilm` is all-MiniLM-L6-v2, `--smollm2` SmolLM2-135M-Instruct. Finished
runs are skipped, so the command can be repeated after an interruption. A model's learning rate is chosen on validation
rows from a grid of three, which grows by one rate while the best is at an edge. Runs are kept in thin form (thin.py),
without weights.
"""

import argparse
import importlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from results.thin import thin_run

RECIPES = {  # script, model, flags
    "minilm": ("train_bert", "minilm", []),
    "smollm2-linear": ("train_qwen", "smollm2", ["--head", "linear"]),
    "smollm2-options": ("train_qwen", "smollm2", ["--train-on", "letter"]),
}
BASELINES = ("tfidf", "frozen-minilm")  # logistic regression, which chooses its own C
GRIDS = {"minilm": [5e-5, 1e-4, 2e-4], "smollm2-linear": [2e-5, 5e-5, 1e-4], "smollm2-options": [2e-5, 5e-5, 1e-4]}
BATCH = 16
FLAGS = "--warmup-ratio 0.1 --weight-decay 0.01 --eval-every 0 --save-every 0 --keep-checkpoints 1 --log-every 25"
SEEDS = {100: 3, 1000: 3, 5000: 3, 20_000: 1, 62_629: 1}  # training rows -> seeds
BANKING = {770: 3, 2310: 3, 10_003: 1}  # rows -> seeds; 10,003 are all rows, which leaves none for validation


def num_steps(rows: int) -> int:
    """The same for every model: four epochs, two from 5,000 rows and one from 20,000, but at least 150 steps of 16."""
    epochs = 4 if rows < 5000 else 2 if rows < 20_000 else 1
    return max(150, epochs * math.ceil(rows / BATCH))


def banking_steps(rows: int) -> int:
    """Seventy-seven classes take longer: fifteen epochs, but 500 to 3,000 steps of 16."""
    return min(3000, max(500, 15 * math.ceil(rows / BATCH)))


def jobs_of_grid(recipe: str, rates: list[float], data: str) -> list[dict]:
    rows, steps = (1000, num_steps(1000)) if data == "data" else (2310, banking_steps(2310))
    prefix = "grid" if data == "data" else "banking77-grid"
    shared = {"recipe": recipe, "data": data, "rows": rows, "steps": steps, "seed": 42, "test_rows": 2000}
    return [shared | {"name": f"{prefix}-{recipe}-{rate:g}", "rate": rate} for rate in rates]


def flags_of(job: dict, args: argparse.Namespace) -> tuple[str, list[str]]:
    flags = ["--data", getattr(args, job["data"]), "--validation-size", "0" if job["rows"] == 10_003 else "1000"]
    flags += ["--max-train-rows", str(job["rows"]), "--seed", str(job["seed"])]
    flags += ["--max-eval-rows", str(job["test_rows"])] if job.get("test_rows") else []
    flags += ["--device", args.device] if args.device else []
    flags += ["--threads", str(args.threads)] if args.threads else []
    flags += ["--dtype", args.dtype] if args.dtype and job["recipe"] != "tfidf" else []
    if job["recipe"] == "zero-shot":
        return "minicls.__main__", ["evaluate", args.smollm2, *flags]
    if job["recipe"] in BASELINES:
        return "minicls.baseline", [*flags, "--features", "tfidf" if job["recipe"] == "tfidf" else args.minilm]
    script, model, more = RECIPES[job["recipe"]]
    flags += [*more, *job.get("flags", []), "--model", getattr(args, model), "--max-steps", str(job["steps"])]
    flags += f"--global-batch-size {BATCH} --micro-batch-size {BATCH} --learning-rate {job['rate']:g}".split()
    return script, [*flags, *FLAGS.split()]


def run(job: dict, args: argparse.Namespace) -> str:
    """Trains one run in this process and keeps its thin form; returns a line about it."""
    out = Path(args.out) / job["name"]
    if (out / "results.json").is_file():
        return f"{job['name']}: exists"
    begin = time.perf_counter()
    work = Path(args.work) / job["name"]
    shutil.rmtree(work, ignore_errors=True)
    script, flags = flags_of(job, args)
    log = Path(args.work) / f"{job['name']}.log"
    with log.open("w") as file:
        saved, sys.stdout, sys.stderr = (sys.stdout, sys.stderr), file, file
        try:
            importlib.import_module(script).main([*flags, "--output-dir", str(work)])
        except BaseException as error:
            return f"{job['name']}: FAILED {type(error).__name__}: {error}"
        finally:
            sys.stdout, sys.stderr = saved
    thin_run(work, out, text_hash=job["data"] == "data")  # banking77's test rows are always the same
    if job["name"] not in args.keep:
        shutil.rmtree(work)
    results = json.loads((out / "results.json").read_text())
    seconds = time.perf_counter() - begin
    trained = f"{results['train_seconds']:.0f} s of training"
    return f"{job['name']}: accuracy {results['accuracy']:.4f}, {trained}, {seconds:.0f} s in all"


def worker(queue, lines, args: argparse.Namespace) -> None:
    while (job := queue.get()) is not None:
        lines.put(run(job, args))


class Workers:
    """Processes that take one job after another, so that each starts Python and the device once."""

    def __init__(self, args: argparse.Namespace):
        self.context = multiprocessing.get_context("spawn")
        self.queue, self.lines = self.context.Queue(), self.context.Queue()
        self.processes = [
            self.context.Process(target=worker, args=(self.queue, self.lines, args), daemon=True)
            for _ in range(args.workers)
        ]
        for process in self.processes:
            process.start()

    def do(self, jobs: list[dict]) -> None:
        """Runs all jobs, the longest first."""
        weight = {
            "minilm": 1,
            "zero-shot": 1,
            "smollm2-linear": 4,
            "smollm2-options": 5,
            "tfidf": 3,
            "frozen-minilm": 1,
        }
        for job in sorted(jobs, key=lambda job: -job["steps"] * weight[job["recipe"]]):
            self.queue.put(job)
        for _ in jobs:
            print(f"{time.strftime('%H:%M:%S')} {self.lines.get()}", flush=True)

    def stop(self) -> None:
        for _ in self.processes:
            self.queue.put(None)


def validation_f1(name: str, args: argparse.Namespace) -> float:
    lines = (Path(args.out) / name / "metrics.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if event.get("split") == "validation"]
    return events[-1]["f1"]


def choose_rates(workers: Workers, args: argparse.Namespace, data: str, recipes: list[str]) -> dict[str, float]:
    """Each recipe's best learning rate on validation; a grid whose best rate is at an edge grows by one."""
    grids = {recipe: list(GRIDS[recipe]) for recipe in recipes}
    while True:
        jobs = [job for recipe, rates in grids.items() for job in jobs_of_grid(recipe, rates, data)]
        workers.do([job for job in jobs if not (Path(args.out) / job["name"] / "results.json").is_file()])
        best, grown = {}, False
        for recipe, rates in grids.items():
            scores = {job["rate"]: validation_f1(job["name"], args) for job in jobs_of_grid(recipe, rates, data)}
            best[recipe] = max(scores, key=scores.get)
            step = rates[1] / rates[0]
            if len(rates) < 6 and best[recipe] == max(rates):
                rates.append(float(f"{max(rates) * 2:.1g}"))
                grown = True
            elif len(rates) < 6 and best[recipe] == min(rates):
                rates.insert(0, float(f"{min(rates) / step:.1g}"))
                grown = True
        if not grown:
            return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "banking77", "minilm", "smollm2", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--parts", nargs="+", default=["rows", "extras", "banking77"])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", help="fp32 for a CPU without bf16; unset: each script's default")
    parser.add_argument("--work", default="runs/decoders")
    parser.add_argument("--keep", nargs="*", default=[], help="runs whose directories stay in --work, weights included")
    parser.add_argument("--sizes", nargs="+", type=int, default=[*SEEDS])
    args = parser.parse_args()
    Path(args.work).mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    workers = Workers(args)
    jobs = []
    if "rows" in args.parts or "extras" in args.parts:
        rates = choose_rates(workers, args, "data", [*RECIPES])
        print("learning rates:", rates, flush=True)
        if "rows" in args.parts:
            for rows, recipe in itertools.product(args.sizes, (*RECIPES, *BASELINES)):
                seeds = 1 if rows == 5000 and recipe.startswith("smollm2") else SEEDS[rows]
                job = {"recipe": recipe, "data": "data", "rows": rows, "steps": num_steps(rows)}
                job |= {"rate": rates.get(recipe), "test_rows": 2000 if rows < 20_000 else None}
                names = {seed: f"{recipe}-{rows}-{seed}" for seed in range(42, 42 + seeds)}
                jobs += [job | {"name": name, "seed": seed} for seed, name in names.items()]
        if "extras" in args.parts:
            extras = {"options-first": ["--prompt", "options-first"], "response": ["--train-on", "response"]}
            extra = {"recipe": "smollm2-options", "data": "data", "rows": 1000, "test_rows": 2000}
            trained = extra | {"steps": num_steps(1000), "rate": rates["smollm2-options"]}
            for (name, flags), seed in itertools.product(extras.items(), (42, 43, 44)):
                jobs.append(trained | {"name": f"smollm2-{name}-1000-{seed}", "seed": seed, "flags": flags})
            jobs.append(extra | {"name": "smollm2-zero-shot", "recipe": "zero-shot", "steps": 1, "seed": 42})
    if "banking77" in args.parts:
        linear = ["minilm", "smollm2-linear"]
        rates = choose_rates(workers, args, "banking77", linear)
        print("learning rates, banking77:", rates, flush=True)
        jobs += [
            {"name": f"banking77-{recipe}-{rows}-{seed}", "recipe": recipe, "data": "banking77", "rows": rows}
            | {"steps": banking_steps(rows), "rate": rates.get(recipe), "seed": seed}
            for rows, seeds in BANKING.items()
            for recipe in (*linear, *BASELINES)
            for seed in range(42, 42 + seeds)
        ]
    workers.do(jobs)
    workers.stop()


if __name__ == "__main__":
    main()

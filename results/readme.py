"""Writes the generated tables into README.md, README.zh-CN.md and results/README.md.

    python results/readme.py        # `make readme`: after any change under results/; a test fails while a table is stale

A table stands between `<!-- NAME: ... -->` and `<!-- /NAME -->` and is the same in both languages.
"""

import functools
import json
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from minicls import metrics, plots
from minicls.checkpoint import Run, open_run
from minicls.comparison import (
    PUBLISHED,
    PUBLISHED_BEST,
    PUBLISHED_STEPS,
    bench_table,
    common_predictions,
    compare_pairs,
    comparison_table,
    curve_section,
    grid_tables,
    open_runs,
)
from minicls.results import interval, kind, markdown, results_table, speed_table

PAGES = ("README.md", "README.zh-CN.md", "results/README.md")
DECODERS = ROOT / "results" / "decoders"
ANSWER = ("minilm-62629-42", "minilm-20000-42", "smollm2-linear-20000-42", "smollm2-options-20000-42", "tfidf-20000-42")
GPU = ROOT / "results" / "gpu"


def answer_table() -> str:
    """The published experiment, and runs of this project on the same test rows of AG News; intervals are Wilson's."""
    header = ["run", "model", "head", "training rows", "step", "test accuracy (95 % interval)", "requests/s"]
    rows = []
    served = {
        "BERT": "60.3 (transformers)",
        "Qwen3": "13.2 (transformers), 27.1 (vLLM)",
    }  # one request at a time, as published
    for name, model in (("BERT", ["bert-base-cased", "linear"]), ("Qwen3", ["Qwen3-0.6B", "options"])):
        step, _ = PUBLISHED_BEST[name]
        accuracy = PUBLISHED[name]["accuracy"][PUBLISHED[name]["step"].index(step)]
        chosen = f"{step:,} of {PUBLISHED_STEPS[name]:,}, best on test"
        scores = interval(accuracy, *metrics.accuracy_interval(accuracy, 7600))
        rows.append(["published", *model, "120,000", chosen, scores, served[name]])
    for run in (open_run(DECODERS / folder) for folder in ANSWER):
        found = run.results
        scores = interval(found["accuracy"], *metrics.accuracy_interval(found["accuracy"], found["num_test_rows"]))
        step = f"{found['headline_step']:,} of {found['final_step']:,}, last" if found["final_step"] else None
        rows.append(["here", *kind(run)[1:], f"{run.info['num_train_rows']:,}", step, scores, None])
    return markdown(header, rows)


def curve_runs() -> dict[str, Run]:
    """The runs of results/decoders whose recipe does not change from one number of rows to the next."""
    folders = sorted(file.parent for file in DECODERS.glob("*/results.json"))
    return open_runs(
        [folder for folder in folders if re.fullmatch(r"(minilm|smollm2-\w+|tfidf|frozen-minilm)-\d+-\d+", folder.name)]
    )


def pairs_table() -> str:
    """The runs of the first screen row by row on the 7,600 test rows."""
    runs = open_runs([DECODERS / folder for folder in ANSWER])
    return comparison_table(compare_pairs(runs, common_predictions(runs)), len(runs))


def own_data_table() -> str:
    """The README's recipe for one's own data: mean of three samples of 1,000 rows, next to TF-IDF on the same rows."""
    header = [
        "data",
        "classes",
        "test rows",
        "recipe, mean accuracy",
        "each sample",
        "TF-IDF, mean accuracy",
        "each sample",
    ]
    rows = []
    for folder in sorted((ROOT / "results/own_data").glob("*/")):
        if folder.name.endswith("-grid"):
            continue
        runs = {
            file.parent.name: json.loads(file.read_text(encoding="utf-8"))
            for file in sorted(folder.glob("*/results.json"))
        }
        sides = [[r for name, r in runs.items() if name.endswith("tfidf") == tfidf] for tfidf in (False, True)]
        cells = []
        for side in sides:
            scores = [result["accuracy"] for result in side]
            cells += (
                [f"**{np.mean(scores):.3f}**", ", ".join(f"{score:.3f}" for score in scores)]
                if scores
                else [None, None]
            )
        rows.append([folder.name, len(sides[0][0]["per_class"]), f"{sides[0][0]['num_test_rows']:,}", *cells])
    return markdown(header, rows)


def own_data_grid() -> str:
    """What the recipe was chosen from, by macro F1 on the validation rows of banking77."""
    rows = []
    for file in sorted((ROOT / "results/own_data/banking77-grid").glob("*/metrics.jsonl")):
        events = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        best = max(event["f1"] for event in events if event.get("split") == "validation")
        settings = json.loads((file.parent / "run.json").read_text(encoding="utf-8"))["settings"]
        result = json.loads((file.parent / "results.json").read_text(encoding="utf-8"))
        rows.append([f"{settings['learning_rate']:g}", f"{settings['epochs']:g}", best, result["accuracy"]])
    chosen = max(rows, key=lambda row: row[2])
    return markdown(
        ["learning rate", "epochs", "validation macro F1", "test accuracy", ""],
        [[*row, "chosen" * (row is chosen)] for row in rows],
    )


def gpu_table() -> str:
    """What results/gpu.py measured, a line for each rate."""
    lines = []
    for file in sorted(GPU.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        for name, values in result.items():
            if isinstance(values, dict) and "samples_per_second" in values:
                peak = values.get("fraction_of_peak")
                cells = [f"{values['samples_per_second']:,.0f}", f"{values['tokens_per_second']:,.0f}"]
                lines.append([name, *cells, None if peak is None else f"{peak:.0%}", values.get("peak_gib")])
            elif isinstance(values, dict) and "requests_per_second" in values:
                lines.append(
                    [
                        f"{name} (p50 {values['p50_ms']:.0f} ms)",
                        f"{values['requests_per_second']:,.0f}",
                        None,
                        None,
                        None,
                    ]
                )
    header = ["NVIDIA H100 80 GB, torch 2.11, bf16", "rows or requests/s", "tokens/s", "of 989 TFLOP/s", "peak GiB"]
    return markdown(header, [[cell if cell is None else str(cell) for cell in line] for line in lines])


def requests_table(benches: list[list[dict]]) -> str:
    """Requests per second and median latency, the engines side by side: in each line, those of one bench.json."""
    names = sorted({f"{row['engine']} {row['engine_version']}" for bench in benches for row in bench})
    lines = []
    for bench in benches:
        found = {
            (row["model"], row["method"], row["mode"], f"{row['engine']} {row['engine_version']}"): row for row in bench
        }
        for asked in dict.fromkeys(key[:3] for key in found):
            cells = [found.get((*asked, name)) for name in names]
            shown = [row and f"{row['requests_per_second']:.2f} ({row['latency_p50_ms']:,.0f} ms)" for row in cells]
            lines.append([*asked, next(row["dtype"] for row in cells if row), *shown])
    return markdown(["model", "method", "mode", "dtype", *names], lines)


@functools.cache
def tables() -> dict[str, str]:
    """The tables by name."""
    benches = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((ROOT / "results/bench").glob("*.json"))]
    requests = [bench for bench in benches if isinstance(bench, list)]
    runs, small = (
        sorted(file.parent for file in (ROOT / "results").glob(f"{place}/results.json")) for place in ("*", "small/*")
    )
    grid = {folder.name: open_run(folder) for folder in small if folder.name.startswith("grid-")}
    decoders = sorted(file.parent for file in DECODERS.glob("*/results.json"))
    rates = {folder.name: open_run(folder) for folder in decoders if folder.name.startswith("grid-")}
    rates77 = {folder.name: open_run(folder) for folder in decoders if folder.name.startswith("banking77-grid-")}
    curves = curve_runs()
    return {
        "answer": answer_table(),
        "results": results_table(runs),
        "speed": speed_table([bench for bench in benches if isinstance(bench, dict)]),
        "served": requests_table(requests),
        "requests": bench_table([row for bench in requests for row in bench]),
        "small": results_table(small),
        "grid": "\n\n".join(grid_tables(grid)),
        "decoders": results_table([folder for folder in decoders if "grid-" not in folder.name]),
        "curves": curve_section(curves, common_predictions(curves))[0],
        "pairs": pairs_table(),
        "decoder_grid": "\n\n".join(grid_tables(rates)),
        "banking_grid": "\n\n".join(grid_tables(rates77)),
        "own_data": own_data_table(),
        "own_data_grid": own_data_grid(),
        "gpu": gpu_table(),
    }


def fill(page: str) -> str:
    """The page with its tables as the result files have them now."""
    for name, table in tables().items():
        block = rf"(<!-- {name}: [^\n]* -->\n).*?(<!-- /{name} -->)"
        page = re.sub(block, lambda found, table=table: f"{found[1]}{table}\n{found[2]}", page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    curves = curve_runs()
    plots.plot_learning_curves(curve_section(curves, common_predictions(curves))[1], DECODERS / "rows.png")
    for page in PAGES:
        (ROOT / page).write_text(fill((ROOT / page).read_text(encoding="utf-8")), encoding="utf-8")

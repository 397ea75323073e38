"""Writes the generated tables into README.md, README.zh-CN.md and results/README.md.

    python results/readme.py        # `make readme`: after any change under results/; a test fails while a table is stale

A table stands between `<!-- NAME: ... -->` and `<!-- /NAME -->` and is the same in both languages.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from minicls import metrics
from minicls.checkpoint import open_run
from minicls.comparison import PUBLISHED, PUBLISHED_BEST, PUBLISHED_STEPS, bench_table, grid_tables
from minicls.report import interval, kind, markdown, results_table, speed_table

PAGES = ("README.md", "README.zh-CN.md", "results/README.md")
ANSWER = ("minilm-ag_news", "qwen3-small-ag_news-linear", "qwen3-small-ag_news-options")  # the first screen's runs


def answer_table() -> str:
    """The published experiment, and runs of this project on the same test rows of AG News; intervals are Wilson's."""
    header = ["run", "model", "head", "starts from", "training rows", "step", "test accuracy (95 % interval)", "requests/s"]
    rows = []
    served = {"BERT": "60.3 (transformers)", "Qwen3": "13.2 (transformers), 27.1 (vLLM)"}  # one request at a time, as published
    for name, model in (("BERT", ["bert-base-cased", "linear"]), ("Qwen3", ["Qwen3-0.6B", "options"])):
        step, _ = PUBLISHED_BEST[name]
        accuracy = PUBLISHED[name]["accuracy"][PUBLISHED[name]["step"].index(step)]
        chosen = f"{step:,} of {PUBLISHED_STEPS[name]:,}, best on test"
        scores = interval(accuracy, *metrics.accuracy_interval(accuracy, 7600))
        rows.append(["published", *model, "pretrained", "120,000", chosen, scores, served[name]])
    for run in (open_run(ROOT / "results" / folder) for folder in ANSWER):
        found = run.results
        chosen = "last" if found["best_step_on_validation"] is None else "best on validation"
        scores = interval(found["accuracy"], *metrics.accuracy_interval(found["accuracy"], found["num_test_rows"]))
        where = [run.info["settings"]["init"], f"{run.info['num_train_rows']:,}"]
        where.append(f"{found['headline_step']:,} of {found['final_step']:,}, {chosen}")
        rows.append(["here", *kind(run)[1:], *where, scores, None])
    return markdown(header, rows)


def requests_table(benches: list[list[dict]]) -> str:
    """Requests per second and median latency, the engines side by side: in each line, those of one bench.json."""
    names = sorted({f"{row['engine']} {row['engine_version']}" for bench in benches for row in bench})
    lines = []
    for bench in benches:
        found = {(row["model"], row["method"], row["mode"], f"{row['engine']} {row['engine_version']}"): row for row in bench}
        for asked in dict.fromkeys(key[:3] for key in found):
            cells = [found.get((*asked, name)) for name in names]
            shown = [row and f"{row['requests_per_second']:.2f} ({row['latency_p50_ms']:,.0f} ms)" for row in cells]
            lines.append([*asked, next(row["dtype"] for row in cells if row), *shown])
    return markdown(["model", "method", "mode", "dtype", *names], lines)


def tables() -> dict[str, str]:
    """The tables by name."""
    benches = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((ROOT / "results/bench").glob("*.json"))]
    requests = [bench for bench in benches if isinstance(bench, list)]
    runs, small = (sorted(file.parent for file in (ROOT / "results").glob(f"{place}/results.json")) for place in ("*", "small/*"))
    grid = {folder.name: open_run(folder) for folder in small if folder.name.startswith("grid-")}
    return {
        "answer": answer_table(),
        "results": results_table(runs),
        "speed": speed_table([bench for bench in benches if isinstance(bench, dict)]),
        "served": requests_table(requests),
        "requests": bench_table([row for bench in requests for row in bench]),
        "small": results_table(small),
        "grid": "\n\n".join(grid_tables(grid)),
    }


def fill(page: str) -> str:
    """The page with its tables as the result files have them now."""
    for name, table in tables().items():
        block = rf"(<!-- {name}: [^\n]* -->\n).*?(<!-- /{name} -->)"
        page = re.sub(block, lambda found, table=table: f"{found[1]}{table}\n{found[2]}", page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(fill((ROOT / page).read_text(encoding="utf-8")), encoding="utf-8")

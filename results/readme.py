"""Writes the generated tables into the pages that show them.

    python results/readme.py    # `make readme`: after any change under results/; a test fails while a table is stale

A table stands between `<!-- NAME: ... -->` and `<!-- /NAME -->` and is the same in every language.
"""

import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from minicls import comparison, plots
from minicls.checkpoint import Run, open_run
from minicls.comparison import PUBLISHED, PUBLISHED_BEST, PUBLISHED_STEPS, describe_model, open_runs, over_seeds, wilson
from minicls.results import interval, plain, spread, table

PAGES = ("README.md", "README.zh-CN.md", "results/README.md", "docs/performance.md")
RESULTS = ROOT / "results"
DECODERS = RESULTS / "decoders"
PAIRED = (
    [f"{model}-62629-42" for model in ("minilm", "smollm2-linear", "smollm2-options", "tfidf", "frozen-minilm")],
    ["minilm-62629-42", *(f"{model}-20000-42" for model in ("minilm", "smollm2-linear", "smollm2-options", "tfidf"))],
    [f"banking77-{model}-10003-42" for model in ("minilm", "smollm2-linear", "frozen-minilm", "tfidf")],
)
CASCADES = (
    *((f"minilm-{n}-42", f"smollm2-{head}-{n}-42") for n in (20_000, 62_629) for head in ("linear", "options")),
    ("tfidf-62629-42", "smollm2-linear-62629-42"),
    *((f"banking77-minilm-2310-{seed}", f"banking77-smollm2-linear-2310-{seed}") for seed in (42, 43, 44)),
)
PUBLISHED_MODELS = {"BERT": ("bert-base-cased", "linear"), "Qwen3": ("Qwen3-0.6B", "options")}
ENGINES = ("minicls", "transformers", "vLLM")
# Per model: training, requests, and methods with their names in results/gpu.py.
SPEED_FILES = {
    "BERT-base": ("train-bert-base-bf16", "rps-bert-base-bf16", {"classify": "classify"}),
    "Qwen3-0.6B": (
        "train-qwen3-0.6b-bf16",
        "rps-qwen3-0.6b-compiled-bf16",
        {"score": "score", "generate": "generate 8"},
    ),
}
PUBLISHED_RATES = {  # by ENGINES
    ("BERT-base", "classify"): (None, 60.3),
    ("Qwen3-0.6B", "generate"): (None, 13.2, 27.1),
}


def read(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


def folders(pattern: str) -> list[Path]:
    return sorted(file.parent for file in RESULTS.glob(f"{pattern}/results.json"))


def joined(tables: Iterable[str]) -> str:
    """Tables one below the other, without the empty ones."""
    return "\n\n".join(filter(None, tables))


# Accuracy.


@functools.cache
def curves(prefix: str = "") -> tuple[str, dict]:
    """The tables and the points of the runs whose recipe does not change with the number of rows."""
    name = re.compile(rf"{prefix}(minilm|smollm2-linear|smollm2-options|tfidf|frozen-minilm)-\d+-\d+")
    runs = open_runs([folder for folder in folders("decoders/*") if name.fullmatch(folder.name)])
    return comparison.curve_section(runs, comparison.common_predictions(runs))


def served(role: str, method: str, mode: str) -> float | None:
    """minicls' requests per second in bench/rps-trained-*.json, not compiled."""
    for name, rows in benches().items():
        for row in rows if name.startswith("rps-trained") else ():
            asked = row["model"].split(": ")[0], row["engine"], row["method"], row["mode"], row["status"]
            if asked == (role, "minicls", method, mode, "ok") and "compiled" not in row["engine_version"]:
                return row["requests_per_second"]
    return None


def answer_table() -> str:
    """Accuracy on AG News by training rows, and requests per second: published, and as this project ran them."""
    columns = ("1,000 training rows", "20,000", "62,629", "120,000")
    rows = []

    def add(model: str, head: str, accuracies: dict[str, str], requests: Sequence[float | None] = ()) -> None:
        row = {"model": model, "head": head} | {column: accuracies.get(column) for column in columns}
        shown = " / ".join(map(rate, requests)) if all(requests) and requests else None
        rows.append(row | {"requests/s, one at a time / all at once": shown})

    for family, (model, head) in PUBLISHED_MODELS.items():
        step, _ = PUBLISHED_BEST[family]
        accuracies = dict(zip(PUBLISHED[family]["step"], PUBLISHED[family]["accuracy"], strict=True))
        best = f"published: best on test, step {step:,} of {PUBLISHED_STEPS[family]:,}"
        add(model, head, {"120,000": f"{wilson(accuracies[step], 7600)}, {best}"})
    roles = {"minilm": ("bert", "classify"), "smollm2-linear": ("qwen-linear", "classify")}
    roles |= {"smollm2-options": ("qwen", "score"), "tfidf": ("baseline", "")}
    rates = {recipe: [served(*role, mode) for mode in ("single", "offline")] for recipe, role in roles.items()}
    for recipe in roles:
        model = describe_model(open_run(DECODERS / f"{recipe}-1000-42"))
        *accuracy, _ = curves()[1][str(model)][1000]
        accuracies = {columns[0]: interval(*accuracy)}
        for size in columns[1:3]:
            results = read(DECODERS / f"{recipe}-{size.replace(',', '')}-42" / "results.json")
            accuracies[size] = wilson(results["accuracy"], results["num_test_rows"])
        add(model.name, model.head, accuracies, rates[recipe])
    cascades = {}
    for column, pair in zip(columns[1:3], (CASCADES[0], CASCADES[2]), strict=True):
        both = cascade_of(*pair)
        cascades[column] = f"{cascade_accuracy(both)}, {both.deferred:.0%} deferred"
    # The cost by the last pair's share: the small model's time for every text, the large one's for the deferred ones.
    pairs = zip(rates["minilm"], rates["smollm2-linear"], strict=True)
    together = [1 / (1 / small + both.deferred / large) if small and large else None for small, large in pairs]
    add("MiniLM, deferring to SmolLM2", "linear, both", cascades, together)
    distilled = read(RESULTS / "distill.json")["data"]["scores"]["soft-T2"]["accuracy"]
    brought = f"{spread(distilled)}, with 20,000 texts without labels"
    add("MiniLM, distilled from SmolLM2", "linear", {columns[0]: brought}, rates["minilm"])
    return table(rows)


def pairs_table(runs: Sequence[Path]) -> str:
    return table(comparison.compare_pairs(comparison.common_predictions(open_runs(runs))))


def results_table(run_dirs: Sequence[Path]) -> str:
    """One line for each setting, seeds as mean ± standard deviation; a run's hf_trainer.json has a line of its own."""
    rows, names = [], dict(zip(run_dirs, comparison.short_names(run_dirs), strict=True))
    for group in comparison.fold(map(open_run, run_dirs)):
        info, model = group[0].info, describe_model(group[0])
        lines = {comparison.group_name([names[run.dir] for run in group]): group}
        for run in group:
            if (file := run.dir / "hf_trainer.json").is_file():
                lines[f"{names[run.dir]}, HF Trainer"] = [Run(run.dir, info, read(file), None)]
        for name, members in lines.items():
            row = {"result": name, "model": model.name, "head": model.head}
            row |= {"train rows": f"{info['num_train_rows']:,}", "test rows": f"{group[0].results['num_test_rows']:,}"}
            row |= {"accuracy": over_seeds(members, "accuracy")}
            row |= {"macro F1 (95 % interval)": comparison.f1_with_interval(members)}
            rows.append(row | {"training, s": over_seeds(members, "train_seconds", 0)})
    return table(rows)


def own_data_table() -> str:
    """The README's recipe for your own data on three samples of 1,000 rows, next to TF-IDF on the same rows."""
    rows = []
    for name in sorted(folder.name for folder in (RESULTS / "own_data").iterdir() if not folder.match("*-grid")):
        runs = {folder.name: read(folder / "results.json") for folder in folders(f"own_data/{name}/*")}
        first = next(iter(runs.values()))
        row = {"data": name, "classes": len(first["per_class"]), "test rows": f"{first['num_test_rows']:,}"}
        for side in ("recipe", "TF-IDF"):
            scores = [run["accuracy"] for key, run in runs.items() if key.endswith("tfidf") == (side == "TF-IDF")]
            row |= {f"{side}, mean accuracy": f"**{np.mean(scores):.3f}**" if scores else None}
            row |= {f"{side}, each sample": ", ".join(f"{score:.3f}" for score in scores) or None}
        rows.append(row)
    return table(rows)


def own_data_grid() -> str:
    """The grid from which the recipe was chosen, by macro F1 on the validation rows of banking77."""
    rows = []
    for run in map(open_run, folders("own_data/banking77-grid/*")):
        s = run.info["settings"]
        row = {"learning rate": f"{s['learning_rate']:g}", "epochs": f"{s['epochs']:g}"}
        row |= {"validation macro F1": comparison.validation_f1(run), "test accuracy": run.results["accuracy"]}
        rows.append(row)
    best = max(row["validation macro F1"] for row in rows)
    return table(row | {"": "chosen" * (row["validation macro F1"] == best)} for row in rows)


# Speed.


@functools.cache
def benches() -> dict[str, list | dict]:
    """The files of bench/: training and scoring are dictionaries, requests lists of rows."""
    return {file.stem: read(file) for file in sorted((RESULTS / "bench").glob("*.json"))}


@functools.cache
def gpus() -> list[dict]:
    """The files of results/gpu.py."""
    return [read(file) for file in sorted((RESULTS / "gpu").glob("*.json"))]


def rate(value: float | str | None) -> str | None:
    """A number with three digits, or all before the point; text as it is."""
    return value if not value or isinstance(value, str) else plain(value)


def rates_table() -> str:
    """Requests and training rows per second of BERT-base and Qwen3-0.6B, by hardware."""
    rows = []

    def add(model: str, task: str, hardware: str, *rates: float | str | None) -> None:
        if any(rates):
            engines = dict(itertools.zip_longest(ENGINES, map(rate, rates)))
            rows.append({"model": model, "task": task, "hardware": hardware} | engines)

    for model, (train, requests, methods) in SPEED_FILES.items():
        training, serving = benches()[train], benches()[requests]
        for gpu in gpus():
            keys = [key for key in gpu if re.fullmatch(rf"{model} (training|SFT), (micro-)?batch \d+", key)]
            for key in dict.fromkeys((*keys[:1], *keys[-1:])):
                add(model, f"training rows/s, {key.split(', ')[1]}", gpu["device"], gpu[key]["samples_per_second"])
        add(model, "training rows/s", training["device"], *(side["samples_per_second"] for side in training["rows"]))
        for method, gpu_method in methods.items():
            tasks = {"single": f"requests/s, {method}, one at a time", "offline": f"requests/s, {method}, all at once"}
            add(model, tasks["single"], "RTX 3090, published", *PUBLISHED_RATES.get((model, method), ()))
            for gpu in gpus():
                traced = [gpu.get(f"{model}, {engine}, {gpu_method}, one at a time", {}) for engine in ENGINES]
                add(model, tasks["single"], gpu["device"], *(figures.get("requests_per_second") for figures in traced))
            if method == "generate":
                del tasks["offline"]  # scoring the letters is faster and gives the same answers
            for mode, task in tasks.items():
                rates = dict.fromkeys(map(str.lower, ENGINES))
                for row in serving:
                    if (row["method"], row["mode"]) == (method, mode):
                        engine, *compiled = row["engine"].split(", ")
                        rates[engine] = " ".join([rate(row["requests_per_second"]) or "-", *compiled])
                add(model, task, serving[0]["device"], *rates.values())
    return table(rows)


def speed_table(benches: list[dict]) -> str:
    """A line for each peer in the files of hf_trainer.py: rates, their ratio with its range over rounds, peak memory.

    Files with the task `score` compare option scoring, which an earlier hf_trainer.py measured.
    """
    peers = {"train": "HF Trainer {}", "score": "transformers {}, a pass a question"}
    lines = []
    for bench in benches:
        ours, *others = bench["rows"]
        s = bench["settings"]
        for theirs in others:
            peer = "vLLM {}" if theirs["side"] == "vllm" else peers[bench["task"]]
            ratios, median = bench["speedup_of_each_round"][theirs["side"]], bench["speedup"][theirs["side"]]
            rounds = f"{min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} rounds" if len(ratios) > 1 else "1 round"
            line = {"measured": f"{bench['task']}, {s['dtype']}" + ", minicls compiled" * s["compile"]}
            line |= {"model": s["model"], "against": peer.format(theirs["version"])}
            line |= {"minicls, rows/s": f"{ours['samples_per_second']:.2f}"}
            line |= {"peer, rows/s": f"{theirs['samples_per_second']:.2f}"}
            line |= {"times as fast": f"**{median:.2f}** ({rounds})"}
            memory = " against ".join(f"{side['peak_memory_bytes'] / 2**30:.1f}" for side in (ours, theirs))
            lines.append(line | {"peak memory, GiB": memory})
    return table(lines)


def requests_table() -> str:
    """The rates and latencies of bench/rps-*.json, a line for each model, engine and method of a file."""

    def name(row: dict) -> tuple[str, ...]:
        return row["model"], row["method"], f"{row['engine']} {row['engine_version']}", row["dtype"]

    lines = []
    for bench in (rows for rows in benches().values() if isinstance(rows, list)):
        for (model, *names), rows in sorted(comparison.group_by(bench, name).items()):
            modes = {row["mode"]: row for row in rows}
            line = dict(zip(("model", "method", "engine", "dtype"), (model.split(": ")[-1], *names), strict=True))
            for mode in ("single", "offline"):
                rates = [modes.get(mode, {}).get(key) for key in ("requests_per_second", "latency_p50_ms")]
                line |= {f"{mode}: requests/s (p50)": rates[0] and "{:.2f} ({:,.0f} ms)".format(*rates)}
            latencies = [modes.get("server", {}).get(f"latency_p{percentile}_ms") for percentile in (50, 99)]
            line |= {"server: p50, p99": latencies[0] and "{:,.0f}, {:,.0f} ms".format(*latencies)}
            changed = [row.get("changed_answers") for row in rows]
            line |= {"changed answers": None if None in changed else f"{max(changed)} of {rows[0]['num_requests']:,}"}
            wrong = [f"{row['mode']}: {row['status']}, {row['reason']}" for row in rows if row["status"] != "ok"]
            lines.append(line | {"not ok": "; ".join(wrong) or None})
    return table(lines, empty_columns=False)


def gpu_table(gpu: dict) -> str:
    """The rates that results/gpu.py measured."""
    rows = []
    for name, figures in gpu.items():
        value = isinstance(figures, dict) and (figures.get("samples_per_second") or figures.get("requests_per_second"))
        if value:
            latency = f" (p50 {figures['p50_ms']:.0f} ms)" if "p50_ms" in figures else ""
            tokens, peak, memory = (figures.get(key) for key in ("tokens_per_second", "fraction_of_peak", "peak_gib"))
            row = {f"{gpu['device']}, torch {gpu['versions']['torch']}, bf16": name + latency}
            row |= {"rows or requests/s": f"{value:,.0f}", "tokens/s": tokens and f"{tokens:,.0f}"}
            row |= {f"of {gpu['peak_tflops_assumed']} TFLOP/s": peak and f"{peak:.0%}"}
            rows.append(row | {"peak GiB": memory and str(memory)})
    return table(rows)


def profile_table(gpu: dict) -> str:
    """The share of a call in which the GPU is busy, from the traces of results/gpu.py."""
    rows = []
    for name, figures in gpu.items():
        if isinstance(figures, dict) and "launches" in figures:
            row = {gpu["device"]: name, "kernel launches": f"{figures['launches']:,}"}
            row |= {"waits of the host": figures["waits"], "work on the GPU, ms": f"{figures['gpu_ms']:.1f}"}
            whole = figures.get("p50_ms")
            rows.append(row | {"p50 of the whole call, ms": whole and f"{whole:.1f}"})
    return table(rows)


@functools.cache
def cascade_of(small: str, large: str) -> comparison.CascadeOfRuns:
    """A pair of CASCADES, which two tables and the picture need."""
    return comparison.cascade_of_runs(*open_runs([DECODERS / small, DECODERS / large]).values())


def cascade_accuracy(both: comparison.CascadeOfRuns) -> str:
    return wilson(both.test.accuracy(both.threshold), len(both.test.labels))


def cascade_table() -> str:
    """A row for each pair of runs that CASCADES names."""
    rows = []
    for small, large in CASCADES:
        both = cascade_of(small, large)
        test, (stay, same) = both.test, both.kept_errors()
        row = {"small": small, "large": large, "threshold": f"{both.threshold:.3f}", "deferred": f"{both.deferred:.1%}"}
        row |= {"small alone": test.accuracy(0), "large alone": test.accuracy(1)}
        row |= {"both": cascade_accuracy(both), "at random": test.at_random(both.deferred)}
        row |= {f"p against {pair['b']}": pair["McNemar's p"] for pair in both.pairs()}
        rows.append(row | {"errors that stay": f"{stay:,}", "the large model's too": f"{same:,}"})
    return table(rows)


def distill_table(data: str) -> str:
    """Scores by kind of run over the seeds, and the pairs."""
    summary = read(RESULTS / "distill.json")[data]
    names = {"alone": "MiniLM, labels alone", "teacher": "SmolLM2, labels alone: the teacher"}
    names |= {"hard": "MiniLM, labels and the teacher's answers"}
    headers = {"accuracy": "accuracy", "calibration_error": "calibration error"}
    headers |= {"calibration_error_scaled": "calibration error at the fitted temperature"}
    headers |= {"validation_f1": "validation F1"}
    rows, pairs = [], []
    for kind, scores in summary["scores"].items():
        name = names[kind] if kind in names else f"MiniLM, labels and its probabilities, {kind.removeprefix('soft-')}"
        row = {"run": kind, "model": name, "seeds": len(scores["accuracy"])}
        rows.append(row | {header: spread(scores[key]) for key, header in headers.items()})
    for pair in summary["pairs"]:
        row = {name: pair[name] for name in "ab"}
        row["accuracy, a - b"] = interval(pair["difference"], pair["low"], pair["high"], sign="+")
        tests = [f"{only_a} : {only_b}, p {p:.2g}" for only_a, only_b, p in pair["mcnemar"]]
        pairs.append(row | {"only a right : only b right, McNemar's p, by seed": "; ".join(tests)})
    return f"{table(rows)}\n\n{table(pairs)}"


@functools.cache
def tables() -> dict[str, str]:
    """The tables by name."""

    def grids(pattern: str) -> str:
        return joined(comparison.grid_tables({folder.name: open_run(folder) for folder in folders(pattern)}))

    small_groups = ("thucnews-*", "all-*", "fudan_long-*", "movie_reviews-*")
    return {
        "answer": answer_table(),
        "rates": rates_table(),
        "curves": curves()[0],
        "banking_curves": curves("banking77-")[0].split("\n\n")[1],  # the crossings
        "pairs": joined(pairs_table([DECODERS / name for name in names]) for names in PAIRED),
        "decoders": results_table([folder for folder in folders("decoders/*") if "grid-" not in folder.name]),
        "decoder_grid": grids("decoders/grid-*"),
        "banking_grid": grids("decoders/banking77-grid-*"),
        "cascades": cascade_table(),
        "distill_ag_news": distill_table("data"),
        "distill_banking77": distill_table("banking77"),
        "own_data": own_data_table(),
        "own_data_grid": own_data_grid(),
        "speed": speed_table([bench for bench in benches().values() if isinstance(bench, dict)]),
        "requests": requests_table(),
        "gpu": joined(map(gpu_table, gpus())),
        "profile": joined(map(profile_table, gpus())),
        "results": results_table(folders("*")),
        "small": results_table(folders("small/*")),
        "small_pairs": joined(pairs_table(folders(f"small/{group}")) for group in small_groups),
        "grid": grids("small/grid-*"),
    }


def fill(page: str) -> str:
    """The page with its tables as the result files have them now."""
    for name, body in tables().items():
        block = rf"(<!-- {name}: [^\n]* -->\n).*?(<!-- /{name} -->)"
        page = re.sub(block, lambda match, body=body: f"{match[1]}{body}\n{match[2]}", page, flags=re.DOTALL)
    return page


def draw(plot: Callable, *arguments, file: Path) -> None:
    """A picture with a palette of 64 colours: a fifth of the bytes."""
    from PIL import Image

    plot(*arguments, file)
    with Image.open(file) as image:
        small = image.convert("RGB").quantize(64)
    small.save(file, optimize=True)


if __name__ == "__main__":
    draw(functools.partial(plots.plot_learning_curves, dpi=100), curves()[1], file=DECODERS / "rows.png")
    best = cascade_of(*CASCADES[2])
    draw(plots.plot_deferral, best.curve(), best.deferred, file=DECODERS / "cascade.png")
    for page in PAGES:
        (ROOT / page).write_text(fill((ROOT / page).read_text(encoding="utf-8")), encoding="utf-8")

"""Writes the generated tables into the pages that show them.

    python results/readme.py    # `make readme`: after any change under results/; a test fails while a table is stale

A table stands between `<!-- NAME: ... -->` and `<!-- /NAME -->` and is the same in every language.
"""

import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from minicls import comparison, plots
from minicls.checkpoint import Run, open_run
from minicls.comparison import PUBLISHED, PUBLISHED_BEST, PUBLISHED_STEPS, describe_model, open_runs, over_seeds, wilson
from minicls.results import interval, plain, spread, table, without_empty_columns

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


# Accuracy.


@functools.cache
def curves() -> tuple[str, dict]:
    """The tables and the points of the runs whose recipe does not change with the number of rows."""
    name = re.compile(r"(minilm|smollm2-linear|smollm2-options|tfidf|frozen-minilm)-\d+-\d+")
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
    """Accuracy on AG News by training rows and requests per second: the published experiment, and what this project ran."""
    columns = ("1,000 training rows", "20,000", "62,629", "120,000")
    rows = []

    def add(model: str, head: str, accuracies: dict[str, str], requests: Sequence[float | None] = ()) -> None:
        row = {"model": model, "head": head} | {column: accuracies.get(column) for column in columns}
        shown = " / ".join(map(rate, requests)) if all(requests) and requests else None
        rows.append(row | {"requests/s, one at a time / all at once": shown})

    for family, (model, head) in PUBLISHED_MODELS.items():
        step, _ = PUBLISHED_BEST[family]
        accuracy = wilson(PUBLISHED[family]["accuracy"][PUBLISHED[family]["step"].index(step)], 7600)
        add(
            model,
            head,
            {"120,000": f"{accuracy}, published: best on test, step {step:,} of {PUBLISHED_STEPS[family]:,}"},
        )
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
    joined = {}
    for column, pair in zip(columns[1:3], (CASCADES[0], CASCADES[2]), strict=True):
        both = cascade_of(*pair)
        share = both.test.share_deferred(both.threshold)
        joined[column] = f"{cascade_accuracy(both)}, {share:.0%} deferred"
    # The cost by the last pair's share: the small model's time for every text, the large one's for the deferred ones.
    times = [zip(rates["minilm"], rates["smollm2-linear"], strict=True)] if all(rates["minilm"]) else []
    together = [1 / (1 / small + share / large) for pair in times for small, large in pair if large]
    add("MiniLM, deferring to SmolLM2", "linear, both", joined, together)
    distilled = read(RESULTS / "distill.json")["data"]["scores"]["soft-T2"]["accuracy"]
    brought = f"{spread(distilled)}, with 20,000 texts without labels"
    add("MiniLM, distilled from SmolLM2", "linear", {columns[0]: brought}, rates["minilm"])
    return table(rows)


def pairs_table(runs: Sequence[Path]) -> str:
    opened = open_runs(runs)
    return comparison.comparison_table(comparison.compare_pairs(comparison.common_predictions(opened)), len(opened))


def results_table(run_dirs: Sequence[Path]) -> str:
    """One line for each setting, seeds as mean ± standard deviation; a run's hf_trainer.json has a line of its own."""

    def scores(group: Sequence[Run]) -> dict[str, str]:
        line = {"accuracy": over_seeds(group, "accuracy")}
        line |= {"macro F1 (95 % interval)": comparison.f1_with_interval(group)}
        return line | {"training, s": over_seeds(group, "train_seconds", 0)}

    rows, names = [], dict(zip(run_dirs, comparison.short_names(run_dirs), strict=True))
    for group in comparison.fold(map(open_run, run_dirs)):
        info, model = group[0].info, describe_model(group[0])
        row = {"result": comparison.group_name([names[run.dir] for run in group])}
        row |= {"model": model.name, "head": model.head, "train rows": f"{info['num_train_rows']:,}"}
        row |= {"test rows": f"{group[0].results['num_test_rows']:,}"}
        rows.append(row | scores(group))
        for run in group:
            if (run.dir / "hf_trainer.json").is_file():
                peer = Run(run.dir, info, read(run.dir / "hf_trainer.json"), None)
                rows.append(row | {"result": f"{names[run.dir]}, HF Trainer"} | scores([peer]))
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
    for folder in folders("own_data/banking77-grid/*"):
        events = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        best = max(event["f1"] for event in events if event.get("split") == "validation")
        settings = read(folder / "run.json")["settings"]
        row = {"learning rate": f"{settings['learning_rate']:g}", "epochs": f"{settings['epochs']:g}"}
        rows.append(row | {"validation macro F1": best, "test accuracy": read(folder / "results.json")["accuracy"]})
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
        bench, served = benches()[train], benches()[requests]
        for gpu in gpus():
            training = [key for key in gpu if re.fullmatch(rf"{model} (training|SFT), (micro-)?batch \d+", key)]
            for key in dict.fromkeys((*training[:1], *training[-1:])):
                add(model, f"training rows/s, {key.split(', ')[1]}", gpu["device"], gpu[key]["samples_per_second"])
        add(model, "training rows/s", bench["device"], *(side["samples_per_second"] for side in bench["rows"]))
        for method, gpu_method in methods.items():
            single = f"requests/s, {method}, one at a time"
            add(model, single, "RTX 3090, published", *PUBLISHED_RATES.get((model, method), ()))
            for gpu in gpus():
                traced = [gpu.get(f"{model}, {engine}, {gpu_method}, one at a time", {}) for engine in ENGINES]
                add(model, single, gpu["device"], *(figures.get("requests_per_second") for figures in traced))
            # Generating letters all at once is left out: scoring them is faster and gives the same answers.
            modes = {"single": single} | (
                {"offline": f"requests/s, {method}, all at once"} if method != "generate" else {}
            )
            for mode, task in modes.items():
                asked = [row for row in served if (row["method"], row["mode"]) == (method, mode)]
                rates = dict.fromkeys(map(str.lower, ENGINES))
                for row in asked:
                    engine, *compiled = row["engine"].split(", ")
                    rates[engine] = " ".join([rate(row["requests_per_second"]) or "-", *compiled])
                add(model, task, served[0]["device"], *rates.values())
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
    lines = []
    for bench in (rows for rows in benches().values() if isinstance(rows, list)):
        names = [
            (row["model"], row["method"], f"{row['engine']} {row['engine_version']}", row["dtype"]) for row in bench
        ]
        for name in sorted({*names}):
            modes = {row["mode"]: row for row, of_row in zip(bench, names, strict=True) if of_row == name}
            line = dict(zip(("model", "method", "engine", "dtype"), (name[0].split(": ")[-1], *name[1:]), strict=True))
            for mode in ("single", "offline"):
                rates = [modes.get(mode, {}).get(key) for key in ("requests_per_second", "latency_p50_ms")]
                line |= {f"{mode}: requests/s (p50)": rates[0] and "{:.2f} ({:,.0f} ms)".format(*rates)}
            latencies = [modes.get("server", {}).get(f"latency_p{percentile}_ms") for percentile in (50, 99)]
            line |= {"server: p50, p99": latencies[0] and "{:,.0f}, {:,.0f} ms".format(*latencies)}
            changed = [row.get("changed_answers") for row in modes.values()]
            line |= {"changed answers": None if None in changed else f"{max(changed)} of {bench[0]['num_requests']:,}"}
            wrong = [
                f"{mode}: {row['status']}, {row['reason']}" for mode, row in modes.items() if row["status"] != "ok"
            ]
            lines.append(line | {"not ok": "; ".join(wrong) or None})
    return table(without_empty_columns(lines))


def gpu_table() -> str:
    """The rates that results/gpu.py measured."""
    rows = []
    for gpu in gpus():
        for name, figures in gpu.items():
            if not isinstance(figures, dict) or not figures.keys() & {"samples_per_second", "requests_per_second"}:
                continue
            latency = f" (p50 {figures['p50_ms']:.0f} ms)" if "p50_ms" in figures else ""
            value = figures.get("samples_per_second") or figures["requests_per_second"]
            tokens, peak, memory = (figures.get(key) for key in ("tokens_per_second", "fraction_of_peak", "peak_gib"))
            row = {f"{gpu['device']}, torch {gpu['versions']['torch']}, bf16": name + latency}
            row |= {"rows or requests/s": f"{value:,.0f}", "tokens/s": tokens and f"{tokens:,.0f}"}
            row |= {f"of {gpu['peak_tflops_assumed']} TFLOP/s": peak and f"{peak:.0%}"}
            rows.append(row | {"peak GiB": memory and str(memory)})
    return table(rows)


def profile_table() -> str:
    """The share of a call in which the GPU is busy, from the traces of results/gpu.py."""
    rows = []
    for gpu in gpus():
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
        test, share, (stay, same) = both.test, both.test.share_deferred(both.threshold), both.kept_errors()
        row = {"small": small, "large": large, "threshold": f"{both.threshold:.3f}", "deferred": f"{share:.1%}"}
        row |= {"small alone": test.accuracy(0), "large alone": test.accuracy(1)}
        row |= {"both": cascade_accuracy(both), "at random": test.at_random(share)}
        row |= {f"p against {pair['b']}": pair["McNemar's p"] for pair in both.pairs()}
        rows.append(row | {"errors that stay": f"{stay:,}", "the large model's too": f"{same:,}"})
    return table(rows)


def distill_table(data: str) -> str:
    """Scores by kind of run over the seeds, and the pairs."""
    summary = read(RESULTS / "distill.json")[data]
    names = {"alone": "MiniLM, labels alone", "teacher": "SmolLM2, labels alone: the teacher"}
    names |= {"hard": "MiniLM, labels and the teacher's answers"}
    headers = {"accuracy": "accuracy", "calibration_error": "calibration error"}
    headers |= {
        "calibration_error_scaled": "calibration error at the fitted temperature",
        "validation_f1": "validation F1",
    }
    rows, pairs = [], []
    for kind, scores in summary["scores"].items():
        name = names[kind] if kind in names else f"MiniLM, labels and its probabilities, {kind.removeprefix('soft-')}"
        row = {"run": kind, "model": name, "seeds": len(scores["accuracy"])}
        rows.append(row | {header: spread(scores[key]) for key, header in headers.items()})
    for pair in summary["pairs"]:
        row = {name: pair[name] for name in "ab"}
        row["accuracy, a - b"] = f"{pair['difference']:+.4f} ({pair['low']:+.4f} to {pair['high']:+.4f})"
        tests = [f"{only_a} : {only_b}, p {p:.2g}" for only_a, only_b, p in pair["mcnemar"]]
        pairs.append(row | {"only a right : only b right, McNemar's p, by seed": "; ".join(tests)})
    return f"{table(rows)}\n\n{table(pairs)}"


@functools.cache
def tables() -> dict[str, str]:
    """The tables by name."""

    def grids(pattern: str) -> str:
        return "\n\n".join(comparison.grid_tables({folder.name: open_run(folder) for folder in folders(pattern)}))

    small_groups = ("thucnews-*", "all-*", "fudan_long-*", "movie_reviews-*")
    return {
        "answer": answer_table(),
        "rates": rates_table(),
        "curves": curves()[0],
        "pairs": "\n\n".join(pairs_table([DECODERS / name for name in names]) for names in PAIRED),
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
        "gpu": gpu_table(),
        "profile": profile_table(),
        "results": results_table(folders("*")),
        "small": results_table(folders("small/*")),
        "small_pairs": "\n\n".join(pairs_table(folders(f"small/{group}")) for group in small_groups),
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
    draw(plots.plot_deferral, best.curve(), best.test.share_deferred(best.threshold), file=DECODERS / "cascade.png")
    for page in PAGES:
        (ROOT / page).write_text(fill((ROOT / page).read_text(encoding="utf-8")), encoding="utf-8")

"""Result files: what a run writes at its end (results.json, predictions.parquet, validation.parquet), and tables out of
such files."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from minicls import dist, metrics
from minicls.checkpoint import Run, open_run, write_json
from minicls.data import AG_NEWS_LABELS, Data, Split
from minicls.logger import read_metrics
from minicls.metrics import evaluate_logits
from minicls.tokenizer import Tokenizer


def text_hash(text: str) -> int:
    """32 bits of the text's SHA-256: with the row's number, it tells whether two files speak of the same row."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little", signed=True)


def write_predictions(
    file: Path, split: Split, logits: torch.Tensor, tokenizer: Tokenizer | None, names: Sequence[str]
) -> None:
    """Writes what was predicted of each row, logits being (n, C), as parquet.

    row: its number in the file it came from; label and prediction: class indices, whose names are in the schema's
    `huggingface` metadata, where `datasets` reads them; num_tokens: of the whole text, before any cut and with nothing
    around it, or null without a tokenizer; text_hash: see there; probability_c: of class c, float32.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"row": split.rows, "label": split.labels, "prediction": logits.argmax(1).numpy()}
    encoded = tokenizer.encode(split.texts) if tokenizer else None
    columns["num_tokens"] = pa.array([len(ids) for ids in encoded] if encoded else [None] * len(split), pa.int64())
    columns["text_hash"] = np.array([text_hash(text) for text in split.texts], np.int32)
    probabilities = logits.double().softmax(1).float().numpy()  # (n, C)
    columns |= {f"probability_{c}": probabilities[:, c] for c in range(len(names))}
    table = pa.table(columns)
    features = {
        field.name: {"dtype": str(field.type).replace("float", "float32"), "_type": "Value"} for field in table.schema
    }
    features |= {name: {"names": [*names], "_type": "ClassLabel"} for name in ("label", "prediction")}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    aside = file.with_name(f".{file.name}.tmp")
    pq.write_table(table, aside)
    aside.replace(file)


def write_results(
    run_dir: Path,
    data: Data,
    validation: Split | None,
    tokenizer: Tokenizer | None,
    logits: dict[str, torch.Tensor],
    state: dict,
    headline_step: int,
    device: torch.device,
) -> dict:
    """Writes predictions.parquet, validation.parquet (of rows held out) and, last, results.json; returns what the
    latter holds.

    logits: the headline model's on the rows of "test" and, if held out, "validation", (n, C) fp32 in their order;
    state: the run's clocks and best steps. The constant answer, which a score has to beat, is the class with most rows
    in train.
    """
    labels, test_logits, names = data.test.labels, logits["test"].double(), data.label_names
    probabilities = test_logits.softmax(1).numpy()  # (n, C)
    scores, confusion = evaluate_logits(test_logits, labels)
    precision, recall, f1 = metrics.per_class(confusion)
    low, high = metrics.f1_interval(confusion)
    support = confusion.sum(1)
    majority = int(np.bincount(data.train.labels, minlength=len(names)).argmax())
    constant = metrics.constant_metrics(support, majority)
    temperature = (
        metrics.fit_temperature(logits["validation"].double().numpy(), validation.labels) if validation else None
    )
    scaled = (test_logits / temperature).softmax(1).numpy() if validation else None
    write_predictions(run_dir / "predictions.parquet", data.test, test_logits, tokenizer, names)
    if validation:
        write_predictions(run_dir / "validation.parquet", validation, logits["validation"], tokenizer, names)
    trained = [event for event in read_metrics(run_dir) if event["event"] == "train"]
    final_losses = [event.get("answer_loss", event["loss"]) for event in trained[-5:]]
    results = scores | {
        "f1_low": low,
        "f1_high": high,
        "num_test_rows": len(labels),
        "majority_class": names[majority],
        "majority_accuracy": constant["accuracy"],
        "majority_f1": constant["f1"],
        "macro_classes": int(metrics.occurs(confusion).sum()),  # that precision, recall and f1 are means over
        "absent_classes": [name for name, rows in zip(names, support, strict=True) if not rows],  # without test rows
        "calibration_error": metrics.calibration_error(probabilities, labels),
        "temperature": temperature,  # fitted on the validation rows; null without
        "calibration_error_scaled": metrics.calibration_error(scaled, labels) if validation else None,
        "per_class": {
            name: {"precision": p, "recall": r, "f1": f, "support": n}
            for name, p, r, f, n in zip(
                names, *(values.tolist() for values in (precision, recall, f1, support)), strict=True
            )
        },
        "confusion": confusion.tolist(),
    }
    best_step, best_f1 = state["best_on_test"] or (None, None)
    results |= {
        "headline_step": headline_step,
        "final_step": state["step"],
        "stopped_early": state.get("stopped_early", False),
        "final_train_loss": float(np.mean(final_losses))
        if trained
        else None,  # of the last steps logged; the answer's alone
        "best_step_on_test": best_step,
        "best_f1_on_test": best_f1,
        "best_step_on_validation": state["best_on_validation"][0] if state["best_on_validation"] else None,
        "train_seconds": state["train_seconds"],
        "eval_seconds": state["eval_seconds"],
        "evaluations": state["evaluations"],  # in these seconds
        "tokens_per_second": state["tokens"] / state["train_seconds"]
        if state["train_seconds"] and state["tokens"]
        else None,
        "samples_per_second": state["samples"] / state["train_seconds"] if state["train_seconds"] else None,
        # A later process may only have scored.
        "peak_memory_bytes": max([dist.peak_memory_bytes(device), *(event["peak_memory_bytes"] for event in trained)]),
        "device": dist.device_name(device),
    }
    write_json(run_dir / "results.json", results)
    return results


def summary(results: dict) -> str:
    """The headline in words, and what to change where it is no better than no model."""
    constant = f" (always answering {shown(results['majority_class'])}: {results['majority_accuracy']:.4f})"
    step = f", step {results['headline_step']}" * bool(results["headline_step"])
    lines = [
        f"test, {results['num_test_rows']:,} rows{step}: accuracy {results['accuracy']:.4f}{constant}, "
        f"macro F1 {results['f1']:.4f} (95 % interval {results['f1_low']:.4f} to {results['f1_high']:.4f})"
    ]
    if absent := absent_line(results):
        lines.append(absent)
    # The published protocol is for comparison with the published tables; one evaluation has nothing to choose from.
    chosen = results["best_step_on_test"] and results["evaluations"] > 1
    if chosen and tuple(results["per_class"]) == AG_NEWS_LABELS:
        lines.append(
            f"best step on test: {results['best_step_on_test']} with F1 {results['best_f1_on_test']:.4f} "
            "(the published protocol; chosen on the test set, so not an estimate of anything)"
        )
    lines.append(f"{results['train_seconds']:.0f} s of training, {results['eval_seconds']:.0f} s of evaluation")
    return "\n".join([*lines, *advice(results)])


def absent_line(results: dict) -> str | None:
    """Which classes have no test rows, and how many the macro means are over; None where all have rows, or nothing says
    so."""
    absent = results.get("absent_classes")
    if not absent:
        return None
    named = ", ".join(map(shown, absent[:10])) + f" and {len(absent) - 10} more" * (len(absent) > 10)
    wrongly = len(absent) + results["macro_classes"] - len(results["per_class"])
    counted = f"; {wrongly} of them predicted, which counts as 0" * bool(wrongly)
    return f"macro means are over {results['macro_classes']} of {len(results['per_class'])} classes; no test rows of {named}{counted}"


def advice(results: dict) -> list[str]:
    """Notes on a run that has learned nothing, or little; empty where it did better than the constant answer.

    A score is no better than the constant answer's where both lower bounds, accuracy's and macro F1's, are not above
    it: a model of unbalanced classes may be good at one of the two alone. A training loss above 0.9 ln C is near that
    of equal chances.
    """
    low, _ = metrics.accuracy_interval(results["accuracy"], results["num_test_rows"])
    notes, chance, loss = [], math.log(len(results["per_class"])), results["final_train_loss"]
    if low <= results["majority_accuracy"] and results["f1_low"] <= results["majority_f1"]:
        constant = f"accuracy {results['majority_accuracy']:.4f}, macro F1 {results['majority_f1']:.4f}"
        notes.append(
            f"note: no better than always answering {shown(results['majority_class'])} ({constant}), within the interval"
        )
    if loss is not None and loss > 0.9 * chance:
        notes.append(
            f"note: the last training loss, {loss:.3f}, is near ln {len(results['per_class'])} = {chance:.3f}, that of a guess"
        )
    if notes and loss is not None:
        notes.append(
            "      try a higher --learning-rate (a lower one if the loss rose), more --epochs, --warmup-ratio 0.1; "
            "`python -m minicls baseline` with the same --data shows what is within reach"
        )
    return notes


def shown(name: str) -> str:
    """A class name, or whatever a table shows, on one line: as Python writes it where it has line breaks or blanks at
    its ends."""
    return name if name == name.strip() and name.isprintable() else repr(name)


def markdown(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A Markdown table. None is shown as -, a float with four decimals, anything else as it is."""

    def cell(value) -> str:
        return (
            "-"
            if value is None
            else f"{value:.4f}"
            if isinstance(value, float)
            else shown(str(value)).replace("|", r"\|")
        )

    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in (header, ["---"] * len(header), *rows))


def interval(value: float, low: float, high: float) -> str:
    """A figure and its 95 % interval."""
    return f"{value:.4f} ({low:.4f} to {high:.4f})"


def f1_with_interval(results: dict) -> str:
    """Macro F1 of a results.json."""
    return interval(results["f1"], results["f1_low"], results["f1_high"])


def spread(values: Sequence[float], digits: int = 4) -> str:
    """A value, or the mean of several ± their standard deviation."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def steps(run_dir: Path) -> tuple[list[str], list[tuple[int, list]]]:
    """The published tables' columns, and for each evaluation on the test rows its step and a line of them."""
    events = read_metrics(run_dir)
    names = ["loss", "answer_loss"] if any("answer_loss" in e for e in events) else ["loss"]
    lines, trained = [], []
    for event in events:
        if event["event"] == "train":
            trained.append([event[name] for name in names])
        elif event["split"] == "test":
            losses = np.mean(trained, axis=0).tolist() if trained else [None] * len(names)
            scores = [event[name] for name in ("loss", "accuracy", "precision", "recall", "f1")]
            lines.append((event["step"], [event["step"], *losses, *scores]))
            trained = []
    header = ["step", "training loss", "of the letter"][: 1 + len(names)]
    return [*header, "test loss", "accuracy", "precision", "recall", "F1"], lines


def steps_table(run_dir: Path) -> str:
    """Markdown with the published tables' columns, a line for each evaluation on the test rows.

    The training loss is the mean over the steps logged since the line before; where only the answer's letter differs
    from row to row, its loss stands apart.
    """
    header, lines = steps(run_dir)
    return markdown(header, [values for _, values in lines])


def short_names(run_dirs: Sequence[Path]) -> list[str]:
    """The directories' paths from the deepest folder that holds them all."""
    paths = [path.absolute() for path in run_dirs]
    common = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(common).as_posix() for path in paths]


def fold(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs of one setting together: those that differ in seed and place alone, and in the training rows where the
    seed samples them."""
    groups = {}
    for run in runs:
        setting = {name: value for name, value in run.info["settings"].items() if name not in ("seed", "output_dir")}
        data = dict(run.info["data_fingerprint"])
        if setting.get("max_train_rows"):
            data["train"] = run.info["num_train_rows"]
        groups.setdefault(json.dumps([setting, data], sort_keys=True), []).append(run)
    return [*groups.values()]


def script(run: Run) -> str:
    """train_bert, train_qwen or baseline; runs from before run.json said so have a head if they are of the second."""
    return run.info.get("script") or ("train_qwen" if "head" in run.info["settings"] else "train_bert")


def kind(run: Run) -> tuple[str, str, str]:
    """What a run is a run of: BERT, Qwen3, another decoder or the baseline; the model's name, or the features'; its head."""
    s = run.info["settings"]
    model = Path(s.get("model") or s["features"]).name
    decoder = "Qwen3" if "qwen" in model.lower() or model == "tiny" else "decoder"
    name = {"train_bert": "BERT", "train_qwen": decoder}.get(script(run), "baseline")
    return (
        name,
        model,
        "logistic regression" if name == "baseline" else s.get("head", "linear"),
    )


def folded(group: Sequence[Run], names: Sequence[str]) -> tuple[str, str, str]:
    """Of runs of one setting: name, accuracy, macro F1 with its interval."""
    name = names[0] if len(group) == 1 else f"{os.path.commonprefix([*names])}* ({len(group)} runs)"  # noqa: RUF071
    accuracy, f1, low, high = ([run.results[key] for run in group] for key in ("accuracy", "f1", "f1_low", "f1_high"))
    return name, spread(accuracy), f"{spread(f1)} ({np.mean(low):.4f} to {np.mean(high):.4f})"


def speed_table(benches: list[dict]) -> str:
    """Markdown of what results/hf_trainer.py wrote, a line for each peer: rates, their ratio with its range over rounds,
    and peak memory. Older files with the task `score` compare option scoring."""
    header = ["measured", "model", "against", "minicls, rows/s", "peer, rows/s", "times as fast", "peak memory, GiB"]
    peers = {"train": "HF Trainer {}", "score": "transformers {}, a pass a question"}
    lines = []
    for bench in benches:
        ours, *others = bench["rows"]
        s = bench["settings"]
        for theirs in others:
            peer = "vLLM {}" if theirs["side"] == "vllm" else peers[bench["task"]]
            measured = f"{bench['task']}, {s['dtype']}" + ", minicls compiled" * s["compile"]
            ratios, median = bench["speedup_of_each_round"][theirs["side"]], bench["speedup"][theirs["side"]]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} rounds" if len(ratios) > 1 else "1 round"
            rates = [f"{side['samples_per_second']:.2f}" for side in (ours, theirs)]
            memory = " against ".join(f"{side['peak_memory_bytes'] / 2**30:.1f}" for side in (ours, theirs))
            line = [measured, Path(s["bert"] or s["qwen"]).name, peer.format(theirs["version"]), *rates]
            lines.append([*line, f"**{median:.2f}** ({spread})", memory])
    return markdown(header, lines)


def results_table(folders: Sequence[Path]) -> str:
    """Markdown of committed results, a line for each folder with a run.json and a results.json; seeds are folded.

    A folder may hold a `hf_trainer.json` of the same rows and settings: a line of its own.
    """
    header = [
        "result",
        "model",
        "head",
        "train rows",
        "test rows",
        "accuracy",
        "macro F1 (95 % interval)",
        "training, s",
    ]
    rows, names = [], dict(zip(folders, short_names(folders), strict=True))
    for group in fold(map(open_run, folders)):
        info, (name, *scores) = group[0].info, folded(group, [names[run.dir] for run in group])
        row = [*kind(group[0])[1:], f"{info['num_train_rows']:,}", f"{group[0].results['num_test_rows']:,}"]
        rows.append([name, *row, *scores, spread([run.results["train_seconds"] for run in group], 0)])
        for run in group:
            if (run.dir / "hf_trainer.json").is_file():
                found = json.loads((run.dir / "hf_trainer.json").read_text(encoding="utf-8"))
                scores = [found["accuracy"], f1_with_interval(found), f"{found['train_seconds']:.0f}"]
                rows.append([f"{names[run.dir]}, HF Trainer", *row, *scores])
    return markdown(header, rows)

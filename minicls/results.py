"""The files written at the end of a run (results.json, predictions.parquet, validation.parquet); Markdown tables."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from minicls import dist, metrics
from minicls.checkpoint import headline_step
from minicls.config import UserError, write_json, written_aside
from minicls.data import AG_NEWS_LABELS, Data, Split
from minicls.logger import read_metrics
from minicls.metrics import evaluate_logits
from minicls.tokenizer import Tokenizer


def text_hash(text: str) -> int:
    """32 bits of the text's SHA-256: with the row number, it shows whether two files describe the same row."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little", signed=True)


def write_predictions(
    file: Path, split: Split, logits: torch.Tensor, tokenizer: Tokenizer | None, names: Sequence[str]
) -> None:
    """Writes the predictions for each row, from logits (n, C), as parquet.

    row: its number in the files of its split; label, prediction: class indices, whose names are in the schema's
    `huggingface` metadata, where `datasets` looks for them; num_tokens: length of the whole text, neither truncated nor
    with special tokens, null without a tokenizer; text_hash: see `text_hash`; probability_c: of class c, float32.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    encoded = tokenizer.encode(split.texts) if tokenizer else None
    probabilities = logits.double().softmax(1).float().numpy()  # (n, C)
    columns = {"row": split.rows, "label": split.labels, "prediction": logits.argmax(1).numpy()}
    columns["num_tokens"] = pa.array([len(ids) for ids in encoded] if encoded else [None] * len(split), pa.int64())
    columns["text_hash"] = np.array([text_hash(text) for text in split.texts], np.int32)
    table = pa.table(columns | {f"probability_{c}": probabilities[:, c] for c in range(len(names))})
    dtypes = {field.name: str(field.type).replace("float", "float32") for field in table.schema}
    features = {name: {"dtype": dtype, "_type": "Value"} for name, dtype in dtypes.items()}
    features |= {name: {"names": [*names], "_type": "ClassLabel"} for name in ("label", "prediction")}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    with written_aside(file) as aside:
        pq.write_table(table, aside)


def read_predictions(file: Path) -> dict[str, np.ndarray] | None:
    """The columns of a file of predictions without nulls, (n,) each; None if the file was not kept."""
    import pyarrow.parquet as pq

    try:
        columns = pq.read_table(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        remedy = f"run `python -m minicls evaluate {file.parent}` again"
        raise UserError(f"{file}: not a readable parquet file ({error}); {remedy}") from None
    arrays = {name: columns[name].to_numpy() for name in columns.column_names if not columns[name].null_count}
    # Reduced files have 16-bit classes, too small to number the cells of a confusion matrix.
    arrays = {name: a.astype(np.int64) if a.dtype.kind in "iu" else a for name, a in arrays.items()}
    if "text_hash" in arrays:
        arrays["text_hash"] &= 0xFF  # a reduced file keeps this byte, enough over hundreds of rows
    return arrays


def scores_by_class(confusion: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    columns = [values.tolist() for values in (*metrics.per_class(confusion), confusion.sum(1))]
    keys = "precision", "recall", "f1", "support"
    return {name: dict(zip(keys, values, strict=True)) for name, *values in zip(names, *columns, strict=True)}


def write_results(
    run_dir: Path,
    data: Data,
    tokenizer: Tokenizer | None,
    logits: dict[str, torch.Tensor],
    state: dict,
    device: torch.device,
) -> dict:
    """Writes predictions.parquet, validation.parquet (if there are such rows) and, last, results.json; returns it.

    logits: the headline model's for each of the data's `eval_splits`, (n, C) fp32 in the order of their rows;
    state: the run's clocks and best steps. The constant answer, which a model has to beat, is the class with most
    training rows.
    """
    labels, names, test_logits = data.test.labels, data.label_names, logits["test"].double()
    scores, confusion = evaluate_logits(test_logits, labels)
    f1_low, f1_high = metrics.f1_interval(confusion)
    majority = int(np.bincount(data.train.labels, minlength=len(names)).argmax())
    always = metrics.confusion_matrix(labels, np.full_like(labels, majority), len(names))
    constant = metrics.classification_metrics(always)
    write_predictions(run_dir / "predictions.parquet", data.test, test_logits, tokenizer, names)
    temperature = None
    if validation := data.validation:
        write_predictions(run_dir / "validation.parquet", validation, logits["validation"], tokenizer, names)
        temperature = metrics.fit_temperature(logits["validation"].double().numpy(), validation.labels)

    def calibration_error(scaled_logits: torch.Tensor) -> float:
        return metrics.calibration_error(scaled_logits.softmax(1).numpy(), labels)

    trained = [event for event in read_metrics(run_dir) if event["event"] == "train"]
    last_losses = [event.get("answer_loss", event["loss"]) for event in trained[-5:]]
    memory = [dist.peak_memory_bytes(device), *(event["peak_memory_bytes"] for event in trained)]
    best_step, best_f1 = state["best_on_test"] or (None, None)
    seconds = state["train_seconds"]
    results = scores | {
        "f1_low": f1_low,
        "f1_high": f1_high,
        "num_test_rows": len(labels),
        "majority_class": names[majority],
        "majority_accuracy": constant["accuracy"],
        "majority_f1": constant["f1"],
        "macro_classes": int(metrics.occurs(confusion).sum()),  # precision, recall and f1 are means over these
        "absent_classes": [name for name, rows in zip(names, confusion.sum(1), strict=True) if not rows],
        "calibration_error": calibration_error(test_logits),
        "temperature": temperature,  # fitted on the validation rows; null without them
        "calibration_error_scaled": calibration_error(test_logits / temperature) if validation else None,
        "per_class": scores_by_class(confusion, names),
        "confusion": confusion.tolist(),
        "headline_step": headline_step(state),
        "final_step": state["step"],
        "stopped_early": state.get("stopped_early", False),
        # The mean over the last five logged steps; of the answer alone, where that is logged.
        "final_train_loss": float(np.mean(last_losses)) if trained else None,
        "best_step_on_test": best_step,
        "best_f1_on_test": best_f1,
        "best_step_on_validation": (state["best_on_validation"] or [None])[0],
        "train_seconds": seconds,
        "eval_seconds": state["eval_seconds"],
        "evaluations": state["evaluations"],  # those that took eval_seconds
        "tokens_per_second": state["tokens"] / seconds if seconds and state["tokens"] else None,
        "samples_per_second": state["samples"] / seconds if seconds else None,
        "peak_memory_bytes": max(memory),  # over all processes: a resumed one may only have evaluated
        "device": dist.device_name(device),
    }
    write_json(run_dir / "results.json", results)
    return results


def summary(results: dict) -> str:
    """The headline in words, with advice if it is no better than a constant answer."""
    constant = f" (always answering {shown(results['majority_class'])}: {results['majority_accuracy']:.4f})"
    step = f", step {results['headline_step']}" * bool(results["headline_step"])
    lines = [
        f"test, {results['num_test_rows']:,} rows{step}: accuracy {results['accuracy']:.4f}{constant}, "
        f"macro F1 {results['f1']:.4f} (95 % interval {results['f1_low']:.4f} to {results['f1_high']:.4f})"
    ]
    lines += filter(None, [absent_classes_note(results)])
    # The published protocol serves for comparison with the published tables; one evaluation leaves no choice.
    chosen = results["best_step_on_test"] and results["evaluations"] > 1
    if chosen and tuple(results["per_class"]) == AG_NEWS_LABELS:
        lines.append(
            f"best step on test: {results['best_step_on_test']} with F1 {results['best_f1_on_test']:.4f} "
            "(the published protocol; chosen on the test set, so not an unbiased estimate)"
        )
    lines.append(f"{results['train_seconds']:.0f} s of training, {results['eval_seconds']:.0f} s of evaluation")
    return "\n".join([*lines, *advice(results)])


def absent_classes_note(results: dict) -> str | None:
    """Names the classes without test rows, and counts the classes in the macro means; None if all classes have rows."""
    if not (absent := results.get("absent_classes")):
        return None
    names = ", ".join(map(shown, absent[:10])) + f" and {len(absent) - 10} more" * (len(absent) > 10)
    num_classes, averaged = len(results["per_class"]), results["macro_classes"]
    wrongly = len(absent) + averaged - num_classes
    counted = f"; {wrongly} of them predicted, which counts as 0" * bool(wrongly)
    return f"macro means are over {averaged} of {num_classes} classes; no test rows of {names}{counted}"


def advice(results: dict) -> list[str]:
    """Notes on a run that has learned little or nothing; empty for one that beats the constant answer.

    A run counts as no better than the constant answer if neither accuracy's nor macro F1's lower bound exceeds it: on
    unbalanced classes a model may be good at only one of the two. A training loss above 0.9 ln C is close to guessing.
    """
    low, _ = metrics.accuracy_interval(results["accuracy"], results["num_test_rows"])
    num_classes, loss, notes = len(results["per_class"]), results["final_train_loss"], []
    chance = math.log(num_classes)
    beaten = low > results["majority_accuracy"] or results["f1_low"] > results["majority_f1"]
    if not beaten and results["majority_accuracy"] < 1:  # else the test rows have one class, and show nothing
        constant = f"accuracy {results['majority_accuracy']:.4f}, macro F1 {results['majority_f1']:.4f}"
        answer = shown(results["majority_class"])
        notes.append(f"note: no better than always answering {answer} ({constant}), within the interval")
    if loss is not None and loss > 0.9 * chance:
        guess = f"ln {num_classes} = {chance:.3f}, the loss of guessing"
        notes.append(f"note: the mean of the last training losses, {loss:.3f}, is not clearly below {guess}")
    if notes and loss is not None:
        notes.append(
            "      try a higher --learning-rate (a lower one if the loss rose), more steps (more --epochs or a smaller "
            "--global-batch-size), --warmup-ratio 0.1; `python -m minicls baseline` shows what is possible here"
        )
    return notes


def shown(value: object) -> str:
    """A value on one line: Python's notation for strings with line breaks or with spaces at their ends."""
    text = str(value)
    return text if text == text.strip() and text.isprintable() else repr(text)


def table(rows: Iterable[dict], empty_columns: bool = True) -> str:
    """A Markdown table of rows {header: cell}, all with the same headers; empty for no rows.

    None becomes -, a float gets four decimals. empty_columns: whether those stay in which all cells are None.
    """

    def cell(value: object) -> str:
        text = "-" if value is None else f"{value:.4f}" if isinstance(value, float) else shown(value)
        return text.replace("|", r"\|")

    if not (rows := [*rows]):
        return ""
    headers = [header for header in rows[0] if empty_columns or any(row[header] is not None for row in rows)]
    lines = [headers, ["---"] * len(headers), *([row[header] for header in headers] for row in rows)]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def figure(value: float | None, spec: str) -> str | None:
    """A number in this format; None for none."""
    return None if value is None else format(value, spec)


def plain(value: float) -> str:
    """Three digits, or all digits before the point if there are more: 1,138 rather than 1.14e+03."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def interval(value: float, low: float, high: float, sign: str = "") -> str:
    """A value with its 95 % interval; sign: "+" for a difference."""
    return f"{value:{sign}.4f} ({low:{sign}.4f} to {high:{sign}.4f})"


def spread(values: Sequence[float], digits: int = 4) -> str:
    """A single value, or the mean of several ± their standard deviation."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def steps(run_dir: Path) -> list[dict]:
    """The columns of the published tables for each evaluation on the test rows.

    The training loss is the mean over the steps logged since the previous evaluation. Where only the answer's letter
    depends on the row, its loss has a column of its own.
    """
    events, rows, train = read_metrics(run_dir), [], []
    losses = {"training loss": "loss", "letter loss": "answer_loss"}
    losses = {header: key for header, key in losses.items() if any(key in event for event in events)}
    for event in events:
        if event["event"] == "train":
            train.append(event)
        elif event["split"] == "test":
            means = {name: float(np.mean([e[key] for e in train])) if train else None for name, key in losses.items()}
            scores = {name: event[name] for name in ("accuracy", "precision", "recall")}
            rows.append({"step": event["step"]} | means | {"test loss": event["loss"]} | scores | {"F1": event["f1"]})
            train = []
    return rows

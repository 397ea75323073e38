"""A run's result files: results.json and predictions.parquet out of the test logits; and runs side by side."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from minicls import dist, metrics
from minicls.checkpoint import open_run, write_json
from minicls.config import UserError
from minicls.data import Data
from minicls.logger import read_metrics


def evaluate_logits(logits: torch.Tensor, labels: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Loss (mean cross-entropy), accuracy and macro precision, recall, F1 of logits (n, C), and their confusion matrix."""
    loss = torch.nn.functional.cross_entropy(logits.double(), torch.from_numpy(labels)).item()
    confusion = metrics.confusion_matrix(labels, logits.argmax(1).numpy(), logits.shape[1])
    return {"loss": loss} | metrics.classification_metrics(confusion), confusion


def write_results(run_dir: Path, data: Data, logits: torch.Tensor, state: dict, headline_step: int, device: torch.device) -> dict:
    """Writes predictions.parquet and, last, results.json; returns what the latter holds.

    logits: (n, C) fp32 of the headline model on the test rows, in their order; state: the run's clocks and best steps.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = data.test.labels
    probabilities = logits.double().softmax(1).numpy()  # (n, C)
    scores, confusion = evaluate_logits(logits, labels)
    precision, recall, f1 = metrics.per_class(confusion)
    low, high = metrics.f1_interval(confusion)
    columns = {"row": np.arange(len(labels)), "label": labels, "prediction": logits.argmax(1).numpy()}
    columns |= {f"probability_{c}": probabilities[:, c].astype(np.float32) for c in range(len(data.label_names))}
    pq.write_table(pa.table(columns), run_dir / "predictions.parquet")
    results = scores | {
        "f1_low": low,
        "f1_high": high,
        "num_test_rows": len(labels),
        "calibration_error": metrics.calibration_error(probabilities, labels),
        "per_class": {
            name: {"precision": p, "recall": r, "f1": f}
            for name, p, r, f in zip(data.label_names, precision.tolist(), recall.tolist(), f1.tolist(), strict=True)
        },
        "confusion": confusion.tolist(),
    }
    best_step, best_f1 = state["best_on_test"] or (None, None)
    results |= {
        "headline_step": headline_step,
        "final_step": state["step"],
        "best_step_on_test": best_step,
        "best_f1_on_test": best_f1,
        "best_step_on_validation": state["best_on_validation"][0] if state["best_on_validation"] else None,
        "train_seconds": state["train_seconds"],
        "eval_seconds": state["eval_seconds"],
        "tokens_per_second": state["tokens"] / state["train_seconds"] if state["train_seconds"] else None,
        "samples_per_second": state["samples"] / state["train_seconds"] if state["train_seconds"] else None,
        "peak_memory_bytes": dist.peak_memory_bytes(device),
        "device": dist.device_name(device),
    }
    write_json(run_dir / "results.json", results)
    return results


def summary(results: dict) -> str:
    """The headline in words."""
    lines = [
        f"test, {results['num_test_rows']:,} rows, step {results['headline_step']}: accuracy {results['accuracy']:.4f}, "
        f"macro F1 {results['f1']:.4f} (95 % interval {results['f1_low']:.4f} to {results['f1_high']:.4f})"
    ]
    if results["best_step_on_test"] is not None:
        lines.append(
            f"best step on test: {results['best_step_on_test']} with F1 {results['best_f1_on_test']:.4f} "
            "(the published protocol; chosen on the test set, so not an estimate of anything)"
        )
    lines.append(f"{results['train_seconds']:.0f} s of training, {results['eval_seconds']:.0f} s of evaluation")
    return "\n".join(lines)


def _f1_with_interval(results: dict) -> str:
    return f"{results['f1']:.4f} ({results['f1_low']:.4f} to {results['f1_high']:.4f})"


def steps_table(run_dir: Path) -> str:
    """Markdown with the published tables' columns, a line for each evaluation on the test rows.

    The training loss is the mean over the steps logged since the line before; where only the answer's letter differs from
    row to row, its loss stands apart.
    """
    events = read_metrics(run_dir)
    names = ["loss", "answer_loss"] if any("answer_loss" in e for e in events) else ["loss"]
    header = ["step", "training loss", "of the letter"][: 1 + len(names)]
    header += ["test loss", "accuracy", "precision", "recall", "F1"]
    lines, trained = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)], []
    for event in events:
        if event["event"] == "train":
            trained.append([event[name] for name in names])
        elif event["split"] == "test":
            losses = [f"{value:.4f}" for value in np.mean(trained, axis=0)] if trained else ["-"] * len(names)
            scores = [f"{event[name]:.4f}" for name in ("loss", "accuracy", "precision", "recall", "f1")]
            lines.append("| " + " | ".join([str(event["step"]), *losses, *scores]) + " |")
            trained = []
    return "\n".join(lines)


def runs_table(run_dirs: Sequence[Path]) -> str:
    """Markdown of finished runs side by side, a line each. Raises UserError where their test rows differ: no comparison."""
    lines = [
        "| run | model | head | steps | accuracy | macro F1 (95 % interval) | training, s | evaluation, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    first = None
    for run_dir in run_dirs:
        try:
            run = open_run(run_dir)
        except (OSError, ValueError) as error:
            raise UserError(f"{run_dir}: no finished run ({error}); train it to the end first") from None
        if run.results is None:
            raise UserError(f"{run_dir}: no finished run (no results.json); train it to the end first")
        first = first or run
        if run.info["data_fingerprint"]["test"] != first.info["data_fingerprint"]["test"]:
            raise UserError(f"{run_dir}: other test rows than {first.dir}, so there is nothing to compare; test both on the same")
        s, results = run.info["settings"], run.results
        lines.append(
            f"| {run_dir} | {s['model']} | {s.get('head', 'linear')} | {results['headline_step']} of {results['final_step']} "
            f"| {results['accuracy']:.4f} | {_f1_with_interval(results)} "
            f"| {results['train_seconds']:.0f} | {results['eval_seconds']:.0f} |"
        )
    return "\n".join(lines)


def speed_table(benches: list[dict]) -> str:
    """Markdown of bench.json files, a line for each peer: rates, the ratio with its spread over rounds, and peak memory."""
    lines = [
        "| what | model | beside | minicls, rows/s | peer, rows/s | times as fast | peak memory, GiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    peers = {"train": "HF Trainer", "score": "transformers, a pass a question", "generate": "transformers' generate"}
    for bench in benches:
        ours, *others = bench["rows"]
        s = bench["settings"]
        for theirs in others:
            ratios = bench["speedup_of_each_round"][theirs["side"]]
            spread, rounds = f"{min(ratios):.2f} to {max(ratios):.2f}", len(ratios)
            peer = "vLLM" if theirs["side"] == "vllm" else peers[bench["task"]]
            lines.append(
                f"| {bench['task']}, {s['dtype']} | {Path(s['bert'] or s['qwen']).name} | {peer} {theirs['version']} "
                f"| {ours['samples_per_second']:.2f} | {theirs['samples_per_second']:.2f} "
                f"| **{bench['speedup'][theirs['side']]:.2f}** ({spread}, {rounds} round{'s' * (rounds > 1)}) "
                f"| {ours['peak_memory_bytes'] / 2**30:.1f} against {theirs['peak_memory_bytes'] / 2**30:.1f} |"
            )
    return "\n".join(lines)


def results_table(folders: Sequence[Path]) -> str:
    """Markdown of committed results, a line for each folder with a run.json and a results.json.

    A folder may hold a `hf_trainer.json` of the same rows and settings beside them: a line of its own.
    """
    lines = [
        "| result | model | head | train rows | test rows | accuracy | macro F1 (95 % interval) | training, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for folder in folders:
        run = open_run(folder)
        s, sides = run.info["settings"], {folder.name: run.results}
        if (folder / "hf_trainer.json").is_file():
            sides[f"{folder.name}, HF Trainer"] = json.loads((folder / "hf_trainer.json").read_text(encoding="utf-8"))
        for name, found in sides.items():
            rows = f"{run.info['num_train_rows']:,} | {found['num_test_rows']:,}"
            lines.append(
                f"| {name} | {Path(s['model']).name} | {s.get('head', 'linear')} | {rows} "
                f"| {found['accuracy']:.4f} | {_f1_with_interval(found)} | {found['train_seconds']:.0f} |"
            )
    return "\n".join(lines)

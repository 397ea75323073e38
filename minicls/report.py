"""A run's result files: results.json and predictions.parquet out of the test logits."""

from pathlib import Path

import numpy as np
import torch

from minicls import dist, metrics
from minicls.checkpoint import write_json
from minicls.data import Data


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
    return "\n".join(lines)


def speed_table(benches: list[dict]) -> str:
    """Markdown of bench.json files of `--task train`, a line each: rates, the ratio with its spread, and peak memory."""
    lines = [
        "| model | dtype | minicls, samples/s | HF Trainer, samples/s | times as fast | peak memory, GiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for bench in benches:
        ours, theirs = bench["rows"]
        spread = f"{min(bench['speedup_of_each_round']):.2f} to {max(bench['speedup_of_each_round']):.2f}"
        rounds = len(bench["speedup_of_each_round"])
        lines.append(
            f"| {Path(bench['settings']['bert']).name} | {bench['settings']['dtype']} "
            f"| {ours['samples_per_second']:.1f} | {theirs['samples_per_second']:.1f} "
            f"| **{bench['speedup']:.2f}** ({spread}, {rounds} round{'s' * (rounds > 1)}) "
            f"| {ours['peak_memory_bytes'] / 2**30:.1f} against {theirs['peak_memory_bytes'] / 2**30:.1f} |"
        )
    return "\n".join(lines)

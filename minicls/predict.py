"""Texts through a trained classifier: the packed forward pass that evaluation and `python -m minicls predict` share."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from minicls import dist, weights
from minicls.config import UserError
from minicls.data import length_batches, pack, read_texts
from minicls.tokenizer import bert_rows, load_tokenizer

EVAL_TOKENS = 16_384  # tokens of a batch: no result depends on it, only memory and speed


@torch.inference_mode()
def classify_rows(model: nn.Module, rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """The logits (n, C) fp32 of n tokenized rows, on the CPU. Ranks take batches in turn, and each ends up with all rows."""
    logits = torch.zeros(len(rows), model.config.num_labels, device=device)
    for batch in length_batches(rows, EVAL_TOKENS)[dist.rank() :: dist.world_size()]:
        logits[torch.from_numpy(batch).to(device)] = model(*pack([rows[row] for row in batch], device))
    return dist.all_sum(logits).cpu()  # a row is zero on all ranks but one, so the sum is exact


class Classifier:
    """A run directory, or any model directory with a trained head, ready for texts."""

    def __init__(self, directory: Path, device: torch.device):
        config = weights.read_config(directory)
        self.tokenizer, self.device = load_tokenizer(directory), device
        self.model, fresh, _ = weights.build_model(weights.BERT, config, directory, 0, device)
        if fresh or "id2label" not in config:
            raise UserError(f"{directory}: holds no trained classifier; pass a finished run of train_bert.py")
        self.model.eval()
        self.label_names = [config["id2label"][str(i)] for i in range(len(config["id2label"]))]
        # As the run did it, so that its predictions come out again; a directory from elsewhere is read in full precision.
        run_file = directory / "run.json"
        settings = json.loads(run_file.read_text(encoding="utf-8"))["settings"] if run_file.is_file() else {}
        self.max_length = settings.get("max_length", self.model.config.max_position_embeddings)
        self.long_text = settings.get("long_text", "head")
        self.bf16 = settings.get("dtype") == "bf16"

    def probabilities(self, texts: Sequence[str]) -> torch.Tensor:
        """The probability of each class, (n, C) float64."""
        rows, _ = bert_rows(self.tokenizer, texts, self.max_length, self.long_text)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return classify_rows(self.model, rows, self.device).double().softmax(1)


def gather_texts(inputs: Sequence[str], text_column: str) -> list[str]:
    """An input is a file (.parquet, .csv, .jsonl; .txt holds a text a line) or a text itself."""
    texts = []
    for item in inputs:
        is_file_name = len(item) < 4096 and Path(item).suffix in (".parquet", ".csv", ".jsonl", ".txt") and "\n" not in item
        if is_file_name and not Path(item).is_file():
            raise UserError(f"{item}: no such file; check the path")
        texts += read_texts(Path(item), text_column) if is_file_name else [item]
    if not texts:
        raise UserError("FILE|TEXT: nothing to classify; pass texts or files, or write texts to standard input, one a line")
    return texts


def table(texts: Sequence[str], probabilities: torch.Tensor, label_names: Sequence[str]) -> str:
    """Label, its probability, those of the other classes where they fit in a line, and the start of the text."""
    shown = label_names if len(label_names) <= 6 else []
    width = max(len(name) for name in [*label_names, "label"])
    lines = ["  ".join([f"{'label':{width}}", "probability", *(f"{name[:10]:>10}" for name in shown), "text"])]
    for text, p in zip(texts, probabilities.tolist(), strict=True):
        best = max(range(len(p)), key=p.__getitem__)
        start = " ".join(text.split())
        start = start if len(start) <= 60 else start[:59] + "…"
        columns = [f"{label_names[best]:{width}}", f"{p[best]:11.4f}", *(f"{p[c]:10.4f}" for c in range(len(shown))), start]
        lines.append("  ".join(columns))
    return "\n".join(lines)


def jsonl(texts: Sequence[str], probabilities: torch.Tensor, label_names: Sequence[str]) -> str:
    """One object a line: text, label, and the probability of every class by name."""
    lines = []
    for text, p in zip(texts, probabilities.tolist(), strict=True):
        best = max(range(len(p)), key=p.__getitem__)
        values = {"text": text, "label": label_names[best], "probabilities": dict(zip(label_names, p, strict=True))}
        lines.append(json.dumps(values, ensure_ascii=False))
    return "\n".join(lines)

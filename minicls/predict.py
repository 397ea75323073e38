"""Texts through a trained classifier: the packed forward pass that evaluation and `python -m minicls predict` share."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from minicls import dist, weights
from minicls.attention import on_gpu
from minicls.batch import length_batches, pack, to_device
from minicls.checkpoint import how_asked
from minicls.config import UserError
from minicls.data import checked_text, read_texts
from minicls.prompt import Chat, ChatFormat, make_template, thinks
from minicls.scorer import score
from minicls.tokenizer import bert_rows, load_tokenizer, text_rows

EVAL_TOKENS = 1024, 16_384  # of a batch, on a CPU and on a GPU: no result depends on it, only memory and speed


@torch.inference_mode()
def classify_rows(model: nn.Module, rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """The logits (n, C) fp32 of n tokenized rows, on the CPU. Ranks take batches in turn, and each ends up with all rows."""
    logits = torch.zeros(len(rows), model.config.num_labels, device=device)
    for batch in length_batches(rows, EVAL_TOKENS[on_gpu(device)])[dist.rank() :: dist.world_size()]:
        logits[to_device(batch, device)] = model(*pack([rows[row] for row in batch], device))
    return dist.all_sum(logits).cpu()  # a row is zero on all ranks but one, so the sum is exact


class Reader:
    """How a run directory, or any model directory that knows its classes, reads a text; its weights are not needed for that."""

    def __init__(self, directory: Path, max_length: int | None = None):
        """`max_length`: cut rows to so many tokens even where the run had more."""
        self.config, self.tokenizer = weights.read_config(directory), load_tokenizer(directory)
        self.kind = weights.ARCHITECTURES.get((self.config.get("architectures") or [None])[0])
        self.untrained = UserError(
            f"{directory}: holds no trained classifier; pass a finished run of train_bert.py or train_qwen.py"
        )
        if self.kind is None or (self.kind is weights.DECODER and "id2label" not in self.config):
            raise self.untrained
        self.label_names = weights.head_labels(self.config, directory)
        # As the run did it, so that its predictions come out again; a directory from elsewhere is read in full precision.
        self.settings = how_asked(directory)
        if tuple(self.settings.get("label_names") or self.label_names) != tuple(self.label_names):
            raise UserError(f"{directory}: minicls.json and config.json name other classes; copy the whole model directory again")
        positions = self.config.get("max_position_embeddings", self.kind.config.max_position_embeddings)
        longest = self.settings.get("max_length", positions)
        self.max_length = min(longest, max_length or longest)
        self.chat = None
        if self.kind is weights.DECODER or self.settings.get("linear_input") == "prompt":
            template = self.settings.get("template") or make_template(self.label_names, no_think=thinks(self.tokenizer))
            form = ChatFormat(**self.settings["chat"]) if self.settings.get("chat") else None
            self.chat = Chat(self.tokenizer, tuple(template), len(self.label_names), self.max_length, format=form)

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids that the head is asked about: of each text, or of the question about it."""
        if self.kind is weights.BERT:
            return bert_rows(self.tokenizer, texts, self.max_length, self.settings.get("long_text", "head"))[0]
        return (self.chat.questions(texts) if self.chat else text_rows(self.tokenizer, texts, self.max_length))[0]


class Classifier(Reader):
    """The same with its weights, ready for texts."""

    def __init__(self, directory: Path, device: torch.device):
        super().__init__(directory)
        self.device = device
        self.model, fresh, _ = weights.build_model(self.kind, self.config, directory, 0, device)
        if fresh:
            raise self.untrained
        self.model.eval()

    def scores(self, texts: Sequence[str]) -> torch.Tensor:
        """The head's logits, or the options' scores, (n, C) float64: a softmax over them gives the probabilities."""
        rows = self.rows(texts)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.get("dtype") == "bf16"):
            if self.kind is weights.DECODER:
                scores = score(self.model, rows, self.chat.options, self.device, self.settings.get("normalize", "mean"))
            else:
                scores = classify_rows(self.model, rows, self.device)
        return scores.double()

    def perplexities(self, scores: torch.Tensor) -> torch.Tensor | None:
        """The perplexity of each option, (n, C), from its scores; None where there are no options."""
        if self.kind is not weights.DECODER:
            return None
        lengths = torch.tensor([len(option) if self.settings.get("normalize") == "sum" else 1 for option in self.chat.options])
        return (-scores / lengths).exp()


def gather_texts(inputs: Sequence[str], text_column: str) -> list[str]:
    """An input is a file (.parquet, .csv, .jsonl; .txt holds a text a line) or a text itself."""
    texts = []
    for item in inputs:
        is_file_name = len(item) < 4096 and Path(item).suffix in (".parquet", ".csv", ".jsonl", ".txt") and "\n" not in item
        if is_file_name and not Path(item).is_file():
            raise UserError(f"{item}: no such file; check the path")
        texts += read_texts(Path(item), text_column) if is_file_name else [checked_text(item, "FILE|TEXT")]
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


def jsonl(
    texts: Sequence[str], probabilities: torch.Tensor, label_names: Sequence[str], perplexities: torch.Tensor | None = None
) -> str:
    """One object a line: text, label, and by name the probability of every class, and its option's perplexity if it has one."""
    lines = []
    for row, (text, p) in enumerate(zip(texts, probabilities.tolist(), strict=True)):
        best = max(range(len(p)), key=p.__getitem__)
        values = {"text": text, "label": label_names[best], "probabilities": dict(zip(label_names, p, strict=True))}
        if perplexities is not None:
            values["perplexities"] = dict(zip(label_names, perplexities[row].tolist(), strict=True))
        lines.append(json.dumps(values, ensure_ascii=False))
    return "\n".join(lines)

"""Texts through a trained classifier: the packed forward pass that evaluation and `python -m minicls predict` share.

from minicls import Classifier
for label, probability, probabilities in Classifier("runs/x").predict(["Stocks fell.", "They won."]): ...
"""

import argparse
import contextlib
import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from minicls import dist, weights
from minicls.attention import on_gpu
from minicls.batch import length_batches, pack, to_device
from minicls.checkpoint import checkpoints, how_asked
from minicls.config import UserError
from minicls.data import checked_text, lines_of, read_rows
from minicls.prompt import make_chat
from minicls.scorer import score
from minicls.tokenizer import bert_rows, load_tokenizer, text_rows

EVAL_TOKENS = 1024, 16_384  # of a batch, on a CPU and on a GPU: no result depends on it, only memory and speed


@torch.inference_mode()
def classify_rows(model: nn.Module, rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """The logits (n, C) fp32 of n tokenized rows, on the CPU. Ranks take batches in turn, and each ends up with all rows."""
    logits = torch.zeros(len(rows), model.config.num_labels, device=device)
    for batch in length_batches(rows, EVAL_TOKENS[on_gpu(device)])[dist.rank() :: dist.world_size()]:
        logits[to_device(batch, device)] = model(pack([rows[row] for row in batch], device))
    return dist.all_sum(logits).cpu()  # a row is zero on all ranks but one, so the sum is exact


def check_model_dir(directory: Path) -> None:
    """Raises UserError where it is no directory, or that of a run which is not finished."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such run directory; check the path")
    if (directory / "run.json").is_file() and not (directory / "config.json").is_file():
        saved = checkpoints(directory)
        newest = f"pass its newest checkpoint, {saved[max(saved)]}, or" if saved else "it has no checkpoint yet:"
        raise UserError(
            f"{directory}: this run is not finished; {newest} go on with it first, with --resume {directory}"
        )


class Reader:
    """How a run directory, or any model directory that knows its classes, reads a text; its weights are not needed for that."""

    def __init__(self, directory: Path, max_length: int | None = None):
        """`max_length`: cut rows to so many tokens even where the run had more."""
        check_model_dir(directory)
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
            raise UserError(
                f"{directory}: minicls.json and config.json name other classes; copy the whole model directory again"
            )
        positions = self.config.get("max_position_embeddings", self.kind.config.max_position_embeddings)
        longest = self.settings.get("max_length", positions)
        self.max_length = min(longest, max_length or longest)
        self.chat = None
        if self.kind is weights.DECODER or self.settings.get("linear_input") == "prompt":
            self.chat = make_chat(self.settings, self.tokenizer, self.label_names, self.max_length, place=directory)

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids that the head is asked about: of each text, or of the question about it. Raises UserError naming the place
        of what is no text."""
        if isinstance(texts, str):
            raise UserError(f"texts: {texts[:60]!r} is one text, not a list of texts; pass [text]")
        texts = [checked_text(text, f"texts[{i}]") for i, text in enumerate(texts)]
        if self.kind is weights.BERT:
            return bert_rows(self.tokenizer, texts, self.max_length, self.settings.get("long_text", "head"))[0]
        return (self.chat.questions(texts) if self.chat else text_rows(self.tokenizer, texts, self.max_length))[0]


class Prediction(NamedTuple):
    label: str
    probability: float  # of this label
    probabilities: dict[str, float]  # of every class, in the order of the classes


class Classifier(Reader):
    """A finished run, a checkpoint or another model directory with a trained head, with its weights, ready for texts."""

    def __init__(self, directory: str | Path, device: torch.device | str | None = None):
        """`device`: cpu, cuda or cuda:N; None is cuda if there is one. Raises UserError where it or the directory is no good."""
        super().__init__(Path(directory))
        self.device = dist.start(device if device is None else str(device))
        self.model, fresh, _ = weights.build_model(self.kind, self.config, Path(directory), 0, self.device)
        if fresh:
            raise self.untrained
        self.model.eval().requires_grad_(False)

    def predict(self, texts: Iterable[str]) -> list[Prediction]:
        """The label and the probabilities of each text."""
        return [self.prediction(p) for p in self.scores(texts).softmax(1).tolist()]

    def prediction(self, probabilities: Sequence[float]) -> Prediction:
        """The label that one row of probabilities means."""
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        return Prediction(
            self.label_names[best], probabilities[best], dict(zip(self.label_names, probabilities, strict=True))
        )

    def scores(self, texts: Sequence[str]) -> torch.Tensor:
        """The head's logits, or the options' scores, (n, C) float64: a softmax over them gives the probabilities."""
        rows = self.rows(texts)
        if not rows:
            return torch.zeros(0, len(self.label_names), dtype=torch.float64)
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
        lengths = torch.tensor(
            [len(option) if self.settings.get("normalize") == "sum" else 1 for option in self.chat.options]
        )
        return (-scores / lengths).exp()


# `python -m minicls predict`: what goes in, and what comes out.

TEXT_FILE = re.compile(r".*\.(parquet|((csv|tsv|jsonl?)(\.gz)?)|txt)", re.IGNORECASE)  # names of files with texts
PATH = re.compile(
    r"[\w.~@+=-]*/[\w./~@+=-]*", re.ASCII
)  # looks like one all the same: with a slash, and nothing else of a text
FORMATS = ("table", "jsonl", "csv", "parquet")
CHUNK = 1024  # texts between two lots of output


def gather(inputs: Sequence[str], text_column: str) -> list[tuple[str, dict]]:
    """The texts, each with the row that it came from. An input is a file (.txt holds a text a line), `-` for standard input (a
    text a line), or a text itself. What exists is a file, and what has the name of one has to exist."""
    rows = []
    for item in inputs:
        if item == "-":
            rows += standard_input()
        elif exists(item):
            if Path(item).is_dir():
                raise UserError(f"{item}: a folder; pass the files in it")
            rows += read_rows(Path(item), text_column)
        elif "\n" not in item and (TEXT_FILE.fullmatch(item) or PATH.fullmatch(item)):
            raise UserError(f"{item}: no such file; check the path (a text like that goes through standard input)")
        else:
            rows.append((checked_text(item, "FILE|TEXT"), {"text": item}))
    return rows


def standard_input() -> list[tuple[str, dict]]:
    """A text a line, whatever it looks like: it may come from anybody, and must not name a file to open."""
    try:
        lines = lines_of(sys.stdin.read())
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not {error.encoding} ({error.reason}); convert it") from None
    return [(checked_text(line, f"standard input, line {i}"), {"text": line}) for i, line in enumerate(lines, start=1)]


def exists(item: str) -> bool:
    try:
        return Path(item).exists()
    except (OSError, ValueError):  # longer than a name can be, or with a null character: a text
        return False


class Result(NamedTuple):
    """One line of the output."""

    text: str
    row: dict  # what the text came with
    prediction: Prediction
    perplexities: dict[str, float] | None  # of the options, where the model has them

    def top(self, count: int | None) -> dict[str, float]:
        """The `count` most probable classes, best first; all in their own order if it is None."""
        probabilities = self.prediction.probabilities
        return dict(sorted(probabilities.items(), key=lambda item: -item[1])[:count]) if count else probabilities

    def joined(self, values: dict) -> dict:
        """The row and the values; a column that has the name of a value is called input_<name>."""
        return {f"input_{name}" if name in values else name: value for name, value in self.row.items()} | values


def results(classifier: Classifier, rows: Sequence[tuple[str, dict]], progress: bool) -> Iterator[Result]:
    """Classifies chunk by chunk; a progress bar goes to standard error, if that is a terminal."""
    from tqdm import tqdm

    names = classifier.label_names
    with tqdm(total=len(rows), unit=" texts", disable=None if progress else True) as bar:
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            scores = classifier.scores([text for text, _ in chunk])
            perplexities = classifier.perplexities(scores)
            for i, ((text, row), p) in enumerate(zip(chunk, scores.softmax(1).tolist(), strict=True)):
                of_options = None if perplexities is None else dict(zip(names, perplexities[i].tolist(), strict=True))
                yield Result(text, row, classifier.prediction(p), of_options)
            bar.update(len(chunk))


def table_lines(results: Iterable[Result], label_names: Sequence[str], top_k: int | None) -> Iterator[str]:
    """Label and probability; the most probable classes, or those that fit in a line; and the start of the text."""
    shown = label_names if len(label_names) <= 6 and not top_k else []
    width = max(len(name) for name in [*label_names, "label"])
    ranks = range(2, (top_k or 1) + 1)
    header = [f"{'label':{width}}", "probability", *(f"{name[:10]:>10}" for name in shown)]
    yield "  ".join([*header, *(f"{f'label {rank}':{width}}  {'':6}" for rank in ranks), "text"])
    for result in results:
        label, probability, probabilities = result.prediction
        start = " ".join(result.text.split())
        columns = [f"{label:{width}}", f"{probability:11.4f}", *(f"{probabilities[name]:10.4f}" for name in shown)]
        columns += [f"{name:{width}}  {p:.4f}" for name, p in [*result.top(top_k).items()][1:]] if top_k else []
        yield "  ".join([*columns, start if len(start) <= 60 else start[:59] + "…"])


def json_lines(results: Iterable[Result], top_k: int | None) -> Iterator[str]:
    """One object a line: the row, the label, and by name the probability of every class, and its option's perplexity if it has
    one."""
    for result in results:
        top = result.top(top_k)
        values = {"label": result.prediction.label, "probabilities": top}
        if result.perplexities:
            values["perplexities"] = {name: result.perplexities[name] for name in top}
        yield json.dumps(result.joined(values), ensure_ascii=False, default=str)


def flat_columns(label_names: Sequence[str], top_k: int | None) -> list[str]:
    """What CSV and parquet say of a text: label, probability, and those of every class, or with `top_k` of the next labels."""
    if not top_k:
        return ["label", "probability", *(f"probability_{name}" for name in label_names)]
    return [
        "label",
        "probability",
        *(f"{part}_{rank}" for rank in range(2, top_k + 1) for part in ("label", "probability")),
    ]


def flat_rows(results: Iterable[Result], columns: Sequence[str], top_k: int | None) -> Iterator[dict]:
    """Each row with the values of these columns."""
    for result in results:
        label, probability, probabilities = result.prediction
        ranked = [part for pair in result.top(top_k).items() for part in pair][2:] if top_k else probabilities.values()
        yield result.joined(dict(zip(columns, [label, probability, *ranked], strict=True)))


def csv_lines(
    results: Iterable[Result], rows: Sequence[tuple[str, dict]], columns: Sequence[str], top_k: int | None
) -> Iterator[str]:
    """A header with the columns of all inputs, and a line for each text."""
    own = dict.fromkeys(name for _, row in rows for name in row)
    names = [f"input_{name}" if name in columns else name for name in own] + [*columns]
    line = io.StringIO()
    writer = csv.DictWriter(line, names, lineterminator="\r\n")  # what ends a line is quoted in a field
    writer.writeheader()
    yield line.getvalue().removesuffix("\r\n")
    for values in flat_rows(results, columns, top_k):
        line.seek(0)
        line.truncate()
        writer.writerow(
            {name: json.dumps(v, default=str) if isinstance(v, (dict, list)) else v for name, v in values.items()}
        )
        yield line.getvalue().removesuffix("\r\n")


def write_parquet(values: Iterable[dict], file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.write_table(pa.Table.from_pylist([*values]), file)
    except pa.ArrowException as error:  # JSON allows a number in one row and a text in the next
        raise UserError(f"--out: the input's columns do not fit parquet ({error}); write .jsonl") from None


def predict_texts(args: argparse.Namespace, inputs: list[str]) -> None:
    """`predict`: everything that can be a mistake is looked at before the model is loaded."""
    suffix = args.out.suffix[1:].lower() if args.out else "table"
    form = args.format or suffix
    if form not in FORMATS:
        raise UserError(f"--out: {args.out} is not .jsonl, .csv or .parquet; name it so, or say which with --format")
    if form == "parquet" and not args.out:
        raise UserError("--format: parquet is not for the terminal; name a file with --out")
    if args.out and (args.out.exists() or not args.out.parent.is_dir()):
        raise UserError(f"--out: {args.out} {'exists' if args.out.exists() else 'is in no directory'}; name a new file")
    if args.top_k is not None and args.top_k < 1:
        raise UserError(f"--top-k: {args.top_k} is too small; pass at least 1")
    check_model_dir(args.run)
    device = dist.start(args.device, args.threads)
    rows = gather(inputs or ([] if sys.stdin.isatty() else ["-"]), args.text_column)
    if not rows:
        raise UserError(
            "FILE|TEXT: nothing to classify; pass texts or files, or write texts to standard input, one a line"
        )
    classifier = Classifier(args.run, device)
    names = classifier.label_names
    top_k = args.top_k and min(args.top_k, len(names))
    columns = flat_columns(names, top_k)
    classified = results(classifier, rows, progress=bool(args.out) or not sys.stdout.isatty())
    # Written aside and renamed: a file that has its name is whole.
    aside = args.out.with_name(f".{args.out.name}.tmp") if args.out else None
    try:
        if form == "parquet":
            write_parquet(flat_rows(classified, columns, top_k), aside)
        else:
            lines = {
                "table": lambda: table_lines(classified, names, top_k),
                "jsonl": lambda: json_lines(classified, top_k),
                "csv": lambda: csv_lines(classified, rows, columns, top_k),
            }[form]()
            with aside.open("w", encoding="utf-8") if aside else contextlib.nullcontext() as file:
                for line in lines:
                    print(line, file=file)
        if aside:
            aside.replace(args.out)
            print(f"predictions: {args.out}")
    finally:
        if aside:
            aside.unlink(missing_ok=True)

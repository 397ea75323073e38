"""A trained classifier applied to texts: the commands `python -m minicls predict` and `evaluate`, and `Classifier`.

from minicls import Classifier
for label, probability, probabilities in Classifier("runs/x").predict(["Stocks fell.", "They won."]): ...
"""

import argparse
import contextlib
import csv
import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from minicls import cascade, checkpoint, dist, plots, weights
from minicls.batch import length_batches, pack, to_device
from minicls.config import DataSettings, UserError, check_value, flag_of, parse, read_json, setting, written_aside
from minicls.data import FORMATS, Data, checked_text, describe, lines_of, load_splits, read_rows
from minicls.kernels import on_gpu
from minicls.logger import Logger
from minicls.prompt import make_chat
from minicls.scorer import score
from minicls.tokenizer import bert_rows, load_tokenizer, text_rows

EVAL_TOKENS = 1024, 16_384  # tokens per batch on a CPU and on a GPU; affects speed and memory, not results


@torch.inference_mode()
def classify_rows(model: nn.Module, rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """The logits (n, C) fp32 of n tokenized rows, on the CPU. Ranks take batches in turn, and each gets all rows."""
    logits = torch.zeros(len(rows), model.config.num_labels, device=device)
    for batch in length_batches(rows, EVAL_TOKENS[on_gpu(device)])[dist.rank() :: dist.world_size()]:
        logits[to_device(batch, device)] = model(pack([rows[row] for row in batch], device))
    return dist.all_sum(logits).cpu()  # a row is zero on all ranks but one, so the sum is exact


def check_trained(directory: Path) -> None:
    """Raises UserError if there is no such directory, or if it is a run that has not been trained to its end."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such run directory; check the path")
    if (directory / "run.json").is_file() and not (directory / "config.json").is_file():
        if (directory / "results.json").is_file():
            raise UserError(f"{directory}: a baseline's or a test's results, without a model; pass a training run")
        saved = checkpoint.checkpoints(directory)
        newest = f"pass its newest checkpoint, {saved[max(saved)]}, or" if saved else "it has no checkpoint yet:"
        raise UserError(f"{directory}: this run is not finished; {newest} finish it, with --resume {directory}")


class Reader:
    """Turns texts into rows of ids as in the model's training. It needs no weights."""

    def __init__(
        self, directory: Path, max_length: int | None = None, classes: Sequence[str] = (), prompt: str | None = None
    ):
        """`max_length`: an upper limit on tokens per row, even if the run allowed more.

        `classes`: ask a language model about these, even if it was not trained on them (zero-shot). The question is the
        one that it was trained on or, with `prompt` or other classes, a new one.
        """
        check_trained(directory)
        self.config, self.tokenizer = weights.read_config(directory), load_tokenizer(directory)
        self.architecture = weights.ARCHITECTURES.get((self.config.get("architectures") or [None])[0])
        fault = "holds no trained classifier; pass a finished run of train_bert.py or train_qwen.py"
        self.untrained = UserError(f"{directory}: {fault}")
        # The run's own settings, to reproduce its predictions. A model from elsewhere has none and runs in fp32.
        self.settings = checkpoint.inference_settings(directory)
        language_model = self.architecture is weights.DECODER
        self.label_names = None
        if self.architecture and (not language_model or "id2label" in self.config):
            self.label_names = weights.head_labels(self.config, directory)
            if [*(self.settings.get("label_names") or self.label_names)] != self.label_names:
                fault = "minicls.json and config.json name different classes"
                raise UserError(f"{directory}: {fault}; copy the whole directory again")
        if language_model and classes and (prompt or self.label_names != [*classes]):
            self.settings = {name: value for name, value in self.settings.items() if name not in ("template", "chat")}
            self.label_names = [*classes]
        if not self.label_names:
            raise self.untrained
        positions = self.config.get("max_position_embeddings", self.architecture.config.max_position_embeddings)
        limit = self.settings.get("max_length", positions)
        self.max_length = min(limit, max_length or limit)
        self.chat = None
        if language_model or self.settings.get("linear_input") == "prompt":
            question = self.label_names, self.max_length, prompt or "published"
            self.chat = make_chat(self.settings, self.tokenizer, *question, source=directory)

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """The model's input ids for each text, or for the question about it. Raises UserError for a non-text."""
        if isinstance(texts, str):
            raise UserError(f"texts: {texts[:60]!r} is one text, not a list of texts; pass [text]")
        texts = [checked_text(text, f"texts[{i}]") for i, text in enumerate(texts)]
        if self.architecture is weights.BERT:
            return bert_rows(self.tokenizer, texts, self.max_length, self.settings.get("long_text", "head"))[0]
        return (self.chat.questions(texts) if self.chat else text_rows(self.tokenizer, texts, self.max_length))[0]


class Prediction(NamedTuple):
    label: str
    probability: float  # of this label
    probabilities: dict[str, float]  # of every class, in the order of the classes


class Classifier(Reader):
    """A finished run, a checkpoint or another model directory with a trained head: a `Reader` with the weights."""

    def __init__(self, directory: str | Path, device: torch.device | str | None = None, **reading):
        """`device`: cpu, cuda or cuda:N; None means cuda if there is one. `reading`: the arguments of `Reader`."""
        super().__init__(Path(directory), **reading)
        self.device = dist.start(device if device is None else str(device))
        self.model, fresh, _ = weights.build_model(self.architecture, self.config, Path(directory), 0, self.device)
        if fresh:
            raise self.untrained
        self.model.eval().requires_grad_(False)

    def predict(self, texts: Iterable[str]) -> list[Prediction]:
        """The label and the probabilities of each text."""
        return self.predictions(self.scores(texts))

    def scores(self, texts: Sequence[str]) -> torch.Tensor:
        """The head's logits, or the options' scores, (n, C) float64: a softmax over them gives the probabilities."""
        return self.score_rows(self.rows(texts))

    def score_rows(self, rows: list[list[int]]) -> torch.Tensor:
        """The scores of rows of ids, as `rows` returns them."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.get("dtype") == "bf16"):
            if self.architecture is weights.DECODER:
                scores = score(self.model, rows, self.chat.options, self.device, self.settings.get("normalize", "mean"))
            else:
                scores = classify_rows(self.model, rows, self.device)
        return scores.double()

    def predictions(self, scores: torch.Tensor) -> list[Prediction]:
        """The most probable label of n texts, from their scores (n, C)."""
        return [Prediction(max(p, key=p.get), max(p.values()), p) for p in self._by_label(scores.softmax(1))]

    def perplexities(self, scores: torch.Tensor) -> list[dict[str, float]] | list[None]:
        """The perplexities of n texts' options, from their scores (n, C); None where there are no options."""
        if self.architecture is not weights.DECODER:
            return [None] * len(scores)
        summed = self.settings.get("normalize") == "sum"
        lengths = torch.tensor([len(option) if summed else 1 for option in self.chat.options])
        return self._by_label((-scores / lengths).exp())

    def _by_label(self, values: torch.Tensor) -> list[dict[str, float]]:
        return [dict(zip(self.label_names, row, strict=True)) for row in values.tolist()]


# `python -m minicls predict`: reading texts, and writing predictions.

TEXT_FILE = re.compile(rf".*\.({'|'.join(map(re.escape, FORMATS))}|txt)", re.IGNORECASE)  # names of files with texts
PATH = re.compile(r"[\w.~@+=-]*/[\w./~@+=-]*", re.ASCII)  # a slash, and only characters that are common in paths
OUTPUT_FORMATS = ("table", "jsonl", "csv", "parquet")
CHUNK = 1024  # texts classified between two writes


def gather(inputs: Sequence[str], text_column: str) -> list[tuple[str, dict]]:
    """The texts, each with the row that it came from.

    An input is a file, `-` for standard input (one text per line), or a text. An existing path is taken for a file; an
    input that looks like a path must exist. A line of standard input is never taken for a path: texts come from
    strangers, and must not open files.
    """
    rows = []
    for item in inputs:
        if item == "-":
            try:
                lines = enumerate(lines_of(sys.stdin.read()), start=1)
            except UnicodeDecodeError as error:
                raise UserError(f"standard input: not {error.encoding} ({error.reason}); convert it") from None
            rows += [(checked_text(line, f"standard input, line {i}"), {"text": line}) for i, line in lines]
        elif os.path.exists(item):  # noqa: PTH110 - Path.exists raises for a text that is too long to be a path
            if Path(item).is_dir():
                raise UserError(f"{item}: a folder; pass the files in it")
            rows += read_rows(Path(item), text_column)
        elif "\n" not in item and (TEXT_FILE.fullmatch(item) or PATH.fullmatch(item)):
            raise UserError(
                f"{item}: no such file; check the path (pipe a text that looks like one through standard input)"
            )
        else:
            rows.append((checked_text(item, "FILE|TEXT"), {"text": item}))
    return rows


class Result(NamedTuple):
    """A text with its prediction."""

    text: str
    row: dict  # the columns that came with the text
    prediction: Prediction
    shown: dict[str, float]  # the most probable classes, best first; without --top-k all, in their order
    perplexities: dict[str, float] | None  # of the options, if the model has them


def results(
    classifier: Classifier, rows: Sequence[tuple[str, dict]], top_k: int | None, progress: bool
) -> Iterator[Result]:
    """Classifies chunk by chunk, with a progress bar on standard error if that is a terminal."""
    with tqdm(total=len(rows), unit=" texts", disable=None if progress else True) as bar:
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            scores = classifier.scores([text for text, _ in chunk])
            columns = chunk, classifier.predictions(scores), classifier.perplexities(scores)
            for (text, row), prediction, perplexities in zip(*columns, strict=True):
                shown = prediction.probabilities
                if top_k:
                    shown = dict(sorted(shown.items(), key=lambda item: -item[1])[:top_k])
                yield Result(text, row, prediction, shown, perplexities)
            bar.update(len(chunk))


def table_lines(results: Iterable[Result], label_names: Sequence[str], top_k: int | None) -> Iterator[str]:
    """Label, probability, the `top_k` classes or up to six, and the start of the text."""
    names = label_names if len(label_names) <= 6 and not top_k else []
    width = max(len(name) for name in [*label_names, "label"])
    header = [f"{'label':{width}}", "probability", *(f"{name[:10]:>10}" for name in names)]
    header += [f"{f'label {rank}':{width}}  {'':6}" for rank in range(2, (top_k or 1) + 1)]
    yield "  ".join([*header, "text"])
    for result in results:
        label, probability, probabilities = result.prediction
        columns = [f"{label:{width}}", f"{probability:11.4f}", *(f"{probabilities[name]:10.4f}" for name in names)]
        columns += [f"{name:{width}}  {p:.4f}" for name, p in [*result.shown.items()][1:]] if top_k else []
        start = " ".join(result.text.split())
        yield "  ".join([*columns, start if len(start) <= 60 else start[:59] + "…"])


def joined(row: dict, values: dict) -> dict:
    """The row and the values. A column with the name of a value is renamed to input_<name>, a free name."""
    renamed = {}
    for name, value in row.items():
        free = name
        while free in values or (free != name and free in row):
            free = f"input_{free}"
        renamed[free] = value
    return renamed | values


def json_lines(results: Iterable[Result]) -> Iterator[str]:
    """One object per line: the row, the label, and by class the probability and, with options, the perplexity."""
    for result in results:
        values = {"label": result.prediction.label, "probabilities": result.shown}
        if result.perplexities:
            values["perplexities"] = {name: result.perplexities[name] for name in result.shown}
        yield json.dumps(joined(result.row, values), ensure_ascii=False, default=str)


def flat_rows(rows: Sequence[tuple[str, dict]], results: Iterable[Result], top_k: int | None) -> Iterator[dict]:
    """The columns of all inputs, the label and its probability, then those of every class or of the next labels."""
    columns = dict.fromkeys(name for _, row in rows for name in row)
    for result in results:
        values = {"label": result.prediction.label, "probability": result.prediction.probability}
        if top_k:
            for rank, (label, probability) in enumerate([*result.shown.items()][1:], start=2):
                values |= {f"label_{rank}": label, f"probability_{rank}": probability}
        else:
            values |= {f"probability_{name}": probability for name, probability in result.shown.items()}
        yield joined(columns | result.row, values)


def csv_lines(rows: Iterable[dict]) -> Iterator[str]:
    """A header, and a line for each row."""
    writer = csv.writer(SimpleNamespace(write=str))  # hands the line back; fields with \r or \n in them are quoted
    for number, row in enumerate(rows):
        values = [json.dumps(v, default=str) if isinstance(v, (dict, list)) else v for v in row.values()]
        for line in [values] if number else [row, values]:  # first the header
            yield writer.writerow(line).removesuffix("\r\n")


def write_parquet(rows: Iterable[dict], file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        pq.write_table(pa.Table.from_pylist([*rows]), file)
    except (pa.ArrowException, UnicodeEncodeError) as error:  # JSON allows a number in one row and a text in the next
        raise UserError(f"--out: the input's columns do not fit parquet ({error}); write .jsonl") from None


def predict_texts(args: argparse.Namespace) -> None:
    """The command. It checks the flags, the runs and the texts before it loads a model, which can take long."""
    output_format = args.format or (args.out.suffix[1:].lower() if args.out else "table")
    if output_format not in OUTPUT_FORMATS:
        raise UserError(f"--out: {args.out} is not .jsonl, .csv or .parquet; name it so, or pass --format")
    if output_format == "parquet" and not args.out:
        raise UserError("--format: parquet is not for the terminal; name a file with --out")
    if args.out and (args.out.exists() or not args.out.parent.is_dir()):
        problem = "exists" if args.out.exists() else "is in a directory that does not exist"
        raise UserError(f"--out: {args.out} {problem}; name a new file")
    for name, minimum, maximum in (("top_k", 1, None), ("threads", 1, None), ("threshold", 0, 1)):
        check_value(name, getattr(args, name), minimum, maximum)
    if args.threshold is not None and not args.then:
        raise UserError(f"--threshold: {args.threshold} is for --then RUN; name one or leave the flag out")
    device = dist.start(args.device, args.threads)
    for run in filter(None, (args.run, args.then)):
        check_trained(run)
    rows = gather(args.inputs or ([] if sys.stdin.isatty() else ["-"]), args.text_column)
    if not rows:
        raise UserError("FILE|TEXT: nothing to classify; pass texts or files, or write texts to standard input")
    threshold = args.threshold
    if args.then and threshold is None:
        threshold = cascade.choose_threshold(cascade.validation_answers(args.run, args.then))
    classifier = Classifier(args.run, device)
    if args.then:
        classifier = cascade.Cascade(classifier, Classifier(args.then, device), threshold)
    names = classifier.label_names
    top_k = args.top_k and min(args.top_k, len(names))
    found = results(classifier, rows, top_k, progress=bool(args.out) or not sys.stdout.isatty())
    flat = flat_rows(rows, found, top_k)
    with written_aside(args.out) if args.out else contextlib.nullcontext() as aside:
        if output_format == "parquet":
            write_parquet(flat, aside)
        else:
            lines = {"table": table_lines(found, names, top_k), "jsonl": json_lines(found), "csv": csv_lines(flat)}
            # JSON can escape half of a character, which UTF-8 cannot write: it is escaped again.
            escaped = {"encoding": "utf-8", "errors": "backslashreplace"}
            with aside.open("w", **escaped) if aside else contextlib.nullcontext() as file:
                for line in lines[output_format]:
                    print(line, file=file)
    if args.out:
        print(f"predictions: {args.out}")
    if args.then:
        deferred = f"{classifier.num_deferred:,} of {len(rows):,} texts were deferred to {args.then}"
        print(f"{deferred}, with a confidence of at most {threshold:.3f}", file=sys.stderr)


# `python -m minicls evaluate`.


@dataclass(frozen=True)
class EvaluateSettings(DataSettings):
    """Settings of a test. Where a help text names a default, an unset one is that of the model's training, if any."""

    model: str | None = setting(None, "run directory, model directory or hub id", group="model")
    prompt: str | None = setting(None, "another question for a language model; as in train_qwen.py")
    normalize: str | None = setting(None, "mean or sum, as in train_qwen.py; default mean", choices=("mean", "sum"))
    max_length: int | None = setting(None, "maximum tokens per row; default 512", minimum=3)
    data: str | None = setting(None, "hub id, directory, or synthetic; unset: test a run's checkpoints", group="data")
    output_dir: str | None = setting(None, "run directory, new or empty; unset: runs/evaluate-<time>", group="machine")
    dtype: str | None = setting(None, "bf16 or fp32; default fp32", choices=("bf16", "fp32"))


def evaluate(argv: list[str]) -> None:
    """Writes results.json and predictions.parquet into a new run directory or, for checkpoints, into their run."""
    argv = ["--model", *argv] if argv and not argv[0].startswith("-") else argv
    description = "Test a model as it is, or every checkpoint of a run."
    s = parse(EvaluateSettings, argv, description, "python -m minicls evaluate")
    if s.model is None:
        raise UserError("MODEL: none given; name a run directory, a model directory or a hub id")
    directory, revision = weights.find_model(s.model)
    if s.data is None and (directory / "run.json").is_file():
        evaluate_checkpoints(directory, s)
    else:
        evaluate_model(directory, revision, s)
    dist.stop()


def evaluate_model(directory: Path, revision: str | None, s: EvaluateSettings) -> None:
    """Tests a model as it is. The result is a run without a step."""
    trained = checkpoint.info_of_model(directory)
    s = dataclasses.replace(s, data=s.data or trained["settings"].get("data") or DataSettings.data)
    device = dist.start(s.device, s.threads)
    if dist.is_first():
        checkpoint.check_output_dir(s.output_dir)
    data = load_splits(s)
    asked = checkpoint.inference_settings(directory)
    max_length = s.max_length or (None if "max_length" in asked else 512)
    classifier = Classifier(directory, device, max_length=max_length, classes=data.label_names, prompt=s.prompt)
    if classifier.label_names != [*data.label_names]:
        classes = ", ".join(data.label_names)[:80]
        remedy = "train it on them, or give its own names with --label-names"
        raise UserError(f"--data: {s.model} was not trained on its classes, {classes}; {remedy}")
    for name in ("prompt", "normalize") if classifier.architecture is not weights.DECODER else ():
        if getattr(s, name):
            raise UserError(f"{flag_of(name)}: {s.model} does not answer with options; leave the flag out")
    logits_of, inference = _scorer(classifier, data), classifier.settings
    inference |= {name: getattr(s, name) for name in ("normalize", "dtype") if getattr(s, name)}
    run_dir = checkpoint.new_run_dir(s.output_dir, "evaluate") if dist.is_first() else None
    if run_dir:
        head = "options" if classifier.architecture is weights.DECODER else "linear"
        settings = {"head": head, "max_length": classifier.max_length, "dtype": inference.get("dtype", "fp32")}
        details = {"model_type": classifier.config["model_type"], "total_steps": 0, "revision": revision}
        details |= {"num_train_rows": trained.get("num_train_rows", 0)}
        details |= classifier.chat.to_dict() if classifier.chat else {}
        checkpoint.write_run_info(run_dir, "evaluate", dataclasses.asdict(s) | settings, device, data, details)
    logger, state = Logger(run_dir, 0, 0), checkpoint.new_state()
    logger.print(*describe(data))
    if classifier.chat and asked.get("template") not in (None, [*classifier.chat.template]):
        logger.print("note: the model is asked another question than in training, by other classes or --prompt")
    logits = checkpoint.evaluate(data.eval_splits, logits_of, state, logger)
    logger.close()
    if run_dir:
        print(plots.finish(run_dir, data, classifier.tokenizer, logits, state, device))


def evaluate_checkpoints(run_dir: Path, s: EvaluateSettings) -> None:
    """Tests every checkpoint of a run, and makes the best on validation, else the last, the headline."""
    for field in dataclasses.fields(s):
        if field.name not in ("model", "device", "threads") and getattr(s, field.name) != field.default:
            problem = "a run's checkpoints are tested with the run's own settings"
            remedy = "leave the flag out, or name --data to test the model as it is"
            raise UserError(f"{flag_of(field.name)}: {problem}; {remedy}")
    run = checkpoint.open_run(run_dir)
    if not run.newest:
        check_trained(run_dir)
        raise UserError(f"{run_dir}: this run has no complete checkpoint; continue it first, with --resume {run_dir}")
    device = dist.start(s.device, s.threads)
    with checkpoint.lock(run_dir) if dist.is_first() else contextlib.nullcontext():
        settings = SimpleNamespace(**run.info["settings"])  # among them those of the data
        data = load_splits(settings, run.info["data_revision"])
        run.check_data(data)
        classifier, saved, logits = Classifier(run.newest, device), checkpoint.checkpoints(run_dir), {}
        logits_of = _scorer(classifier, data)
        state = read_json(run.newest / "resume" / "state.json", "delete this checkpoint", step=int)
        state |= {"eval_seconds": 0.0, "evaluations": 0, "best_on_validation": None}
        remedy = "--model: test it with --data and --dtype fp32"
        total_steps = run.info["total_steps"]
        logger = Logger(run_dir if dist.is_first() else None, total_steps, total_steps)  # all events stay in the log
        for state["step"], directory in saved.items():
            weights.load_weights(classifier.model, directory, classifier.architecture)
            logits[state["step"]] = checkpoint.evaluate(data.eval_splits, logits_of, state, logger, remedy)
        logger.close()
        if state["step"] < total_steps and not state.get("stopped_early"):
            reached = f"this run stands at step {state['step']} of {total_steps}"
            logger.print(f"note: {reached}; --resume {run_dir} continues it")
        if dist.is_first():
            step = checkpoint.headline_step(state)
            for file in filter(Path.is_file, saved[step].iterdir()):
                with written_aside(run_dir / file.name) as aside:
                    shutil.copyfile(file, aside)
            print(plots.finish(run_dir, data, classifier.tokenizer, logits[step], state, device))


def _scorer(classifier: Classifier, data: Data) -> Callable[[str], torch.Tensor]:
    """Scores a split by its name. The texts are tokenized here, once for all checkpoints."""
    rows = {name: classifier.rows(split.texts) for name, split in data.eval_splits.items()}
    return lambda name: classifier.score_rows(rows[name])

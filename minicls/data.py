"""Texts and labels from the hub, from local parquet, CSV or JSON files, or synthetic; and the choice of rows.

A data set has a train split, a test split and possibly a validation split; its files lie in its directory or in
`data/`. Texts are used verbatim. Every choice of rows is a pure function of the texts or of (seed, epoch), so that a
run can be repeated, resumed at any step, and compared with another.
"""

import codecs
import contextlib
import csv
import dataclasses
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minicls import tiny
from minicls.config import DataSettings, UserError, flag_of

AG_NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")
# The first words of file names, as in `datasets`, except "eval" and "evaluation": they can mean either split.
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev"),
}
TEXT_FORMATS = ("csv", "tsv", "jsonl", "json")
FORMATS = ("parquet", *TEXT_FORMATS, *(f"{name}.gz" for name in TEXT_FORMATS))  # the ends of file names
UNREAD_FORMATS = {
    "xlsx xls ods": "a spreadsheet; save it as CSV in UTF-8",
    "txt": "no columns; write a CSV with a header",
    "zip bz2 xz zst tar tgz 7z gz": "packed; unpack it",
    "arrow feather": "write it as parquet",
    "pkl pickle pt": "nothing is unpickled; write it as parquet",
}
FOR_PREDICT = "texts without labels are for `python -m minicls predict`: move the file away"


@dataclass(frozen=True)
class Split:
    """n texts, their class indices (n,) int64, and the index of each row in its split's files, (n,) int64.

    soft_labels: (n, C) float64, see distill.py.
    """

    texts: list[str]
    labels: np.ndarray
    rows: np.ndarray
    soft_labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: np.ndarray) -> "Split":
        return Split([self.texts[row] for row in rows], self.labels[rows], self.rows[rows])

    def fingerprint(self) -> str:
        """SHA-256 over the labelled texts and their labels, in their order: equal if two runs saw the same rows."""
        digest = hashlib.sha256()
        for text, label, row in zip(self.texts, self.labels, self.rows, strict=True):
            if row >= 0:  # not a text that came with the soft labels
                encoded = text.encode()
                digest.update(b"%d %d " % (label, len(encoded)) + encoded)
        return digest.hexdigest()


@dataclass(frozen=True)
class Data:
    train: Split
    test: Split
    label_names: tuple[str, ...]
    revision: str | None = None  # the hub commit, for data from the hub
    validation: Split | None = None  # from files, or held out by `split_data`
    sources: tuple[str, ...] = ()  # lines that say which files were read and which were not
    held_out_texts: frozenset[str] = frozenset()  # texts of all validation and test rows, before `split_data` cuts them

    @property
    def eval_splits(self) -> dict[str, Split]:
        """The splits that are scored: validation, if there are such rows, and test."""
        return ({"validation": self.validation} if self.validation else {}) | {"test": self.test}

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train} | self.eval_splits

    def fingerprint(self) -> dict[str, str]:
        """A digest of each split, of the class names in their order, and of the soft labels if there are any."""
        digests = {name: split.fingerprint() for name, split in self.splits.items()}
        if self.train.soft_labels is not None:
            texts = json.dumps(self.train.texts).encode()
            digests["soft_labels"] = hashlib.sha256(texts + self.train.soft_labels.tobytes()).hexdigest()
        return digests | {"label_names": hashlib.sha256(json.dumps(self.label_names).encode()).hexdigest()}

    def differences(self, fingerprint: dict[str, str]) -> list[str]:
        """The digests in which this data differs from a run's saved fingerprint.

        Soft labels count only where this data has some: a test needs none.
        """
        digests = self.fingerprint()
        names = sorted(digests.keys() | fingerprint.keys() - {"soft_labels"})
        return [name for name in names if digests.get(name) != fingerprint.get(name)]


def load_data(
    data: str,
    text_column: str = "text",
    label_column: str = "label",
    label_names: Sequence[str] | None = None,
    revision: str | None = None,
    test_size: float = 0,
) -> Data:
    """Reads `--data`: `synthetic`, a directory, or a hub id. Raises UserError for anything that a user can fix.

    Class names come from `label_names`, else from labels.txt, else from the parquet metadata or the dataset card; else
    they are the training labels, sorted. Labels are class names or class indices. If there is no test split,
    `test_size` training rows (below 1: a fraction of them) become one.
    """
    if data == "synthetic":
        given = {"test_size": test_size, "label_names": label_names}
        given |= {"text_column": text_column != "text", "label_column": label_column != "label"}
        for name in filter(given.get, given):
            problem = "the synthetic texts have columns, classes and a test split of their own"
            raise UserError(f"{flag_of(name)}: {problem}; leave the flag out")
        return synthetic()
    directory, revision = find_data(data, revision)
    card = _Card(directory / "README.md")
    files, unread = _split_files(directory, card)
    if "test" in files and test_size:
        name = files["test"][0].name
        raise UserError(f"--test-size: {directory} has a test split ({name}); leave the flag out, or move it away")
    for split in ("train",) if test_size else ("train", "test"):
        if split not in files:
            names = f"a file such as {split}.csv, .tsv, .jsonl, .json or .parquet, here or in data/"
            skipped = f", not counted: {unread}" if unread else ""
            hint = ", or hold rows out of the training split with --test-size 0.2" if split == "test" else ""
            raise UserError(f"{directory}: no {split} split ({names}){skipped}; add one{hint}")
    rows = {split: _read_split(split, paths, text_column, label_column) for split, paths in files.items()}
    names, class_of = _classes(card, [*itertools.chain(*files.values())], rows, label_column, label_names)
    splits, sources = {}, []
    for split, paths in files.items():
        splits[split] = _as_split(split, rows[split], names, class_of)
        counts = Counter(row.file for row in rows[split])
        read = [f"{file.relative_to(directory)} ({counts[file]:,} rows)" for file in paths]
        sources.append(f"{split}: {', '.join(read)}")
    sources += [f"not read: {unread}"] if unread else []
    sources += [f"warning: {line}" for split_rows in rows.values() for line in _repeated_between_files(split_rows)]
    if test_size:
        splits["test"], splits["train"] = _hold_out("--test-size", splits["train"], test_size)
        sources.append(f"test: {len(splits['test']):,} of the training rows, held out by --test-size")
    return Data(splits["train"], splits["test"], names, revision, splits.get("validation"), tuple(sources))


def local_path(name: str) -> Path:
    """The path that a user gave, with ~ expanded."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 - Path's method raises if it does not know the user


def find_data(data: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The directory of a data set, downloaded from the hub (at `revision`) if it is not local, and its hub commit."""
    path = local_path(data)
    if path.is_dir():
        return path, None
    if path.is_file():
        raise UserError(f"--data: {data} is a file; pass the directory that holds it, --data {path.parent}")
    directory, revision = download("--data", data, "dataset", ["README.md", "labels.txt"], revision)
    card = _Card(directory / "README.md")
    patterns = [pattern for split in card.data_files.values() for pattern in split]
    if not patterns:
        words = [f"{folder}{word}" for folder in ("", "data/") for words in SPLITS.values() for word in words]
        patterns = [f"{word}[-._ 0-9]*{suffix}" for word in words for suffix in FORMATS]
    return download("--data", data, "dataset", [card.folder + pattern for pattern in patterns], revision)


def download(flag: str, name: str, repo_type: str, patterns: list[str], revision: str | None) -> tuple[Path, str]:
    """Fetches files of a hub repository into huggingface-hub's cache; returns the snapshot's directory and commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{flag}: no directory {name}; pass an existing directory or a hub id such as org/name")
    try:
        path = Path(snapshot_download(name, repo_type=repo_type, allow_patterns=patterns, revision=revision))
    except (RepositoryNotFoundError, HFValidationError):
        problem = f"{name} is neither a directory here nor a {repo_type} on the hub"
        raise UserError(f"{flag}: {problem}; check the name") from None
    except Exception as error:  # the errors of the hub client, its HTTP library and the system share no base class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
        problem = f"there is no directory {name} here, and the hub did not give it ({reason})"
        remedy = "check the path or the network, or download it elsewhere and pass its directory"
        raise UserError(f"{flag}: {problem}; {remedy}: {flag} DIR") from None
    return path, path.name  # the cache names a snapshot's directory by its commit


# The files of each split.


def _format(file: Path) -> str | None:
    """The one of FORMATS in which the file name ends, in upper or lower case."""
    return next((name for name in FORMATS if file.name.lower().endswith(f".{name}")), None)


def _split_of(name: str) -> str | None:
    """The split that a file name's first word stands for. A word ends at - . _ a space or a digit, as in `datasets`."""
    word = re.match(r"[a-z]+(?=[-._ 0-9])", name.lower())
    return next((split for split, words in SPLITS.items() if word and word[0] in words), None)


def _why_unread(file: Path, needs_split: bool = False) -> str | None:
    """Why a file cannot be read or, by its name, belongs to no split; None if it can, and does."""
    if file.is_dir():
        return "a folder"
    if needs_split and re.match(r"eval(uation)?[-._ 0-9]", file.name.lower()):
        return "may be test or validation; rename it"
    if needs_split and _split_of(file.name) is None:
        return "its name begins with none of train, test, validation"
    reasons = {suffix: reason for suffixes, reason in UNREAD_FORMATS.items() for suffix in suffixes.split()}
    default = "none of .parquet, .csv, .tsv, .jsonl, .json"
    return None if _format(file) else reasons.get(file.suffix.lower().removeprefix("."), default)


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _split_files(directory: Path, card: "_Card") -> tuple[dict[str, list[Path]], str]:
    """The files of each split, by the card's data_files or else by name; and the others, with the reasons."""
    root, files, unread = directory / card.folder, {split: [] for split in SPLITS}, defaultdict(list)
    for split, patterns in card.data_files.items():
        # Path.glob would take "data/**" for folders only.
        names = itertools.chain(*(glob.glob(path, root_dir=root, recursive=True) for path in patterns))  # noqa: PTH207
        files[split] = sorted(file for file in {root / name for name in names} if file.is_file() and _format(file))
        if not files[split]:
            problem = f"no readable file matches its data_files for the {split} split, {card.folder}{patterns[0]}"
            raise UserError(f"{card.file}: {problem}; restore the files, or remove data_files from README.md")
    by_card = {*itertools.chain(*files.values())}
    for file in [file for folder in (root, root / "data") if folder.is_dir() for file in sorted(folder.iterdir())]:
        if file.name.startswith(".") or file.name in ("README.md", "labels.txt") or file in by_card:
            continue
        if file.is_dir() and (file.name == "data" or card.data_files):
            continue
        reason = "README.md's data_files do not name it" if card.data_files else _why_unread(file, needs_split=True)
        if reason:
            unread[reason].append(str(file.relative_to(directory)))
        else:
            files[_split_of(file.name)].append(file)
    for split, paths in files.items():
        # train.csv and Train.csv, or dev.csv and validation.csv, are versions of a split rather than parts of it.
        versions = {(file.parent, re.match("[A-Za-z]*", file.name)[0], _format(file)) for file in paths}
        if len(versions) > 1 and not card.data_files:
            problem = f"{paths[0].name} and {paths[-1].name} both hold {split} rows"
            raise UserError(f"{directory}: {problem}; keep one kind of file in one place")
    reasons = [f"{_shortened(names)} ({reason})" for reason, names in unread.items()]
    return {split: paths for split, paths in files.items() if paths}, ", ".join(reasons)


class _Card:
    """A dataset card: the YAML head of README.md, read as `datasets` reads it.

    One difference: a value is the text in the file, so that `no` can be a class name, not False.
    """

    def __init__(self, file: Path):
        """Finds the default config and its files, but not yet the class names: another source may have them."""
        import yaml

        text = _read_text(file) if file.is_file() else ""
        match = re.match(r"\s*---[ \t]*\r?\n(.*?)\n---[ \t]*\r?(\n|$)", text, re.DOTALL)
        try:
            head = yaml.load(match[1], yaml.BaseLoader) if match else {}
        except yaml.YAMLError as error:
            head = {}
            if re.search("class_label|data_files", match[1]):  # minicls reads nothing else from it
                raise UserError(f"{file}: its head is not valid YAML ({error}); fix it") from None
        self.file, self.head = file, head if isinstance(head, dict) else {}
        self.config = self._default_config()
        self.folder, self.data_files = self._find_files()

    def _mappings(self, parent: dict, key: str) -> list[dict]:
        """The list of mappings under `key`; dataset_info may be a single one."""
        entries = parent.get(key) or []
        entries = [entries] if isinstance(entries, dict) and key == "dataset_info" else entries
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{self.file}: {key} is not a list of mappings, as `datasets` writes it; fix it")
        return entries

    def _default_config(self) -> dict:
        """The config that `datasets` loads by default: the only one, or the one called or marked default; else {}."""
        configs, true = self._mappings(self.head, "configs"), ("true", "yes", "on")
        marked = [c for c in configs if c.get("config_name") == "default" or str(c.get("default")).lower() in true]
        if len(configs) > 1 and len(marked) > 1:
            names = " and ".join(str(config.get("config_name")) for config in marked)
            raise UserError(f"{self.file}: {names} are both the default config; keep one")
        return (configs if len(configs) == 1 else marked or [{}])[0]

    def _find_files(self) -> tuple[str, dict[str, list[str]]]:
        """The folder of the default config, "" or with a slash at its end; and the patterns of each split's files."""
        folder, files = self.config.get("data_dir") or "", self.config.get("data_files") or {}
        if isinstance(files, str) or (isinstance(files, list) and all(isinstance(path, str) for path in files)):
            files = {"train": files}
        patterns = {}
        try:
            for name, paths in files.items() if isinstance(files, dict) else [(x["split"], x["path"]) for x in files]:
                split = _split_of(f"{name}.") or name
                if split in patterns:
                    raise UserError(f"{self.file}: its data_files name the {split} split twice; keep one entry")
                paths = [paths] if isinstance(paths, str) else paths
                patterns[split] = [re.sub(r"^(\./)+", "", path) for path in paths]
            folder = f"{folder.strip('/').removeprefix('./')}/" if folder.strip("./") else ""
        except (AttributeError, KeyError, TypeError):
            raise UserError(f"{self.file}: its data_files are not as `datasets` writes them; fix them") from None
        patterns = {split: patterns[split] for split in SPLITS if split in patterns}
        for path in [folder, *itertools.chain(*patterns.values())]:
            if "://" in path or ".." in path or path.startswith("/"):
                problem = f"its data_files name {path}, which is outside the data set"
                raise UserError(f"{self.file}: {problem}; download it and fix README.md")
        return folder, patterns

    def class_names(self, label_column: str) -> dict[tuple[str, ...] | None, str]:
        """{class names or None: where they are declared}, of the default config or, without one, of every config."""
        infos = self._mappings(self.head, "dataset_info")
        has_default = self.config or any(info.get("config_name") == "default" for info in infos)
        if has_default and not (len(infos) == 1 and "config_name" not in infos[0]):
            name = self.config.get("config_name", "default")
            infos = [info for info in infos if info.get("config_name", "default") == name]
        sources = {}
        for info in infos:
            place = f"{self.file}, config {info.get('config_name', 'default')}"
            types = {str(feature.get("name")): feature.get("dtype") for feature in self._mappings(info, "features")}
            dtype, names = types.get(label_column), None
            if isinstance(dtype, dict) and "class_label" in dtype:
                label = dtype["class_label"]
                names = _checked_names(label.get("names") if isinstance(label, dict) else None, place)
            sources[names] = place
        return sources


# Rows: read from files, their labels turned into class indices.


class _Row(NamedTuple):
    text: str
    label: str
    file: Path
    place: str  # the file and the line, for error messages


def _read_split(split: str, files: list[Path], text_column: str, label_column: str) -> list[_Row]:
    # The flag ends the message about a missing column, so the advice for unlabelled files goes with it.
    label_flag = "--label-column" if split == "train" else f"--label-column; {FOR_PREDICT}"
    rows = [
        _Row(checked_text(row[text_column], place), _label_text(row[label_column], place), file, place)
        for file in files
        for place, row in _read_file(file, {text_column: "--text-column", label_column: label_flag})
    ]
    if not rows:
        raise UserError(f"{files[0]}: no rows; put at least one {split} row in it")
    if split != "train" and not any(row.label for row in rows):
        raise UserError(f"{rows[0].place}: no {split} row has a label; {FOR_PREDICT}")
    if empty := next((row for row in rows if not row.label), None):
        raise UserError(f"{empty.place}: the label is empty; give every row a label or drop the row")
    return rows


def _label_text(label, place: str) -> str:
    """A label as text; "" if it is missing. In a column with a missing value, pandas writes 3 as 3.0: both are "3"."""
    if label is None or label != label or (isinstance(label, str) and not label.strip()):  # missing may be NaN
        return ""
    if not isinstance(label, (str, int, float)) or label in (math.inf, -math.inf):
        raise UserError(f"{place}: label {label!r} is neither a class name nor an index; fix the row")
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _repeated_between_files(rows: list[_Row]) -> list[str]:
    """A line for each file of a split that repeats texts of an earlier one. Raises UserError if it must be a copy."""
    lines, first_file, distinct = [], {}, {}
    for file, rows_of_file in itertools.groupby(rows, key=lambda row: row.file):
        texts = {row.text for row in rows_of_file}
        distinct[file] = len(texts)
        for other, repeated in Counter(first_file[text] for text in texts if text in first_file).items():
            line = f"{repeated:,} of the {len(texts):,} texts in {file.name} are also in {other.name}"
            if 2 * repeated >= min(len(texts), distinct[other]):
                raise UserError(f"{file}: {line}, and both would be read; if one is a copy of the other, move it away")
            lines.append(line)
        first_file = dict.fromkeys(texts, file) | first_file
    return lines


def _classes(
    card: _Card, files: list[Path], rows: dict[str, list[_Row]], label_column: str, label_names: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, int]]:
    """The class names, from the first source that has them, and the class index of each label that has one."""
    labels_file = card.file.with_name("labels.txt")
    if label_names is not None:
        sources = {tuple(label_names): "--label-names"}
    elif labels_file.is_file():
        sources = {tuple(line.rstrip() for line in lines_of(_read_text(labels_file).rstrip())): labels_file}
    else:
        sources = _parquet_names(files, label_column) or card.class_names(label_column)
    if len(sources) > 1:
        first, second, *_ = sources.values()
        raise UserError(f"{first} and {second} do not have the same class names; pass --label-names or labels.txt")
    names, source = next(iter(sources.items()), (None, None))
    if names is None:
        labels = {row.label for row in rows["train"]}
        numeric = all(_as_index(label) is not None for label in labels)
        names = tuple(sorted(labels, key=lambda label: (_as_index(label), label) if numeric else label))
        if len(names) == 1:
            problem = f"the training labels, column {label_column!r}, are all {names[0]!r}"
            raise UserError(f"{labels_file.parent}: {problem}; a classifier needs two classes or more, add another one")
        return names, {name: i for i, name in enumerate(names)}
    if len(names) < 2 or len(names) != len(set(names)) or "" in names:
        raise UserError(f"{source}: {' '.join(names)!r} are not two or more different names; pass one for each class")
    return names, _class_index(names, {row.label for split_rows in rows.values() for row in split_rows})


def _parquet_names(files: list[Path], label_column: str) -> dict[tuple[str, ...], Path]:
    """The class names in the metadata that `datasets` writes into its parquet files, and a file that has them."""
    import pyarrow.parquet as pq

    sources = {}
    for file in [file for file in files if _format(file) == "parquet"]:
        try:
            feature = json.loads(pq.read_schema(file).metadata[b"huggingface"])["info"]["features"][label_column]
        except (ValueError, KeyError, TypeError):
            continue  # no metadata, metadata of another form, or without this column
        if isinstance(feature, dict) and "names" in feature:
            sources[_checked_names(feature["names"], file)] = file
    return sources


def _checked_names(names, place: str | Path) -> tuple[str, ...]:
    """Class names from a list or a mapping of 0, 1, 2 ... to names: `datasets` writes either."""
    if isinstance(names, dict):
        names = [names.get(str(i)) for i in range(len(names))]
        if None in names:
            problem = f"its class names have none for index {names.index(None)} of {len(names)}"
            raise UserError(f"{place}: {problem}; number them from 0 on")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problem = "its class names are neither a list of names nor names by index"
        raise UserError(f"{place}: {problem}; fix them, or pass --label-names")
    return tuple(names)


def _class_index(names: Sequence[str], labels: set[str]) -> dict[str, int]:
    """The class index of each label that is the name or the index of a class.

    Names come before indices. If a name could be an index, the whole data set is read in one way: if the names are
    1 2 3 4, label 1 is the first class, unless a label 0 shows that the labels are indices.
    """
    index, by_name, by_index = {name: i for i, name in enumerate(names)}, {}, {}
    for label in labels:
        number = _as_index(label)
        name = label if label in index or number is None else str(number)  # 007 may be class 7
        if name in index:
            by_name[label] = index[name]
        if number is not None and number < len(names):
            by_index[label] = number
    if index.keys().isdisjoint(map(str, range(len(names)))):
        return by_index | by_name
    return by_index if len(by_name) < len(by_index) == len(labels) else by_name


def _as_index(label: str) -> int | None:
    return int(label) if re.fullmatch(r"\d+", label, re.ASCII) else None


def _as_split(split: str, rows: list[_Row], names: tuple[str, ...], class_of: dict[str, int]) -> Split:
    if wrong := next((row for row in rows if row.label not in class_of), None):
        unlabelled = split != "train" and all(row.label == "-1" for row in rows)  # as `datasets` writes it
        remedy = FOR_PREDICT if unlabelled else "fix the row, labels.txt or --label-names"
        problem = f"label {wrong.label!r} is none of the {len(names)} classes ({', '.join(names)[:80]})"
        raise UserError(f"{wrong.place}: {problem}; {remedy}")
    labels = np.array([class_of[row.label] for row in rows], np.int64)
    return Split([row.text for row in rows], labels, np.arange(len(rows)))


# Files of one format each.


def read_rows(file: Path, text_column: str) -> list[tuple[str, dict]]:
    """The texts of one file, with or without labels, each with all columns of its row.

    A .txt file, or a file without a suffix, holds one text per line. Raises UserError for any other format, and if the
    column or a text is missing.
    """
    if _format(file):
        rows = _read_file(file, {text_column: "--text-column"}, whole=True)
        return [(checked_text(row[text_column], place), row) for place, row in rows]
    if file.is_dir() or file.suffix.lower() not in ("", ".txt"):
        formats = ".parquet, .csv, .tsv, .jsonl, .json, or .txt with one text per line"
        raise UserError(f"{file}: {_why_unread(file)}; pass {formats}")
    return [(text, {"text": text}) for text in lines_of(_read_text(file))]


def lines_of(text: str) -> list[str]:
    """The lines, ended by LF or CR LF. str.splitlines would also end them at U+2028, form feeds and the like."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def checked_text(text, place: str) -> str:
    """Returns the text. Raises UserError if a tokenizer would reject it."""
    if not isinstance(text, str):
        raise UserError(f"{place}: the text is {text!r}; fix the row, or name another column with --text-column")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a character
        raise UserError(f"{place}: the text is not valid Unicode ({error.reason}); fix the row") from None
    return text


def _read_file(file: Path, columns: dict[str, str], whole: bool = False) -> Iterator[tuple[str, dict]]:
    """Yields (place, row) for each row of a file of FORMATS.

    `columns` maps the columns that a row must have to the flags that chose them. `whole`: with all others as well.
    """
    if _format(file) == "parquet":
        return _read_parquet(file, columns, whole)
    return (_read_json if "json" in _format(file) else _read_csv)(file, _read_text(file), columns)


def _check_columns(place: str | Path, names: list[str], columns: dict[str, str], hint: str = "") -> None:
    """Raises UserError for a column that is missing or occurs twice; `hint` is added if all are missing."""
    if not names:
        raise UserError(f"{place}: empty; write a header and rows")
    for name, flag in columns.items():
        if name not in names:
            shown = ", ".join(column if column == column.strip() else repr(column) for column in names)[:120]
            hint = "" if columns.keys() & {*names} else hint
            raise UserError(f"{place}: no column {name!r} among {shown}; {hint}name the right one with {flag}")
        if names.count(name) > 1:
            raise UserError(f"{place}: {names.count(name)} columns are called {name!r}; rename all but one")


def _read_parquet(file: Path, columns: dict[str, str], whole: bool) -> Iterator[tuple[str, dict]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
        _check_columns(file, parquet.schema_arrow.names, columns)
        table = parquet.read(columns=None if whole else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]}); write it again") from None
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError:
        for number in range(len(table)):
            try:
                table.slice(number, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise UserError(f"{file}, row {number}: not UTF-8 ({error.reason}); convert the file") from None
        raise
    for number, row in enumerate(rows):
        yield f"{file}, row {number}", row


def _read_csv(file: Path, text: str, columns: dict[str, str]) -> Iterator[tuple[str, dict]]:
    csv.field_size_limit(1 << 30)  # the default refuses articles above 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_separator(file, text, columns), strict=True)
    place = f"{file}, line 1"  # where the current row begins; it may take several lines
    try:
        header = next(reader, [])
        _check_columns(file, header, columns, "the first line must name the columns: write such a header, or ")
        place = f"{file}, line {reader.line_num + 1}"
        for row in reader:
            if row and len(row) != len(header):  # an empty line is not a row
                raise UserError(f"{place}: {len(row)} fields, the header has {len(header)}; fix or quote the row")
            if row:
                yield place, dict(zip(header, row, strict=True))
            place = f"{file}, line {reader.line_num + 1}"
    except csv.Error as error:
        raise UserError(f"{place}: not valid CSV ({error}); fix or quote the row") from None


def _separator(file: Path, text: str, columns: dict[str, str]) -> str:
    """The comma, semicolon or tab that separates the wanted columns in the header."""
    headers = {
        separator: next(csv.reader(io.StringIO(text[:100_000], newline=""), delimiter=separator), [])
        for separator in ("\t,;" if _format(file).startswith("tsv") else ",;\t")
    }
    fitting = [separator for separator, header in headers.items() if columns.keys() <= {*header}]
    if len({tuple(headers[separator]) for separator in fitting}) > 1:
        problem = f"its columns may be separated by {' and '.join(map(repr, fitting))}"
        raise UserError(f"{file}: {problem}; keep one of them in the header, or quote the names")
    return fitting[0] if fitting else max(headers, key=lambda separator: len(headers[separator]))


def _read_json(file: Path, text: str, columns: dict[str, str]) -> Iterator[tuple[str, dict]]:
    """JSON lines. A .json file may hold one array of objects instead, as pandas' `orient="records"` writes it."""
    is_array, is_jsonl = text.lstrip().startswith("["), _format(file).startswith("jsonl")
    if is_array and is_jsonl:
        raise UserError(f"{file}: a JSON array; name it .json, or write one object a line")
    place, unit = str(file), "item" if is_array else "line"
    try:
        items = json.loads(text) if is_array else text.split("\n")  # JSON allows U+2028 inside strings
        for number, item in enumerate(items, start=1):
            place = f"{file}, {unit} {number}"
            if is_array or item.strip():
                row = item if is_array else json.loads(item)
                if not isinstance(row, dict):
                    raise UserError(f"{place}: not a JSON object; write one object per {unit}")
                _check_columns(place, list(row), columns)
                yield place, row
    except ValueError as error:
        remedy = "fix the row" if is_array or is_jsonl else "fix the row, or write an array of objects"
        raise UserError(f"{place}: not valid JSON ({error}); {remedy}") from None


def _read_text(file: Path) -> str:
    """The text of a UTF-8 file, unpacked if it is gzip. Raises UserError that says how to convert another encoding."""
    content = file.read_bytes()
    for magic, format in ((b"PAR1", "a parquet file"), (b"PK\3\4", "a zip archive or a spreadsheet")):
        if content.startswith(magic):
            raise UserError(f"{file}: it holds {format}, not text; give it the suffix of its format, or save it as CSV")
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{file}: not a readable gzip file ({error}); write it again") from None
    line, encoding = 1, _utf_16_or_32(content)
    if encoding is None:
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line, encoding = content[: error.start].count(b"\n") + 1, _likely_encoding(content)
    if encoding == "UTF-8":
        raise UserError(f"{file}, line {line}: not UTF-8, though most of the file is; fix or drop the row")
    source = f"most likely {encoding}; " if encoding else "a text editor shows the encoding, E; "
    name = shlex.quote(str(file.with_suffix("") if file.suffix == ".gz" else file))
    unpack = f"gunzip {shlex.quote(str(file))} && " if file.suffix == ".gz" else ""
    convert = f"{unpack}iconv -f {encoding or 'E'} -t UTF-8 {name} > utf8 && mv utf8 {name}"
    raise UserError(f"{file}, line {line}: not UTF-8; {source}convert it: {convert}")


def _utf_16_or_32(content: bytes) -> str | None:
    """iconv's name for UTF-16 or UTF-32, if a byte order mark or the many zero bytes (UTF-16) show it; else None."""
    marks = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
    sample = content[: 1 << 16]
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    by_zeros = "UTF-16LE" if odd > even else "UTF-16BE"
    default = by_zeros if even + odd > max(4, len(sample) / 100) else None
    return next((name for mark, name in marks.items() if content.startswith(mark)), default)


def _likely_encoding(content: bytes) -> str | None:
    """iconv's name for the encoding of bytes that are not UTF-8; UTF-8 if only a few are not; None if nothing fits."""
    replaced = content.decode("utf-8", "replace")
    if sum(character > "\x7f" for character in replaced) > 2 * replaced.count("\ufffd"):
        return "UTF-8"
    runs = re.findall(rb"[\x80-\xff]+", content)
    high = sum(map(len, runs))
    pairs = len(re.findall(rb"[\xa1-\xf7][\xa1-\xfe]", content))  # GB 2312, which covers nearly all Chinese text
    # In WINDOWS-1252, letters with accents are mostly single, between plain ones.
    for encoding, plausible in (("GB18030", 2 * pairs > 0.8 * high), ("WINDOWS-1252", high < 2 * len(runs))):
        with contextlib.suppress(UnicodeDecodeError):
            if plausible and content.decode(encoding):
                return encoding
    return None


# The choice of rows, and the lines about them at the start of a run.


def synthetic(num_train: int = 4000, num_test: int = 1000) -> Data:
    """`--data synthetic`: see `tiny.synthetic_texts`."""
    texts, labels = tiny.synthetic_texts(num_train + num_test)
    labels = np.array(labels, np.int64)
    train = Split(texts[:num_train], labels[:num_train], np.arange(num_train))
    test = Split(texts[num_train:], labels[num_train:], np.arange(num_test))
    return Data(train, test, AG_NEWS_LABELS, sources=("synthetic texts",))


def stratified_rows(split: Split, size: int, seed: int | None = None) -> np.ndarray:
    """`size` rows, ascending, with the classes in the split's own proportions, chosen by a hash of their texts.

    Without a seed, the choice depends on the texts alone, not on the order of the file; each seed gives another sample.
    A smaller choice is part of a larger one of the same seed, up to one row per class.
    """
    salt = b"" if seed is None else b"%d " % seed
    shares = np.bincount(split.labels) * size / len(split)
    quotas = np.floor(shares).astype(int)
    largest_remainders = np.argsort(quotas - shares, kind="stable")
    quotas[largest_remainders[: size - quotas.sum()]] += 1
    rows = []
    for label, quota in enumerate(quotas):
        members = np.flatnonzero(split.labels == label)
        keys = {row: hashlib.sha256(salt + split.texts[row].encode()).digest() for row in members}
        rows += sorted(members, key=keys.__getitem__)[:quota]
    return np.sort(np.array(rows, np.int64))


def _hold_out(flag: str, split: Split, size: float) -> tuple[Split, Split]:
    """A stratified sample of `size` rows (below 1: a fraction, rounded up), and the rest."""
    if size >= 1 and size != int(size):
        raise UserError(f"{flag}: {size} is not a whole number of rows; pass one, or a fraction below 1")
    num_rows = int(size) if size >= 1 else math.ceil(round(size * len(split), 6))  # 0.07 * 100 is a little more than 7
    if num_rows >= len(split):
        raise UserError(f"{flag}: {num_rows} leaves none of the {len(split)} training rows; pass less")
    rows = stratified_rows(split, num_rows)
    return split.select(rows), split.select(np.setdiff1d(np.arange(len(split)), rows))


def split_data(
    data: Data,
    validation_size: float = 0,
    max_train_rows: int | None = None,
    max_eval_rows: int | None = None,
    seed: int | None = None,
) -> Data:
    """Holds out `validation_size` training rows (below 1: a fraction), then cuts the splits to the given sizes.

    Each seed keeps another sample of the training rows, so that runs with several seeds cover the variance of sampling.
    The validation and test rows are the same for all seeds; rows held out here are not cut.
    """

    def cut(split: Split, max_rows: int | None, seed: int | None = None) -> Split:
        too_long = max_rows and max_rows < len(split)
        return split.select(stratified_rows(split, max_rows, seed)) if too_long else split

    if data.validation and validation_size:
        raise UserError("--validation-size: the data has a validation split; leave the flag out, or move it away")
    train, validation = data.train, data.validation and cut(data.validation, max_eval_rows)
    if validation_size:
        validation, train = _hold_out("--validation-size", train, validation_size)
    held_out = frozenset(text for split in (data.test, data.validation, validation) if split for text in split.texts)
    train, test = cut(train, max_train_rows, seed), cut(data.test, max_eval_rows)
    return dataclasses.replace(data, train=train, test=test, validation=validation, held_out_texts=held_out)


def load_splits(s: DataSettings, revision: str | None = None) -> Data:
    """The data set that the settings name, split and cut as they say."""
    data = load_data(s.data, s.text_column, s.label_column, s.label_names, revision, s.test_size)
    return split_data(data, s.validation_size, s.max_train_rows, s.max_eval_rows, s.seed)


def describe(data: Data) -> list[str]:
    """Lines for the start of a run: the files read, the classes with their training rows, and warnings."""
    counts = np.bincount(data.train.labels, minlength=len(data.label_names))
    by_class = [f"{' '.join(name.split())} {count:,}" for name, count in zip(data.label_names, counts, strict=True)]
    shown = ", ".join(by_class)
    if len(counts) > 10:
        fewest = ", ".join(by_class[i] for i in np.argsort(counts, kind="stable")[:5])
        shown = f"{counts.min():,} to {counts.max():,}, the fewest {fewest}"
    lines = [*data.sources, f"{len(counts)} classes, training rows of each: {shown}"]
    for name, split in data.splits.items():
        if empty := sum(not text.strip() for text in split.texts):
            lines.append(f"warning: {empty:,} of the {len(split):,} {name} rows have an empty text")
    rare = [repr(data.label_names[i]) for i in np.flatnonzero(counts <= 2)]
    if 2 * len(counts) > len(data.train):
        rows = f"{len(data.train):,} training rows"
        lines.append(f"warning: {len(counts)} classes for {rows}; is --label-column the right one?")
    elif rare:
        few = f"{len(rare)} of {len(counts)} classes with two training rows or fewer"
        lines.append(f"warning: {few}: {_shortened(rare)}")
    similar = defaultdict(list)
    for name in data.label_names:
        similar[" ".join(name.split()).casefold()].append(repr(name))
    for names in [names for names in similar.values() if len(names) > 1]:
        lines.append(f"warning: the classes {', '.join(names)} differ only in case or spaces; are they the same?")
    if broken := [repr(name) for name in data.label_names if len(name.splitlines()) > 1]:
        lines.append(f"warning: class names with line breaks: {', '.join(broken[:5])}")
    texts = {"validation": []} | {name: split.texts for name, split in data.splits.items()}
    for name, other in (("test", "train"), ("validation", "train"), ("test", "validation")):
        others = {*texts[other]}
        if repeated := sum(text in others for text in texts[name]):
            share = f"{repeated:,} of the {len(texts[name]):,} {name} texts also occur in {other}"
            lines.append(f"warning: {share}; a score on them says nothing about new texts")
    return lines


def describe_rows(split: str, rows: Sequence[Sequence[int]], cut: int, max_length: int) -> str:
    """A line about the tokenized rows of a split, of which `cut` were longer than `max_length`."""
    return f"{split}: {len(rows):,} rows, {sum(map(len, rows)):,} tokens, {cut:,} rows cut to {max_length}"


def derived_seed(*numbers: int) -> int:
    """A seed derived from several numbers; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)  # torch takes 63 bits

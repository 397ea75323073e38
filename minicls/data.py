"""Texts and labels: from the hub, from local parquet/CSV/JSON, or synthetic; splits.

A data set is a train and a test split, and may have a validation split; its files are flat or under `data/`. Texts are used
verbatim. Every choice of rows is a pure function of the texts or of (seed, epoch), so that a run can be repeated, resumed at
any step, and compared.
"""

import codecs
import csv
import dataclasses
import glob
import gzip
import hashlib
import io
import json
import math
import re
import shlex
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minicls import tiny
from minicls.config import DataSettings, UserError

AG_NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")
# The words that a split's files begin with are those of `datasets`, but for eval and evaluation: they can mean either split.
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev"),
}
TEXT_FORMATS = ("csv", "tsv", "jsonl", "json")
ADVICE = {  # why a file of another format is not read
    ("xlsx", "xls", "ods"): "a spreadsheet; save it as CSV in UTF-8",
    ("txt",): "no columns; write a CSV with a header",
    ("zip", "bz2", "xz", "zst", "tar", "tgz", "7z", "gz"): "packed; unpack it",
    ("arrow", "feather"): "write it as parquet",
    ("pkl", "pickle", "pt"): "nothing is unpickled; write it as parquet",
}


@dataclass(frozen=True)
class Split:
    """n texts, their class indices (n,) int64, and the number of each row in the file it came from, (n,) int64."""

    texts: list[str]
    labels: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: np.ndarray) -> "Split":
        return Split([self.texts[row] for row in rows], self.labels[rows], self.rows[rows])

    def fingerprint(self) -> str:
        """SHA-256 over texts and labels in their order: two runs with equal fingerprints saw the same rows."""
        digest = hashlib.sha256()
        for text, label in zip(self.texts, self.labels, strict=True):
            encoded = text.encode()
            digest.update(b"%d %d " % (label, len(encoded)) + encoded)
        return digest.hexdigest()


@dataclass(frozen=True)
class Data:
    train: Split
    test: Split
    label_names: tuple[str, ...]
    revision: str | None = None  # the hub's commit, where the data came from there
    validation: Split | None = None  # from files of its own
    sources: tuple[str, ...] = ()  # lines that say which files were read, and which were not

    def fingerprint(self) -> dict[str, str]:
        """A digest of each split, and of the class names in their order."""
        digests = {"train": self.train.fingerprint(), "test": self.test.fingerprint()}
        digests |= {"validation": self.validation.fingerprint()} if self.validation else {}
        return digests | {"label_names": hashlib.sha256(json.dumps(self.label_names).encode()).hexdigest()}

    def matches(self, fingerprint: dict[str, str]) -> bool:
        """Whether a run's saved fingerprint is this data's; older runs did not save that of the class names."""
        digests = self.fingerprint()
        return {"label_names": digests["label_names"]} | fingerprint == digests


@dataclass(frozen=True)
class _Columns:
    """A split as read: labels are still what the file says; `places[i]` tells row i from its neighbours in a message."""

    texts: list[str]
    labels: list
    places: list[str]
    files: dict[Path, int]  # and how many rows each has


def load_data(
    data: str,
    text_column: str = "text",
    label_column: str = "label",
    label_names: Sequence[str] | None = None,
    revision: str | None = None,
    test_size: float = 0,
) -> Data:
    """Reads `--data`: `synthetic`, a directory, or a hub id. Raises UserError for anything that a user can fix.

    Class names are `label_names`, else labels.txt, else the parquet metadata or the dataset card, else the labels
    themselves, sorted. Labels are class names or class indices. Without a test split, `test_size` training rows (below 1: a
    share of them) become one.
    """
    if data == "synthetic":
        if test_size:
            raise UserError("--test-size: the synthetic texts have a test split; leave the flag out")
        return synthetic()
    directory, revision = find_data(data, revision)
    card = _read_card(directory)
    files, unread = _split_files(directory, card)
    if "test" in files and test_size:
        raise UserError(
            f"--test-size: {directory} has a test split ({files['test'][0].name}); leave the flag out, or move it away"
        )
    for split in ("train",) if test_size else ("train", "test"):
        if split not in files:
            instead = ", or hold rows out of the training split with --test-size 0.2" if split == "test" else ""
            raise UserError(
                f"{directory}: no {split} split (a file such as {split}.csv, .tsv, .jsonl, .json or .parquet, here or under data/)"
                f"{', not counted: ' + _listing(unread) if unread else ''}; add one{instead}"
            )
    read = {split: _read_split(split, files[split], text_column, label_column) for split in SPLITS if split in files}
    labels = {
        split: [_label_text(*row) for row in zip(columns.labels, columns.places, strict=True)]
        for split, columns in read.items()
    }
    for split, texts in labels.items():
        if split != "train" and set(texts) == {"-1"} and "-1" not in labels["train"]:
            raise UserError(f"{read[split].places[0]}: all labels are -1, which means none; {_FOR_PREDICT}")
    source, names = "--label-names", label_names
    if names is None:
        source, names = _label_names(directory, card, [file for split in files for file in files[split]], label_column)
    index = {}
    if names is None:
        numeric = all(_as_index(label) is not None for label in labels["train"])
        names = sorted(set(labels["train"]), key=lambda label: (_as_index(label), label) if numeric else label)
        source = f"{directory}: the labels of its training rows, column {label_column!r}"
        if len(names) == 1:
            raise UserError(
                f"{source}, are all {names[0]!r}; a classifier needs two classes or more, add rows of another one"
            )
        index = {name: i for i, name in enumerate(names)}
    names = tuple(names)
    if len(names) < 2 or len(names) != len(set(names)) or "" in names:
        raise UserError(f"{source}: {' '.join(names)!r} are not two or more different names; pass one for each class")
    index = index or _class_index(names, {label for texts in labels.values() for label in texts})
    splits = {}
    for split, columns in read.items():
        for label, place in zip(labels[split], columns.places, strict=True):
            if label not in index:
                raise UserError(
                    f"{place}: label {label!r} is none of the {len(names)} classes ({', '.join(names)[:80]}); "
                    "fix the row, labels.txt or --label-names"
                )
        indices = np.array([index[label] for label in labels[split]], np.int64)
        splits[split] = Split(columns.texts, indices, np.arange(len(indices)))
    sources = [
        f"{split}: "
        + ", ".join(f"{file.relative_to(directory)} ({rows:,} rows)" for file, rows in columns.files.items())
        for split, columns in read.items()
    ]
    sources += [f"not read: {_listing(unread)}"] if unread else []
    sources += [f"warning: {line}" for columns in read.values() for line in _repeated_between_files(columns)]
    if test_size:
        held_out = _held_out("--test-size", splits["train"], test_size)
        splits["test"], splits["train"] = splits["train"].select(held_out), _without(splits["train"], held_out)
        sources.append(f"test: {len(held_out):,} of the training rows, held out by --test-size")
    return Data(splits["train"], splits["test"], names, revision, splits.get("validation"), tuple(sources))


def find_data(data: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The directory that holds a data set, downloaded from the hub if need be (at this commit), and the hub's commit."""
    path = Path(data).expanduser()
    if path.is_dir():
        return path, None
    if path.is_file():
        raise UserError(f"--data: {data} is a file; pass the directory that it is in, --data {path.parent}")
    directory, revision = download("--data", data, "dataset", ["README.md", "labels.txt"], revision)
    folder, patterns = _card_files(_read_card(directory), directory / "README.md")
    wanted = [pattern for split in patterns.values() for pattern in split]
    if not patterns:
        words = [word for words in SPLITS.values() for word in words]
        suffixes = ["parquet", *TEXT_FORMATS, *(f"{suffix}.gz" for suffix in TEXT_FORMATS)]
        wanted = [
            f"{below}{word}[-._ 0-9]*{suffix}" for below in ("", "data/") for word in words for suffix in suffixes
        ]
    return download("--data", data, "dataset", [f"{folder}{pattern}" for pattern in wanted], revision)


def download(flag: str, name: str, repo_type: str, patterns: list[str], revision: str | None) -> tuple[Path, str]:
    """Fetches files of a hub repository into huggingface-hub's cache; returns the snapshot's directory and commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{flag}: no directory {name}; pass an existing directory or a hub id such as org/name")
    try:
        path = Path(snapshot_download(name, repo_type=repo_type, allow_patterns=patterns, revision=revision))
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{flag}: {name} is neither a directory here nor a {repo_type} on the hub; check the name"
        ) from None
    except Exception as error:  # the hub client's own errors, its HTTP library's and the system's have no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{flag}: could not get {name} from the hub ({reason[:150]}); "
            f"check the network, or download it elsewhere and pass its directory: {flag} DIR"
        ) from None
    return path, path.name  # the cache names a snapshot's directory by its commit


# Which files are the data.


def _split_of(name: str) -> str | None:
    """The split that a file of this name is part of: its first word ends at - . _ a space or a digit, as in `datasets`."""
    word = re.match(r"[a-z]+(?=[-._ 0-9])", name.lower())
    return next((split for split, words in SPLITS.items() if word and word[0] in words), None)


def _format(file: Path) -> str | None:
    """parquet, csv, tsv, jsonl or json by the end of the name, in any case, the text formats with .gz or without; else None."""
    match = re.search(rf"\.(?:(parquet)|({'|'.join(TEXT_FORMATS)})(?:\.gz)?)$", file.name.lower())
    return match and (match[1] or match[2])


def _why_not(file: Path) -> str:
    """Why a file of no format of ours is not read."""
    advice = {suffix: reason for suffixes, reason in ADVICE.items() for suffix in suffixes}
    suffix = file.suffix.lower().removeprefix(".")
    return "a folder" if file.is_dir() else advice.get(suffix, "none of .parquet, .csv, .tsv, .jsonl, .json")


def _listing(unread: dict[str, str]) -> str:
    """File names by the reason why they are not read."""
    names = defaultdict(list)
    for name, reason in unread.items():
        names[reason].append(name)
    more = {reason: f" and {len(group) - 5} more" if len(group) > 5 else "" for reason, group in names.items()}
    return ", ".join(f"{', '.join(group[:5])}{more[reason]} ({reason})" for reason, group in names.items())


def _split_files(directory: Path, card: dict) -> tuple[dict[str, list[Path]], dict[str, str]]:
    """The files of each split, as the dataset card's data_files say, else by their names; and why the others are none."""
    folder, patterns = _card_files(card, directory / "README.md")
    root = directory / folder
    files, unread = defaultdict(list), {}
    for split, globs in patterns.items():
        # Not Path.glob, for which "data/**" are the folders alone.
        matches = {root / name for pattern in globs for name in glob.glob(pattern, root_dir=root, recursive=True)}  # noqa: PTH207
        files[split] = sorted(file for file in matches if file.is_file() and _format(file))
        if not files[split]:
            raise UserError(
                f"{directory / 'README.md'}: its data_files name {folder}{globs[0]} for the {split} split, which is not here in a "
                "format that can be read; restore the files, or take data_files out of README.md"
            )
    named = {file for paths in files.values() for file in paths}
    for file in [file for below in (root, root / "data") if below.is_dir() for file in sorted(below.iterdir())]:
        name, split = str(file.relative_to(directory)), _split_of(file.name)
        if (
            file.name.startswith(".")
            or file.name in ("README.md", "labels.txt")
            or (file.name == "data" and file.is_dir())
        ):
            continue
        if patterns:
            if file.is_file() and file not in named:
                unread[name] = "README.md's data_files do not name it"
        elif file.is_dir():
            unread[name] = "a folder"
        elif re.match(r"eval(uation)?[-._ 0-9]", file.name.lower()):
            unread[name] = "may be test or validation; rename it"
        elif split is None:
            unread[name] = "its name begins with none of train, test, validation"
        elif not _format(file):
            unread[name] = _why_not(file)
        else:
            files[split].append(file)
    for split, paths in files.items():
        # train.csv and Train.csv, or dev.csv and validation.csv, are two versions of a split rather than two parts of it.
        kinds = {
            (file.parent, re.match("[A-Za-z]*", file.name)[0], _format(file), file.suffix.lower()) for file in paths
        }
        if len(kinds) > 1 and not patterns:
            raise UserError(
                f"{directory}: {paths[0].name} and {paths[-1].name} both hold {split} rows; keep one kind in one place"
            )
    return dict(files), unread


def _repeated_between_files(columns: _Columns) -> list[str]:
    """A line for each file of a split that repeats texts of an earlier one. Raises UserError where it must be a copy."""
    lines, seen, start = [], {}, 0
    distinct = {}
    for file, rows in columns.files.items():
        texts = set(columns.texts[start : start + rows])
        start, distinct[file] = start + rows, len(texts)
        for other, repeated in Counter(seen[text] for text in texts if text in seen).items():
            line = f"{repeated:,} of the {distinct[file]:,} texts in {file.name} are also in {other.name}"
            if 2 * repeated >= min(distinct[file], distinct[other]):
                raise UserError(f"{file}: {line}, and both would be read; if one is a copy of the other, move it away")
            lines.append(line)
        seen = dict.fromkeys(texts, file) | seen
    return lines


# Dataset cards: README.md's YAML head, read as `datasets` reads it.


def _read_card(directory: Path) -> dict:
    """The head, its values the text that stands there (`no` is a class name, not False); {} where README.md has none."""
    file = directory / "README.md"
    text = _read_text(file) if file.is_file() else ""
    head = re.match(r"\s*---[ \t]*\r?\n(.*?)\n---[ \t]*\r?(\n|$)", text, re.DOTALL)
    if not head:
        return {}
    import yaml

    try:
        card = yaml.load(head[1], yaml.BaseLoader)
    except yaml.YAMLError as error:
        if not re.search("class_label|data_files", head[1]):
            return {}  # it says nothing that is needed here
        raise UserError(f"{file}: its head is not valid YAML ({error}); fix it") from None
    return card if isinstance(card, dict) else {}


def _entries(card: dict, key: str, place: Path) -> list[dict]:
    """What a card has under `key`: a list of mappings, or for dataset_info the one mapping."""
    entries = card.get(key) or []
    entries = [entries] if isinstance(entries, dict) and key == "dataset_info" else entries
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{place}: {key} is not a list of mappings, as `datasets` writes it; fix it")
    return entries


def _default_config(card: dict, place: Path) -> dict | None:
    """The entry of the config that `datasets` loads where none is named: the only one, or the one called or marked default."""
    configs = _entries(card, "configs", place)
    if len(configs) == 1:
        return configs[0]
    marked = [
        c
        for c in configs
        if c.get("config_name") == "default" or str(c.get("default")).lower() in ("true", "yes", "on")
    ]
    if len(marked) > 1:
        raise UserError(
            f"{place}: {' and '.join(str(c.get('config_name')) for c in marked)} are both the default config; keep one"
        )
    return marked[0] if marked else None


def _card_files(card: dict, place: Path) -> tuple[str, dict[str, list[str]]]:
    """Where the default config keeps its files ("" or a folder with a slash), and the patterns of each split, if it names any."""
    config = _default_config(card, place) or {}
    folder, files = config.get("data_dir") or "", config.get("data_files") or {}
    if isinstance(files, str) or (isinstance(files, list) and all(isinstance(path, str) for path in files)):
        files = {"train": files}
    try:
        if isinstance(files, list):
            if len({entry["split"] for entry in files}) < len(files):
                raise UserError(f"{place}: its data_files name a split twice; keep one entry for each")
            files = {entry["split"]: entry["path"] for entry in files}
        patterns = {}
        for name, paths in files.items():
            split, paths = _split_of(f"{name}."), [paths] if isinstance(paths, str) else paths
            if split in patterns:
                raise UserError(f"{place}: its data_files name the {split} split twice; keep one entry for it")
            if split:
                patterns[split] = [re.sub(r"^(\./)+", "", path) for path in paths]
        folder = f"{folder.strip('/').removeprefix('./')}/" if folder.strip("./") else ""
        paths = [folder, *(path for paths in patterns.values() for path in paths)]
        outside = [path for path in paths if "://" in path or ".." in path or path.startswith("/")]
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{place}: its data_files are not as `datasets` writes them; fix them") from None
    if outside:
        raise UserError(
            f"{place}: its data_files name {outside[0]}, which is outside the data set; download it and fix README.md"
        )
    return folder, patterns


def _label_names(directory: Path, card: dict, files: list[Path], label_column: str) -> tuple[Path, list[str] | None]:
    """Class names, and where they stand: labels.txt, the parquet metadata that `datasets` writes, or the dataset card."""
    if (directory / "labels.txt").is_file():
        return directory / "labels.txt", [
            line.rstrip() for line in lines_of(_read_text(directory / "labels.txt").rstrip())
        ]
    import pyarrow.parquet as pq

    sources = {}
    for file in files:
        metadata = (pq.read_schema(file).metadata or {}).get(b"huggingface") if _format(file) == "parquet" else None
        try:
            feature = json.loads(metadata)["info"]["features"][label_column] if metadata else {}
        except (ValueError, KeyError, TypeError):
            continue  # metadata of another form, or of a data set without this column
        if isinstance(feature, dict) and "names" in feature:
            sources[file] = _checked_names(feature["names"], file)
    place = directory / "README.md"
    if not sources:
        infos, config = _entries(card, "dataset_info", place), _default_config(card, place)
        if config or any(info.get("config_name") == "default" for info in infos):
            name = (config or {}).get("config_name", "default")
            sole = infos if len(infos) == 1 and "config_name" not in infos[0] else []
            infos = [info for info in infos if info.get("config_name", "default") == name] or sole
        for info in infos:
            sources[info.get("config_name", "default")] = _card_names(info, label_column, place)
    different = {tuple(names) if names else None: source for source, names in sources.items()}
    if len(different) > 1:
        one, other, *_ = different.values()
        where = f"{one} and {other.name}" if isinstance(other, Path) else f"{place}: its configs {one} and {other}"
        raise UserError(f"{where} do not have the same class names; say which with --label-names or labels.txt")
    names = next(iter(sources.values()), None)
    return next((source for source in sources if isinstance(source, Path)), place), names


def _card_names(info: dict, label_column: str, place: Path) -> list[str] | None:
    """The names of a card's class_label column."""
    for feature in _entries(info, "features", place):
        dtype = feature.get("dtype")
        if feature.get("name") == label_column and isinstance(dtype, dict) and "class_label" in dtype:
            return _checked_names(
                dtype["class_label"].get("names") if isinstance(dtype["class_label"], dict) else None, place
            )
    return None


def _checked_names(names, place: Path) -> list[str]:
    """A list of names, or a mapping from 0, 1, 2 ... to them, as `datasets` takes them."""
    if isinstance(names, dict):
        missing = [i for i in range(len(names)) if str(i) not in names]
        if missing:
            raise UserError(
                f"{place}: its class names have none for index {missing[0]} of {len(names)}; number them from 0 on"
            )
        names = [names[str(i)] for i in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{place}: its class names are neither a list of names nor names by index; fix them, or pass --label-names"
        )
    return names


# Rows.


def _read_split(split: str, files: list[Path], text_column: str, label_column: str) -> _Columns:
    texts, labels, places, rows = [], [], [], {}
    for file in files:
        # The end of the message about a column that is missing.
        label_flag = "--label-column" if split == "train" else f"--label-column; {_FOR_PREDICT}"
        columns = {"--text-column": text_column, label_flag: label_column}
        for (text, label), place, _ in _READERS[_format(file)](file, columns):
            texts.append(checked_text(text, place))
            labels.append(label)
            places.append(place)
        rows[file] = len(texts) - sum(rows.values())
    if not texts:
        raise UserError(f"{files[0]}: no rows; put at least one {split} row in it")
    if split != "train" and all(_is_empty(label) for label in labels):
        raise UserError(f"{files[0]}: none of its rows has a label; {_FOR_PREDICT}")
    return _Columns(texts, labels, places, rows)


_FOR_PREDICT = "texts without labels are for `python -m minicls predict`: move the file away"


def lines_of(text: str) -> list[str]:
    """Its lines, ended by LF or CR LF. Not str.splitlines, which also ends them at U+2028, form feeds and the like."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def read_rows(file: Path, text_column: str) -> list[tuple[str, dict]]:
    """The texts of one file of a split's formats, labels or none, each with all columns of its row; or the lines of a .txt file
    or one without a suffix.

    Raises UserError for any other format, and where there is no such column, or no text in it.
    """
    if _format(file):
        rows = _READERS[_format(file)](file, {"--text-column": text_column}, whole=True)
        return [(checked_text(text, place), row) for (text,), place, row in rows]
    if file.is_dir() or file.suffix.lower() not in ("", ".txt"):
        raise UserError(
            f"{file}: {_why_not(file)}; pass .parquet, .csv, .tsv, .jsonl, .json, or .txt with a text a line"
        )
    return [(text, {"text": text}) for text in lines_of(_read_text(file))]


def checked_text(text, place: str) -> str:
    """The text, found at `place`. Raises UserError where it is none that a tokenizer takes."""
    if not isinstance(text, str):
        raise UserError(f"{place}: the text is {text!r}; fix the row, or name another column with --text-column")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can escape half of a character
            raise UserError(f"{place}: the text is no valid Unicode ({error.reason}); fix the row") from None
    return text


# The readers yield (values of the wanted columns, place of the row, all columns of it if `whole`). `columns` maps the flag that
# named a column to its name.


def _read_parquet(file: Path, columns: dict[str, str], whole: bool = False):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
        _check_columns(file, parquet.schema_arrow.names, columns)
        table = parquet.read(columns=None if whole else list(columns.values()))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]}); write it again") from None
    values = []
    for name in columns.values():
        try:
            values.append(table[name].to_pylist())
        except UnicodeDecodeError:
            for row, value in enumerate(table[name]):
                try:
                    value.as_py()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{file}, row {row}: {name} is not UTF-8 ({error.reason}); convert the file"
                    ) from None
    rows = table.to_pylist() if whole else [{}] * len(table)
    for row, wanted in enumerate(zip(*values, strict=True)):
        yield wanted, f"{file}, row {row}", rows[row]


def _read_csv(file: Path, columns: dict[str, str], whole: bool = False):
    csv.field_size_limit(1 << 30)  # the default refuses articles above 128 KiB
    text = _read_text(file)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_separator(file, text, columns), strict=True)
    line = 1
    try:
        header = next(reader, [])
        _check_columns(file, header, columns, "the first line must name the columns: write such a header, or ")
        at = [header.index(name) for name in columns.values()]
        line = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):  # an empty line is no row
                raise UserError(
                    f"{file}, line {line}: {len(row)} fields, the header has {len(header)}; fix or quote the row"
                )
            if row:
                yield [row[i] for i in at], f"{file}, line {line}", dict(zip(header, row, strict=True)) if whole else {}
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}, line {line}: not valid CSV ({error}); fix or quote the row") from None


def _separator(file: Path, text: str, columns: dict[str, str]) -> str:
    """The one of comma, semicolon and tab that the header's columns stand between."""
    headers = {}
    for separator in "\t,;" if _format(file) == "tsv" else ",;\t":
        try:
            headers[separator] = next(csv.reader(io.StringIO(text[:100_000], newline=""), delimiter=separator), [])
        except csv.Error:
            headers[separator] = []
    fitting = [separator for separator, header in headers.items() if set(columns.values()) <= set(header)]
    if len({tuple(headers[separator]) for separator in fitting}) > 1:
        names = " and ".join(repr(separator) for separator in fitting)
        raise UserError(
            f"{file}: its columns may be separated by {names}; keep one of them in the header, or quote the names"
        )
    return fitting[0] if fitting else max(headers, key=lambda separator: len(headers[separator]))


def _read_jsonl(file: Path, columns: dict[str, str], whole: bool = False):
    """JSON lines. A .json file may hold one array of objects instead, as pandas' `orient="records"` writes it."""
    text = _read_text(file)
    is_array = text.lstrip()[:1] == "["
    if is_array and _format(file) == "jsonl":
        raise UserError(f"{file}: a JSON array; name it .json, or write one object a line")
    try:
        rows = enumerate(
            json.loads(text) if is_array else text.split("\n"), start=1
        )  # JSON allows U+2028 inside strings
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); fix it") from None
    for number, row in rows:
        place = f"{file}, {'item' if is_array else 'line'} {number}"
        if isinstance(row, str) and not is_array:
            if not row.strip():
                continue
            try:
                row = json.loads(row)
            except ValueError as error:
                form = "; or write an array of objects" if _format(file) == "json" else ""
                raise UserError(f"{place}: not valid JSON ({error}); fix the row{form}") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: not a JSON object; write one object {'an item' if is_array else 'a line'}")
        _check_columns(place, list(row), columns)
        yield [row[name] for name in columns.values()], place, row if whole else {}


_READERS = {"parquet": _read_parquet, "csv": _read_csv, "tsv": _read_csv, "jsonl": _read_jsonl, "json": _read_jsonl}


def _read_text(file: Path) -> str:
    """A file's text, unpacked if it ends in .gz. Raises UserError that says how to convert it where it is not UTF-8."""
    content = file.read_bytes()
    for magic, kind in ((b"PAR1", "a parquet file"), (b"PK\3\4", "a zip archive or a spreadsheet")):
        if content.startswith(magic):
            raise UserError(
                f"{file}: the content is {kind}, not text; give it the name of its format, or save it as CSV"
            )
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{file}: not a readable gzip file ({error}); write it again") from None
    try:
        if _zeros(content):  # ASCII in UTF-16 without a byte order mark would be valid UTF-8
            raise UnicodeDecodeError("utf-8", content, 0, 1, "zero bytes")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        encoding = _likely_encoding(content)
    if encoding == "UTF-8":
        raise UserError(f"{file}, line {line}: not UTF-8, though most of the file is; fix or drop the row") from None
    source = "a text editor tells the encoding, E, " if encoding is None else f"most likely {encoding}; "
    name = shlex.quote(str(file.with_suffix("") if file.suffix == ".gz" else file))
    unpack = f"gunzip {shlex.quote(str(file))} && " if file.suffix == ".gz" else ""
    convert = f"{unpack}iconv -f {encoding or 'E'} -t UTF-8 {name} > utf8 && mv utf8 {name}"
    raise UserError(f"{file}, line {line}: not UTF-8; {source}convert it: {convert}")


def _zeros(content: bytes) -> tuple[int, int] | None:
    """How many bytes are 0 at even and odd places, where there are so many that it must be UTF-16; else None."""
    sample = content[: 1 << 16]
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    return (even, odd) if even + odd > max(4, len(sample) / 100) else None


def _likely_encoding(content: bytes) -> str | None:
    """iconv's name for the encoding of text that is not UTF-8; UTF-8 if only a few bytes are not; None if nothing fits."""
    for mark, name in (
        (codecs.BOM_UTF32_LE, "UTF-32"),
        (codecs.BOM_UTF16_LE, "UTF-16"),
        (codecs.BOM_UTF16_BE, "UTF-16"),
    ):
        if content.startswith(mark):
            return name
    if _zeros(content):
        even, odd = _zeros(content)
        return "UTF-16LE" if odd > even else "UTF-16BE"
    valid = len(re.findall(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}", content))
    if valid > content.decode("utf-8", "replace").count("\ufffd"):
        return "UTF-8"
    high = len(re.findall(rb"[\x80-\xff]", content))
    pairs = len(re.findall(rb"[\xa1-\xf7][\xa1-\xfe]", content))  # GB2312, which nearly all Chinese text keeps to
    try:
        content.decode("gb18030")
        if pairs * 2 > 0.8 * high:
            return "GB18030"
    except UnicodeDecodeError:
        pass
    runs = len(re.findall(rb"[\x80-\xff]+", content))  # letters with accents stand between others
    undefined = re.search(rb"[\x81\x8d\x8f\x90\x9d]", content)
    return "WINDOWS-1252" if high < 2 * runs and not undefined else None


def _check_columns(place, names: list[str], columns: dict[str, str], hint: str = "") -> None:
    """Raises UserError for a column that is missing or there twice; `hint` is told where all are missing."""
    if not names:
        raise UserError(f"{place}: empty; write a header and rows")
    for flag, name in columns.items():
        if name not in names:
            shown = ", ".join(column if column == column.strip() else repr(column) for column in names)[:120]
            hint = "" if {*columns.values()} & {*names} else hint
            raise UserError(f"{place}: no column {name!r} among {shown}; {hint}name the right one with {flag}")
        if names.count(name) > 1:
            raise UserError(f"{place}: {names.count(name)} columns are called {name!r}; rename all but one")


# Labels.


def _is_empty(label) -> bool:
    """None, an empty text, or NaN, which is how pandas writes that there is none."""
    return label is None or label != label or (isinstance(label, str) and not label.strip())


def _label_text(label, place: str) -> str:
    """A label as text: 3 and 3.0, which pandas makes of 3 in a column that once had a hole, are both "3"."""
    if _is_empty(label):
        raise UserError(f"{place}: the label is empty; give every row a label or drop the row")
    if not isinstance(label, (str, int, float)) or label in (math.inf, -math.inf):
        raise UserError(f"{place}: label {label!r} is neither a class name nor an index; fix the row")
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _as_index(label: str) -> int | None:
    return int(label) if re.fullmatch(r"\d+", label, re.ASCII) else None


def _class_index(names: Sequence[str], labels: set[str]) -> dict[str, int]:
    """The class of each label; labels that have none are left out.

    Names before indices, and one reading for the whole data set: where the names are 1 2 3 4, label 1 is the first class.
    """
    index = {name: i for i, name in enumerate(names)}
    by_number = {str(i): i for i in range(len(names))}
    numbers = {label: str(_as_index(label)) for label in labels if _as_index(label) is not None}
    if by_number.keys().isdisjoint(index):
        index |= by_number
    elif not labels <= index.keys() and labels <= numbers.keys() and set(numbers.values()) <= by_number.keys():
        index = by_number
    keys = {label: label if label in index else numbers.get(label) for label in labels}
    return {label: index[key] for label, key in keys.items() if key in index}


def synthetic(num_train: int = 4000, num_test: int = 1000) -> Data:
    """`--data synthetic`: see `tiny.synthetic_texts`."""
    texts, labels = tiny.synthetic_texts(num_train + num_test)
    labels = np.array(labels, np.int64)
    train = Split(texts[:num_train], labels[:num_train], np.arange(num_train))
    test = Split(texts[num_train:], labels[num_train:], np.arange(num_test))
    return Data(train, test, AG_NEWS_LABELS, sources=("synthetic texts",))


def stratified_rows(split: Split, size: int, seed: int | None = None) -> np.ndarray:
    """`size` rows with the classes in the split's own proportions, chosen by a hash of their texts; ascending.

    Without a seed, the choice depends on the texts alone, not on the order of the file. With one, it is another sample for
    each seed. A smaller choice is part of a larger one of the same seed, up to one row a class.
    """
    salt = b"" if seed is None else b"%d " % seed
    counts = np.bincount(split.labels)
    shares = counts * size / len(split)
    quotas = np.floor(shares).astype(int)
    quotas[np.argsort(quotas - shares, kind="stable")[: size - quotas.sum()]] += (
        1  # the largest remainders get the rest
    )
    rows = []
    for label, quota in enumerate(quotas):
        members = np.flatnonzero(split.labels == label)
        keys = {row: hashlib.sha256(salt + split.texts[row].encode()).digest() for row in members}
        rows += sorted(members, key=keys.__getitem__)[:quota]
    return np.sort(np.array(rows, np.int64))


def _held_out(flag: str, split: Split, size: float) -> np.ndarray:
    """The stratified rows that --validation-size or --test-size asks for: so many, or below 1 a share, rounded up."""
    if size >= 1 and size != int(size):
        raise UserError(f"{flag}: {size} is no whole number of rows; pass one, or a share below 1")
    rows = int(size) if size >= 1 else math.ceil(round(size * len(split), 6))  # 0.07 * 100 is a little more than 7
    if rows >= len(split):
        raise UserError(f"{flag}: {rows} leaves none of the {len(split)} training rows; pass less")
    return stratified_rows(split, rows)


def _without(split: Split, rows: np.ndarray) -> Split:
    return split.select(np.setdiff1d(np.arange(len(split)), rows))


def split_data(
    data: Data,
    validation_size: float = 0,
    max_train_rows: int | None = None,
    max_eval_rows: int | None = None,
    seed: int | None = None,
) -> tuple[Data, Split | None]:
    """Holds `validation_size` training rows (below 1: a share of them) out, then cuts the splits to at most so many rows.

    The training rows that are kept are a sample of their own for each seed, so that runs with several seeds cover the variance
    of sampling. The validation and test rows are the same for all seeds; held-out rows are not cut. Returns the data and the
    validation rows, held out or from files, None if there are neither.
    """
    train, test, validation = data.train, data.test, data.validation
    if validation and validation_size:
        raise UserError(
            "--validation-size: the data has a validation split; leave the flag out, or move its files away"
        )
    if validation_size:
        held_out = _held_out("--validation-size", train, validation_size)
        validation, train = train.select(held_out), _without(train, held_out)
    if max_train_rows and max_train_rows < len(train):
        train = train.select(stratified_rows(train, max_train_rows, seed))
    if max_eval_rows and max_eval_rows < len(test):
        test = test.select(stratified_rows(test, max_eval_rows))
    if data.validation and max_eval_rows and max_eval_rows < len(validation):
        validation = validation.select(stratified_rows(validation, max_eval_rows))
    from_files = validation if data.validation else None
    return dataclasses.replace(data, train=train, test=test, validation=from_files), validation


def load_splits(s: DataSettings, revision: str | None = None) -> tuple[Data, dict[str, Split]]:
    """The data set that the settings name, and its splits by name: train, validation if there are such rows, test."""
    data = load_data(s.data, s.text_column, s.label_column, s.label_names, revision, s.test_size)
    data, validation = split_data(data, s.validation_size, s.max_train_rows, s.max_eval_rows, s.seed)
    splits = {"train": data.train, "validation": validation, "test": data.test}
    return data, {name: split for name, split in splits.items() if split}


def describe(data: Data, validation: Split | None = None) -> list[str]:
    """Lines for the start of a run: the files, the classes with their training rows, and what may be wrong with them."""
    counts = np.bincount(data.train.labels, minlength=len(data.label_names))
    by_class = [f"{' '.join(name.split())} {count:,}" for name, count in zip(data.label_names, counts, strict=True)]
    fewest = [by_class[i] for i in np.argsort(counts, kind="stable")[:5]]
    rows = (
        ", ".join(by_class)
        if len(counts) <= 10
        else f"{counts.min():,} to {counts.max():,}, the fewest {', '.join(fewest)}"
    )
    lines = [*data.sources, f"{len(counts)} classes, training rows of each: {rows}"]
    rare = [repr(data.label_names[i]) for i in np.flatnonzero(counts <= 2)]
    if 2 * len(counts) > len(data.train):
        lines.append(
            f"warning: {len(counts)} classes for {len(data.train):,} training rows; is --label-column the right one?"
        )
    elif rare:
        more = f" and {len(rare) - 5} more" if len(rare) > 5 else ""
        lines.append(f"warning: {len(rare)} classes have two training rows or fewer: {', '.join(rare[:5])}{more}")
    alike = defaultdict(list)
    for name in data.label_names:
        alike[" ".join(name.split()).casefold()].append(repr(name))
    for names in alike.values():
        if len(names) > 1:
            lines.append(f"warning: the classes {', '.join(names)} differ in case or blanks alone; are they one?")
    broken = [repr(name) for name in data.label_names if len(name.splitlines()) > 1]
    if broken:
        lines.append(f"warning: class names with line breaks: {', '.join(broken[:5])}")
    splits = {"train": data.train, "validation": validation, "test": data.test}
    for name, other in (("test", "train"), ("validation", "train"), ("test", "validation")):
        if splits[name] and splits[other]:
            texts = set(splits[other].texts)
            repeated = sum(text in texts for text in splits[name].texts)
            if repeated:
                lines.append(
                    f"warning: {repeated:,} of the {len(splits[name]):,} {name} texts also occur in {other}; "
                    "a score on them says nothing about new texts"
                )
    return lines


def describe_rows(split: str, rows: Sequence[Sequence[int]], cut: int, max_length: int) -> str:
    """A line about the tokenized rows of a split, of which `cut` were longer than `max_length`."""
    return f"{split}: {len(rows):,} rows, {sum(map(len, rows)):,} tokens, {cut:,} rows cut to {max_length}"


def derived_seed(*numbers: int) -> int:
    """One seed out of several numbers; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)  # torch takes 63 bits

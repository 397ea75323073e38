"""Texts and labels: from the hub, from local parquet/CSV/JSONL, or synthetic; splits.

A data set is a `train*` and a `test*` split, flat or under `data/`. Texts are used verbatim. Every choice of rows is a
pure function of the texts or of (seed, epoch), so that a run can be repeated, resumed at any step, and compared.
"""

import csv
import hashlib
import io
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minicls.config import UserError

AG_NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")
FORMATS = ("parquet", "csv", "jsonl")


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

    def fingerprint(self) -> dict[str, str]:
        names = hashlib.sha256(json.dumps(self.label_names).encode()).hexdigest()
        return {"train": self.train.fingerprint(), "test": self.test.fingerprint(), "label_names": names}


@dataclass(frozen=True)
class _Columns:
    """A split as read: labels are still what the file says; `places[i]` tells row i from its neighbours in a message."""

    texts: list[str]
    labels: list
    places: list[str]
    files: list[Path]


def load_data(
    data: str,
    text_column: str = "text",
    label_column: str = "label",
    label_names: Sequence[str] | None = None,
    revision: str | None = None,
) -> Data:
    """Reads `--data`: `synthetic`, a directory, or a hub id. Raises UserError for anything a user can mend.

    Class names are `label_names`, else labels.txt, else the parquet metadata or the dataset card, else the labels
    themselves, sorted. Labels are class names or class indices.
    """
    if data == "synthetic":
        return synthetic()
    directory, revision = find_data(data, revision)
    read = {split: _read_split(directory, split, text_column, label_column) for split in ("train", "test")}
    for columns in read.values():
        for label, place in zip(columns.labels, columns.places, strict=True):
            if label is None or label == "" or label != label:  # NaN is how pandas writes that there is none
                raise UserError(f"{place}: the label is empty; give every row a label or drop the row")
            if not isinstance(label, (str, int, float)):
                raise UserError(f"{place}: label {label!r} is neither a class name nor an index; mend the row")
    source, names = "--label-names", label_names
    if names is None:
        source, names = _label_names(directory, read["train"].files[0], label_column)
    named = names is not None
    if not named:
        numeric = all(_as_index(label) is not None for label in read["train"].labels)
        names = [str(label) for label in sorted(set(read["train"].labels), key=_as_index if numeric else str)]
    names = tuple(names)
    if len(names) < 2 or len(names) != len(set(names)) or "" in names:
        raise UserError(f"{source}: {' '.join(names)!r} are not two or more different names; pass one for each class")
    # Names before indices, and one reading for the whole data set: where the names are 1 2 3 4, label 1 is the first class.
    index = {name: i for i, name in enumerate(names)}
    if named:
        by_number = {str(i): i for i in range(len(names))}
        labels = {label for columns in read.values() for label in columns.labels}
        if by_number.keys().isdisjoint(index):
            index |= by_number
        elif not all(str(label) in index for label in labels) and all(str(_as_index(label)) in by_number for label in labels):
            index = by_number
    splits = {}
    for split, columns in read.items():
        keys = [str(label) if str(label) in index else str(_as_index(label)) for label in columns.labels]
        for key, label, place in zip(keys, columns.labels, columns.places, strict=True):
            if key not in index:
                raise UserError(
                    f"{place}: label {label!r} is none of the {len(names)} classes ({', '.join(names)[:80]}); "
                    "mend the row, labels.txt or --label-names"
                )
        splits[split] = Split(columns.texts, np.array([index[key] for key in keys], np.int64), np.arange(len(keys)))
    return Data(splits["train"], splits["test"], names, revision)


def find_data(data: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The directory that holds a data set, downloaded from the hub if need be (at this commit), and the hub's commit."""
    path = Path(data).expanduser()
    if path.is_dir():
        return path, None
    patterns = [f"{folder}{split}*.{suffix}" for folder in ("", "data/") for split in ("train", "test") for suffix in FORMATS]
    return download("--data", data, "dataset", [*patterns, "labels.txt", "README.md"], revision)


def download(flag: str, name: str, repo_type: str, patterns: list[str], revision: str | None) -> tuple[Path, str]:
    """Fetches files of a hub repository into huggingface-hub's cache; returns the snapshot's directory and commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{flag}: no directory {name}; pass an existing directory or a hub id such as org/name")
    try:
        path = Path(snapshot_download(name, repo_type=repo_type, allow_patterns=patterns, revision=revision))
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{flag}: {name} is neither a directory here nor a {repo_type} on the hub; check the name") from None
    except Exception as error:  # the hub client's own errors, its HTTP library's and the system's have no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{flag}: could not get {name} from the hub ({reason[:150]}); "
            f"check the network, or download it elsewhere and pass its directory: {flag} DIR"
        ) from None
    return path, path.name  # the cache names a snapshot's directory by its commit


def _read_split(directory: Path, split: str, text_column: str, label_column: str) -> _Columns:
    files = [f for folder in (directory, directory / "data") for f in sorted(folder.glob(f"{split}*")) if f.is_file()]
    files = [f for f in files if f.suffix[1:] in FORMATS]
    if not files:
        raise UserError(f"{directory}: no {split}*.parquet, {split}*.csv or {split}*.jsonl, here or under data/; add one")
    if len({(f.parent, f.suffix) for f in files}) > 1:
        raise UserError(f"{directory}: {files[0].name} and {files[-1].name} both hold {split} rows; keep one kind in one place")
    texts, labels, places = [], [], []
    for file in files:
        for (text, label), place in _READERS[file.suffix[1:]](file, {"--text-column": text_column, "--label-column": label_column}):
            texts.append(checked_text(text, place))
            labels.append(label)
            places.append(place)
    if not texts:
        raise UserError(f"{files[0]}: no rows; put at least one {split} row in it")
    return _Columns(texts, labels, places, files)


def lines_of(text: str) -> list[str]:
    """Its lines, ended by LF or CR LF. Not str.splitlines, which also ends them at U+2028, form feeds and the like."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def read_texts(file: Path, text_column: str) -> list[str]:
    """The texts of one parquet, CSV or JSONL file, labels or none, or the lines of a .txt file."""
    if file.suffix[1:] not in FORMATS:
        return lines_of(_read_text(file))
    return [checked_text(text, place) for (text,), place in _READERS[file.suffix[1:]](file, {"--text-column": text_column})]


def checked_text(text, place: str) -> str:
    """The text, found at `place`. Raises UserError where it is none that a tokenizer takes."""
    if not isinstance(text, str):
        raise UserError(f"{place}: the text is {text!r}; mend the row, or name another column with --text-column")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can escape half of a character
            raise UserError(f"{place}: the text is no valid Unicode ({error.reason}); mend the row") from None
    return text


# The readers yield (values of the wanted columns, place of the row). `columns` maps the flag that named a column to its name.


def _read_parquet(file: Path, columns: dict[str, str]):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({str(error).splitlines()[0]}); write it again") from None
    _check_columns(file, table.column_names, columns)
    values = []
    for name in columns.values():
        try:
            values.append(table[name].to_pylist())
        except UnicodeDecodeError:
            for row, value in enumerate(table[name]):
                try:
                    value.as_py()
                except UnicodeDecodeError as error:
                    raise UserError(f"{file}, row {row}: {name} is not UTF-8 ({error.reason}); convert the file") from None
    for row, wanted in enumerate(zip(*values, strict=True)):
        yield wanted, f"{file}, row {row}"


def _read_csv(file: Path, columns: dict[str, str]):
    csv.field_size_limit(1 << 30)  # the default refuses articles above 128 KiB
    reader = csv.reader(io.StringIO(_read_text(file), newline=""), strict=True)
    line = 1
    try:
        header = next(reader, [])
        _check_columns(file, header, columns)
        at = [header.index(name) for name in columns.values()]
        line = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):  # an empty line is no row
                raise UserError(f"{file}, line {line}: {len(row)} fields, the header has {len(header)}; mend or quote the row")
            if row:
                yield [row[i] for i in at], f"{file}, line {line}"
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}, line {line}: not valid CSV ({error}); mend or quote the row") from None


def _read_jsonl(file: Path, columns: dict[str, str]):
    # Not str.splitlines: JSON allows U+2028 and its like inside strings.
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place}: not valid JSON ({error}); mend the row") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: not a JSON object; write one object a line")
        _check_columns(place, list(row), columns)
        yield [row[name] for name in columns.values()], place


_READERS = {"parquet": _read_parquet, "csv": _read_csv, "jsonl": _read_jsonl}


def _read_text(file: Path) -> str:
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None


def _check_columns(place, names: list[str], columns: dict[str, str]) -> None:
    for flag, name in columns.items():
        if name not in names:
            raise UserError(f"{place}: no column {name!r} among {', '.join(names)[:120]}; name the right one with {flag}")


def _as_index(label) -> int | None:
    """3, "3" and 3.0 as 3; None for anything that is no whole number."""
    if isinstance(label, str):
        return int(label) if re.fullmatch(r"\d+", label, re.ASCII) else None
    if isinstance(label, (int, float)) and not isinstance(label, bool) and label == label // 1:
        return int(label)
    return None


def _label_names(directory: Path, train_file: Path, label_column: str) -> tuple[Path, list[str] | None]:
    """Class names, and where they stand: labels.txt, the parquet metadata that `datasets` writes, or README.md's YAML head."""
    if (directory / "labels.txt").is_file():
        return directory / "labels.txt", [line.rstrip() for line in lines_of(_read_text(directory / "labels.txt").rstrip())]
    if train_file.suffix == ".parquet":
        import pyarrow.parquet as pq

        metadata = (pq.read_schema(train_file).metadata or {}).get(b"huggingface")
        features = json.loads(metadata).get("info", {}).get("features", {}) if metadata else {}
        if "names" in features.get(label_column, {}):
            return train_file, features[label_column]["names"]
    if (directory / "README.md").is_file():
        from huggingface_hub import DatasetCard

        try:
            info = DatasetCard(_read_text(directory / "README.md")).data.to_dict().get("dataset_info") or {}
            for part in info if isinstance(info, list) else [info]:
                for feature in part.get("features", []):
                    if feature["name"] == label_column and isinstance(feature["dtype"], dict):
                        names = feature["dtype"]["class_label"]["names"]
                        return directory / "README.md", [names[i] for i in sorted(names, key=int)]
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # a README that is no dataset card, or one of another form: the labels themselves will do
    return train_file, None


# A few words of each class, and words that tell nothing.
_TOPIC_WORDS = (
    "minister election treaty embassy border troops parliament rebels ceasefire refugees president sanctions envoy "
    "hostages province militants diplomats capital protest summit",
    "coach season striker playoff champion stadium defeat inning goal medal tournament quarterback league injury victory "
    "rookie racket relay referee penalty",
    "shares profit merger quarter investors earnings oil bank stocks revenue analysts dividend retailer inflation "
    "shareholders bankruptcy lender trade pension forecast",
    "software internet satellite browser scientists chip telescope virus wireless server researchers laptop genome "
    "broadband spacecraft encryption robot download network fossil",
)
_COMMON_WORDS = (
    "the a of in on for with after before over new early late another first last big small two three more than said says "
    "reported announced expected could will may monday tuesday friday week month year today people group officials plan "
    "deal record talks team company world home top major long open move set back next against under"
)


def synthetic(num_train: int = 4000, num_test: int = 1000) -> Data:
    """News-like texts in AG News' four classes, the same in every process, for runs without network or files.

    A text's words hint at its class, some at a wrong one, and one label in twenty is wrong, so that no model gets every
    row right and a model that has learned nothing gets a quarter.
    """
    rng = random.Random(0)
    topics, common = [words.split() for words in _TOPIC_WORDS], _COMMON_WORDS.split()
    texts, labels = [], []
    for _ in range(num_train + num_test):
        topic = rng.randrange(4)
        words = []
        for _ in range(rng.randint(12, 40)):
            kind = rng.random()
            words.append(rng.choice(topics[topic] if kind < 0.16 else topics[rng.randrange(4)] if kind < 0.3 else common))
        texts.append(" ".join(words).capitalize() + ".")
        labels.append(rng.randrange(4) if rng.random() < 0.05 else topic)
    labels = np.array(labels, np.int64)
    train = Split(texts[:num_train], labels[:num_train], np.arange(num_train))
    test = Split(texts[num_train:], labels[num_train:], np.arange(num_test))
    return Data(train, test, AG_NEWS_LABELS)


def stratified_rows(split: Split, size: int, seed: int | None = None) -> np.ndarray:
    """`size` rows with the classes in the split's own proportions, chosen by a hash of their texts; ascending.

    Without a seed, the choice depends on the texts alone, not on the order of the file. With one, it is another sample for
    each seed. A smaller choice is part of a larger one of the same seed, up to one row a class.
    """
    salt = b"" if seed is None else b"%d " % seed
    counts = np.bincount(split.labels)
    shares = counts * size / len(split)
    quotas = np.floor(shares).astype(int)
    quotas[np.argsort(quotas - shares, kind="stable")[: size - quotas.sum()]] += 1  # the largest remainders get the rest
    rows = []
    for label, quota in enumerate(quotas):
        members = np.flatnonzero(split.labels == label)
        keys = {row: hashlib.sha256(salt + split.texts[row].encode()).digest() for row in members}
        rows += sorted(members, key=keys.__getitem__)[:quota]
    return np.sort(np.array(rows, np.int64))


def split_data(
    data: Data,
    validation_size: int = 0,
    max_train_rows: int | None = None,
    max_eval_rows: int | None = None,
    seed: int | None = None,
) -> tuple[Data, Split | None]:
    """Holds `validation_size` training rows out, then cuts both splits to at most so many rows.

    The training rows that are kept are a sample of their own for each seed, so that runs with several seeds cover the variance
    of sampling. The validation and test rows are the same for all seeds.
    """
    train, test, validation = data.train, data.test, None
    if validation_size >= len(train):
        raise UserError(f"--validation-size: {validation_size} leaves none of the {len(train)} training rows; pass less")
    if validation_size:
        held_out = stratified_rows(train, validation_size)
        validation, train = train.select(held_out), train.select(np.setdiff1d(np.arange(len(train)), held_out))
    if max_train_rows and max_train_rows < len(train):
        train = train.select(stratified_rows(train, max_train_rows, seed))
    if max_eval_rows and max_eval_rows < len(test):
        test = test.select(stratified_rows(test, max_eval_rows))
    return Data(train, test, data.label_names, data.revision), validation


def derived_seed(*numbers: int) -> int:
    """One seed out of several numbers; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)  # torch takes 63 bits

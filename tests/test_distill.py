"""Distillation: soft labels from a file, the loss, and training on them.   python -m pytest tests/test_distill.py"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import EVERY_STEP, interrupt_at, losses, resume, train

from minicls import checkpoint
from minicls.__main__ import main
from minicls.config import UserError
from minicls.data import Data, Split, load_data, split_data
from minicls.distill import SoftTargets, add_soft_labels, distillation_loss

NAMES = ("ant", "bee", "cat")
CPU = torch.device("cpu")


def split(texts: str, labels: list[int], **more) -> Split:
    return Split(texts.split(), np.array(labels), np.arange(len(labels)), **more)


def soft_file(file: Path, rows: dict[str, tuple], names=NAMES) -> str:
    """A file such as `predict` writes; the columns that do not matter are left out."""
    columns = {"text": [*rows]} | {f"probability_{n}": [p[c] for p in rows.values()] for c, n in enumerate(names)}
    pq.write_table(pa.table(columns), file)
    return str(file)


def settings(**given) -> SimpleNamespace:
    return SimpleNamespace(text_column="text", **given)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_targets_are_the_softmax_of_the_teacher_s_logits_at_the_temperature(temperature):
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 4, (50, 3)))
    rows = split("x " * 50, [0] * 50, soft_labels=logits.softmax(1).numpy())
    targets, weights, _ = SoftTargets(rows, settings(temperature=temperature, soft_label_weight=0.3), CPU)[
        np.arange(50)
    ]
    assert targets.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(targets.double(), (logits / temperature).softmax(1), atol=1e-6, rtol=0)


def test_weights_of_labelled_rows_of_added_texts_and_of_rows_without_a_soft_label():
    soft = np.array([[0.2, 0.3, 0.5], [np.nan] * 3, [0, 0, 1]])
    rows = Split(["a", "b", "c"], np.array([0, 1, 2]), np.array([0, 1, -1]), soft)
    targets, weights, temperature = SoftTargets(rows, settings(temperature=2.0, soft_label_weight=0.25), CPU)[
        np.array([2, 1, 0])
    ]
    assert weights.tolist() == [1, 0, 0.25] and temperature == 2
    assert targets[0].tolist() == [0, 0, 1] and targets[1].tolist() == [0, 0, 0]
    assert targets[2].sum().item() == pytest.approx(1, abs=1e-6)
    targets, weights, temperature = SoftTargets(rows, settings(temperature=None, soft_label_weight=None), CPU)[
        np.arange(3)
    ]
    assert weights.tolist() == [0.5, 0, 1] and temperature == 1  # the defaults
    assert targets[0].tolist() == pytest.approx([0.2, 0.3, 0.5])
    assert SoftTargets(rows, settings(temperature=None, soft_label_weight=0.0), CPU)[np.arange(3)][1].tolist() == [
        0,
        0,
        1,
    ]


def test_the_loss_is_that_of_the_paper():
    """(1 - w) CE(label) + w T^2 CE(soft target, student at T); the Kullback-Leibler distance has the same gradient."""
    rng = np.random.default_rng(1)
    logits = torch.tensor(rng.normal(0, 2, (6, 3)), requires_grad=True)
    targets = torch.tensor(rng.dirichlet([1, 1, 1], 6))
    labels, weights, temperature = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor(rng.uniform(0, 1, 6)), 3.0
    hard = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    loss = distillation_loss(hard, logits, targets, weights, temperature)
    kl = 0.0
    for i in range(6):
        z = (logits[i].detach() / temperature).tolist()
        log_sum = math.log(sum(map(math.exp, z)))
        soft = -sum(float(p) * (value - log_sum) for p, value in zip(targets[i], z, strict=True))
        expected = (1 - weights[i]) * hard[i] + weights[i] * temperature**2 * soft
        assert loss[i].item() == pytest.approx(expected.item(), rel=1e-12)
        student = (logits[i] / temperature).log_softmax(0)
        distance = torch.nn.functional.kl_div(student, targets[i], reduction="sum")
        kl = kl + (1 - weights[i]) * hard[i] + weights[i] * temperature**2 * distance
    (ours,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(kl, logits)
    torch.testing.assert_close(ours, theirs)


def test_texts_are_matched_added_and_left_out(tmp_path):
    held_out = frozenset("tv")  # of which only t is in the splits, as after --max-eval-rows
    data = Data(split("a b c", [0, 1, 2]), split("t", [0]), NAMES, held_out_texts=held_out)
    rows = {"b": (0.1, 0.7, 0.2), "new": (0.2, 0.2, 0.6), "t": (1, 0, 0), "v": (1, 0, 0), "a": (0.5, 0.25, 0.25)}
    s = settings(soft_labels=soft_file(tmp_path / "soft.parquet", rows))
    extended = add_soft_labels(s, data)
    train = extended.train
    assert extended.test is data.test
    assert train.texts == ["a", "b", "c", "new"]
    assert train.labels.tolist() == [0, 1, 2, 2] and train.rows.tolist() == [0, 1, 2, -1]
    expected = [rows["a"], rows["b"], (np.nan,) * 3, rows["new"]]
    np.testing.assert_array_equal(train.soft_labels, expected)
    assert extended.sources == (
        "soft labels: for 2 of the 3 labelled rows, and 1 texts without a label; 2 texts left out "
        "because they are validation or test rows",
    )
    digests, before = extended.fingerprint(), data.fingerprint()
    assert {name: digests[name] for name in before} == before and digests.keys() - before == {"soft_labels"}
    assert data.differences(digests) == extended.differences(digests) == []
    assert extended.differences(before) == ["soft_labels"]
    run = checkpoint.Run(Path("run"), {"settings": {"soft_labels": "soft.csv"}, "data_fingerprint": digests}, {}, None)
    rows["new"] = (0.6, 0.2, 0.2)
    other = add_soft_labels(settings(soft_labels=soft_file(tmp_path / "other.parquet", rows)), data)
    run.check_data(extended)
    with pytest.raises(UserError, match=r"--soft-labels: soft\.csv .* run was started on"):
        run.check_data(other)


@pytest.mark.parametrize(
    ("rows", "names", "parts"),
    [
        ({"a": (0.5, 0.5)}, ("ant", "bee"), ["differs in cat", "--top-k"]),
        ({"a": (0.2, 0.2, 0.2, 0.4)}, (*NAMES, "dog"), ["differs in dog"]),
        ({"a": (0.5, 0.5, 0.5)}, NAMES, ["'a'", "sum 1"]),
        ({"a": (1.5, -0.5, 0.0)}, NAMES, ["'a'", "at least 0"]),
        ({"a": (None, 0.5, 0.5)}, NAMES, ["'a'", "numbers"]),
        ({"a": ("x", "y", "z")}, NAMES, ["'a'", "numbers"]),
    ],
)
def test_mistakes_in_the_file(rows, names, parts, tmp_path):
    data = Data(split("a", [0]), split("t", [0]), NAMES)
    s = settings(soft_labels=soft_file(tmp_path / "soft.parquet", rows, names))
    with pytest.raises(UserError) as error:
        add_soft_labels(s, data)
    assert all(part in str(error.value) for part in ["--soft-labels", "soft.parquet", *parts])


def test_a_file_that_is_not_there_and_flags_without_one(tmp_path):
    for flags, part in (
        (["--soft-labels", str(tmp_path / "no.parquet")], "no file"),
        (["--temperature", "2"], "--temperature: used only with --soft-labels"),
        (["--soft-label-weight", "1"], "--soft-label-weight: used only with --soft-labels"),
    ):
        with pytest.raises(UserError, match=part):
            train(tmp_path / "run", *flags)
        assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def one_hot(tmp_path_factory) -> str:
    """The true labels of TINY's rows as soft labels."""
    data = load_data("synthetic")
    rows = {text: np.eye(4)[label] for text, label in zip(data.train.texts, data.train.labels, strict=True)}
    return soft_file(tmp_path_factory.mktemp("soft") / "one-hot.parquet", rows, data.label_names)


def test_one_hot_soft_labels_of_the_same_rows_train_as_the_labels_do(one_hot, tmp_path):
    """With weight 1 and temperature 1, and again with half a weight; the texts of no labelled row are taken out."""
    hard = train(tmp_path / "hard", *EVERY_STEP)
    data = split_data(load_data("synthetic"), max_train_rows=150, seed=42)
    table = pq.read_table(one_hot)
    keep = pa.array([text in {*data.train.texts} for text in table["text"].to_pylist()])
    file = tmp_path / "same.parquet"
    pq.write_table(table.filter(keep), file)
    for weight in ("1", "0.5"):
        flags = "--soft-labels", str(file), "--soft-label-weight", weight
        soft = train(tmp_path / f"soft-{weight}", *EVERY_STEP, *flags)
        np.testing.assert_allclose(losses(soft), losses(hard), rtol=1e-5)


def test_predict_writes_the_file_and_a_run_goes_on_with_it_alone(bert_run, tmp_path):
    """From a teacher's predictions to a student; resumed, it has the same losses, and not with another file."""
    data = split_data(load_data("synthetic"), max_train_rows=300, seed=42)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in data.train.texts))
    soft = tmp_path / "soft.parquet"
    main(["predict", str(bert_run), str(texts), "--out", str(soft), "--device", "cpu"])
    flags = [*EVERY_STEP, "--soft-labels", str(soft), "--temperature", "2"]
    whole = train(tmp_path / "whole", *flags)
    info = json.loads((whole / "run.json").read_text())
    assert info["num_train_rows"] == 150  # labelled ones
    main(["evaluate", str(whole), "--device", "cpu"])  # a test needs no soft labels
    with interrupt_at(2), pytest.raises(SystemExit):
        train(tmp_path / "stopped", *flags)
    table = pq.read_table(soft)
    resume(tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(whole)
    with interrupt_at(2), pytest.raises(SystemExit):
        train(tmp_path / "other", *flags)
    columns = {name: table[name] for name in table.column_names}
    swapped = {"probability_World": columns["probability_Sports"], "probability_Sports": columns["probability_World"]}
    pq.write_table(pa.table(columns | swapped), soft)
    with pytest.raises(UserError, match="has other rows or classes"):
        resume(tmp_path / "other")

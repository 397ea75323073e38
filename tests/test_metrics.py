"""Metrics against scikit-learn, scipy, brute force, and counts made by hand.

    python -m pytest tests/test_metrics.py

Counts and quotients agree to a few units of the last of 16 digits: 1e-12. The bootstrap's tolerance is written next to it;
everything is seeded, so nothing fails by chance.
"""

import tracemalloc

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import binomtest
from sklearn import metrics as sklearn_metrics

from minicls.metrics import (
    accuracy_interval,
    calibration_error,
    classification_metrics,
    confusion_matrix,
    crossing,
    f1_interval,
    fit_temperature,
    last_crossing,
    mcnemar,
    occurs,
    paired_bootstrap,
    per_class,
    resampled_accuracies,
)

CLOSE = {"rtol": 0, "atol": 1e-12}


def random_rows(n: int, C: int, right: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C, n)
    return labels, np.where(rng.random(n) < right, labels, rng.integers(0, C, n))


def cases():
    yield "random", 4, *random_rows(500, 4, 0.0)
    yield "mostly right", 77, *random_rows(3000, 77, 0.9)
    labels, predictions = random_rows(300, 3, 0.5)
    yield "class absent from the labels", 4, labels, np.where(predictions == 0, 3, predictions)
    yield "class never predicted", 3, labels, np.where(predictions == 2, 0, predictions)
    yield "class in neither", 5, labels, predictions
    yield "one class predicted", 3, labels, np.ones_like(labels)
    yield "all right", 3, labels, labels
    yield "all wrong", 3, labels, (labels + 1) % 3
    yield "one row", 2, labels[:1] * 0, labels[:1] * 0 + 1


@pytest.mark.parametrize(
    ("C", "labels", "predictions"), [case[1:] for case in cases()], ids=[case[0] for case in cases()]
)
def test_metrics_equal_scikit_learn(C, labels, predictions):
    confusion = confusion_matrix(labels, predictions, C)
    classes = {"labels": range(C)}
    np.testing.assert_array_equal(confusion, sklearn_metrics.confusion_matrix(labels, predictions, **classes))
    theirs = sklearn_metrics.precision_recall_fscore_support(labels, predictions, zero_division=0, **classes)
    for ours, reference in zip(per_class(confusion), theirs, strict=False):
        np.testing.assert_allclose(ours, reference, **CLOSE)
    scores = classification_metrics(confusion)
    assert list(scores) == ["accuracy", "precision", "recall", "f1"] and {type(x) for x in scores.values()} == {float}
    # Without `labels`, scikit-learn's macro mean is over the classes that occur in labels or predictions.
    macro = sklearn_metrics.precision_recall_fscore_support(labels, predictions, average="macro", zero_division=0)
    reference = [sklearn_metrics.accuracy_score(labels, predictions), *macro[:3]]
    np.testing.assert_allclose([*scores.values()], reference, **CLOSE)


def test_metrics_counted_by_hand():
    labels, predictions = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 0])
    confusion = confusion_matrix(labels, predictions, 3)
    assert confusion.tolist() == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    precision, recall, f1 = per_class(confusion)
    np.testing.assert_allclose(precision, [2 / 4, 1 / 2, 0], **CLOSE)
    np.testing.assert_allclose(recall, [2 / 3, 1 / 2, 0], **CLOSE)
    np.testing.assert_allclose(f1, [4 / 7, 1 / 2, 0], **CLOSE)
    scores = classification_metrics(confusion)
    assert scores == pytest.approx({"accuracy": 3 / 6, "precision": 1 / 3, "recall": 7 / 18, "f1": 5 / 14}, abs=1e-12)


def test_macro_means_are_over_the_classes_that_occur():
    """Classes 0 and 1 have rows; 2 has none and is predicted once, so it counts as 0; 3 is nowhere, and does not
    count."""
    labels, predictions = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])
    confusion = confusion_matrix(labels, predictions, 4)
    assert occurs(confusion).tolist() == [True, True, True, False]
    assert classification_metrics(confusion)["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3, abs=1e-12)
    assert classification_metrics(np.diag([3, 2, 0]))["f1"] == 1.0 and f1_interval(np.diag([3, 2, 0])) == (1.0, 1.0)
    assert paired_bootstrap(labels, labels, labels)["f1"] == (0, 0, 0)


def test_a_thousand_classes_need_no_table_of_a_million_cells_a_draw():
    """1,000 rows fill at most 1,000 of the cells; all cells of 10,000 draws would be 80 GB, of 500 draws 4 GB."""
    labels, a = random_rows(1000, 1000, 0.5)
    b = random_rows(1000, 1000, 0.5, seed=1)[1]
    confusion = confusion_matrix(labels, a, 1000)
    tracemalloc.start()
    low, high = f1_interval(confusion)
    found = paired_bootstrap(labels, a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6 and 0 < low < high < 1
    assert found["f1"][0] == pytest.approx(
        sklearn_metrics.f1_score(labels, a, average="macro") - sklearn_metrics.f1_score(labels, b, average="macro"),
        abs=0.02,
    )  # each over the classes that it predicts or that have rows


def test_nothing_counted_gives_zeros():
    empty = np.zeros((3, 3), np.int64)
    assert classification_metrics(empty) == {"accuracy": 0, "precision": 0, "recall": 0, "f1": 0}
    assert f1_interval(empty) == (0.0, 0.0)


def test_several_confusion_matrices_at_once_are_each_their_own():
    tables = [confusion_matrix(*random_rows(50, 3, 0.6, seed), 3) for seed in range(4)]
    together = per_class(np.stack(tables))
    for i, table in enumerate(tables):
        for many, one in zip(together, per_class(table), strict=True):
            np.testing.assert_array_equal(many[i], one)


@pytest.mark.parametrize(("n", "C", "right"), [(300, 3, 0.8), (60, 4, 0.5)])
def test_f1_interval_equals_a_bootstrap_over_rows(n, C, right):
    labels, predictions = random_rows(n, C, right)
    low, high = f1_interval(confusion_matrix(labels, predictions, C))
    rng = np.random.default_rng(1)
    resampled = []
    for _ in range(2000):
        rows = rng.integers(0, n, n)
        resampled.append(classification_metrics(confusion_matrix(labels[rows], predictions[rows], C))["f1"])
    sigma = np.std(resampled)
    # The 2.5 % quantile of R draws has a standard error of sqrt(0.025 * 0.975 / R) / 0.0584 sigma (0.0584 is the normal
    # density there): 0.060 sigma for 2,000 draws and 0.027 for 10,000, together 0.066. Four of them allow for the two
    # bounds being checked at once; a real mistake (a 90 % interval, half the rows) is off by 0.3 sigma or more.
    assert abs(low - np.quantile(resampled, 0.025)) < 0.26 * sigma
    assert abs(high - np.quantile(resampled, 0.975)) < 0.26 * sigma


def test_f1_interval_is_seeded_and_holds_the_figure():
    confusion = confusion_matrix(*random_rows(400, 4, 0.9), 4)
    low, high = f1_interval(confusion)
    assert (low, high) == f1_interval(confusion) != f1_interval(confusion, seed=1)
    assert low < classification_metrics(confusion)["f1"] < high
    narrow_low, narrow_high = f1_interval(confusion * 100)
    assert (high - low) / (narrow_high - narrow_low) == pytest.approx(10, rel=0.1)  # 1 / sqrt(n); 4 standard errors
    assert f1_interval(np.diag([5, 5])) == (1.0, 1.0)
    assert len(f1_interval(confusion, resamples=7)) == 2


def binary(*confidences: float) -> np.ndarray:
    return np.array([[p, 1 - p] for p in confidences])


@pytest.mark.parametrize(
    ("probabilities", "labels", "bins", "expected"),
    [
        (binary(1.0, 1.0), [0, 0], 15, 0.0),
        (binary(1.0, 1.0), [0, 1], 15, 0.5),
        (binary(0.8, 0.8, 0.8, 0.8, 0.8), [0, 0, 0, 0, 1], 10, 0.0),
        # bin (0.5, 0.75]: confidence 0.6 and 0.7, one right; bin (0.75, 1]: confidence 0.9, wrong
        (binary(0.6, 0.7, 0.9), [0, 1, 1], 4, (abs(1.3 - 1) + abs(0.9 - 0)) / 3),
        # 0.75 belongs to the bin below it: with 0.6, (0.6 + 0.75 - 1) / 2; with 1.0 it would be |1.75 - 1| + |0.6 - 1|
        (binary(0.75, 0.6, 1.0), [1, 0, 0], 4, (0.35 + 0) / 3),
        (binary(0.3, 0.3), [1, 1], 15, 0.3),  # the second class is predicted with 0.7
        (np.array([[1 + 1e-7, 0.0]]), [0], 15, 1e-7),  # rounding can put a sum above one
        (np.full((4, 4), 0.25), [0, 1, 2, 3], 15, 0.0),
    ],
)
def test_calibration_error_counted_by_hand(probabilities, labels, bins, expected):
    assert calibration_error(probabilities, np.array(labels), bins) == pytest.approx(expected, abs=1e-12)


def test_mcnemar_counted_by_hand():
    labels = np.zeros(10, int)
    a, b = np.array([0] * 8 + [1] * 2), np.array([0] * 4 + [1] * 5 + [0])  # only a: rows 4-7, only b: row 9
    assert mcnemar(labels, a, b) == (4, 1, 2 * (1 + 5) / 2**5)
    assert mcnemar(labels, b, a) == (1, 4, 2 * (1 + 5) / 2**5)
    assert mcnemar(labels, a, a) == (0, 0, 1.0)
    assert mcnemar(np.array([0, 0]), np.array([1, 2]), np.array([2, 1])) == (0, 0, 1.0)  # both wrong, each in its way


@pytest.mark.parametrize(
    ("n", "right_a", "right_b"),
    [(30, 0.5, 0.5), (200, 0.6, 0.9), (7600, 0.94, 0.935), (7600, 0.2, 0.9), (60_000, 0.6, 0.599)],
)
def test_mcnemar_equals_the_binomial_test(n, right_a, right_b):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, n)
    a, b = (np.where(rng.random(n) < right, labels, (labels + 1) % 4) for right in (right_a, right_b))
    only_a, only_b, p = mcnemar(labels, a, b)
    assert only_a == sum((a == labels) & (b != labels)) and only_b == sum((b == labels) & (a != labels))
    # scipy sums in floating point, with about ten good digits in the far tail.
    assert p == pytest.approx(binomtest(only_a, only_a + only_b, 0.5).pvalue, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize(("right", "n"), [(7181, 7600), (0, 5), (5, 5), (1, 2), (60, 100)])
def test_accuracy_interval_equals_wilson(right, n):
    reference = binomtest(right, n).proportion_ci(method="wilson")
    assert accuracy_interval(right / n, n) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_accuracy_interval_holds_the_accuracy_and_stays_within_0_and_1():
    for n in range(1, 200):
        for right in (0, 1, n - 1, n):
            low, high = accuracy_interval(right / n, n)
            assert 0 <= low <= right / n <= high <= 1, (right, n)


@pytest.mark.parametrize(("sharpness", "C"), [(0.3, 3), (1.0, 4), (5.0, 77)])
def test_temperature_is_the_minimum_that_scipy_finds(sharpness, C):
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(2000, C))
    labels = np.array([rng.choice(C, p=np.exp(row)) for row in log_softmax(logits, axis=1)])  # calibrated as they are
    logits = sharpness * logits + 700  # a constant moves no softmax, and must not overflow
    nll = lambda T: -log_softmax(logits / T, axis=1)[np.arange(2000), labels].mean()  # noqa: E731
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(
        minimize_scalar(nll, bounds=(0.01, 100), method="bounded", options={"xatol": 1e-9}).x, rel=1e-6
    )
    assert found == pytest.approx(sharpness, rel=0.1)  # 2,000 rows tell it to about three percent


def test_temperature_where_no_finite_one_is_the_best():
    logits = np.array([[2.0, 1.0], [0.0, 3.0]])
    assert fit_temperature(logits, np.array([0, 1])) == pytest.approx(0.01)  # all right: the sharper, the better
    assert fit_temperature(logits, np.array([1, 0])) == pytest.approx(100)  # all wrong: the flatter, the better


def test_paired_bootstrap_of_accuracy_counted_by_hand():
    """100 rows, 20 of them right for a alone and 10 for b alone: the difference of a row is 1, -1 or 0, with variance
    0.3 - 0.1**2 = 0.29. The mean of 100 has a standard error of 0.0539, and 1.96 of them are the interval, but for the
    grid of 1/100 that the mean moves on."""
    labels = np.zeros(100, int)
    a, b = np.array([0] * 20 + [1] * 10 + [0] * 70), np.array([1] * 20 + [0] * 10 + [0] * 70)
    difference, low, high = paired_bootstrap(labels, a, b)["accuracy"]
    assert difference == pytest.approx(0.1, abs=1e-12)
    assert (low, high) == pytest.approx((0.1 - 1.96 * 0.0539, 0.1 + 1.96 * 0.0539), abs=0.011)
    assert paired_bootstrap(labels, a, a) == {"accuracy": (0, 0, 0), "f1": (0, 0, 0)}


@pytest.mark.parametrize(("n", "C"), [(300, 3), (500, 20)])
def test_paired_bootstrap_equals_one_over_rows(n, C):
    labels, a = random_rows(n, C, 0.8)
    b = np.where(np.random.default_rng(5).random(n) < 0.7, a, random_rows(n, C, 0.5, seed=9)[1])
    found = paired_bootstrap(labels, a, b)
    assert found == paired_bootstrap(labels, a, b) != paired_bootstrap(labels, a, b, seed=1)
    scores = [classification_metrics(confusion_matrix(labels, predictions, C)) for predictions in (a, b)]
    rng = np.random.default_rng(1)
    resampled = {"accuracy": [], "f1": []}
    for _ in range(2000):
        rows = rng.integers(0, n, n)
        one, two = (classification_metrics(confusion_matrix(labels[rows], p[rows], C)) for p in (a, b))
        for name, values in resampled.items():
            values.append(one[name] - two[name])
    for name, values in resampled.items():
        difference, low, high = found[name]
        assert difference == pytest.approx(scores[0][name] - scores[1][name], abs=1e-12)
        # As above, a quarter of a sigma; and accuracies lie on a grid of 1 / n.
        tolerance = 0.26 * np.std(values) + (name == "accuracy") / n
        assert abs(low - np.quantile(values, 0.025)) < tolerance and abs(high - np.quantile(values, 0.975)) < tolerance
    mirrored = paired_bootstrap(labels, b, a)
    assert mirrored["f1"][0] == pytest.approx(-found["f1"][0], abs=1e-12)


@pytest.mark.parametrize(
    ("values", "place", "sign"),
    [
        ([2.0, 1.0, -1.0], 1.5, -1),
        ([-1.0, 3.0, 1.0], 0.25, 1),
        ([1.0, -1.0, 3.0], 1.25, 1),  # the last of two
        ([1.0, 2.0, 3.0], None, 1),
        ([-1.0, 0.0, -1.0], None, -1),  # touches, does not change
        ([1.0, 0.0, -1.0], 1.0, -1),
        ([1.0, -1.0, 0.0], 0.5, -1),
        ([0.0, 0.0, 1.0], None, 1),
        ([0.0, 0.0, 0.0], None, 0),
        ([1.0, -1.0, 0.0, -1.0], 0.5, -1),  # a later touch is no change
    ],
)
def test_the_last_crossing_by_hand(values, place, sign):
    (found,), (later,) = last_crossing(np.arange(float(len(values))), np.array([values]))
    assert later == sign and (np.isnan(found) if place is None else found == pytest.approx(place, abs=1e-12))


def test_a_zero_for_a_while_between_the_signs_ends_with_the_later_one():
    (found,), _ = last_crossing(np.arange(4.0), np.array([[1.0, 0.0, 0.0, -1.0]]))
    assert found == 2.0


def test_a_crossing_by_hand_with_replicates_on_both_sides():
    """a - b is 0.05 at 1,000 rows and -0.1 at 10,000: a third of the way in the logarithm. Of 100 replicates, 3 are
    below 0 everywhere (crossed before), 2 above 0 everywhere (not yet); the others cross half way, at 10^3.5."""
    sizes, a, b = [100, 1000, 10_000], np.array([0.8, 0.8, 0.8]), np.array([0.6, 0.75, 0.9])
    differences = np.array([[0.2, 0.1, -0.1]] * 95 + [[-0.1, -0.1, -0.1]] * 3 + [[0.1, 0.1, 0.1]] * 2)
    found = crossing(sizes, a - b, differences)
    assert found["rows"] == pytest.approx(10 ** (3 + 1 / 3)) and found["later"] == -1
    assert found["without"] == pytest.approx(0.05)
    assert found["low"] == -np.inf  # 3 %: open
    assert found["high"] == pytest.approx(10**3.5)  # 2 %: not
    mirrored = crossing(sizes, b - a, -differences)
    assert mirrored | {"later": -1} == found and mirrored["later"] == 1


def test_no_crossing_by_hand():
    """a is ahead at both sizes; 10 of 100 replicates cross at the geometric middle, so the interval is open above."""
    differences = np.array([[0.1, -0.1]] * 10 + [[0.1, 0.1]] * 90)
    found = crossing([100, 10_000], np.array([0.1, 0.05]), differences)
    assert (found["rows"], found["later"], found["without"]) == (None, 1, 0.9)
    assert found["low"] == pytest.approx(1000) and found["high"] == np.inf
    never = crossing([100, 10_000], np.array([0.1, 0.05]), np.ones((100, 2)))
    assert (never["rows"], never["without"]) == (None, 1.0) and np.isnan([never["low"], never["high"]]).all()


def test_replicates_over_seeds_and_rows_equal_brute_force():
    """Three runs of one point and one of another on 60 rows, drawn one by one."""
    rng = np.random.default_rng(3)
    right = rng.random((4, 60)) < np.array([0.9, 0.7, 0.6, 0.75])[:, None]
    means, replicates = resampled_accuracies([right[:3], right[3:]])
    assert means == pytest.approx([right[:3].mean(), right[3].mean()], abs=1e-12) and replicates.shape == (10_000, 2)
    brute = []
    for _ in range(4000):
        rows, seeds = rng.integers(0, 60, 60), rng.integers(0, 3, 3)
        brute.append([np.mean([right[seed, rows].mean() for seed in seeds]), right[3, rows].mean()])
    brute = np.array(brute)
    # Standard errors: of a mean sigma / 63, of a standard deviation sigma / 89 (4,000 draws); five of them.
    for values in (replicates, brute):
        assert values.mean(0) == pytest.approx(means, abs=5 * brute.std(0).max() / 63)
    np.testing.assert_allclose(replicates.std(0), brute.std(0), rtol=5 / 89)
    assert np.corrcoef(replicates.T)[0, 1] == pytest.approx(
        np.corrcoef(brute.T)[0, 1], abs=5 / 63
    )  # the rows are the same
    assert replicates.std(0)[1] < np.sqrt(0.75 * 0.25 / 60) * 1.05  # one seed: rows alone


def test_published_predictions_reproduce_their_authors_figures(shared):
    table = pq.read_table(shared / "data" / "ag_news" / "published_test_predictions.parquet")
    labels, *models = (table[name].to_numpy() for name in ("label", "distilbert", "linear_svc", "llama31_8b_sft"))
    accuracies = [classification_metrics(confusion_matrix(labels, model, 4))["accuracy"] for model in models]
    assert [round(accuracy, 4) for accuracy in accuracies] == [0.9422, 0.9234, 0.9543]
    assert sum(np.all([model != labels for model in models], axis=0)) == 220
    only_a, only_b, p = mcnemar(labels, models[0], models[2])
    assert only_b - only_a == round(7600 * (accuracies[2] - accuracies[0]))
    assert p == pytest.approx(binomtest(only_a, only_a + only_b).pvalue, rel=1e-9)


def test_published_predictions_side_by_side(shared):
    """The 8B model beats DistilBERT by 1.21 points, and both beat the linear one, far outside the error bar."""
    table = pq.read_table(shared / "data" / "ag_news" / "published_test_predictions.parquet")
    labels, bert, svc, llama = (
        table[name].to_numpy() for name in ("label", "distilbert", "linear_svc", "llama31_8b_sft")
    )
    for a, b, points in ((llama, bert, 0.0121), (bert, svc, 0.0188), (llama, svc, 0.0309)):
        only_a, only_b, p = mcnemar(labels, a, b)
        difference, low, high = paired_bootstrap(labels, a, b)["accuracy"]
        assert difference == pytest.approx((only_a - only_b) / 7600, abs=1e-12) and round(difference, 4) == points
        # McNemar's variance: that of a row's difference, 1 or -1 where one alone is right.
        half = 1.96 * np.sqrt(((only_a + only_b) / 7600 - difference**2) / 7600)
        assert (low, high) == pytest.approx((difference - half, difference + half), abs=3e-4)  # 0.1 standard errors
        assert p < 1e-4 and p == pytest.approx(binomtest(only_a, only_a + only_b).pvalue, rel=1e-9) and low > 0
        _, f1_low, f1_high = paired_bootstrap(labels, a, b)["f1"]
        assert (f1_low, f1_high) == pytest.approx(
            (low, high), abs=1e-3
        )  # balanced classes: F1 and accuracy hardly differ

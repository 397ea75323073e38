"""The baseline against scikit-learn and transformers used directly.   python -m pytest tests/test_baseline.py"""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from runs import results, write_news
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss

from minicls import baseline, weights
from minicls.__main__ import main
from minicls.config import UserError
from minicls.data import load_data, split_data, stratified_rows
from minicls.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def news(tmp_path_factory):
    return write_news(tmp_path_factory.mktemp("news") / "data", 240, 80)


def run(run_dir, data, *flags):
    main(["baseline", "--data", str(data), "--threads", "1", "--device", "cpu", "--output-dir", str(run_dir), *flags])
    return read(run_dir / "predictions.parquet")


def read(file) -> dict[str, np.ndarray]:
    return {name: np.array(values) for name, values in pq.read_table(file).to_pydict().items()}


def probabilities(frame, C=4) -> np.ndarray:
    return np.stack([frame[f"probability_{c}"] for c in range(C)], axis=1)


def chosen(fitted_on, chooses, class_weight=None) -> LogisticRegression:
    """The regression with the best macro F1 on the second (features, labels), then the lowest loss, fitted on the
    first."""

    def quality(model):
        loss = log_loss(chooses[1], model.predict_proba(chooses[0]), labels=model.classes_)
        return f1_score(chooses[1], model.predict(chooses[0]), average="macro"), -loss

    models = [
        LogisticRegression(C=10.0**k, max_iter=1000, class_weight=class_weight).fit(*fitted_on) for k in range(-2, 4)
    ]
    return max(models, key=quality)


def vectors(*texts):
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+")
    return [vectorizer.fit_transform(texts[0]), *map(vectorizer.transform, texts[1:])]


@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_tfidf_equals_scikit_learn(class_weight, news, tmp_path):
    """A fifth of the training rows chooses C; the model is then fitted on all of them."""
    frame = run(tmp_path / "run", news, *(["--class-weights", class_weight] if class_weight else []))
    data = load_data(str(news))
    inside = stratified_rows(data.train, 48)
    part, chooses = data.train.select(np.setdiff1d(np.arange(240), inside)), data.train.select(inside)
    features = vectors(part.texts, chooses.texts)
    C = chosen((features[0], part.labels), (features[1], chooses.labels), class_weight).C
    whole, test = vectors(data.train.texts, data.test.texts)
    model = LogisticRegression(C=C, max_iter=1000, class_weight=class_weight).fit(whole, data.train.labels)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["C"] == C
    np.testing.assert_allclose(probabilities(frame), model.predict_proba(test), atol=1e-6, rtol=0)
    assert (
        frame["prediction"].tolist() == model.predict(test).tolist()
        and frame["label"].tolist() == data.test.labels.tolist()
    )
    assert not (tmp_path / "run" / "validation.parquet").exists()  # these rows were fitted on in the end


def test_rows_held_out_as_the_scripts_hold_them_out(news, tmp_path):
    frame = run(
        tmp_path / "run",
        news,
        "--validation-size",
        "40",
        "--max-train-rows",
        "100",
        "--max-eval-rows",
        "50",
        "--seed",
        "7",
    )
    data = split_data(load_data(str(news)), 40, 100, 50, 7)
    validation = data.validation
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["data_fingerprint"] == data.fingerprint() and info["num_train_rows"] == len(data.train) == 100
    train, chooses, test = vectors(data.train.texts, validation.texts, data.test.texts)
    model = chosen((train, data.train.labels), (chooses, validation.labels))
    np.testing.assert_allclose(probabilities(frame), model.predict_proba(test), atol=1e-6, rtol=0)
    held_out = read(tmp_path / "run" / "validation.parquet")
    np.testing.assert_allclose(probabilities(held_out), model.predict_proba(chooses), atol=1e-6, rtol=0)
    assert held_out["row"].tolist() == validation.rows.tolist() and frame["row"].tolist() == data.test.rows.tolist()
    found = results(tmp_path / "run")
    assert found["temperature"] > 0 and found["accuracy"] == pytest.approx(model.score(test, data.test.labels))


def test_embeddings_are_the_mean_of_transformers_hidden_states(bert_run, news, tmp_path):
    from transformers import BertModel

    frame = run(
        tmp_path / "run",
        news,
        "--features",
        str(bert_run),
        "--dtype",
        "fp32",
        "--validation-size",
        "40",
        "--max-length",
        "8",
    )
    data = split_data(load_data(str(news)), 40)
    model, tokenizer = BertModel.from_pretrained(bert_run).eval(), load_tokenizer(bert_run)
    cls, sep = tokenizer.control_ids(["[CLS]", "[SEP]"])

    def pooled(texts):
        rows = [[cls, *ids[:6], sep] for ids in tokenizer.encode(texts)]
        with torch.no_grad():
            return np.stack([model(torch.tensor([row])).last_hidden_state[0].mean(0).numpy() for row in rows])

    theirs = [pooled(split.texts) for split in (data.train, data.test, data.validation)]
    settings = baseline.Settings(max_length=8, dtype="fp32")
    ours, _ = baseline.embeddings(bert_run, (data.train, data.test, data.validation), settings, torch.device("cpu"))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6, rtol=0)
    regression = chosen((theirs[0], data.train.labels), (theirs[2], data.validation.labels))
    np.testing.assert_allclose(
        probabilities(frame), regression.predict_proba(theirs[1]), atol=1e-3, rtol=0
    )  # lbfgs stops early
    assert frame["num_tokens"].tolist() == [len(ids) for ids in tokenizer.encode(data.test.texts)]


def test_a_model_directory_needs_no_head(bert_run, tmp_path, capsys):
    """Sentence-transformers' layout: the encoder's tensors alone, without a prefix, and no classes in the config."""
    from transformers import BertModel

    BertModel.from_pretrained(bert_run).save_pretrained(tmp_path / "encoder")
    load_tokenizer(bert_run).save(tmp_path / "encoder")
    config = weights.read_config(tmp_path / "encoder")
    for name in ("id2label", "label2id", "problem_type", "num_labels"):
        config.pop(name, None)
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(config))
    flags = ["--features", str(tmp_path / "encoder"), "--max-train-rows", "60", "--max-eval-rows", "20"]
    run(tmp_path / "run", "synthetic", *flags)
    assert "the head and the pooler are not used" in capsys.readouterr().out


def write_csv(folder, train, test=(("a b", "x"), ("c d", "y"))):
    folder.mkdir()
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return folder


def test_a_chinese_character_is_a_word():
    whole, _ = baseline.tfidf(["我爱 NLP2", "天气, it's"], ["爱"])
    assert whole.shape == (2, 3 + 2 + 4 + 3)  # 我 爱 nlp2, 天 气 it s, and their pairs


def test_two_classes_and_one_without_training_rows(tmp_path):
    """Its probability is next to nothing, and the loss stays finite."""
    rows = [("aa bb", "x"), ("cc dd", "y")] * 6
    data = write_csv(tmp_path / "data", rows, [("aa", "x"), ("dd", "y"), ("ee", "z")])
    frame = run(tmp_path / "run", data, "--label-names", "x", "y", "z")
    assert frame["prediction"].tolist()[:2] == [0, 1] and frame["probability_2"].max() < 1e-12
    assert (
        probabilities(frame, 3).sum(1) == pytest.approx(np.ones(3), abs=1e-6)
        and 0 < results(tmp_path / "run")["loss"] < 31
    )
    two = run(tmp_path / "two", write_csv(tmp_path / "more", rows))
    features = vectors([text for text, _ in rows], ["a b", "c d"])
    C = json.loads((tmp_path / "two" / "run.json").read_text())["C"]
    model = LogisticRegression(C=C, max_iter=1000).fit(features[0], [label for _, label in rows])
    np.testing.assert_allclose(probabilities(two, 2), model.predict_proba(features[1]), atol=1e-6, rtol=0)


def test_two_training_rows_choose_no_C(tmp_path, capsys):
    run(tmp_path / "run", write_csv(tmp_path / "data", [("a", "x"), ("b", "y")]))
    assert "too few training rows to choose C, so C is 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["C"] == 1.0


def test_mistakes_are_told_in_one_line(news, tmp_path):
    with pytest.raises(UserError, match="--max-length: --features tfidf does not use it"):
        run(tmp_path / "run", news, "--max-length", "8")
    with pytest.raises(UserError, match="--data: the 2 training rows are all x"):
        run(tmp_path / "run", write_csv(tmp_path / "one", [("a", "x"), ("b", "x")]), "--label-names", "x", "y")
    with pytest.raises(UserError, match="--features tfidf: no word in the training texts"):
        run(tmp_path / "run", write_csv(tmp_path / "none", [("?", "x"), ("!", "y")] * 5))
    with pytest.raises(UserError, match="--features: no directory a/b/c"):
        run(tmp_path / "run", news, "--features", "a/b/c")
    assert not (tmp_path / "run").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match=r"--output-dir: .* is not empty"):
        run(tmp_path / "full", news)


def test_the_report_takes_it_like_any_run(bert_run, tmp_path, capsys):
    flags = ["--max-train-rows", "256", "--max-eval-rows", "100"]
    run(tmp_path / "run", "synthetic", *flags)
    main(["report", str(bert_run), str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"| {tmp_path / 'run'} | tfidf | logistic regression | - | 100 |" in text

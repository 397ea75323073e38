"""The training loop: published schedule, exact losses, files of a run.   python -m pytest tests/test_train.py

Tolerances: everything runs in fp32 where two orders of summation are compared. Losses differ by a few 1e-7 then, the bound
is 1e-5. Weights differ by 1e-6, the bound is 1e-4: Adam divides by the gradient's size, so rounding in a gradient near zero
may grow. Nothing is random from run to run, so no failure is chance. Only the accuracy of the run that learns could fall
otherwise on another CPU: seeds 42 and 0 to 8 all gave 1.00, and the bound is 0.9.
"""

import json
import math
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from runs import (
    CLASSES,
    EVERY_STEP,
    LOSS_FLAGS,
    MODEL_FILES,
    SCRIPTS,
    events,
    interrupt_at,
    losses,
    padded,
    results,
    resume,
    smoothed,
    their_class_weights,
    train,
    without_dropout,
    write_news,
    write_uneven,
)
from safetensors.torch import load_file

import train_bert
import train_qwen
from minicls import checkpoint, metrics, weights
from minicls import results as result_files
from minicls.batch import pack, step_rows
from minicls.checkpoint import checkpoints, every_steps
from minicls.config import UserError
from minicls.data import Data, Split, load_data, split_data
from minicls.optim import cosine_lr, make_class_weights, make_optimizer
from minicls.predict import evaluate
from minicls.tiny import SIZES
from minicls.tokenizer import bert_rows, load_tokenizer, text_rows


@pytest.fixture(scope="module")
def news(tmp_path_factory):
    return write_news(tmp_path_factory.mktemp("news") / "news")


@pytest.fixture(scope="module")
def learned(news, tmp_path_factory):
    """A run long enough to learn: 40 steps, though an epoch has 19 and one was asked for."""
    flags = [
        "--learning-rate",
        "5e-3",
        "--warmup-ratio",
        "0.2",
        "--epochs",
        "1",
        "--max-steps",
        "40",
        "--eval-every",
        "0.3",
    ]
    flags += ["--max-train-rows", "600", "--max-eval-rows", "200", "--log-every", "4", "--save-every", "0.2"]
    return train(tmp_path_factory.mktemp("learned") / "run", "--data", str(news), *flags)


@pytest.fixture(scope="module")
def calm(bert_run, tmp_path_factory):
    return without_dropout(bert_run, tmp_path_factory.mktemp("calm") / "model")


@pytest.fixture(scope="module")
def plain(calm, tmp_path_factory):
    return train(tmp_path_factory.mktemp("plain") / "run", "--model", str(calm), *EVERY_STEP)


def predictions(run_dir):
    return pq.read_table(run_dir / "predictions.parquet").to_pydict()


# Schedule and optimizer.


def test_the_defaults_are_the_published_steps(tmp_path, monkeypatch):
    split = Split(["news"] * 120_000, np.arange(120_000) % 4, np.arange(120_000))
    monkeypatch.setattr("minicls.data.load_data", lambda *_: Data(split, split.select(np.arange(8)), CLASSES))
    with interrupt_at(1), pytest.raises(SystemExit):
        train_bert.main(["--model", "tiny", "--device", "cpu", "--threads", "1", "--output-dir", str(tmp_path / "run")])
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (info["total_steps"], info["num_train_rows"]) == (9375, 120_000)
    every = every_steps(info["settings"]["eval_every"], 9375)
    assert [*range(every, 9376, every)] == [938, 1876, 2814, 3752, 4690, 5628, 6566, 7504, 8442]


@pytest.mark.parametrize(
    ("steps", "peak", "ratio", "warmup"), [(9375, 1e-5, 0.0, 0), (120_000 // (12 * 8), 1.2e-5, 0.01, 13)]
)
def test_schedule_is_that_of_transformers(steps, peak, ratio, warmup):
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps):
        assert cosine_lr(step, steps, peak, ratio) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=0)
        optimizer.step()
        schedule.step()


def test_optimizer_groups_are_those_of_the_trainer():
    from transformers import BertConfig, BertForSequenceClassification, Trainer

    values = SIZES["tiny-bert"] | {"vocab_size": 50}
    hugging_face = BertForSequenceClassification(BertConfig(**values))
    decaying = set(Trainer.get_decay_parameter_names(None, hugging_face))
    model, _, _ = weights.build_model(weights.BERT, values, None, 0, torch.device("cpu"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay, rest = make_optimizer(model, 1e-5, 1e-6).param_groups
    assert {names[p] for p in decay["params"]} == decaying
    assert {names[p] for p in rest["params"]} == {name for name, _ in hugging_face.named_parameters()} - decaying
    assert (decay["weight_decay"], rest["weight_decay"]) == (1e-6, 0.0)
    assert all((g["lr"], g["betas"], g["eps"]) == (1e-5, (0.9, 0.999), 1e-8) for g in (decay, rest))


@pytest.mark.parametrize(("num_rows", "batch"), [(150, 64), (128, 64), (10, 64), (65, 1)])
def test_step_rows_cover_each_epoch_once(num_rows, batch):
    steps = math.ceil(num_rows / batch)
    epochs = [
        np.concatenate([step_rows(epoch * steps + i, num_rows, batch, seed=42) for i in range(steps)])
        for epoch in range(3)
    ]
    assert all(sorted(epoch) == [*range(num_rows)] for epoch in epochs)
    other_seed = np.concatenate([step_rows(i, num_rows, batch, seed=43) for i in range(steps)])
    orders = {tuple(order) for order in (*epochs, other_seed)}
    assert len(orders) == 4  # two orders of 10 rows are equal with a chance of 3e-7; these seeds' are not
    assert max(len(step_rows(i, num_rows, batch, seed=42)) for i in range(steps)) <= batch


# The loss of a step, whatever way it was computed.


def test_loss_is_the_mean_over_the_rows_of_the_step(calm, tmp_path):
    """With a learning rate of 0 every step's loss follows from one look at each row, also in a window of 22 = 6 + 6 + 5 + 5."""
    run = train(tmp_path / "run", "--model", str(calm), *EVERY_STEP, "--micro-batch-size", "16", "--learning-rate", "0")
    data = split_data(load_data("synthetic"), max_train_rows=150, seed=42)
    model, _, _ = weights.build_model(weights.BERT, weights.read_config(run), run, 0, torch.device("cpu"))
    rows, _ = bert_rows(load_tokenizer(run), data.train.texts, max_length=512)
    with torch.no_grad():
        logits = torch.cat([model.eval()(pack([row])) for row in rows])
    row_losses = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(data.train.labels), reduction="none"
    ).numpy()
    expected = [row_losses[step_rows(step, 150, 64, seed=42)].mean() for step in range(6)]
    assert [loss for _, loss, _ in losses(run)] == pytest.approx(expected, rel=1e-5)
    assert [e["epoch"] for e in events(run, "train")] == pytest.approx(
        [64 / 150, 128 / 150, 1, 214 / 150, 278 / 150, 2]
    )
    assert all(
        torch.equal(tensor, load_file(run / "model.safetensors")[name]) for name, tensor in model.state_dict().items()
    )


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 2, 2, 3], [1] * 9 + [0, 2, 3] * 2, [3, 2, 1, 0]])
def test_balanced_class_weights_are_those_of_scikit_learn(labels):
    labels = np.array(labels)
    assert make_class_weights(labels, 4, "balanced") == pytest.approx(their_class_weights("balanced", labels), rel=1e-6)
    assert make_class_weights(labels, 4, "none").tolist() == [1.0] * 4


def test_a_class_without_rows_has_no_weight():
    """The others weigh what scikit-learn says of them alone."""
    assert make_class_weights(np.array([0, 0, 2]), 4, "balanced").tolist() == [0.75, 0.0, 1.5, 0.0]


@pytest.mark.parametrize("head", ["bert", "qwen linear"])
@pytest.mark.parametrize("flags", LOSS_FLAGS)
def test_loss_with_class_weights_and_smoothing(flags, head, tmp_path):
    """The weighted losses of a window over the sum of their weights, in windows of 64, 64 and few rows in unequal parts.

    From transformers' logits, as with a learning rate of 0 the weights saved are those of every step.
    """
    from transformers import AutoModelForSequenceClassification

    scheme, smoothing = LOSS_FLAGS[flags]
    news = write_uneven(tmp_path / "news")
    given = [
        "--data",
        str(news),
        *EVERY_STEP,
        "--max-eval-rows",
        "4",
        "--micro-batch-size",
        "16",
        "--learning-rate",
        "0",
    ]
    given += ["--max-steps", "3", *flags.split()]
    if head == "bert":  # without dropout
        start = train(
            tmp_path / "start", "--data", str(news), "--max-steps", "1", "--max-eval-rows", "4", "--dtype", "fp32"
        )
        run = train(tmp_path / "run", "--model", str(without_dropout(start, tmp_path / "calm")), *given)
    else:
        run = train(tmp_path / "run", "--head", "linear", *given, script=train_qwen)
    data = split_data(load_data(str(news)), max_train_rows=150, seed=42)
    tokenizer, texts, labels = load_tokenizer(run), data.train.texts, data.train.labels
    rows, _ = bert_rows(tokenizer, texts, 512) if head == "bert" else text_rows(tokenizer, texts, 512)
    model = AutoModelForSequenceClassification.from_pretrained(run, dtype=torch.float32).eval()
    with torch.no_grad():
        log_likelihoods = model(**padded(rows, model.config.pad_token_id)).logits.log_softmax(1)
    weight = their_class_weights(scheme, labels)[labels]
    row_losses = np.array([smoothed(x, y, smoothing).item() for x, y in zip(log_likelihoods, labels, strict=True)])
    windows = [step_rows(step, len(labels), 64, seed=42) for step in range(3)]
    expected = [(row_losses * weight)[window].sum() / weight[window].sum() for window in windows]
    assert [loss for _, loss, _ in losses(run)] == pytest.approx(expected, rel=1e-5)
    assert len(windows[2]) % 16 and np.ptp(np.bincount(labels)) > 20


COMPILED = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")


@pytest.mark.parametrize(
    "variant",
    [
        ["--micro-batch-size", "16"],
        ["--micro-batch-size", "16", "--activation-checkpointing"],
        pytest.param(["--compile"], marks=[pytest.mark.slow, COMPILED]),
    ],
    ids=" ".join,
)
def test_same_training_another_way(variant, calm, plain, tmp_path):
    run = train(tmp_path / "run", "--model", str(calm), *EVERY_STEP, *variant)
    assert np.array(losses(run)) == pytest.approx(np.array(losses(plain)), rel=1e-5)
    trained, expected = load_file(run / "model.safetensors"), load_file(plain / "model.safetensors")
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-4)


# A run's files.


def test_it_learns(learned):
    assert results(learned)["accuracy"] > 0.9  # chance: 0.25
    assert losses(learned)[0][1] > 1.0 > 0.5 > losses(learned)[-1][1]  # log 4 = 1.39 at first


def test_metrics(learned):
    trained, evaluated = events(learned, "train"), events(learned, "eval", "test")
    assert len(trained) + len(evaluated) == len((learned / "metrics.jsonl").read_text().splitlines())
    assert [e["step"] for e in trained] == [*range(4, 41, 4)]
    assert [e["step"] for e in evaluated] == [12, 24, 36, 40]  # 0.3 of 40 steps, and the last
    needed = {"event", "step", "epoch", "loss", "learning_rate", "grad_norm", "samples_per_second", "tokens_per_second"}
    assert all(e.keys() >= needed for e in trained)
    assert all(
        e.keys() == {"event", "split", "step", "loss", "accuracy", "precision", "recall", "f1"} for e in evaluated
    )
    assert [e["learning_rate"] for e in trained] == [cosine_lr(step, 40, 5e-3, 0.2) for step in range(3, 40, 4)]
    assert trained[-1]["epoch"] == (2 * 600 + 2 * 32) / 600  # data repeats: 19 + 19 + 2 steps


def test_results(learned):
    found, evaluated = results(learned), events(learned, "eval", "test")
    assert found.keys() >= {
        *(
            "accuracy",
            "precision",
            "recall",
            "f1",
            "f1_low",
            "f1_high",
            "num_test_rows",
            "final_step",
            "best_step_on_test",
        ),
        *("best_f1_on_test", "train_seconds", "eval_seconds", "evaluations", "tokens_per_second", "samples_per_second"),
        *("peak_memory_bytes", "device"),
    }
    assert {name: found[name] for name in ("loss", "accuracy", "f1")}.items() <= evaluated[
        -1
    ].items()  # the last step, unselected
    assert (found["num_test_rows"], found["final_step"], found["headline_step"]) == (200, 40, 40)
    best = max(evaluated, key=lambda e: e["f1"])  # the earliest of equals
    assert (found["best_step_on_test"], found["best_f1_on_test"]) == (best["step"], best["f1"])
    assert found["f1_low"] <= found["f1"] <= found["f1_high"] <= 1
    assert found["train_seconds"] > 0 and found["eval_seconds"] > 0 and found["peak_memory_bytes"] > 2**20
    assert np.sum(found["confusion"]) == 200 and np.trace(found["confusion"]) == round(200 * found["accuracy"])


def test_predictions(learned, news):
    found, labels = predictions(learned), load_data(str(news)).test.labels
    probabilities = np.array([found[f"probability_{c}"] for c in range(4)])
    assert [*found] == [
        "row",
        "label",
        "prediction",
        "num_tokens",
        "text_hash",
        *(f"probability_{c}" for c in range(4)),
    ]
    assert found["row"] == [*range(200)] and found["label"] == labels.tolist()
    assert found["prediction"] == probabilities.argmax(0).tolist()
    assert probabilities.sum(0) == pytest.approx(np.ones(200), abs=1e-6)
    assert np.mean(found["prediction"] == labels) == results(learned)["accuracy"]


def test_run_directory(learned, news):
    config, info = (json.loads((learned / name).read_text()) for name in ("config.json", "run.json"))
    assert [config["id2label"][str(i)] for i in range(4)] == [*CLASSES]
    assert config["pad_token_id"] == 0
    assert info["settings"]["epochs"] == 1 and info["settings"]["max_steps"] == info["total_steps"] == 40
    assert info["versions"].keys() >= {"minicls", "python", "torch", "tokenizers"} and "CPU" in info["device"]
    assert info["revision"] is None and info["data_fingerprint"] == load_data(str(news)).fingerprint()
    for name in ("curves.png", "confusion.png"):
        assert (learned / name).read_bytes().startswith(b"\x89PNG\r\n") and (learned / name).stat().st_size > 5000
    assert [*(learned / "tensorboard").glob("events.out.tfevents.*")]
    assert [*checkpoints(learned)] == [32, 40]  # the newest two
    for directory in (learned, *checkpoints(learned).values()):
        assert all((directory / name).is_file() for name in MODEL_FILES)
    last = checkpoints(learned)[40]
    assert (last / "model.safetensors").read_bytes() == (learned / "model.safetensors").read_bytes()
    assert not [*learned.rglob("*.tmp")]


def test_evaluating_a_directory_repeats_its_predictions(learned, news, tmp_path):
    run = tmp_path / "run"
    evaluate([str(learned), "--data", str(news), "--max-eval-rows", "200", "--output-dir", str(run)])
    assert predictions(run) == predictions(learned)
    assert results(run)["f1"] == results(learned)["f1"] and results(run)["final_step"] == 0
    assert not events(run, "train") and not checkpoints(run)
    counts = [json.loads((folder / "run.json").read_text())["num_train_rows"] for folder in (run, learned)]
    assert counts[0] == counts[1]  # the rows that the model was trained on, not those of the data set


@pytest.mark.parametrize("head", ["linear", "options"])
def test_evaluating_on_other_classes_is_an_error_where_a_head_has_its_own(head, learned, news, tmp_path):
    """A language model may be asked about any classes; a linear head knows only its own."""
    model = learned
    if head == "linear":
        flags = ["--data", str(news), "--head", "linear", "--max-steps", "1", "--max-eval-rows", "8"]
        model = train(tmp_path / "linear", *flags, script=train_qwen)
    with pytest.raises(UserError, match=r"--data: .* was not trained on its classes, World, Sports"):
        evaluate([str(model), "--data", "synthetic", "--output-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_headline_is_the_step_best_on_validation(news, tmp_path, monkeypatch):
    """The F1 on the 40 validation rows is scripted, for the best step to be neither the last nor by chance."""
    original, script = metrics.evaluate_logits, iter([0.1, 0.5, 0.3, 0.5, 0.2])

    def evaluate_logits(logits, labels):
        scores, confusion = original(logits, labels)
        return scores | ({"f1": next(script)} if len(labels) == 40 else {}), confusion

    def write_results(run_dir, data, tokenizer, logits, *rest):
        handed.extend(original(logits[x], data.validation.labels)[0]["loss"] for x in logits if x == "validation")
        return write(run_dir, data, tokenizer, logits, *rest)

    write, handed = result_files.write_results, []
    monkeypatch.setattr(metrics, "evaluate_logits", evaluate_logits)
    monkeypatch.setattr(result_files, "write_results", write_results)
    flags = [
        "--data",
        str(news),
        "--validation-size",
        "40",
        "--max-steps",
        "10",
        "--dtype",
        "fp32",
        "--learning-rate",
        "3e-3",
    ]
    run = train(tmp_path / "run", *flags, "--eval-every", "2", "--save-every", "3", "--keep-checkpoints", "1")
    found = results(run)
    assert [e["step"] for e in events(run, "eval", "validation")] == [e["step"] for e in events(run, "eval", "test")]
    assert (found["headline_step"], found["best_step_on_validation"], found["final_step"]) == (4, 4, 10)
    assert [*checkpoints(run)] == [4, 10]  # the best and the newest
    best = checkpoints(run)[4]
    assert (run / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()
    on_test = next(e for e in events(run, "eval", "test") if e["step"] == 4)
    assert {name: found[name] for name in ("loss", "accuracy", "f1")}.items() <= on_test.items()
    assert handed == [
        e["loss"] for e in events(run, "eval", "validation") if e["step"] == 4
    ]  # for the temperature: not the last's
    assert 0.01 <= found["temperature"] <= 100 and 0 <= found["calibration_error_scaled"] <= 1
    again = tmp_path / "again"
    evaluate([str(best), "--data", str(news), "--max-eval-rows", "100", "--output-dir", str(again)])
    assert predictions(again) == predictions(run)


@pytest.fixture
def scripted_f1(monkeypatch):
    """The F1 on 40 validation rows: best at the second evaluation, then two that are no better."""
    original, script = metrics.evaluate_logits, iter([0.5, 0.6, 0.4, 0.6])

    def evaluate_logits(logits, labels):
        scores, confusion = original(logits, labels)
        return scores | ({"f1": next(script, scores["f1"])} if len(labels) == 40 else {}), confusion

    monkeypatch.setattr(metrics, "evaluate_logits", evaluate_logits)


@pytest.mark.parametrize("name", SCRIPTS)
def test_patience(name, news, scripted_f1, tmp_path, capsys):
    """Two evaluations without a better score end a run that would have had eight; it counts as finished, also after a kill
    between the last checkpoint and the results."""
    flags = ["--data", str(news), "--validation-size", "40", "--max-steps", "8", "--eval-every", "1", "--dtype", "fp32"]
    run = train(tmp_path / "run", *flags, "--patience", "2", "--keep-checkpoints", "1", script=SCRIPTS[name])
    found = results(run)
    assert [e["step"] for e in events(run, "eval", "validation")] == [1, 2, 3, 4] and [*checkpoints(run)] == [2, 4]
    assert (found["headline_step"], found["final_step"], found["stopped_early"]) == (2, 4, True)
    assert (run / "model.safetensors").read_bytes() == (checkpoints(run)[2] / "model.safetensors").read_bytes()
    assert "stopped early: 2 evaluations without a better validation score" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    resume(run)
    assert f"{run} is finished" in capsys.readouterr().out
    for written in ("results.json", "predictions.parquet", "model.safetensors", "minicls.json"):
        (run / written).unlink()
    resume(run)
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert before.keys() <= after.keys() and [e["step"] for e in events(run, "eval", "validation")] == [1, 2, 3, 4]
    of_checkpoint = [path for path in before if checkpoints(run)[4] in path.parents]
    for path in (run / "predictions.parquet", run / "model.safetensors", *of_checkpoint):
        assert before[path] == after[path], path
    clocks = {name for name in found if name.endswith(("_seconds", "_per_second", "_bytes"))} | {"evaluations"}
    assert {k: v for k, v in results(run).items() if k not in clocks} == {
        k: v for k, v in found.items() if k not in clocks
    }
    # A test of its checkpoints leaves it finished, and chooses among those that are there.
    evaluate([str(run)])
    assert results(run)["stopped_early"]
    shutil.rmtree(checkpoints(run)[2])
    evaluate([str(run)])
    assert results(run)["headline_step"] == 4
    assert (run / "model.safetensors").read_bytes() == (checkpoints(run)[4] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", SCRIPTS)
def test_patience_without_validation_rows_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"--patience: 2 needs validation rows; hold some out with --validation-size"):
        train(tmp_path / "run", "--patience", "2", script=SCRIPTS[name])
    assert not (tmp_path / "run").exists()


FROZEN = {"bert": ("bert", "classifier."), "qwen options": ("qwen", "model.norm."), "qwen linear": ("qwen", "score.")}


@pytest.mark.parametrize("case", FROZEN)
def test_frozen_parameters(case, tmp_path, monkeypatch):
    """All but a head frozen, as a reader might do it: it trains, saves, and resumes bit for bit."""
    name, trained = FROZEN[case]
    script, make = SCRIPTS[name], make_optimizer

    def only_the_head(model, *rest):
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name.startswith(trained))
        return make(model, *rest)

    monkeypatch.setattr(script, "make_optimizer", only_the_head)
    flags = ["--max-steps", "4", "--log-every", "1", "--eval-every", "0", "--max-eval-rows", "8", "--dtype", "fp32"]
    flags += ["--head", case.split()[1]] if name == "qwen" else []
    whole = train(tmp_path / "whole", *flags, "--save-every", "1", "--keep-checkpoints", "4", script=script)
    with interrupt_at(2), pytest.raises(SystemExit):
        train(tmp_path / "run", *flags, script=script)
    run = resume(tmp_path / "run")
    newest = checkpoints(run)[4]
    for file in ("model.safetensors", "resume/optimizer.safetensors"):
        assert (newest / file).read_bytes() == (checkpoints(whole)[4] / file).read_bytes(), file
    assert losses(run) == losses(whole)
    first, last = (load_file(checkpoints(whole)[step] / "model.safetensors") for step in (1, 4))
    moved = {key for key in first if not torch.equal(first[key], last[key])}
    assert moved == {key for key in first if key.startswith(trained)} != set()
    assert {
        key.removeprefix("exp_avg_sq.").removeprefix("exp_avg.")
        for key in load_file(newest / "resume" / "optimizer.safetensors")
    } == moved


def test_head_tail_keeps_both_ends(tmp_path, capsys):
    flags = ["--max-train-rows", "32", "--max-eval-rows", "8", "--max-steps", "1", "--max-length", "12"]
    train(tmp_path / "run", *flags, "--long-text", "head-tail")
    data = split_data(load_data("synthetic"), max_train_rows=32, seed=42)
    words = data.train.texts[0].lower().removesuffix(".").split()
    printed = capsys.readouterr().out
    # Ten tokens: the text's first round(10 * 128 / 510) = 3, and its last 7, the full stop being one.
    assert f"[CLS] {' '.join(words[:3] + words[-6:])}. [SEP]\n" in printed
    assert "train: 32 rows, 384 tokens, 32 rows cut to 12" in printed


# Losses that are not finite.


def test_diverging_run_stops_and_leaves_the_checkpoint_before(tmp_path):
    """Warm-up makes the first step one of 0, the second one of 5e29."""
    flags = [
        "--learning-rate",
        "1e30",
        "--warmup-ratio",
        "0.2",
        "--max-steps",
        "10",
        "--save-every",
        "1",
        "--eval-every",
        "1",
    ]
    with pytest.raises(UserError, match=r"--learning-rate: .* became nan.*; lower 1e\+30"):
        train(tmp_path / "run", *flags)
    assert [*checkpoints(tmp_path / "run")] == [1]
    for name in ("model.safetensors", "resume/optimizer.safetensors"):
        assert all(x.isfinite().all() for x in load_file(checkpoints(tmp_path / "run")[1] / name).values())
    assert not (tmp_path / "run" / "results.json").exists()


def test_finite_loss_with_gradients_that_are_not_spoils_no_checkpoint(tmp_path, monkeypatch):
    original = train_bert.F.cross_entropy
    nan_gradient = lambda logits, *args, **options: original(logits, *args, **options) + (0 * logits.sum()).sqrt()  # noqa: E731
    monkeypatch.setattr(train_bert.F, "cross_entropy", nan_gradient)
    with pytest.raises(UserError, match=r"became nan at step 1"):
        train(tmp_path / "run", "--max-steps", "2", "--save-every", "1")
    assert not checkpoints(tmp_path / "run")


def test_weights_lost_in_the_last_step_are_no_result(tmp_path):
    with pytest.raises(UserError, match=r"--learning-rate: .* lower 1e\+30"):
        train(tmp_path / "run", "--learning-rate", "1e30", "--max-steps", "1")
    assert not (tmp_path / "run" / "results.json").exists()


def test_runs_of_the_same_second_have_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint.time, "strftime", lambda _: "now")
    made = [checkpoint.new_run_dir(None, "train_bert") for _ in range(3)]
    assert [str(path) for path in made] == ["runs/train_bert-now", "runs/train_bert-now-2", "runs/train_bert-now-3"]

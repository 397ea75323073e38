"""The parts of the loop that only train_qwen.py has: targets, the two losses, both heads.   python -m pytest tests/test_train_qwen.py

What it shares with train_bert.py is tested there, and in test_resume.py and test_ranks.py for both. Everything runs in fp32
where two orders of summation are compared: losses differ by a few 1e-7 then (bound: 1e-5, against transformers 1e-4, as two
implementations are ten AdamW steps apart), weights by a few 1e-6 (bound: 1e-4).
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from runs import (
    CLASSES,
    EVERY_STEP,
    LOSS_FLAGS,
    MODEL_FILES,
    events,
    interrupt_at,
    losses,
    padded,
    results,
    smoothed,
    their_class_weights,
    train,
    write_news,
    write_uneven,
)
from safetensors.torch import load_file
from test_prompt import BEGINS, TEMPLATES, tokenizer_dir

import train_qwen
from minicls import weights
from minicls.batch import step_rows
from minicls.checkpoint import every_steps
from minicls.config import UserError
from minicls.data import AG_NEWS_LABELS, Data, Split, load_data, split_data
from minicls.predict import evaluate
from minicls.prompt import Chat, make_template
from minicls.results import steps
from minicls.scorer import score_brute_force
from minicls.tiny import SIZES, train_qwen_tokenizer
from minicls.tokenizer import load_tokenizer
from train_qwen import make_targets, targets_loss

# Few rows scored.
UNEVEN = [*EVERY_STEP, "--max-eval-rows", "20"]


def run_qwen(run_dir, *flags):
    return train(run_dir, *flags, script=train_qwen)


def answers(run):
    return [
        (e["step"], e["loss"], e.get("answer_loss"), e.get("format_loss"), e["grad_norm"]) for e in events(run, "train")
    ]


def predictions(run):
    return pq.read_table(run / "predictions.parquet").to_pydict()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run_qwen(tmp_path_factory.mktemp("plain") / "run", *UNEVEN)


def test_the_defaults_are_the_published_steps(tmp_path, monkeypatch):
    split = Split(["news"] * 120_000, np.arange(120_000) % 4, np.arange(120_000))
    question = tmp_path / "question.txt"
    question.write_text("{text} {options}")  # a short one: 120,000 are encoded
    monkeypatch.setattr("minicls.data.load_data", lambda *_: Data(split, split.select(np.arange(8)), CLASSES))
    with interrupt_at(1), pytest.raises(SystemExit):
        flags = ["--model", "tiny", "--device", "cpu", "--threads", "1", "--prompt", str(question)]
        train_qwen.main([*flags, "--output-dir", str(tmp_path / "run")])
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (info["total_steps"], info["num_train_rows"]) == (1250, 120_000)
    every = every_steps(info["settings"]["eval_every"], 1250)
    assert [*range(every, 1251, every)] == [250, 500, 750, 1000, 1250]


# The loss.


@pytest.mark.parametrize(
    ("flags", "trained", "letter"),
    [
        ([], 7, 4),
        (["--think-in", "prompt"], 3, 0),
        (["--train-on", "letter"], 1, 0),
        (["--train-on", "letter", "--prompt", "options-first"], 1, 0),
    ],
    ids=["response", "think in prompt", "letter", "letter, options before, zh"],
)
def test_losses_and_gradient_against_transformers(flags, trained, letter, tmp_path):
    """The first step, over accumulated micro-batches of ragged rows, against one padded batch and labels of -100."""
    from transformers import AutoModelForCausalLM

    steps = ["--max-steps", "1", "--log-every", "1", "--learning-rate", "0", "--max-eval-rows", "4", "--dtype", "fp32"]
    run = run_qwen(
        tmp_path / "run", *steps, "--micro-batch-size", "8", *flags
    )  # lr 0: the weights saved are those of the start
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)
    tokenizer = load_tokenizer(run)
    data = split_data(load_data("synthetic"), max_train_rows=256, seed=42)
    template = json.loads((run / "run.json").read_text())["template"]
    window = step_rows(0, 256, 32, seed=42)
    questions, _ = Chat(tokenizer, template, 4, 512).questions([data.train.texts[row] for row in window])
    ending = [*tokenizer.control_ids(["<|im_end|>"]), *tokenizer.encode(["\n"])[0]]
    rows = [
        ids + tokenizer.encode(["ABCD"[y]])[0] + ending
        for ids, y in zip(questions, data.train.labels[window], strict=True)
    ]
    ends = [len(ids) - 2 * (trained == 1) for ids in rows]
    labels = [[-100] * (end - trained) + ids[end - trained : end] for ids, end in zip(rows, ends, strict=True)]
    rows = [ids[:end] for ids, end in zip(rows, ends, strict=True)]
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids, targets = (
        pad([*map(torch.tensor, x)], batch_first=True, padding_value=p) for x, p in ((rows, 0), (labels, -100))
    )
    mask = pad([torch.ones(len(ids), dtype=torch.int64) for ids in rows], batch_first=True)
    output = model.train()(input_ids=input_ids, attention_mask=mask, labels=targets)
    each = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), targets[:, 1:], reduction="none", ignore_index=-100)
    kept = torch.stack([row[t != -100] for row, t in zip(each, targets[:, 1:], strict=True)])  # (32, trained)
    assert kept.shape == (32, trained)
    output.loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    ((_, loss, answer_loss, format_loss, grad_norm),) = answers(run)
    assert loss == pytest.approx(output.loss.item(), rel=1e-5)
    if trained > 1:
        assert answer_loss == pytest.approx(kept[:, letter].mean().item(), rel=1e-5)
        others = torch.cat([kept[:, :letter], kept[:, letter + 1 :]], dim=1)
        assert format_loss == pytest.approx(others.mean().item(), rel=1e-5)
    else:  # the letter's loss is the loss
        assert answer_loss is None and format_loss is None
    assert grad_norm == pytest.approx(norm.item(), rel=1e-4)


def test_label_smoothing_needs_options_of_one_token(tmp_path, monkeypatch):
    """Nothing is written: a run directory would refuse the corrected command."""
    monkeypatch.setattr(Chat, "options", [[1, 2], [3, 4], [5, 6], [7, 8]])
    with pytest.raises(UserError, match="--label-smoothing: it needs options of one token"):
        train(tmp_path / "run", "--label-smoothing", "0.1", script=train_qwen)
    assert not (tmp_path / "run").exists()


FAMILIES = {  # model_type: (sizes in addition to TINY's, chat template and control tokens)
    "qwen3": None,
    "llama": ({"head_dim": 32, "rope_theta": 500_000.0, "tie_word_embeddings": False}, "Llama 3"),
    "qwen2": ({"num_attention_heads": 2, "num_key_value_heads": 1}, "Qwen2.5"),  # heads of 32 as well
}


def family_dir(family: str, folder: Path) -> Path:
    """A directory as transformers saves it: random weights, a small tokenizer with the family's chat template."""
    import transformers

    sizes, template = FAMILIES[family]
    data = split_data(load_data("synthetic"), max_train_rows=150, seed=42)
    tokenizer = train_qwen_tokenizer(["".join(make_template(data.label_names)), *data.train.texts], 2000)
    tokenizer_dir(folder, tokenizer, *TEMPLATES[template], begins=template in BEGINS)
    values = {
        name: value for name, value in (SIZES["tiny-qwen3"] | sizes).items() if name not in ("model_type", "head_dim")
    }
    values |= {"head_dim": sizes["head_dim"]} if "head_dim" in sizes else {}
    prefix = family.capitalize()
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**values, vocab_size=len(load_tokenizer(folder)))
    getattr(transformers, f"{prefix}ForCausalLM")(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_equal_those_of_transformers(family, tmp_path, capsys):
    """The same weights, rows, targets, schedule and AdamW around transformers' model: each step's loss to 1e-4."""
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    shared = [
        "--max-train-rows",
        "150",
        "--log-every",
        "1",
        "--max-eval-rows",
        "4",
        "--dtype",
        "fp32",
        "--warmup-ratio",
        "0.2",
    ]
    shared += ["--weight-decay", "0.1", "--eval-every", "0"]
    if family == "qwen3":
        start = run_qwen(tmp_path / "start", *shared, "--max-steps", "2")
    else:
        start = family_dir(family, tmp_path / "start")
    run = run_qwen(tmp_path / "run", "--model", str(start), *shared, "--max-steps", "10", "--learning-rate", "3e-3")
    assert "tokens, computed once per batch" in capsys.readouterr().out  # transformers below reads them in every row
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).train()
    data = split_data(load_data("synthetic"), max_train_rows=150, seed=42)
    template = json.loads((run / "run.json").read_text())["template"]
    assert template[1].endswith("/no_think") == (family == "qwen3")  # the others' tokenizers have no <think>
    chat = Chat(load_tokenizer(start), template, 4, 512)
    rows, _ = chat.training_rows(data.train.texts, data.train.labels)
    trained = sum(chat.target_counts(0))
    assert {sum(chat.target_counts(label)) for label in range(4)} == {trained} and trained == {
        "qwen3": 7,
        "llama": 2,
        "qwen2": 3,
    }[family]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.ndim == 1]}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 10)
    expected = []
    for step in range(10):
        window = step_rows(step, 150, 32, seed=42)
        loss = 0
        for row in window:
            ids = torch.tensor([rows[row]])
            labels = torch.full_like(ids, -100)
            labels[:, -trained:] = ids[:, -trained:]
            loss += model(input_ids=ids, labels=labels).loss / len(
                window
            )  # rows have as many targets each: a mean of means
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        expected.append(loss.item())
    found = [loss for _, loss, _ in losses(run)]
    assert found == pytest.approx(expected, abs=1e-4)
    assert expected[0] - expected[-1] > 0.5  # it moved
    trained = load_file(run / "model.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.data, rtol=0, atol=1e-4, msg=name)


def test_targets_of_a_hand_made_batch():
    """Two rows that begin with one equal id; the second one's letter is two tokens."""
    rows = [[9, 3, 4, 10, 11, 20, 12], [9, 8, 10, 11, 21, 22, 12]]  # prompt; 10 11; letter; 12
    endings = np.array([[2, 1, 1], [2, 2, 1]])
    class_weights = np.array([0.5, 3.0], np.float32)
    targets = make_targets(rows, np.array([0, 1]), endings, class_weights, 1, torch.device("cpu"))
    assert targets.batch.input_ids.tolist() == [9, 3, 4, 10, 11, 20, 8, 10, 11, 21, 22]
    assert targets.at.tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert targets.ids.tolist() == [10, 11, 20, 12, 10, 11, 21, 22, 12]
    assert targets.letter_index.tolist() == [2, 6, 7]
    assert targets.weights.tolist() == [1, 1, 0.5, 1, 1, 1, 3, 3, 1]
    logits = torch.randn(9, 30, generator=torch.Generator().manual_seed(0))
    each = [-logits[i].double().softmax(0)[token].log().item() for i, token in enumerate(targets.ids.tolist())]
    letters = 0.5 * each[2] + 3.0 * (each[6] + each[7])
    expected = [sum(each) - each[2] - each[6] - each[7] + letters, letters]
    loss = targets_loss(lambda *_: logits, targets, None, 0.0)
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)


def test_smoothing_of_a_hand_made_batch():
    """The letter's target gives a tenth of itself to the two letters in equal parts; the format's targets give nothing."""
    rows = [[3, 10, 20, 12], [4, 10, 21, 12], [5, 10, 21, 12]]
    labels, letter_ids = np.array([0, 1, 1]), torch.tensor([20, 21])
    class_weights = np.array([0.5, 3.0], np.float32)
    targets = make_targets(rows, labels, np.array([[1, 1, 1]] * 2), class_weights, 0, torch.device("cpu"))
    assert targets.at.tolist() == [*range(9)] and targets.letter_index.tolist() == [1, 4, 7]
    logits = torch.randn(9, 30, generator=torch.Generator().manual_seed(0))
    likelihoods = logits.double().log_softmax(1)
    shares = {20: [0.95, 0.05], 21: [0.05, 0.95]}
    letters = sum(
        weight * -(torch.tensor(shares[token]).double() * likelihoods[i][letter_ids]).sum().item()
        for i, token, weight in ((1, 20, 0.5), (4, 21, 3.0), (7, 21, 3.0))
    )
    format_loss = -sum(
        likelihoods[i][token].item() for i, token in ((0, 10), (2, 12), (3, 10), (5, 12), (6, 10), (8, 12))
    )
    loss = targets_loss(lambda *_: logits, targets, letter_ids, 0.1)
    assert loss.tolist() == pytest.approx([format_loss + letters, letters], rel=1e-5)


@pytest.mark.parametrize("train_on", ["response", "letter"])
@pytest.mark.parametrize("flags", LOSS_FLAGS)
def test_loss_with_class_weights_and_smoothing(flags, train_on, tmp_path):
    """Weights and smoothing apply to the letter; the sum of the weighted losses is divided by that of the weights. Over windows
    of 64, 64 and few rows in unequal parts, from transformers' logits: with a learning rate of 0 the weights never change."""
    from transformers import AutoModelForCausalLM

    scheme, smoothing = LOSS_FLAGS[flags]
    news = write_uneven(tmp_path / "news")
    given = ["--data", str(news), *UNEVEN, "--max-eval-rows", "4", "--micro-batch-size", "16", "--learning-rate", "0"]
    run = run_qwen(tmp_path / "run", *given, "--max-steps", "3", "--train-on", train_on, *flags.split())
    data = split_data(load_data(str(news)), max_train_rows=150, seed=42)
    labels = data.train.labels
    chat = Chat(load_tokenizer(run), json.loads((run / "run.json").read_text())["template"], 4, 512, train_on=train_on)
    rows, _ = chat.training_rows(data.train.texts, labels)
    counts = chat.target_counts(0)
    letter_ids = torch.tensor([ids for (ids,) in chat.options])
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = torch.cat([model(**padded(rows[i : i + 50], 0)).logits for i in range(0, 150, 50)])
    weight, letters, formats = their_class_weights(scheme, labels)[labels], [], []
    for row, label, row_logits in zip(rows, labels, logits, strict=True):
        first = len(row) - sum(counts)
        likelihoods = row_logits[first - 1 : len(row) - 1].log_softmax(1)
        each = -likelihoods[torch.arange(sum(counts)), torch.tensor(row[first:])]
        # All of the vocabulary competes for the letter, but the share goes to the letters alone.
        letters.append(smoothed(likelihoods[counts[0], letter_ids], label, smoothing).item())
        formats.append((each.sum() - each[counts[0]]).item())
    letters, formats = np.array(letters) * weight, np.array(formats)
    for step, (_, loss, answer, of_format, _) in enumerate(answers(run)):
        window = step_rows(step, 150, 64, seed=42)
        num_formats = len(window) * (counts[0] + counts[2])
        total = letters[window].sum() + formats[window].sum()
        assert loss == pytest.approx(total / (weight[window].sum() + num_formats), rel=1e-5)
        if train_on == "response":
            assert answer == pytest.approx(letters[window].sum() / weight[window].sum(), rel=1e-5)
            assert of_format == pytest.approx(formats[window].sum() / num_formats, rel=1e-5)
        else:
            assert answer is None and of_format is None


@pytest.mark.parametrize(
    "variant",
    [
        ["--micro-batch-size", "16"],
        ["--micro-batch-size", "16", "--activation-checkpointing"],
        pytest.param(
            ["--compile"],
            marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")],
        ),
    ],
    ids=" ".join,
)
def test_same_training_another_way(variant, plain, tmp_path):
    run = run_qwen(tmp_path / "run", *UNEVEN, *variant)
    assert np.array(answers(run)) == pytest.approx(np.array(answers(plain)), rel=1e-5)
    torch.testing.assert_close(
        load_file(run / "model.safetensors"), load_file(plain / "model.safetensors"), rtol=0, atol=1e-4
    )


# Runs.

LEARN = [
    "--learning-rate",
    "2e-3",
    "--warmup-ratio",
    "0.1",
    "--max-train-rows",
    "600",
    "--max-eval-rows",
    "60",
    "--dtype",
    "fp32",
]
LEARN += ["--global-batch-size", "16", "--micro-batch-size", "16", "--log-every", "5", "--keep-checkpoints", "5"]


@pytest.fixture(scope="module")
def news(tmp_path_factory):
    return write_news(tmp_path_factory.mktemp("news") / "news")


@pytest.fixture(scope="module", params=["options", "linear"])
def learned(request, news, tmp_path_factory):
    """A run of each head, long enough to learn."""
    flags = [*LEARN, "--head", request.param]
    flags += ["--train-on", "letter", "--max-steps", "150"] if request.param == "options" else ["--max-steps", "40"]
    return run_qwen(tmp_path_factory.mktemp(request.param) / "run", "--data", str(news), *flags)


def test_it_learns(learned):
    assert results(learned)["accuracy"] > 0.8  # chance: 0.25


def test_files_of_a_run(learned, news):
    linear = json.loads((learned / "run.json").read_text())["settings"]["head"] == "linear"
    config = json.loads((learned / "config.json").read_text())
    tokenizer = load_tokenizer(learned)
    assert config["architectures"] == ["Qwen3ForSequenceClassification" if linear else "Qwen3ForCausalLM"]
    assert [config["pad_token_id"]] == tokenizer.control_ids(["<|endoftext|>"])
    assert [config["id2label"][str(i)] for i in range(4)] == [*CLASSES]
    assert all((learned / name).is_file() for name in (*MODEL_FILES, "curves.png", "confusion.png", "results.json"))
    assert (learned / "generation_config.json").is_file() != linear
    if not linear:
        generation = json.loads((learned / "generation_config.json").read_text())
        assert (
            generation["eos_token_id"] == tokenizer.control_ids(["<|im_end|>", "<|endoftext|>"])
            and not generation["do_sample"]
        )
    found, labels = predictions(learned), split_data(load_data(str(news)), max_eval_rows=60).test.labels
    probabilities = np.array([found[f"probability_{c}"] for c in range(4)])
    assert found["label"] == labels.tolist() and found["prediction"] == probabilities.argmax(0).tolist()
    assert probabilities.sum(0) == pytest.approx(np.ones(60), abs=1e-6)
    assert results(learned)["train_seconds"] > 0 and results(learned)["eval_seconds"] > 0


def test_evaluating_a_directory_repeats_its_predictions(learned, news, tmp_path):
    run = tmp_path / "run"
    evaluate([str(learned), "--data", str(news), "--max-eval-rows", "60", "--output-dir", str(run)])
    assert predictions(run) == predictions(learned) and not events(run, "train")


@pytest.mark.parametrize("learned", ["options"], indirect=True)
class TestOptions:
    def test_predictions_are_the_brute_force_ones(self, learned, news):
        from transformers import AutoModelForCausalLM

        data = split_data(load_data(str(news)), max_eval_rows=60)
        chat = Chat(load_tokenizer(learned), make_template(data.label_names, no_think=True), 4, 512)
        theirs = AutoModelForCausalLM.from_pretrained(learned, dtype=torch.float32)
        model = lambda batch, at: theirs(batch.input_ids[None]).logits[0, at]  # noqa: E731
        scores = score_brute_force(model, chat.questions(data.test.texts)[0], chat.options, torch.device("cpu"))
        saved = predictions(learned)
        expected = np.array([saved[f"probability_{c}"] for c in range(4)]).T
        np.testing.assert_allclose(scores.double().softmax(1).numpy(), expected, atol=1e-5)

    def test_evaluating_scores_a_run_s_checkpoints(self, learned, tmp_path):
        copy = shutil.copytree(learned, tmp_path / "run")
        before = events(copy, "eval", "test")
        assert [e["step"] for e in before] == [30, 60, 90, 120, 150]  # 0.2 of 150
        lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
        (copy / "metrics.jsonl").write_text("".join(line for line in lines if '"eval"' not in line))
        evaluate([str(copy)])
        assert events(copy, "eval", "test") == before and results(copy)["f1"] == results(learned)["f1"]
        # The table is that of a run evaluated while it trained, though the evaluations are now at the end of the file.
        rows = steps(copy)
        assert rows == steps(learned) and len(rows) == 5 and all(None not in row.values() for row in rows)

    def test_zero_shot_of_any_model(self, learned, news, tmp_path):
        """Trained on ants and bees, asked about news; and about ants and bees, but in other words."""
        flags = [str(learned), "--max-eval-rows", "20"]
        evaluate([*flags, "--data", "synthetic", "--output-dir", str(tmp_path / "run")])
        assert results(tmp_path / "run")["num_test_rows"] == 20 and results(tmp_path / "run")["final_step"] == 0
        info = json.loads((tmp_path / "run" / "run.json").read_text())
        assert info["template"] == [*make_template(AG_NEWS_LABELS, no_think=True)]
        (tmp_path / "prompt.txt").write_text("{text}\n{options}")
        flags += ["--data", str(news), "--prompt", str(tmp_path / "prompt.txt")]
        evaluate([*flags, "--output-dir", str(tmp_path / "other")])
        info = json.loads((tmp_path / "other" / "run.json").read_text())
        assert info["template"] == ["", "\nA. ant\nB. bee\nC. cat\nD. dog"]

    def test_zero_shot_of_random_weights(self, learned, tmp_path):
        """A base model as it would come from the hub: no classes, no minicls.json."""
        config = json.loads((learned / "config.json").read_text())
        config = {name: value for name, value in config.items() if name not in ("id2label", "label2id", "problem_type")}
        model, _, _ = weights.build_model(weights.DECODER, config, None, 0, torch.device("cpu"))
        weights.save_model(model, config, load_tokenizer(learned), tmp_path / "base")
        run = tmp_path / "run"
        evaluate([str(tmp_path / "base"), "--data", "synthetic", "--max-eval-rows", "20", "--output-dir", str(run)])
        assert results(run)["final_step"] == 0
        assert results(run)["loss"] == pytest.approx(np.log(4), abs=0.2)  # it knows nothing
        assert json.loads((run / "run.json").read_text())["num_train_rows"] == 0

    def test_evaluating_a_run_without_a_checkpoint_is_an_error(self, learned, tmp_path):
        copy = shutil.copytree(learned, tmp_path / "run")
        shutil.rmtree(copy / "checkpoints")
        with pytest.raises(UserError, match=r"run: this run has no complete checkpoint"):
            evaluate([str(copy)])

    def test_a_run_s_checkpoints_take_no_other_settings(self, learned):
        with pytest.raises(
            UserError, match=r"--max-length: a run's checkpoints are tested with the run's own settings"
        ):
            evaluate([str(learned), "--max-length", "100"])

    def test_the_template_of_the_start_counts(self, news, learned, tmp_path):
        """A resumed run asks what it asked before, though the file with the question is gone."""
        question = tmp_path / "question.txt"
        question.write_text("{options}\n{text}\n?")
        flags = ["--data", str(news), "--max-steps", "4", "--max-eval-rows", "8", "--prompt", str(question)]
        with interrupt_at(2), pytest.raises(SystemExit):
            run_qwen(tmp_path / "run", *flags)
        question.unlink()
        train_qwen.main(["--resume", str(tmp_path / "run")])
        assert json.loads((tmp_path / "run" / "run.json").read_text())["template"] == [
            "A. ant\nB. bee\nC. cat\nD. dog\n",
            "\n?",
        ]


def test_linear_head_may_read_the_prompt(news, tmp_path):
    flags = [
        "--data",
        str(news),
        "--head",
        "linear",
        "--linear-input",
        "prompt",
        "--max-steps",
        "1",
        "--max-eval-rows",
        "8",
    ]
    run = run_qwen(tmp_path / "run", *flags)
    assert results(run)["num_test_rows"] == 8
    again = tmp_path / "again"
    evaluate([str(run), "--data", str(news), "--max-eval-rows", "8", "--output-dir", str(again)])
    assert predictions(again) == predictions(run)

"""results/hf_trainer.py: its arithmetic on sides whose times are known, and both of its measures on a tiny model.

python -m pytest -m "slow or not slow" tests/test_hf_trainer.py
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT

from minicls.config import UserError
from minicls.data import load_data
from minicls.predict import Reader
from results import hf_trainer
from results.readme import speed_table


def measure(tmp_path, *flags):
    hf_trainer.main([*flags, "--data", "synthetic", "--threads", "1", "--output", str(tmp_path / "out.json")])
    return json.loads((tmp_path / "out.json").read_text())


def test_speed(bert_run, tmp_path, capsys, monkeypatch):
    """Two rounds of three steps, of which the first is untimed; a side tells the times of all but the first."""
    times = {"minicls": iter([[1.0, 3.0], [2.0, 2.0]]), "transformers": iter([[8.0, 8.0], [2.0, 4.0]])}

    def run_side(s, side):
        assert (s.max_steps, s.global_batch_size, s.learning_rate, s.weight_decay) == (3, 32, 1e-5, 1e-6)
        memory = {"minicls": 2**30, "transformers": 2 * 2**30}[side]
        return {"seconds": next(times[side]), "peak_memory_bytes": memory, "losses": [1.0], "version": "1"}

    monkeypatch.setattr(hf_trainer, "run_side", run_side)
    flags = "--measure speed --max-steps 3 --rounds 2 --global-batch-size 32 --model"
    result = measure(tmp_path, *flags.split(), str(bert_run))
    ours, theirs = result["rows"]
    assert (ours["side"], ours["seconds"], ours["samples_per_second"]) == ("minicls", 2.0, 16.0)
    assert (theirs["side"], theirs["seconds"], theirs["samples_per_second"]) == ("transformers", 6.0, 32 / 6)
    assert result["speedup_of_each_round"] == {"transformers": [4.0, 1.5]}
    assert result["speedup"] == {"transformers": 2.75} and result["memory_ratio"] == {"transformers": 0.5}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    table = speed_table([result])
    assert (
        "| train, bf16 | run | HF Trainer 1 | 16.00 | 5.33 | **2.75** (1.50 to 4.00, 2 rounds) | 1.0 against 2.0 |"
        in table
    )
    committed = json.loads((ROOT / "results/bench/train-minilm-bf16.json").read_text())
    assert {*result} == {*committed} and [*ours] == [*committed["rows"][0]]


def test_one_round_has_no_range():
    committed = json.loads((ROOT / "results/bench/train-bert-base-bf16.json").read_text())
    assert "| **2.42** (1 round) |" in speed_table([committed])


def test_a_gpu_is_timed_over_more_steps_and_after_more_of_them():
    settings = hf_trainer.Settings(device="cuda", max_steps=50)
    assert hf_trainer.untimed_steps(settings) == 10
    assert hf_trainer.untimed_steps(replace(settings, max_steps=2)) == 1
    assert hf_trainer.untimed_steps(replace(settings, device="cpu")) == 1


def test_a_model_must_be_named():
    with pytest.raises(UserError, match="--model: unset"):
        hf_trainer.main([])


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--rounds 2", "--rounds: --measure quality does not use it"),
        ("--max-steps 5", "--max-steps: --measure quality does not use it"),
        ("--init random", "--init: --measure quality does not use it"),
        ("--compile", "--compile: --measure quality does not use it"),
        ("--measure speed --epochs 2", "--epochs: --measure speed does not use it"),
        ("--measure speed --group-by-length", "--group-by-length: --measure speed does not use it"),
        ("--measure speed --max-train-rows 9", "--max-train-rows: --measure speed does not use it"),
        ("--measure speed --max-steps 999", "--max-steps: 999 steps of 64 rows"),
        ("--model no/such/dir", "--model: no directory no/such/dir"),
    ],
)
def test_mistakes(flags, part, bert_run, tmp_path):
    with pytest.raises(UserError) as error:
        measure(tmp_path, "--model", str(bert_run), *flags.split())
    assert part in str(error.value) and not (tmp_path / "out.json").exists()


def test_a_decoder_has_no_quality(qwen_run, tmp_path):
    with pytest.raises(UserError, match=r"--model: .* is a decoder"):
        measure(tmp_path, "--model", str(qwen_run))


def test_a_decoders_labels_are_its_targets(qwen_run):
    """The response of seven tokens, the letter among them, is trained on; the prompt is not."""
    data, rows = load_data("synthetic"), np.array([3, 1])
    settings = hf_trainer.Settings(model=str(qwen_run))
    for item in hf_trainer.training_examples(settings, data, rows):
        assert item["labels"][:-7] == [-100] * (len(item["input_ids"]) - 7)
        assert item["labels"][-7:] == item["input_ids"][-7:]
    batch = hf_trainer.collate(hf_trainer.training_examples(settings, data, rows))
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    assert (batch["labels"] >= 0).sum(1).tolist() == [7, 7]


def test_training_asks_the_default_question_whatever_the_run_was_asked(qwen_run, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((qwen_run / name).read_bytes())
    template = ("Say what this is: ", " Answer:")
    (tmp_path / "minicls.json").write_text(json.dumps({"template": template}))
    assert Reader(tmp_path).settings == {"template": [*template]}  # a file that says no more than that is no error
    assert Reader(tmp_path).chat.template == template
    data, rows = load_data("synthetic"), np.array([3, 1])
    ours, default = (
        hf_trainer.training_examples(hf_trainer.Settings(model=str(d)), data, rows) for d in (tmp_path, qwen_run)
    )
    assert ours == default


@pytest.mark.slow
def test_both_sides_of_a_decoder_lose_the_same(qwen_run, tmp_path):
    """Without dropout, the same rows in the same order give the same losses: nothing but time and memory differs."""
    flags = "--measure speed --init random --max-steps 3 --rounds 1 --dtype fp32 --model"
    ours, theirs = measure(tmp_path, *flags.split(), str(qwen_run))["rows"]
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=1e-4)
    assert ours["peak_memory_bytes"] > 2**26 and theirs["peak_memory_bytes"] > 2**26


@pytest.mark.slow
def test_quality(bert_run, tmp_path):
    flags = "--max-train-rows 64 --group-by-length --global-batch-size 32 --dtype fp32 --model"
    result = measure(tmp_path, *flags.split(), str(bert_run))
    assert (result["final_step"], result["num_train_rows"], result["num_test_rows"]) == (2, 64, 1000)
    assert 0 <= result["f1_low"] <= result["f1"] <= result["f1_high"] <= 1 and result["settings"]["model"] == "run"

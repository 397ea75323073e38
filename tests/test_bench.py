"""bench.py's arithmetic on sides whose times are known; its processes run in the README's commands (slow tier).

    python -m pytest tests/test_bench.py

Nothing here looks at a clock: figures are exact.
"""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
from minicls import config, engines
from minicls import tiny as tiny_sizes
from minicls.config import UserError, parse
from minicls.data import load_data
from minicls.predict import Reader
from minicls.prompt import make_template


def fake_measure(seconds, predictions=None):
    """A `measure` that answers from a table: {side: [seconds of each round's steps or requests]}."""
    rounds = {side: iter(times) for side, times in seconds.items()}

    def measure(s, side):
        side_s = parse(bench.Settings, bench.command_line({**vars(s), "side": side, "output_dir": None}))
        assert side_s == replace(s, side=side, output_dir=None)  # what a side's process is told is what was asked
        memory = {"minicls": 2**30, "transformers": 2 * 2**30, "vllm": 4 * 2**30}[side]
        losses = {"losses": [1.0]} if s.task == "train" else {"predictions": predictions[side]}
        return {"seconds": next(rounds[side]), "peak_memory_bytes": memory, "version": "1"} | losses

    return measure


def run(capsys, tmp_path, *flags):
    bench.main([*flags, "--data", "synthetic", "--threads", "1", "--output-dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out.strip().splitlines()
    result = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert json.loads(printed[-1]) == result
    return result, "\n".join(printed)


def test_training(bert_run, tmp_path, capsys, monkeypatch):
    times = {"minicls": [[1.0, 3.0], [2.0, 2.0]], "transformers": [[8.0, 8.0], [2.0, 4.0]]}
    monkeypatch.setattr(bench, "measure", fake_measure(times))
    flags = [
        "--task",
        "train",
        "--bert",
        str(bert_run),
        "--max-steps",
        "3",
        "--rounds",
        "2",
        "--global-batch-size",
        "32",
    ]
    result, printed = run(capsys, tmp_path, *flags)
    ours, theirs = result["rows"]
    assert (ours["side"], ours["seconds"], ours["samples_per_second"]) == ("minicls", 2.0, 16.0)
    assert (theirs["side"], theirs["seconds"], theirs["samples_per_second"]) == ("transformers", 6.0, 32 / 6)
    assert result["speedup_of_each_round"] == {"transformers": [4.0, 1.5]} and result["speedup"] == {
        "transformers": 2.75
    }
    assert result["memory_ratio"] == {"transformers": 0.5}
    assert "minicls is 2.75 times as fast as transformers (1.50 to 4.00 over 2 rounds)" in printed


def test_scoring_asks_as_the_run_was_trained_and_training_begins_anew(qwen_run, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((qwen_run / name).read_bytes())
    first = ("Say what this is: ", " Answer:")
    (tmp_path / "run.json").write_text(json.dumps({"template": first}))
    data = load_data("synthetic")
    for task, expected in (("score", first), ("train", make_template(data.label_names, no_think=True))):
        settings = bench.Settings(task=task, qwen=str(tmp_path))
        assert bench.make_chat(settings, data).template == expected
    assert Reader(tmp_path).settings == {"template": [*first]}  # a run.json that says no more than that is no error


def test_scoring(qwen_run, tmp_path, capsys, monkeypatch):
    answers = {"minicls": [0, 1, 2, 3], "transformers": [0, 1, 2, 0], "vllm": [0, 1, 2, 3]}
    monkeypatch.setattr(
        bench, "measure", fake_measure({"minicls": [[2.0]], "transformers": [[10.0]], "vllm": [[1.0]]}, answers)
    )
    flags = [
        "--task",
        "score",
        "--qwen",
        str(qwen_run),
        "--num-questions",
        "4",
        "--rounds",
        "1",
        "--vllm-python",
        "python",
    ]
    result, _ = run(capsys, tmp_path, *flags)
    assert result["rows"][0]["samples_per_second"] == 2.0
    assert [row["agreement"] for row in result["rows"]] == [1, 0.75, 1] and result["speedup"] == {
        "transformers": 5,
        "vllm": 0.5,
    }


@pytest.mark.parametrize("side", ["minicls", "transformers"])
def test_a_side_scores(side, qwen_run, capsys):
    bench.main(
        ["--task", "score", "--qwen", str(qwen_run), "--data", "synthetic", "--num-questions", "4", "--side", side]
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["seconds"]) == 1 and len(result["predictions"]) == 4 and result["peak_memory_bytes"] > 0


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--task", "train"], ["--task train", "--qwen DIR", "--bert DIR"]),
        (["--task", "train", "--bert", "a", "--qwen", "b"], ["name one model"]),
        (["--task", "score", "--bert", "a"], ["--task score", "--qwen DIR"]),
        (["--task", "train", "--qwen", "a", "--vllm-python", "python"], ["--vllm-python", "does not train"]),
        (["--qwen", "a", "--rounds", "0"], ["--rounds", "at least 1"]),
        ([], ["--task rps", "--bert RUN", "--qwen-linear RUN"]),
        (["--task", "score", "--qwen-linear", "a"], ["--task score", "name one model"]),
        (["--bert", "a", "--engines", "tensorflow"], ["--engines", "tensorflow"]),
        (["--bert", "a", "--mode", "batch"], ["--mode", "batch"]),
        (["--bert", "no/such/dir", "--data", "synthetic"], ["--bert: no directory no/such/dir"]),
        (["--bert", "a", "--qwen", "b", "--side", "minicls"], ["--side minicls", "one model"]),
        (["--task", "train", "--bert", "a", "--side", "vllm"], ["--side vllm", "does not train"]),
        (
            ["--task", "train", "--bert", "a", "--data", "synthetic", "--max-steps", "999"],
            ["--max-steps: 999 steps of 64 rows", "fewer"],
        ),
    ],
)
def test_mistakes(flags, parts, tmp_path):
    with pytest.raises(UserError) as error:
        bench.main([*flags, "--output-dir", str(tmp_path / "out")])
    assert all(part in str(error.value) for part in parts) and not (tmp_path / "out").exists()


def test_counts_of_several_rounds_stay_whole():
    rounds = [
        {"status": "ok", "num_requests": 64, "threads": 2, "requests_per_second": rate, "reason": None}
        for rate in (2.0, 3.0)
    ]
    assert json.dumps(bench.median_row(rounds)) == json.dumps(rounds[0] | {"requests_per_second": 2.5})
    failed = {"status": "failed", "num_requests": None, "threads": 2, "requests_per_second": None, "reason": "it broke"}
    assert bench.median_row([failed, rounds[0]]) == failed | {"num_requests": 64, "requests_per_second": 2.0}


def test_a_side_that_fails_is_named(qwen_run, tmp_path):
    flags = ["--task", "score", "--qwen", str(qwen_run), "--data", "synthetic", "--rounds", "1", "--device", "cuda:99"]
    with pytest.raises(UserError, match=r"--side minicls: failed .*cuda:99"):
        bench.main([*flags, "--output-dir", str(tmp_path / "out")])


# Requests per second.


class Clock:
    """It stands still until somebody moves it."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_closed_loop_goes_on_until_both_minima_in_whole_passes():
    clock, passes = Clock(), []

    def answer(texts):
        clock.now += len(texts)
        return [text.upper() for text in texts]

    def forget():
        clock.now += 100  # no part of any latency
        passes.append(clock.now)

    loop = (["a", "b", "c"], 1, answer, forget)
    assert bench.closed_loop(*loop, 1, 0.0, clock) == ([1.0] * 3, 3, ["A", "B", "C"]) and len(passes) == 1
    assert bench.closed_loop(*loop, 4, 0.0, clock) == ([1.0] * 6, 6, ["A", "B", "C"])
    assert bench.closed_loop(*loop, 1, 7.0, clock)[:2] == ([1.0] * 9, 9)
    assert bench.closed_loop(["a", "b", "c"], 3, answer, forget, 4, 0.0, clock) == ([3.0, 3.0], 6, ["A", "B", "C"])


@pytest.mark.parametrize(
    ("seconds", "windows"), [([5, 1, 1.05], 3), ([1, 1], 2), ([9, 4, 2, 1.95], 4), ([2.0**i for i in range(12)], 10)]
)
def test_warm_up(seconds, windows):
    clock, left = Clock(), iter(seconds)

    def window():
        clock.now += next(left)

    assert bench.warm_up(window, clock) == windows


def test_figures():
    row = bench.figures([0.1 * i for i in range(1, 102)], seconds=50.0, requests=101, tokens=10)
    assert (row["requests_per_second"], row["input_tokens_per_second"]) == (2.02, 20.2)
    assert [row[f"latency_p{p}_ms"] for p in (50, 90, 99)] == pytest.approx([5100, 9100, 10000])


# Log-probabilities of two options: rows 0 and 1 are clear, row 2 is nearly even.
EXPECTED = np.log([[0.9, 0.1], [0.2, 0.8], [0.505, 0.495]])


@pytest.mark.parametrize(
    ("predictions", "agreement", "status", "reason"),
    [
        ([0, 1, 0], 1.0, "ok", None),
        ([0, 1, 1], 2 / 3, "ok", None),  # 0.02 nats apart: rounding may decide
        ([0, 0, 0], 2 / 3, "invalid", "1 of 3 answers differ from minicls in fp32"),
        ([0, None, None], 1 / 3, "invalid", "1 of 3 answers differ from minicls in fp32, 2 of 3 name no option"),
        ([0, 1, None], 2 / 3, "ok", "1 of 3 name no option"),
    ],
)
def test_trained_weights_are_judged_by_their_answers(predictions, agreement, status, reason):
    row = {"predictions": predictions, "log_probabilities": None}
    verdict = bench.judge(row, EXPECTED, np.array([0, 0, 0]), bench.Settings())
    accuracy = sum(p == 0 for p in predictions) / 3
    assert verdict == {"accuracy": accuracy, "agreement": agreement, "status": status, "reason": reason}


def test_random_weights_are_judged_by_their_log_probabilities():
    s = bench.Settings(init="random", dtype="fp32")
    for off, status in ((1e-4, "ok"), (0.01, "invalid"), (float("nan"), "invalid")):
        row = {
            "predictions": [0, 1, 0],
            "log_probabilities": (EXPECTED + np.array([[0, 0], [0, off], [0, 0]])).tolist(),
        }
        verdict = bench.judge(row, EXPECTED, np.array([0, 0, 0]), s)
        assert (verdict["accuracy"], verdict["status"]) == (None, status) and "random weights" in verdict["reason"]
    verdict = bench.judge({"predictions": [None] * 3, "log_probabilities": None}, EXPECTED, np.array([0, 0, 0]), s)
    assert verdict == {
        "accuracy": None,
        "agreement": None,
        "status": "ok",
        "reason": "random weights: timed, not compared",
    }


def fake_start(rates, broken=(), interrupt_after=None):
    """A `start_side` whose engines answer as the reference does: {engine: requests a second, an item a round}."""
    rates = {engine: iter(values) for engine, values in rates.items()}
    yielded = []

    def start(s, engine):
        rate = next(rates[engine])
        ((role, _),) = bench.models(s).items()
        for mode in s.mode:
            for method in bench.METHODS[role]:
                if len(yielded) == interrupt_after:
                    raise KeyboardInterrupt
                if engine in broken and method != "score":
                    raise UserError(f"{engine} broke")
                yielded.append(engine)
                row = {
                    "method": method,
                    "mode": mode,
                    "engine_version": "1",
                    "peak_memory_bytes": 2**30,
                    "num_requests": 4,
                }
                row |= bench.figures([1 / rate], 1 / rate, 1, 10.0) | (
                    {"slo_attainment": 0.5} if mode == "server" else {}
                )
                yield row | {"predictions": [0] * 4, "log_probabilities": [[0.0, -9.0, -9.0, -9.0]] * 4}

    return start


def rps(monkeypatch, tmp_path, start, *flags):
    monkeypatch.setattr(bench, "start_side", start)
    monkeypatch.setattr(bench, "reference", lambda *args: np.array([[0.0, -9.0, -9.0, -9.0]] * 4))
    flags = [
        *flags,
        "--data",
        "synthetic",
        "--threads",
        "1",
        "--num-requests",
        "4",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    bench.main(flags)


def read_rows(tmp_path):
    return json.loads((tmp_path / "out" / "bench.json").read_text())


KEYS = ["model", "engine", "engine_version", "method", "mode", "dtype", "threads", "device", "requests_per_second"]
KEYS += [
    "latency_p50_ms",
    "latency_p90_ms",
    "latency_p99_ms",
    "input_tokens_per_second",
    "peak_memory_bytes",
    "accuracy",
]
KEYS += ["agreement", "num_requests", "status", "reason"]


def test_table_and_plot(bert_run, qwen_run, tmp_path, capsys, monkeypatch):
    start = fake_start({"minicls": [30.0, 3.0, 10.0, 5.0, 20.0, 4.0], "vllm": [7.0] * 12}, broken=("vllm",))
    models = ["--bert", str(bert_run), "--qwen", str(qwen_run), "--engines", "minicls", "vllm"]
    rps(monkeypatch, tmp_path, start, *models, "--mode", "single", "server", "--rounds", "3")
    rows, printed = read_rows(tmp_path), capsys.readouterr().out
    assert printed.endswith(
        f"{tmp_path / 'out' / 'bench.json'}, {tmp_path / 'out' / 'rps.png'}\n"
    )  # no JSON at a reader
    assert (tmp_path / "out" / "rps.png").stat().st_size > 0
    assert all([*row] == KEYS + ["slo_attainment"] * (row["mode"] == "server") for row in rows)
    assert {(r["model"].split(":")[0], r["engine"], r["method"], r["mode"]) for r in rows} == {
        (model, engine, method, mode)
        for model, methods in (("bert", ["classify"]), ("qwen", ["generate", "score"]))
        for engine in ("minicls", "vllm")
        for method in methods
        for mode in ("single", "server")
    }
    assert len(rows) == 12
    ours, *_ = rows
    assert (ours["requests_per_second"], ours["latency_p99_ms"], ours["status"]) == (
        20.0,
        50.0,
        "ok",
    )  # the median of 3 rounds
    assert ours["agreement"] == 1 and ours["dtype"] == "bf16" and ours["threads"] == 1
    theirs = next(row for row in rows if row["engine"] == "vllm")
    assert (theirs["status"], theirs["reason"], theirs["requests_per_second"]) == ("failed", "vllm broke", None)
    assert "failed (vllm broke)" in printed and "50.0% in time" in printed


def test_engines_that_are_not_installed_are_left_out_unless_asked_for(bert_run, tmp_path, capsys, monkeypatch):
    find_spec = bench.importlib.util.find_spec
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name == "vllm" else find_spec(name))
    named = tmp_path / "bert"
    named.symlink_to(bert_run)
    start = fake_start({"minicls": [3.0], "transformers": [3.0]})
    rps(monkeypatch, tmp_path, start, "--bert", str(named), "--mode", "offline", "--rounds", "1")
    assert [(row["model"], row["engine"]) for row in read_rows(tmp_path)] == [
        ("bert", "minicls"),
        ("bert", "transformers"),
    ]
    assert "not installed, so not measured: vllm\n" in capsys.readouterr().out


def test_interruption_leaves_the_rows_done(qwen_run, tmp_path, capsys, monkeypatch):
    start = fake_start({"minicls": [1.0], "transformers": [1.0]}, interrupt_after=3)
    with pytest.raises(SystemExit) as ended:
        flags = ["--qwen", str(qwen_run), "--engines", "minicls", "transformers", "--mode", "single", "--rounds", "1"]
        config.run(lambda _: rps(monkeypatch, tmp_path, start, *flags))
    assert ended.value.code == 130 and capsys.readouterr().err.endswith("interrupted\n")
    rows = read_rows(tmp_path)
    done = [("minicls", "generate"), ("minicls", "score"), ("transformers", "generate")]
    assert [(row["engine"], row["method"]) for row in rows] == done and not [*(tmp_path / "out").glob(".*")]


def test_an_engine_that_cannot_start_is_rows_that_say_why(bert_run, tmp_path, capsys):
    """Really started: there is no such interpreter."""
    flags = ["--bert", str(bert_run), "--engines", "vllm", "--vllm-python", str(tmp_path / "python"), "--rounds", "1"]
    flags += ["--data", "synthetic", "--num-requests", "4", "--threads", "1"]
    bench.main([*flags, "--output-dir", str(tmp_path / "out")])
    assert [(row["mode"], row["status"]) for row in read_rows(tmp_path)] == [
        ("single", "failed"),
        ("offline", "failed"),
    ]
    assert all("does not start (No such file" in row["reason"] for row in read_rows(tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_an_engine_that_is_not_installed_says_so(bert_run, monkeypatch):
    monkeypatch.setattr(bench.signal, "signal", lambda *args: None)
    with pytest.raises(UserError, match="vllm does not import"):
        bench.main(["--bert", str(bert_run), "--data", "synthetic", "--threads", "1", "--side", "vllm"])


def test_a_process_measures_every_method_and_mode(qwen_run, capsys, monkeypatch):
    """What such a process prints, from the real engine: the answers are minicls' own; and it is told what was asked."""
    monkeypatch.setattr(bench.signal, "signal", lambda *args: None)
    s = bench.Settings(
        qwen=str(qwen_run), data="synthetic", mode=("single", "offline", "server"), dtype="fp32", threads=1
    )
    s = replace(s, num_requests=8, min_seconds=0.0, rate=1e6, global_batch_size=12)
    command, env = bench.side_process(replace(s, threads=2), "vllm")
    assert (
        parse(bench.Settings, command[2:]) == replace(s, threads=2, side="vllm")
        and env["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    )
    bench.main(bench.side_process(s, "minicls")[0][2:])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(bench.ROW)]
    rows = [json.loads(line.removeprefix(bench.ROW)) for line in lines]
    assert [(row["mode"], row["method"]) for row in rows] == [
        (mode, m) for mode in s.mode for m in ("generate", "score")
    ]
    data = bench.read_data(s)
    expected = bench.reference(
        s, "qwen", Reader(qwen_run), qwen_run, bench.torch.device("cpu"), bench.question_texts(s, data)
    )
    for row in rows:
        assert (
            "failed" not in row and row["num_requests"] == 8 and ("slo_attainment" in row) == (row["mode"] == "server")
        )
        if row["method"] == "score":
            np.testing.assert_allclose(row["log_probabilities"], expected, atol=1e-4)
            assert row["predictions"] == expected.argmax(1).tolist()


def test_what_an_engine_cannot_do_is_a_failed_row(qwen_run, capsys, monkeypatch):
    monkeypatch.setattr(bench.signal, "signal", lambda *args: None)
    monkeypatch.setattr(bench.engines.Minicls, "generate", lambda *args: 1 / 0)
    flags = [
        "--qwen",
        str(qwen_run),
        "--data",
        "synthetic",
        "--threads",
        "1",
        "--num-requests",
        "2",
        "--min-seconds",
        "0",
    ]
    bench.main([*flags, "--mode", "single", "--side", "minicls"])
    generated, scored = (json.loads(line.removeprefix(bench.ROW)) for line in capsys.readouterr().out.splitlines())
    assert generated["failed"].startswith("ZeroDivisionError") and "failed" not in scored


def test_real_size_needs_no_files(tmp_path, monkeypatch):
    """Random weights of the published sizes (smaller here), a tokenizer learned from the data, and the classes."""
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes = {name: tiny_sizes.SIZES[name] | tiny for name in ("bert-base-cased", "Qwen3-0.6B")}
    sizes["Qwen3-0.6B"] |= {"num_key_value_heads": 1, "head_dim": 8}
    monkeypatch.setattr(bench, "SIZES", sizes)
    s = bench.with_random_weights(bench.Settings(model_size="real", init="random", data="synthetic"), str(tmp_path))
    for role, directory in bench.models(s).items():
        reader = Reader(directory)
        assert reader.kind is bench.KINDS[role] and reader.label_names == ["World", "Sports", "Business", "Sci/Tech"]
        assert all(max(row) < reader.config["vocab_size"] for row in reader.rows(["Shares fell.", ""]))
    assert [*bench.models(s)] == [*bench.METHODS]


def test_models_that_do_not_fit_their_flag_or_the_data(bert_run, qwen_run, tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.csv").write_text("text,label\na,x\nb,y\n")
    for flags, part in (
        (
            ["--qwen-linear", str(qwen_run), "--data", "synthetic"],
            r"is a Qwen3ForCausalLM; pass a Llama\w+ or Qwen2\w+ or Qwen3ForSequenceClassification$",
        ),
        (["--bert", str(bert_run), "--data", str(tmp_path / "data")], "other classes"),
    ):
        with pytest.raises(UserError, match=part):
            bench.main([*flags, "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        (None, None, "0"),
        ("cuda:1", None, "1"),
        ("cuda:1", "5,7", "7"),
        ("cuda", "GPU-a,GPU-b", "GPU-a"),
        ("cpu", "5,7", "5,7"),
    ],
)
def test_every_side_sees_the_one_device_alone(device, visible, expected, monkeypatch):
    """Or the HF Trainer spreads its batch over all devices, and vLLM takes the first whatever --device says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    settings = bench.Settings(bert="run", device=device, compile=True)
    for side in bench.SIDES:
        command, env = bench.side_process(settings, side)
        assert env["CUDA_VISIBLE_DEVICES"] == expected
        assert command[command.index("--device") + 1] == ("cpu" if device == "cpu" else "cuda")
        # Frozen weights are packed for a CPU's products; a GPU has no such layout.
        assert ("TORCHINDUCTOR_FREEZING" in env) == (side == "minicls" and device == "cpu")


def test_a_gpu_is_timed_over_more_steps_and_after_more_of_them():
    settings = bench.Settings(device="cuda", max_steps=50)
    assert bench.uncounted_steps(settings) == 10
    assert bench.uncounted_steps(replace(settings, max_steps=2)) == 1
    assert bench.uncounted_steps(replace(settings, device="cpu")) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_vllm_leaves_a_card_room_for_others(device, monkeypatch):
    monkeypatch.setattr(engines, "is_classifier", lambda directory: False)
    arguments = engines._vllm_arguments(Path("run"), torch.bfloat16, torch.device(device), 512, False)
    assert arguments.get("gpu_memory_utilization") == (0.6 if device == "cuda" else None)


@pytest.mark.parametrize(("flags", "data"), [([], "synthetic"), (["--data", "other"], "other")])
def test_the_data_are_those_of_the_run_unless_named(flags, data, bert_run, monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "rps_side", asked.append)
    bench.main(["--bert", str(bert_run), "--side", "minicls", *flags])
    assert [s.data for s in asked] == [data]

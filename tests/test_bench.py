"""bench.py on engines whose times are known; its processes run in the README's commands (slow tier).

    python -m pytest tests/test_bench.py

Nothing here looks at a clock: figures are exact.
"""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import train_bert
from minicls import config, engines, serving, tiny, weights
from minicls.config import UserError, parse
from minicls.data import load_data
from minicls.predict import Reader
from results import small_qwen3


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("", ["--bert: no model", "--qwen-linear RUN", "--init random"]),
        ("--qwen a --rounds 0", ["--rounds", "at least 1"]),
        ("--bert a --engines tensorflow", ["--engines", "tensorflow"]),
        ("--bert a --mode batch", ["--mode", "batch"]),
        ("--bert no/such/dir --data synthetic", ["--bert: no directory no/such/dir"]),
        ("--init random --qwen no/such/x --data synthetic", ["--qwen: no directory no/such/x"]),
        ("--bert a --qwen b --side minicls", ["--side: minicls", "one model"]),
        ("--init random --bert Qwen3-0.6B --data synthetic", ["--bert: Qwen3-0.6B is a qwen3 model"]),
        ("--bert a --engines harness", ["--engines: harness only scores", "--qwen RUN"]),
        ("--qwen a --engines onnxruntime", ["--engines: onnxruntime only runs BERT", "--bert RUN"]),
        ("--qwen-linear a --engines minicls onnxruntime-int8", ["--engines: onnxruntime-int8 only", "--bert RUN"]),
        ("--qwen a --engines minicls-int8", ["--engines: minicls-int8 only runs BERT", "--bert RUN"]),
        ("--bert a --device cuda --engines minicls-int8", ["--engines: minicls-int8 runs only on a CPU"]),
        ("--bert a --device cuda --engines onnxruntime", ["--engines: onnxruntime runs only on a CPU", "--device cpu"]),
    ],
)
def test_mistakes(flags, parts, tmp_path):
    with pytest.raises(UserError) as error:
        bench.main([*flags.split(), "--output-dir", str(tmp_path / "out")])
    assert all(part in str(error.value) for part in parts) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flag", "others", "user"),
    [
        ("--text-column body", "--qwen a --data synthetic", "--data DIR"),
        ("--label-column class", "--qwen a --data synthetic", "--data DIR"),
        ("--text-column body", "--qwen a", "--data DIR"),
        ("--label-names x y", "--qwen a --data synthetic", "--data DIR"),
        ("--test-size 9", "--qwen a", "--data DIR"),
        ("--bert a", "--qwen b --engines harness", "--engines minicls or transformers or vllm or minicls-int8"),
        ("--qwen a", "--bert b --engines onnxruntime", "--engines minicls or transformers or vllm or harness"),
        ("--dtype fp32", "--bert a --engines minicls-int8 onnxruntime", "--engines minicls or transformers"),
        ("--max-new-tokens 4", "--bert a", "--qwen"),
        ("--max-new-tokens 4", "--qwen a --engines harness", "other than harness"),
        ("--max-new-tokens 4", "--qwen a --bert b --engines harness onnxruntime", "other than harness"),
        ("--min-seconds 1", "--qwen a --mode server", "--mode single or offline"),
        ("--rate 4", "--qwen a", "--mode server"),
        ("--slo-ms 200", "--qwen a --mode single", "--mode server"),
        ("--seed 1", "--qwen a", "--mode server or --init random"),
        ("--then b", "--qwen a --engines minicls", "--bert RUN with --engines minicls"),
        ("--then b", "--bert a --engines transformers", "--bert RUN with --engines minicls"),
        ("--then b", "--bert a --engines minicls --init random", "--bert RUN with --engines minicls"),
        ("--threshold 0.5", "--bert a", "--then RUN"),
        ("--compile", "--qwen a --engines transformers", "--engines minicls"),
        ("--vllm-python python", "--qwen a --engines minicls", "--engines vllm"),
    ],
)
def test_no_flag_is_silently_ignored(flag, others, user, tmp_path):
    with pytest.raises(UserError) as error:
        bench.main([*flag.split(), *others.split(), "--output-dir", str(tmp_path / "out")])
    message = str(error.value)
    assert message.startswith(f"{flag.split()[0]}: used only by") and user in message and message.endswith("flag out")


def test_flags_that_are_used_are_no_mistake():
    flags = (
        "--qwen a --engines minicls vllm --mode single server --max-new-tokens 4 --min-seconds 1 --rate 4 --slo-ms 200"
    )
    flags += " --seed 1 --compile --vllm-python python --text-column body --label-column class --data DIR"
    flags += " --label-names x y --test-size 9 --dtype fp32"
    bench.check_flags(parse(bench.Settings, flags.split()))
    defaults = "--bert a --engines minicls --rate 2 --slo-ms 1000 --seed 42"  # spelled out
    bench.check_flags(parse(bench.Settings, defaults.split()))


def test_counts_of_several_rounds_stay_whole():
    rounds = [
        {"status": "ok", "num_requests": 64, "threads": 2, "requests_per_second": rate, "reason": None}
        for rate in (2.0, 3.0)
    ]
    assert json.dumps(serving.median_row(rounds)) == json.dumps(rounds[0] | {"requests_per_second": 2.5})
    failed = {"status": "failed", "num_requests": None, "threads": 2, "requests_per_second": None, "reason": "it broke"}
    assert serving.median_row([failed, rounds[0]]) == failed | {"num_requests": 64, "requests_per_second": 2.0}


class Clock:
    """It stands still until it is advanced."""

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
    assert serving.closed_loop(*loop, 1, 0.0, clock) == ([1.0] * 3, 3, ["A", "B", "C"]) and len(passes) == 1
    assert serving.closed_loop(*loop, 4, 0.0, clock) == ([1.0] * 6, 6, ["A", "B", "C"])
    assert serving.closed_loop(*loop, 1, 7.0, clock)[:2] == ([1.0] * 9, 9)
    assert serving.closed_loop(["a", "b", "c"], 3, answer, forget, 4, 0.0, clock) == ([3.0, 3.0], 6, ["A", "B", "C"])


@pytest.mark.parametrize(
    ("seconds", "windows"), [([5, 1, 1.05], 3), ([1, 1], 2), ([9, 4, 2, 1.95], 4), ([2.0**i for i in range(12)], 10)]
)
def test_warm_up(seconds, windows):
    clock, left = Clock(), iter(seconds)

    def window():
        clock.now += next(left)

    assert serving.warm_up(window, clock) == windows


def test_figures():
    row = serving.figures([0.1 * i for i in range(1, 102)], seconds=50.0, num_answered=101, tokens=10)
    assert (row["requests_per_second"], row["input_tokens_per_second"]) == (2.02, 20.2)
    assert [row[f"latency_p{p}_ms"] for p in (50, 90, 99)] == pytest.approx([5100, 9100, 10000])


# Log-probabilities of two options: rows 0 and 1 are clear, row 2 is nearly even.
EXPECTED = np.log([[0.9, 0.1], [0.2, 0.8], [0.505, 0.495]])


@pytest.mark.parametrize(
    ("predictions", "changed", "status", "reason"),
    [
        ([0, 1, 0], 0, "ok", None),
        ([0, 1, 1], 1, "ok", None),  # 0.02 nats apart: rounding may decide
        ([0, 0, 0], 1, "invalid", "1 of 3 answers differ from minicls in fp32"),
        ([1, 0, 1], 3, "invalid", "2 of 3 answers differ from minicls in fp32"),
        ([0, None, None], 2, "invalid", "1 of 3 answers differ from minicls in fp32, 2 of 3 name no option"),
        ([0, 1, None], 1, "ok", "1 of 3 name no option"),
    ],
)
def test_trained_weights_are_judged_by_their_answers(predictions, changed, status, reason):
    """Every changed answer is counted, and one that was not nearly even makes the row invalid."""
    row = {"predictions": predictions, "log_probabilities": None}
    verdict = serving.judge(row, EXPECTED, np.array([0, 0, 0]), bench.Settings())
    accuracy = sum(p == 0 for p in predictions) / 3
    expected = {"accuracy": accuracy, "agreement": pytest.approx(1 - changed / 3), "changed_answers": changed}
    assert verdict == expected | {"status": status, "reason": reason}


def test_near_a_threshold_either_model_may_answer():
    row = {"predictions": [1, 0, 0], "log_probabilities": None}  # both clear answers changed
    verdicts = [
        serving.judge(row, EXPECTED, np.array([0, 0, 0]), bench.Settings(), near)
        for near in (False, np.array([True, False, False]), np.array([True, True, False]))
    ]
    assert [(v["status"], v["changed_answers"]) for v in verdicts] == [("invalid", 2), ("invalid", 2), ("ok", 2)]
    assert verdicts[1]["reason"] == "1 of 3 answers differ from minicls in fp32"


def test_random_weights_are_judged_by_their_log_probabilities():
    s = bench.Settings(init="random", dtype="fp32")
    for off, status in ((1e-4, "ok"), (0.01, "invalid"), (float("nan"), "invalid")):
        row = {
            "predictions": [0, 1, 0],
            "log_probabilities": (EXPECTED + np.array([[0, 0], [0, off], [0, 0]])).tolist(),
        }
        verdict = serving.judge(row, EXPECTED, np.array([0, 0, 0]), s)
        assert (verdict["accuracy"], verdict["status"]) == (None, status) and "random weights" in verdict["reason"]
        assert verdict["changed_answers"] is None
        assert (
            off != 0.01 or serving.judge(row, EXPECTED, np.array([0, 0, 0]), replace(s, dtype="int8"))["status"] == "ok"
        )
    verdict = serving.judge({"predictions": [None] * 3, "log_probabilities": None}, EXPECTED, np.array([0, 0, 0]), s)
    assert verdict == {
        "accuracy": None,
        "agreement": None,
        "changed_answers": None,
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
            for method in bench.methods(role, engine):
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
                row |= serving.figures([1 / rate], 1 / rate, 1, 10.0)
                row |= {"slo_attainment": 0.5} if mode == "server" else {}
                yield row | {"predictions": [0] * 4, "log_probabilities": [[0.0, -9.0, -9.0, -9.0]] * 4}

    return start


def compare(monkeypatch, tmp_path, start, *flags):
    monkeypatch.setattr(bench, "start_side", start)
    monkeypatch.setattr(bench, "reference", lambda *args: np.array([[0.0, -9.0, -9.0, -9.0]] * 4))
    fixed = "--data synthetic --threads 1 --num-requests 4 --output-dir"
    bench.main([*flags, *fixed.split(), str(tmp_path / "out")])


def read_rows(tmp_path):
    return json.loads((tmp_path / "out" / "bench.json").read_text())


KEYS = ["model", "engine", "engine_version", "method", "mode", "dtype", "threads", "device", "requests_per_second"]
KEYS += ["latency_p50_ms", "latency_p90_ms", "latency_p99_ms", "input_tokens_per_second", "peak_memory_bytes"]
KEYS += ["accuracy", "agreement", "changed_answers", "num_requests", "status", "reason"]


def test_table_and_plot(bert_run, qwen_run, tmp_path, capsys, monkeypatch):
    start = fake_start({"minicls": [30.0, 3.0, 10.0, 5.0, 20.0, 4.0], "vllm": [7.0] * 12}, broken=("vllm",))
    models = ["--bert", str(bert_run), "--qwen", str(qwen_run), "--engines", "minicls", "vllm"]
    compare(monkeypatch, tmp_path, start, *models, "--mode", "single", "server", "--rounds", "3")
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
    assert ours["changed_answers"] == 0 and "| changed answers |" in printed
    theirs = next(row for row in rows if row["engine"] == "vllm")
    assert (theirs["status"], theirs["reason"], theirs["requests_per_second"]) == ("failed", "vllm broke", None)
    assert "| failed: vllm broke |" in printed and "| in time |" in printed and "| 50.0% |" in printed


def test_the_harness_only_scores_and_only_where_it_is_named(bert_run, qwen_run, tmp_path, monkeypatch):
    start = fake_start({"minicls": [3.0] * 2, "harness": [3.0]})
    models = ["--bert", str(bert_run), "--qwen", str(qwen_run), "--engines", "minicls", "harness"]
    compare(monkeypatch, tmp_path, start, *models, "--mode", "single", "--rounds", "1")
    rows = [(row["model"].split(":")[0], row["engine"], row["method"]) for row in read_rows(tmp_path)]
    ours = [("bert", "minicls", "classify"), ("qwen", "minicls", "generate"), ("qwen", "minicls", "score")]
    assert rows == [*ours, ("qwen", "harness", "score")]


def test_onnxruntime_measures_bert_alone_in_dtypes_of_its_own(bert_run, qwen_run, tmp_path, monkeypatch):
    names = ("minicls", "onnxruntime", "onnxruntime-int8")
    start = fake_start({"minicls": [3.0] * 2, "onnxruntime": [3.0], "onnxruntime-int8": [3.0]}, broken=names[2:])
    models = ["--bert", str(bert_run), "--qwen", str(qwen_run), "--engines", *names]
    compare(monkeypatch, tmp_path, start, *models, "--mode", "single", "--rounds", "1")
    keys = ("engine", "method", "dtype", "status", "changed_answers")
    assert [tuple(row[key] for key in keys) for row in read_rows(tmp_path)] == [
        ("minicls", "classify", "bf16", "ok", 0),
        ("onnxruntime", "classify", "fp32", "ok", 0),
        ("onnxruntime-int8", "classify", "int8", "failed", None),
        ("minicls", "generate", "bf16", "ok", 0),
        ("minicls", "score", "bf16", "ok", 0),
    ]


def test_columns_without_a_value_are_left_out():
    row = {"model": "bert", "engine": "minicls", "method": "classify", "mode": "single", "requests_per_second": 2.0}
    row |= {"num_requests": 4, "accuracy": None, "status": "ok"}
    header = "| model | engine | method | mode | requests/s | requests | status |"
    assert bench.bench_table([row]).startswith(f"{header}\n")


def test_engines_that_are_not_installed_are_left_out_unless_asked_for(bert_run, tmp_path, capsys, monkeypatch):
    find_spec = bench.importlib.util.find_spec
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name == "vllm" else find_spec(name))
    named = tmp_path / "bert"
    named.symlink_to(bert_run)
    start = fake_start({"minicls": [3.0], "transformers": [3.0]})
    compare(monkeypatch, tmp_path, start, "--bert", str(named), "--mode", "offline", "--rounds", "1")
    assert [(row["model"], row["engine"]) for row in read_rows(tmp_path)] == [
        ("bert", "minicls"),
        ("bert", "transformers"),
    ]
    assert "not installed, so not measured: vllm\n" in capsys.readouterr().out


def test_interruption_leaves_the_rows_done(qwen_run, tmp_path, capsys, monkeypatch):
    start = fake_start({"minicls": [1.0], "transformers": [1.0]}, interrupt_after=3)
    with pytest.raises(SystemExit) as ended:
        flags = ["--qwen", str(qwen_run), "--engines", "minicls", "transformers", "--mode", "single", "--rounds", "1"]
        config.run_main(lambda _: compare(monkeypatch, tmp_path, start, *flags))
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


def test_a_side_that_fails_leaves_its_rows_and_its_last_words(monkeypatch):
    code = "import sys; print('loading'); print('ROW {}'); sys.exit('Traceback\\nerror: no memory')"
    monkeypatch.setattr(bench, "side_process", lambda s, side: ([sys.executable, "-c", code], None))
    rows = bench.start_side(bench.Settings(), "transformers")
    assert next(rows) == {}
    with pytest.raises(UserError, match=r"^no memory$"):
        next(rows)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_an_engine_that_is_not_installed_says_so(bert_run, monkeypatch):
    monkeypatch.setattr(bench.signal, "signal", lambda *args: None)
    with pytest.raises(UserError, match="vllm cannot be imported"):
        bench.main(["--bert", str(bert_run), "--data", "synthetic", "--threads", "1", "--side", "vllm"])


def test_a_process_measures_every_method_and_mode(qwen_run, capsys, monkeypatch):
    """The output of such a process with the real engine: the answers are minicls' own, and its flags are those asked for."""
    monkeypatch.setattr(bench.signal, "signal", lambda *args: None)
    s = bench.Settings(qwen=str(qwen_run), data="synthetic", mode=bench.MODES, dtype="fp32", threads=1)
    s = replace(s, num_requests=8, min_seconds=0.0, rate=1e6)
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
    texts = bench.requests(s, load_data("synthetic")).texts
    expected = bench.reference(Reader(qwen_run), qwen_run, torch.device("cpu"), texts)
    for row in rows:
        assert (
            "failed" not in row and row["num_requests"] == 8 and ("slo_attainment" in row) == (row["mode"] == "server")
        )
        if row["method"] == "score":
            np.testing.assert_allclose(row["log_probabilities"], expected, atol=1e-4)
            assert row["predictions"] == expected.argmax(1).tolist()


def test_a_cascade_is_a_row_whose_answers_are_the_two_models(bert_run, qwen_run, tmp_path):
    """In processes of their own: the row is checked against both models in fp32, and other engines have no such row."""
    texts = bench.requests(bench.Settings(num_requests=8), load_data("synthetic")).texts
    small, large = (bench.reference(Reader(run), run, torch.device("cpu"), texts) for run in (bert_run, qwen_run))
    threshold = float(np.median(np.exp(small).max(1)) + 1e-4)
    flags = f"--bert {bert_run} --then {qwen_run} --threshold {threshold} --data synthetic --dtype fp32 --threads 1"
    flags += " --engines minicls transformers --mode single offline server --num-requests 8 --min-seconds 0 --rounds 1"
    bench.main([*flags.split(), "--rate", "1000", "--output-dir", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "bench.json").read_text())
    cascade = [row for row in rows if row["method"] == "cascade"]
    assert [(row["engine"], row["mode"]) for row in cascade] == [("minicls", mode) for mode in bench.MODES]
    labels = bench.requests(bench.Settings(num_requests=8), load_data("synthetic")).labels
    sent = np.exp(small).max(1) <= threshold
    assert 0 < sent.sum() < 8
    accuracy = (np.where(sent, large.argmax(1), small.argmax(1)) == labels).mean()
    for row in cascade:
        assert row["model"] == f"cascade: {bert_run.name}, {qwen_run.name}" and row["status"] == "ok"
        assert (row["changed_answers"], row["accuracy"]) == (0, accuracy) and row["requests_per_second"] > 0


def test_what_an_engine_cannot_do_is_a_failed_row(qwen_run, capsys, monkeypatch):
    monkeypatch.setattr(bench.signal, "signal", lambda *args: None)
    monkeypatch.setattr(bench.engines.Minicls, "generate", lambda *args: 1 / 0)
    flags = "--data synthetic --threads 1 --num-requests 2 --min-seconds 0 --mode single --side minicls"
    bench.main(["--qwen", str(qwen_run), *flags.split()])
    generated, scored = (json.loads(line.removeprefix(bench.ROW)) for line in capsys.readouterr().out.splitlines())
    assert generated["failed"].startswith("ZeroDivisionError") and "failed" not in scored


@pytest.fixture
def small_sizes(monkeypatch):
    """The published sizes, made smaller."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes = {name: tiny.SIZES[name] | small for name in ("bert-base-cased", "Qwen3-0.6B", "qwen3-small")}
    for name in ("Qwen3-0.6B", "qwen3-small"):
        sizes[name] |= {"num_key_value_heads": 1, "head_dim": 8}
    for module in (bench, tiny, weights):
        monkeypatch.setattr(module, "SIZES", sizes)


@pytest.mark.parametrize(
    ("role", "size"), [("bert", "bert-base-cased"), ("qwen", "Qwen3-0.6B"), ("qwen_linear", "Qwen3-0.6B")]
)
def test_a_published_size_needs_no_files(role, size, small_sizes, tmp_path):
    """Random weights, a tokenizer learned from the data, and its classes."""
    data = load_data("synthetic")
    arguments = bench.ARCHITECTURES[role], data.train.texts, data.label_names, 42, tmp_path
    directory = weights.save_random_model(size, *arguments)
    reader = Reader(directory)
    assert directory == tmp_path / size and reader.architecture is bench.ARCHITECTURES[role]
    assert reader.label_names == ["World", "Sports", "Business", "Sci/Tech"]
    assert all(max(row) < reader.config["vocab_size"] for row in reader.rows(["Shares fell.", ""]))


def test_a_directory_without_weights_gives_config_and_tokenizer(small_sizes, tmp_path):
    """The files of results/small_qwen3.py are enough, and the weights follow from the seed."""
    small_qwen3.main([str(tmp_path / "small"), "--data", "synthetic", "--vocab-size", "400"])
    assert not (tmp_path / "small" / "model.safetensors").exists()
    made = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        data = load_data("synthetic")
        arguments = weights.DECODER, data.train.texts, data.label_names, seed, tmp_path / folder
        directory = weights.save_random_model(str(tmp_path / "small"), *arguments)
        assert directory == tmp_path / folder / "small" and Reader(directory).config["vocab_size"] == 400
        made.append((directory / "model.safetensors").read_bytes())
    assert made[0] == made[1] != made[2]


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
    """Otherwise the HF Trainer spreads its batch over all devices, and vLLM takes the first whatever --device says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    settings = bench.Settings(bert="run", device=device, compile=True)
    for side in bench.ENGINES:
        command, env = bench.side_process(settings, side)
        assert env["CUDA_VISIBLE_DEVICES"] == expected
        assert command[command.index("--device") + 1] == ("cpu" if device == "cpu" else "cuda")
        # Frozen weights are packed for a CPU's products; a GPU has no such layout. A decoder's layers share a graph.
        assert ("TORCHINDUCTOR_FREEZING" in env) == (side.startswith("minicls") and device == "cpu")
        _, env = bench.side_process(replace(settings, bert=None, qwen="run"), side)
        assert "TORCHINDUCTOR_FREEZING" not in env


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_vllm_leaves_a_card_room_for_others(device, monkeypatch):
    monkeypatch.setattr(engines, "is_classifier", lambda directory: False)
    arguments = engines._vllm_arguments(Path("run"), torch.bfloat16, torch.device(device), 512, False)
    assert arguments.get("gpu_memory_utilization") == (0.6 if device == "cuda" else None)


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """A run on data of which a reader must know the columns, the class names and the rows held out; and the flags."""
    folder = tmp_path_factory.mktemp("own")
    rows = "".join(f"text {i},{i % 2}\n" for i in range(40))
    (folder / "train.csv").write_text("body,class\n" + rows)
    flags = ["--data", str(folder), "--text-column", "body", "--label-column", "class", "--test-size", "0.25"]
    flags += ["--label-names", "bad", "good"]
    model = ["--model", "tiny", "--max-steps", "1", "--device", "cpu", "--threads", "1", "--dtype", "fp32"]
    train_bert.main([*model, *flags, "--output-dir", str(folder / "run")])
    return folder / "run", flags


@pytest.mark.parametrize("named", [False, True])
def test_the_data_are_read_as_the_run_read_them_unless_named(named, own_data, monkeypatch):
    """By the comparison, and by its processes."""
    (run, flags), seen = own_data, []

    def compare(s, data):
        seen.append(data)
        bench.main(bench.side_process(s, "minicls")[0][2:])
        sys.exit()

    monkeypatch.setattr(bench, "compare", compare)
    monkeypatch.setattr(bench, "measure_side", lambda s, data: seen.append(data))
    with pytest.raises(SystemExit):
        bench.main(["--bert", str(run), "--engines", "minicls", *(flags if named else [])])
    fingerprint = json.loads((run / "run.json").read_text())["data_fingerprint"]
    assert [data.fingerprint() for data in seen] == [fingerprint] * 2


@pytest.mark.parametrize(
    ("left_out", "parts"),
    [("--test-size", ["no test split", "--test-size 0.2"]), ("--label-names", ["--bert: ", "(0, 1)", "--label-names"])],
)
def test_data_that_are_named_without_the_flags_of_the_training(left_out, parts, own_data, tmp_path):
    run, flags = own_data
    start = flags.index(left_out)
    end = next((i for i in range(start + 1, len(flags)) if flags[i].startswith("--")), len(flags))
    argv = ["--bert", str(run), "--engines", "minicls", "--output-dir", str(tmp_path / "out")]
    with pytest.raises(UserError) as error:
        bench.main([*argv, *flags[:start], *flags[end:]])
    assert all(part in str(error.value) for part in parts) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("engine", "noted"), [("minicls", True), ("onnxruntime", False), ("minicls-int8", False)])
def test_slow_bf16_is_noted_only_where_weights_are_in_bf16(engine, noted, bert_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.dist, "_fast_bf16", lambda: False)
    start = fake_start({engine: [1.0]})
    compare(
        monkeypatch, tmp_path, start, "--bert", str(bert_run), "--engines", engine, "--mode", "single", "--rounds", "1"
    )
    assert ("BF16 IS SLOW" in capsys.readouterr().err) == noted


def test_a_config_that_does_not_fit_names_the_flag_of_its_model(bert_run, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert_run / name, tmp_path)
    config_values = json.loads((bert_run / "config.json").read_text()) | {"hidden_act": "relu"}
    (tmp_path / "config.json").write_text(json.dumps(config_values))
    with pytest.raises(UserError, match=r"^--bert: its config.json does not fit"):
        bench.main(["--init", "random", "--bert", str(tmp_path), "--data", "synthetic", "--engines", "minicls"])

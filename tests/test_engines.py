"""Engines give the same answers, and in mode server latency counts from the moment a request was due.

    python -m pytest tests/test_engines.py      (vLLM's answers: tests/test_vllm.py)

The tests turn the clock: no figure depends on how fast anything runs. Answers are in fp32, where other orders of addition
give log-probabilities within 1e-4 and the same tokens.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import ROOT
from runs import train

import train_qwen
from minicls import dist, engines, serving, weights
from minicls.config import UserError
from minicls.data import load_data, split_data
from minicls.predict import Reader

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def linear_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("linear") / "run"
    return train(run_dir, "--head", "linear", "--max-steps", "4", "--dtype", "fp32", script=train_qwen)


@pytest.fixture(scope="module")
def texts():
    return split_data(load_data("synthetic"), max_eval_rows=11).test.texts


def both(run, batch_size: int = 4):
    return engines.Minicls(run, torch.float32, CPU), engines.Transformers(run, torch.float32, CPU, batch_size)


@pytest.mark.parametrize("name", ["bert_run", "linear_run"])
def test_classify(name, texts, request):
    """Alone, and in padded batches of several lengths."""
    run = request.getfixturevalue(name)
    ours, theirs = both(run)
    rows = Reader(run).rows(texts)
    expected = ours.classify(rows)
    torch.testing.assert_close(expected.exp().sum(1), torch.ones(len(texts)))
    torch.testing.assert_close(theirs.classify(rows), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(theirs.classify(rows[:1]), expected[:1], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.classify(rows[:1]), expected[:1], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def onnx_engines(bert_run):
    """ONNX Runtime with the weights in fp32 and in int8, as bench.py makes it: --dtype changes neither."""
    pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    arguments = bert_run, torch.bfloat16, CPU, 512, False, False
    return [engines.make_engine(name, *arguments) for name in ("onnxruntime", "onnxruntime-int8")]


def test_onnxruntime(bert_run, texts, onnx_engines):
    """Alone, and in padded batches of several lengths; the last row has [CLS] and [SEP] alone."""
    rows = Reader(bert_run).rows([*texts, ""])
    expected = engines.Minicls(bert_run, torch.float32, CPU).classify(rows)
    theirs = engines.Transformers(bert_run, torch.float32, CPU).classify(rows)
    assert len({*map(len, rows)}) > 3 and len(rows) > 8
    fp32, int8 = onnx_engines
    fp32.batch_size = int8.batch_size = 4
    assert int8.version == f"{fp32.version}, int8"
    for engine, tolerance in ((fp32, 1e-4), (int8, 0.1)):
        answers = engine.classify(rows)
        assert answers.dtype == torch.float32 and answers.shape == expected.shape
        torch.testing.assert_close(answers, expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(answers, theirs, rtol=0, atol=tolerance)
        alone = torch.cat([engine.classify([row]) for row in rows])
        torch.testing.assert_close(alone, expected, rtol=0, atol=tolerance)
    assert (answers - expected).abs().max() > 1e-5  # the last one's weights are not in fp32


def test_minicls_in_int8(bert_run, texts):
    """The encoder's layers are quantized, the heads are not; the answers stay near those in fp32."""
    rows = Reader(bert_run).rows(texts)
    whole = engines.Minicls(bert_run, torch.float32, CPU)
    int8 = engines.make_engine("minicls-int8", bert_run, torch.bfloat16, CPU, 512, False, False)
    assert int8.version == f"{whole.version}, int8"
    linear = {name: type(module) for name, module in int8.model.named_modules() if "Linear" in type(module).__name__}
    assert {kind is torch.nn.Linear for name, kind in linear.items() if "encoder" in name} == {False}
    assert {kind is torch.nn.Linear for name, kind in linear.items() if "encoder" not in name} == {True}
    answers, expected = int8.classify(rows), whole.classify(rows)
    torch.testing.assert_close(answers, expected, rtol=0, atol=0.1)
    assert (answers - expected).abs().max() > 1e-5


@pytest.mark.parametrize("level", [None, 1.0], ids=["random", "all at the largest value"])
def test_a_product_in_int8(level):
    """Within half a step of each rounded factor. Sums of the largest products do not overflow, whatever the CPU."""
    torch.manual_seed(0)
    x, linear = torch.randn(7, 96), torch.nn.Linear(96, 33).requires_grad_(False)
    linear.weight[5] = 0  # a column without a scale of its own
    if level:
        x.fill_(level), linear.weight.fill_(level)
    answers, expected = engines.Int8Linear(linear)(x), linear(x)
    x_step = (x.max().clamp(min=0) - x.min().clamp(max=0)) / 255
    weight_step = linear.weight.abs().amax(1) / 63  # (33,)
    weight = linear.weight.abs() + weight_step[:, None] / 2
    # The zero point of x is rounded as well, which can shift the ends of its range by half a step.
    bound = x_step * weight.sum(1) + weight_step / 2 * x.abs().sum(1, keepdim=True)  # (7, 33)
    assert ((answers - expected).abs() <= bound + 1e-4).all()
    assert level or (answers - expected).abs().max() > 1e-3


def test_onnxruntime_as_documented(bert_run, onnx_engines, tmp_path, monkeypatch):
    """docs/deploy.md's lines export a run, and the file answers as the engine does on the same two texts."""
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    export, serve = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "onnx" in code)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "bert").symlink_to(bert_run)
    monkeypatch.chdir(tmp_path)
    exec(export, {})
    for file, engine in zip(("bert.onnx", "bert-int8.onnx"), onnx_engines, strict=True):
        names: dict = {}
        exec(serve.replace("bert-int8.onnx", file), names)
        expected = engine.classify(Reader(bert_run).rows(names["texts"]))
        log_probabilities = torch.from_numpy(names["logits"]).log_softmax(1)
        torch.testing.assert_close(log_probabilities, expected, rtol=0, atol=1e-5)


def test_the_exported_graph_is_fused(bert_run, tmp_path):
    """One operator for a layer's attention and none of its parts: otherwise ONNX Runtime is slower than it can be."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    file, config = tmp_path / "model.onnx", Reader(bert_run).config
    for int8, attention in ((False, "Attention"), (True, "QAttention")):
        engines.export_onnx(bert_run, file, int8)
        operators = [node.op_type for node in onnx.load(file).graph.node]
        assert operators.count(attention) == config["num_hidden_layers"]
        assert "SkipLayerNormalization" in operators and not {"Softmax", "LayerNormalization", "Erf"} & {*operators}
        assert ("MatMulInteger" in operators, "MatMul" in operators) == (int8, not int8)


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-int8"])
def test_onnxruntime_that_is_not_installed(name, bert_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=f"^{name} cannot be imported .*; install it or leave it out$"):
        engines.make_engine(name, bert_run, torch.float32, CPU, 512, False, False)


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled(int8, bert_run, texts):
    """One row alone and several together are two graphs, and the second is asked twice: neither falls back to eager."""
    torch._dynamo.utils.counters.clear()
    rows = Reader(bert_run).rows(texts)
    compiled, plain = (
        engines.Minicls(bert_run, torch.float32, CPU, compile=compile, int8=int8) for compile in (True, False)
    )
    assert compiled.version == f"{plain.version}, compiled"
    for asked in (rows[:1], rows, rows[5:], rows[2:3]):
        torch.testing.assert_close(compiled.classify(asked), plain.classify(asked), rtol=0, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] < 10  # not one a layer, nor one a request


@pytest.mark.slow
def test_the_layers_of_a_compiled_decoder_share_graphs(qwen_run, texts, tmp_path, monkeypatch):
    """As many graphs for six layers as for three, and the answers of the model that is not compiled."""
    compile, graphs = torch.nn.Module.compile, []
    # This backend traces as any other would, and needs no C++ compiler.
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **flags: compile(self, backend="aot_eager", **flags))
    for num_hidden_layers in (3, 6):
        source = shutil.copytree(qwen_run, tmp_path / f"{num_hidden_layers}-source")
        config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": num_hidden_layers}
        (source / "config.json").write_text(json.dumps(config))
        arguments = weights.DECODER, texts, ("a", "b"), 0, tmp_path / str(num_hidden_layers)
        directory = weights.save_random_model(str(source), *arguments)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled, plain = (engines.Minicls(directory, torch.float32, CPU, compile) for compile in (True, False))
        rows, options = Reader(qwen_run).rows(texts), [[5], [6]]
        for asked in (rows[:1], rows[:5]):
            torch.testing.assert_close(compiled.score(asked, options), plain.score(asked, options), rtol=0, atol=1e-4)
            assert compiled.generate(asked, 4, []) == plain.generate(asked, 4, [])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


def test_score_and_generate(qwen_run, texts):
    ours, theirs = both(qwen_run)
    chat = Reader(qwen_run).chat
    questions = chat.questions(texts)[0]
    expected = ours.score(questions, chat.options)
    assert (expected.exp().sum(1) < 1).all()  # other tokens have a share, too
    torch.testing.assert_close(theirs.score(questions, chat.options), expected, rtol=0, atol=1e-4)
    ours.forget()
    one_by_one = torch.cat([ours.score([row], chat.options) for row in questions])
    torch.testing.assert_close(one_by_one, expected, rtol=0, atol=1e-4)
    assert ours.prefix.begins(questions) and len(ours.prefix.ids) > 20  # read once for those that follow
    harness = engines.Harness(qwen_run, torch.float32, CPU)
    torch.testing.assert_close(harness.score(questions[:2], chat.options), expected[:2], rtol=0, atol=1e-4)
    prompts = chat.prompts(texts)[0]
    stop = ours.generate(prompts, 2, [])[0][1:]  # a token that does come
    answers = ours.generate(prompts, 8, stop)
    assert answers == theirs.generate(prompts, 8, stop) and len(answers[0]) < 8
    assert ours.generate(prompts[:2], 8, []) == theirs.generate(prompts[:2], 8, [])
    assert all(len(ids) == 8 for ids in theirs.generate(prompts[:2], 8, []))
    with pytest.raises(UserError, match="several tokens"):
        theirs.score(questions, [[1, 2], [3]])


def test_bf16_weights(bert_run, texts):
    """The head stays in fp32; what is below it has three digits."""
    rows = Reader(bert_run).rows(texts)
    found = engines.Minicls(bert_run, torch.bfloat16, CPU).classify(rows)
    expected = engines.Minicls(bert_run, torch.float32, CPU).classify(rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)


def test_arrivals():
    """A Poisson process: gaps of mean and deviation 1 / rate (n = 20,000: within 3 %, four standard errors), seeded."""
    due = serving.arrivals(5.0, 20_000, seed=1)
    gaps = np.diff(due, prepend=0)
    assert (gaps > 0).all() and abs(gaps.mean() * 5 - 1) < 0.03 and abs(gaps.std() * 5 - 1) < 0.03
    np.testing.assert_array_equal(due[:10], serving.arrivals(5.0, 10, seed=1))
    assert (due[:10] != serving.arrivals(5.0, 10, seed=2)).all()


class FakeFeed:
    """Rows that arrive when they are due, on a clock that only waiting and working move."""

    def __init__(self, due, rows=None):
        self.due, self.rows, self.next, self.now = list(due), rows or [[7]] * len(due), 0, 0.0

    def clock(self) -> float:
        return self.now

    def poll(self, timeout):
        limit = float("inf") if timeout is None else self.now + timeout
        if self.next == len(self.due) or self.due[self.next] > limit:
            assert timeout is not None, "waits forever"
            self.now = limit
            return None
        self.now = max(self.now, self.due[self.next])
        self.next += 1
        return self.next - 1, self.rows[self.next - 1]


def serve(feed: FakeFeed, seconds: Callable[[int], float], max_tokens=100, max_wait=0.0):
    """Latencies, answers and batches of an engine whose n-th call takes `seconds(n)`."""
    batches = []

    def answer(rows):
        feed.now += seconds(len(batches))
        batches.append(rows)
        return [sum(row) for row in rows]

    return *serving.serve_batches(feed.due, feed, answer, max_tokens, max_wait), batches


def test_a_calm_engine_takes_its_service_time():
    latencies, answers, batches = serve(FakeFeed([0.5, 1.5, 2.5], [[1], [2, 2], [3]]), lambda call: 0.25)
    assert latencies == [0.25] * 3 and answers == [1, 4, 3] and len(batches) == 3
    latencies, _, batches = serve(FakeFeed([0.5, 1.5, 2.5]), lambda call: 0.25, max_wait=0.125)
    assert latencies == [0.375, 0.375, 0.25] and len(batches) == 3  # after the last there is nothing to wait for
    latencies, _, batches = serve(FakeFeed([0.5, 0.625, 2.5]), lambda call: 0.25, max_wait=0.125)
    assert latencies == [0.375, 0.25, 0.25] and [*map(len, batches)] == [2, 1]


def test_batches_keep_to_the_budget_and_lose_nothing():
    rows = [[1] * n for n in (3, 4, 4, 9, 1, 2, 2)]
    latencies, answers, batches = serve(FakeFeed([0.0] * 7, rows), lambda call: 1.0, max_tokens=8)
    assert [[len(row) for row in batch] for batch in batches] == [
        [3, 4],
        [4],
        [9],
        [1, 2, 2],
    ]  # one row may be too long alone
    assert answers == [3, 4, 4, 9, 1, 2, 2] and latencies == [1, 1, 2, 3, 4, 4, 4]


def test_a_stall_shows_in_the_tail():
    """One call of fifty takes ten seconds. The nine requests that arrive meanwhile wait, and their latency says so."""
    latencies, _, _ = serve(FakeFeed(np.arange(50.0)), lambda call: 10.0 if call == 20 else 0.125)
    row = serving.figures(latencies, 50.0, 50, tokens=1, slo_ms=1000)
    assert row["latency_p50_ms"] == 125 and row["latency_p99_ms"] > 9000
    assert sum(latency > 1 for latency in latencies) == 10 and row["slo_attainment"] == 0.8


@pytest.mark.parametrize(("rate", "share"), [(4, 1.0), (16, 0.08)])
def test_overload_shows_in_slo_attainment(rate, share):
    """An engine of 8 requests a second, one row a batch. At 16 a second, each waits 1/16 s longer than the previous."""
    due = np.arange(200) / rate
    latencies, _, _ = serve(FakeFeed(due), lambda call: 0.125, max_tokens=1)
    row = serving.figures(latencies, due[-1], 200, tokens=1, slo_ms=1000)
    assert row["slo_attainment"] == pytest.approx(share, abs=0.006)
    assert latencies[-1] == pytest.approx(0.125 if rate == 4 else 200 / 8 - due[-1])


def test_texts_are_tokenized_in_a_thread_whose_errors_come_out():
    threads = set()

    def encode(i):
        threads.add(threading.get_ident())
        if i == 2:
            raise UserError("no such text")
        return [i]

    feed = serving.Feed([0.0, 0.0, 0.0], encode)
    assert [feed.poll(None), feed.poll(None)] == [(0, [0]), (1, [1])]
    with pytest.raises(UserError, match="no such text"):
        feed.poll(None)
    assert feed.poll(0.0) is None and threading.get_ident() not in threads


def test_a_server_gets_each_request_in_a_thread_of_its_own():
    barrier = threading.Barrier(3, timeout=60)  # all three must be under way at once

    def answer(i):
        barrier.wait()
        return i * i

    latencies, answers = serving.serve_each([0.0, 0.0, 0.0], answer)
    assert answers == [0, 1, 4] and min(latencies) > 0
    with pytest.raises(ZeroDivisionError):
        serving.serve_each([0.0, 0.0], lambda i: 1 / i)


def test_memory_of_a_process_leaves_out_that_of_its_parent():
    command = [sys.executable, "-c", "print('started', flush=True); open(0).read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as small:
        assert small.stdout.readline() == "started\n"
        assert 2**20 < dist.resident_peak_bytes(small.pid) < 2**26 < dist.peak_memory_bytes(CPU)  # torch is loaded here
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert dist.resident_peak_bytes(ended.pid) == 0  # a zombie, which vLLM's server may have among its processes
    server = object.__new__(engines.VLLMServer)
    server.process, server.device = ended, CPU
    assert server.peak_memory_bytes == 0  # gone between two looks
    large = torch.ones(2**28)  # 1 GiB, here alone
    code = "import torch; from minicls import dist; print(dist.peak_memory_bytes(torch.device('cpu')))"
    seen = int(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT))
    assert 2**26 < seen < large.nbytes < dist.peak_memory_bytes(CPU)

"""The branches that a GPU takes, over a reference kernel on the CPU (`way` runs other files' tests through them, too).

python -m pytest tests/test_gpu_path.py
"""

import inspect
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_bert import make_model as make_bert
from test_bert import naive_attention
from test_decoder import make_model, random_rows
from torch.nn.attention.varlen import varlen_attn

from minicls import attention as attention_module
from minicls.attention import Rows, attention, has_flash
from minicls.batch import pack
from minicls.generate import generate
from minicls.scorer import score

CPU = torch.device("cpu")
MIXED = [7, 1, 12, 1, 30, 2]

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


def bf16_autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture
def taken(monkeypatch) -> list[tuple]:
    """What is handed to the variable-length kernel, call by call."""
    calls = []

    def counted(*arguments, **options):
        calls.append((arguments, options))
        return varlen_attn(*arguments, **options)

    monkeypatch.setattr(attention_module, "varlen_attn", counted)
    return calls


def packed(lengths: list[int]) -> Rows:
    return Rows(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths))


@pytest.mark.parametrize("lengths", [[7], [1], [1, 1], MIXED], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_varlen_kernel_gets_what_equals_the_naive_way(causal, kv_heads, lengths, taken):
    """Inputs are rounded to bf16 first, so that only results and gradients are: by 0.4 %, and values are of the order of 1."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, 8) for heads in (4, kv_heads, kv_heads)]
    rounded = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
    exact = [x.detach().float().requires_grad_() for x in rounded]
    output, expected = attention(*rounded, packed(lengths), causal), naive_attention(*exact, lengths, causal)
    assert output.dtype == torch.bfloat16 and len(taken) == 1
    upstream = torch.randn(output.shape, generator=generator).bfloat16()
    found = [output, *torch.autograd.grad(output, rounded, upstream)]
    wanted = [expected, *torch.autograd.grad(expected, exact, upstream.float())]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=0.01, atol=0.03)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "major", "taken"),
    [
        (64, torch.bfloat16, 8, True),
        (128, torch.float16, 9, True),
        (256, torch.bfloat16, 12, True),
        (26, torch.bfloat16, 9, False),  # TinyBERT: 312 in 12 heads
        (264, torch.bfloat16, 9, False),
        (64, torch.float32, 9, False),
        (64, torch.float16, 7, False),  # T4, V100
    ],
)
def test_which_cards_and_heads_flash_takes(head_dim, dtype, major, taken, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("", (), {"major": major}))
    assert has_flash(torch.device("cuda", 1), dtype, head_dim) == taken


def test_head_sizes_that_flash_refuses_go_the_padded_way(taken):
    q = torch.randn(sum(MIXED), 2, 26, dtype=torch.bfloat16)
    output = attention(q, q, q, packed(MIXED))
    torch.testing.assert_close(output.float(), naive_attention(*[q.float()] * 3, MIXED, False), rtol=0.01, atol=0.03)
    assert not taken


def test_varlen_attn_is_called_as_it_wants():
    parameters = inspect.signature(varlen_attn).parameters
    positional = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert [*parameters][:7] == positional
    assert parameters["window_size"].default == (-1, -1)
    assert {*attention_module.GROUPED} == {"enable_gqa"} & parameters.keys()


# torch.compile. aot_eager traces forward and backward as any backend would, and compiles nothing.


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, dynamic=True, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_bert_trains_and_classifies_without_a_graph_break(dropout):
    model = make_bert(attention_probs_dropout_prob=dropout, num_hidden_layers=3)
    forward = compiled(model)
    with bf16_autocast():
        for lengths in ([5, 9, 1], MIXED, [8, 8]):
            model.train()
            forward(*pack(random_rows(lengths))).sum().backward()
        model.eval()
        rows = random_rows([*range(1, 20)])
        with torch.inference_mode():
            torch.testing.assert_close(forward(*pack(rows)), model(*pack(rows)), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_decoder_trains_without_a_graph_break(checkpointing):
    model = make_model(num_hidden_layers=3).train()
    model.model.activation_checkpointing = checkpointing
    forward = compiled(model)
    with bf16_autocast():
        for lengths in ([5, 9, 1], MIXED, [8, 8]):
            batch = pack(random_rows(lengths))
            forward(*batch, batch.last).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_and_decoding_need_no_graph_break(dtype):
    model = make_model().to(dtype)
    forward = compiled(model)
    for beginning, lengths in (([1, 2, 3, 4], MIXED), ([*range(30)], [2, 5, 3])):
        questions = [beginning + row for row in random_rows(lengths)]
        for options in ([[1], [2], [3]], [[1, 2, 3], [4], [5, 6]]):
            torch.testing.assert_close(
                score(forward, questions, options, CPU), score(model, questions, options, CPU), rtol=1e-3, atol=1e-3
            )
    assert generate(forward, random_rows(MIXED), 6, [], CPU) == generate(model, random_rows(MIXED), 6, [], CPU)


@pytest.mark.parametrize(
    "sections",
    [["environment", "scoring_check", "bert_training", "single_requests"], pytest.param([], marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_the_script_for_a_gpu_runs_on_a_cpu(sections, tmp_path):
    only = ["--only", *sections] if sections else []
    command = [sys.executable, str(ROOT / "results" / "gpu.py"), "--smoke", *only, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("smoke-torch-*.json")
    result = json.loads(file.read_text())
    assert result["wrong"] == [] and result["seconds"].keys() >= {*sections, "all"}
    assert result["Qwen3-0.6B, minicls, score, one at a time"]["requests_per_second"] > 0

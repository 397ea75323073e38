"""The branches that a GPU takes, over a reference kernel on the CPU (`way` runs other files' tests through them, too).

python -m pytest tests/test_gpu_path.py
"""

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from runs import SCRIPTS, losses, train, without_dropout
from test_bert import make_model as make_bert
from test_bert import naive_attention
from test_decoder import make_model, random_rows
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode

from minicls import attention as attention_module
from minicls import dist
from minicls.attention import Batch, Layout, attention, cache_slots, lay_out, pad_layout
from minicls.batch import pack
from minicls.config import UserError
from minicls.generate import generate
from minicls.kernels import has_flash
from minicls.scorer import score

CPU = torch.device("cpu")
MIXED = [7, 1, 12, 1, 30, 2]

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")


def bf16_autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.fixture
def taken(monkeypatch) -> list[tuple]:
    """The arguments of each call of the variable-length kernel."""
    calls = []

    def counted(*arguments, **options):
        calls.append((arguments, options))
        return varlen_attn(*arguments, **options)

    monkeypatch.setattr(attention_module, "varlen_attn", counted)
    return calls


def layout_of(lengths: list[int], q: torch.Tensor) -> Layout:
    return lay_out(pack([[0] * length for length in lengths]), q, q.shape[-1])


@pytest.mark.parametrize("lengths", [[7], [1], [1, 1], MIXED], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_the_varlen_kernel_gets_what_equals_the_naive_way(causal, kv_heads, lengths, taken):
    """Inputs are rounded to bf16 first, so that only results and gradients are: by 0.4 %, and values are of the order of 1."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, 8) for heads in (4, kv_heads, kv_heads)]
    rounded = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
    exact = [x.detach().float().requires_grad_() for x in rounded]
    output = attention(*rounded, layout_of(lengths, rounded[0]), causal)
    expected = naive_attention(*exact, lengths, causal)
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
    output = attention(q, q, q, layout_of(MIXED, q))
    torch.testing.assert_close(output.float(), naive_attention(*[q.float()] * 3, MIXED, False), rtol=0.01, atol=0.03)
    assert not taken


def test_varlen_attn_is_called_as_it_wants():
    parameters = inspect.signature(varlen_attn).parameters
    positional = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert [*parameters][:7] == positional
    assert parameters["window_size"].default == (-1, -1)
    assert {*attention_module.GROUPED} == {"enable_gqa"} & parameters.keys()


# Starting on a GPU, as far as a machine without one can tell.


@pytest.fixture
def card(monkeypatch):
    """Sets up a card that is not there, of a compute capability; returns the allocator's setting."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "restored afterwards")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")

    def set_up(capability, dtype):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        dist.set_up_cuda(torch.device("cuda", 0), dtype)
        return os.environ.get("PYTORCH_ALLOC_CONF")

    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield set_up
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize(
    ("capability", "dtype", "told"), [((7, 5), "bf16", 1), ((7, 5), "fp32", 0), ((8, 6), "bf16", 0)]
)
def test_setting_up_a_card(capability, dtype, told, card, monkeypatch, capsys):
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert card(capability, dtype) == "expandable_segments:True"
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == told and all("capability 7.5" in note and "--dtype fp32" in note for note in notes)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")  # the user's own
    assert card(capability, dtype) is None


@pytest.mark.parametrize(
    ("built_for", "visible", "words"),
    [
        ("13.0", None, ["CUDA 13.0", "driver 535.104.05", "update the driver"]),
        (None, None, ["built without CUDA"]),
        ("13.0", "", None),  # the user hides the devices
    ],
)
def test_a_driver_that_torch_cannot_use_is_told_in_one_line(built_for, visible, words, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(dist, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES") if visible is None else monkeypatch.setenv(
        "CUDA_VISIBLE_DEVICES", visible
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dist.start(None) == CPU and not capsys.readouterr().err  # no driver: nothing to tell
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023\nGCC version: 12\n"
    )
    assert dist.start(None) == CPU
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == (words is not None) and all(
        word in note for note in notes for word in ["RUNS ON THE CPU", *words]
    )
    with pytest.raises(UserError, match=words[-1] if words else "torch sees no CUDA device"):
        dist.start("cuda")


def test_a_rank_without_its_group_is_a_mistake(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(
        UserError, match=r"RANK: '0' .* no WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start with torchrun, or unset RANK"
    ):
        dist.start("cpu")


# torch.compile. aot_eager traces forward and backward as any backend would, and compiles nothing.


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, dynamic=True, fullgraph=True, backend="aot_eager")


SHAPES = [5, 9, 1], MIXED, [8, 8]  # the longest row: odd, even, and a multiple of 8


@pytest.fixture
def graphs():
    """The number of graphs that torch.compile has made."""
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_bert_with_dropout_trains_in_one_graph_for_all_lengths(graphs):
    model = make_bert(num_hidden_layers=1).train()
    forward = compiled(model)
    with bf16_autocast():
        for lengths in SHAPES:
            forward(pack(random_rows(lengths))).sum().backward()
    assert graphs() == 1
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_bert_classifies_in_one_graph_for_all_lengths(graphs):
    model = make_bert().eval()
    forward = compiled(model)
    with torch.inference_mode(), bf16_autocast():
        for lengths in SHAPES:
            batch = pack(random_rows(lengths))
            torch.testing.assert_close(forward(batch), model(batch), rtol=0.05, atol=0.05)
    assert graphs() == 1


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_decoder_trains_in_one_graph_for_all_lengths(checkpointing, graphs):
    """Two layers with checkpointing, since torch.compile used to fail in the second one."""
    model, gradients = make_model(num_hidden_layers=1 + checkpointing).train(), []
    forwards = {False: model, True: compiled(model)}
    for is_compiled, forward in forwards.items():
        model.model.activation_checkpointing = checkpointing and is_compiled
        for lengths in SHAPES:
            batch = pack(random_rows(lengths))
            model.zero_grad()
            with bf16_autocast():
                forward(batch, batch.last).square().mean().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert graphs() == 1
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.05 * gradients[0].abs().max().item())


@pytest.mark.parametrize(
    ("beginning", "options"),
    [
        (2, [[1], [2], [3]]),
        pytest.param(30, [[1], [2], [3]], marks=pytest.mark.slow),
        pytest.param(2, [[1, 2, 3], [4], [5, 6]], marks=pytest.mark.slow),
        pytest.param(30, [[1, 2, 3], [4], [5, 6]], marks=pytest.mark.slow),
    ],
    ids=[
        "rests longer",
        "prefix longer",
        "rests longer, options of several tokens",
        "prefix longer, options of several tokens",
    ],
)
def test_scoring_breaks_no_graph(beginning, options):
    model = make_model(num_hidden_layers=1).bfloat16()
    questions = [[*range(beginning), *row] for row in random_rows([12, 5, 9])]
    # Rounding alone: bf16 has 8 bits.
    torch.testing.assert_close(
        score(compiled(model), questions, options, CPU), score(model, questions, options, CPU), rtol=0.02, atol=0.1
    )


@pytest.mark.slow
def test_decoding_breaks_no_graph():
    model = make_model(num_hidden_layers=1)
    assert generate(compiled(model), random_rows(MIXED), 4, [], CPU) == generate(model, random_rows(MIXED), 4, [], CPU)


# The costs of a GPU, counted without one.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_a_cache_is_one_that_a_fused_kernel_takes(dtype, monkeypatch):
    """Flash takes grouped heads in half precision and no mask; the memory-efficient kernel masks, as many heads of keys as of
    queries, and lines of a mask that begin at multiples of 8. Whatever else there is computes all scores, several passes over."""
    original, calls = F.scaled_dot_product_attention, []

    def attend(q, k, v, mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False):
        calls.append((q.shape, k.shape, mask, is_causal, enable_gqa))
        return original(q, k, v, mask, dropout_p, is_causal, enable_gqa=enable_gqa)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    model = make_model().to(dtype)
    for beginning in (2, 30):
        questions = [[*range(beginning), *row] for row in random_rows([12, 5, 9])]
        for options in ([[1], [2]], [[1, 2, 3], [4]]):
            score(model, questions, options, CPU)
        generate(model, questions, 3, [], CPU)
    assert {is_causal for *_, is_causal, _ in calls} == {True, False}
    for q, k, mask, is_causal, enable_gqa in calls:
        assert (mask is None) == is_causal
        if enable_gqa:
            assert mask is None and dtype == torch.bfloat16
        else:
            assert q[1] == k[1]
        if mask is not None:
            assert mask.dtype == dtype and all(stride % 8 == 0 for stride in mask.stride()[:-1])


class Operations(TorchDispatchMode):
    """Counts what is dispatched, views aside: on a GPU about a kernel's launch each."""

    VIEWS = (
        "view",
        "_unsafe_view",
        "transpose",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "t",
        "detach",
        "alias",
        "split",
    )

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.number += function.overloadpacket.__name__ not in self.VIEWS
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    ("make", "training", "allowed"),
    # A decoder's four norms are one operation each on a GPU, seven here.
    [(make_bert, False, 26), (make_bert, True, 57), (make_model, True, 59)],
    ids=["BERT classifies", "BERT trains", "a decoder trains"],
)
def test_operations_a_layer(make, training, allowed):
    batch, counts = pack(random_rows(MIXED)), []
    for layers in (2, 3):
        model = make(num_hidden_layers=layers).train(training)
        with Operations() as operations, bf16_autocast():
            model(batch, *([batch.last] if make is make_model else []))
        counts.append(operations.number)
    assert counts[1] - counts[0] <= allowed


def test_a_layout_and_slots_ask_a_gpu_for_no_number():
    """Each would make the host wait until all that is under way is done."""
    with FakeTensorMode():  # has shapes and no numbers: asking for one is an error
        ends, ids = torch.tensor([0, 3, 5, 9], dtype=torch.int32), torch.arange(9)
        batch = Batch(ids, ids, ends, 4)
        layout = pad_layout(batch, torch.bfloat16)
        ((pad_index, mask),) = layout.groups
        assert (pad_index.shape, mask.shape, layout.unpad_index.shape) == ((3, 4), (3, 1, 1, 4), (9,))
        for S in (5, 20):
            cache_slots(batch, torch.empty(9, 8, dtype=torch.bfloat16), S, 2)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_train_as_on_a_cpu(name, bert_run, tmp_path, monkeypatch, taken):
    """The same losses up to bf16's rounding, over ten steps; dropout draws other numbers, so without."""
    flags = ["--max-steps", "10", "--log-every", "1", "--eval-every", "0", "--save-every", "0", "--dtype", "bf16"]
    if name == "bert":
        flags += ["--model", str(without_dropout(bert_run, tmp_path / "model"))]
    gpu = train(tmp_path / "gpu", *flags, script=SCRIPTS[name])
    assert taken
    monkeypatch.setattr("minicls.kernels.GPUS", ("cuda",))
    cpu = train(tmp_path / "cpu", *flags, script=SCRIPTS[name])
    found, expected = ([loss for _, loss, _ in losses(run)] for run in (gpu, cpu))
    assert found == pytest.approx(expected, rel=0.01) and found != expected


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


def test_scoring_hands_a_kernel_one_shape_a_batch(monkeypatch):
    """cuDNN, if it is enabled again, makes a new plan for each shape; and no padding beyond a batch's own is computed."""
    shapes, batches, original = set(), [], F.scaled_dot_product_attention

    def attend(q, k, v, *more, **options):
        shapes.add((q.shape, k.shape))
        return original(q, k, v, *more, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    model = make_model().bfloat16()
    model.register_forward_pre_hook(lambda *_: batches.append(1))
    questions = [[*range(20), *row] for row in random_rows([5 + i % 23 for i in range(60)])]
    score(model, questions, [[1], [2]], CPU, max_tokens=400)
    assert 5 < len(batches) < 40 and len(shapes) <= len(batches)


class _FusedNorm(torch.autograd.Function):
    """CUDA's fused RMSNorm keeps its input, its weight and one scale per vector for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


def test_bytes_that_a_layer_keeps_a_token(monkeypatch):
    """Under bf16 autocast, counted: what bounds a micro-batch on a card. By hand, for D wide states and heads of Dh:

    two residuals in fp32; both norms' outputs in bf16; q and k in fp32 for their norms; q, k, v, the output and a number a head
    of flash attention; gate, its silu, up and their product. With Qwen3-0.6B's sizes that is 61.6 kB.
    """
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: _FusedNorm.apply(x, weight, eps))
    D, H, Hkv, Dh, wide = 64, 4, 2, 32, 96
    sizes = {
        "hidden_size": D,
        "num_attention_heads": H,
        "num_key_value_heads": Hkv,
        "head_dim": Dh,
        "intermediate_size": wide,
    }
    kept, batch = [], pack(random_rows([12] * 16))
    for layers in (1, 2):
        model, storages, alive = make_model(num_hidden_layers=layers, **sizes).train(), {}, []
        parameters = {parameter.data_ptr() for parameter in model.parameters()}

        def keep(x, parameters=parameters, storages=storages, alive=alive):
            alive.append(x)  # or the memory of one tensor would be another's
            if x.data_ptr() not in parameters:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), bf16_autocast():
            model(batch, batch.last).sum()
        kept.append(sum(storages.values()))
    weights = 2 * sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2)  # the copies in bf16
    attention_kept = 4 * (H + Hkv) * Dh + 2 * (H + 2 * Hkv) * Dh + 2 * H * Dh + 4 * H
    allowed = 2 * 4 * D + 2 * 2 * D + attention_kept + 4 * 2 * wide
    scales = 4 * (2 + H + Hkv) + 64  # and a few numbers a batch
    assert allowed <= (kept[1] - kept[0] - weights) / len(batch.input_ids) <= allowed + scales

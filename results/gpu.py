"""Is minicls correct and fast on this GPU? One command, eight minutes at most, no network.

    python results/gpu.py                               # writes results/gpu/<device>-torch-<version>.json
    python results/gpu.py --only attention scripts      # some sections
    python results/gpu.py --smoke                       # tiny sizes on the CPU: does this script itself run?

It first checks attention, models, both training scripts, scoring and decoding against the CPU in fp32. It then measures
training and serving with random weights in the published sizes, on random token ids as long as AG News' texts, against
transformers where it is installed. A failed check or a broken section is reported and the next section starts; the file
is written after each section. The exit code is 1 if anything was wrong.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F

import train_bert
import train_qwen
from minicls import dist, engines, scorer, weights
from minicls.attention import attention, lay_out, pad_layout, padded_attention
from minicls.batch import length_batches, pack, to_device
from minicls.config import run_main
from minicls.generate import generate
from minicls.optim import make_optimizer
from minicls.predict import classify_rows
from minicls.tiny import SIZES, train_bert_tokenizer, train_qwen_tokenizer

CPU = torch.device("cpu")
# Dense bf16 TFLOP/s by the vendor's data sheet; the first key contained in the device's name counts.
PEAKS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "L4": 121,
}
MINILM = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 30522}
SFT_ROWS, MICRO = 96, (12, 48, 96)  # rows of a step; micro-batch sizes
BERT_ROWS, BERT_STEPS, LONG = 64, 16, 512  # LONG: tokens of the longest rows
LETTERS = [[32], [33], [34], [35]]  # Qwen's ids of A, B, C and D
COUNTS = np.array([[4, 1, 2]])  # targets of a training row: format, letter, format again

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seconds", type=float, default=460, help="skip sections that could end later than this")
parser.add_argument("--only", nargs="+", metavar="SECTION", help="run these sections; an unknown name lists them all")
parser.add_argument("--out", default=str(ROOT / "results" / "gpu"), help="directory of the JSON file")
parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
args = parser.parse_args()
if args.smoke:
    SFT_ROWS, MICRO, BERT_ROWS, BERT_STEPS, LONG = 8, (2, 4, 8), 8, 2, 32

BEGIN = time.perf_counter()
RESULT: dict = {"wrong": [], "seconds": {}}
SECTIONS: dict[str, tuple[float, Callable]] = {}  # name -> time limit in seconds, function
DEVICE, FOLDER = CPU, ""


def say(name: str, value, good: bool | None = None) -> None:
    """Prints and records a figure or, with `good`, the outcome of a check."""
    RESULT[name] = value
    if good is False:
        RESULT["wrong"].append(name)
    print(f"{'' if good is None else 'ok' if good else 'WRONG':6}{name}: {value}", flush=True)


def section(seconds: float) -> Callable:
    def register(run: Callable) -> Callable:
        SECTIONS[run.__name__] = seconds, run
        return run

    return register


def run_section(name: str, file: Path) -> None:
    begin = time.perf_counter()
    print(f"--- {name}", flush=True)
    try:
        SECTIONS[name][1]()
    except ImportError as error:
        say(f"{name}: left out", f"{error}")
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        say(name, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False)
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    RESULT["seconds"][name] = round(time.perf_counter() - begin, 1)
    file.write_text(json.dumps(RESULT, indent=2, default=str) + "\n")


def sync() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def clock(call: Callable, seconds: float = 3.0, warm: int = 3) -> float:
    """Median seconds of a call, the device idle before and after, over at most `seconds` in all."""
    for _ in range(1 if args.smoke else warm):
        call()
    taken: list[float] = []
    while not taken or (len(taken) < 50 and sum(taken) < seconds and not args.smoke):
        sync()
        begin = time.perf_counter()
        call()
        sync()
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken))


def peak_gib(call: Callable) -> float:
    if DEVICE.type != "cuda":
        call()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    call()
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def trace(call: Callable) -> dict:
    """Kernel launches, waits of the host, and milliseconds of work of a call on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    if DEVICE.type != "cuda":
        return {}
    call()
    sync()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
    names = [event.name for event in profiled.events()]
    on_device = [event for event in profiled.events() if event.device_type.name == "CUDA"]
    return {
        "launches": sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for name in names),
        "waits": sum(name in ("cudaStreamSynchronize", "cudaDeviceSynchronize") for name in names)
        - 1,  # one at the end
        "gpu_ms": round(sum(event.time_range.elapsed_us() for event in on_device) / 1000, 2),
    }


def bf16(on: bool = True):
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=on)


def random_rows(lengths, vocab_size: int, seed: int = 0, before: int = 0, after: int = 0) -> list[list[int]]:
    """Rows of random ids, all with the same `before` ids in front and `after` behind."""
    rng = np.random.default_rng(seed)
    first, last = rng.integers(5, vocab_size, before).tolist(), rng.integers(5, vocab_size, after).tolist()
    return [first + rng.integers(5, vocab_size, int(n)).tolist() + last for n in lengths]


def news_lengths(n: int, seed: int = 0, mean: float = 51) -> np.ndarray:
    """Token counts spread like those of AG News' texts: log-normal, few of them long."""
    mean = 12 if args.smoke else mean
    drawn = np.random.default_rng(seed).lognormal(0, 0.35, n)
    return np.clip(drawn * mean / np.exp(0.35**2 / 2), 10, 280).astype(int)


def decoder_config(**changes) -> dict:
    tiny = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    tiny |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 600}
    return SIZES["Qwen3-0.6B"] | (tiny if args.smoke else {}) | {"pad_token_id": 0} | changes


def bert_config(**changes) -> dict:
    tiny = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 600,
    }
    labels = {"id2label": {str(i): str(i) for i in range(4)}, "pad_token_id": 0}
    return SIZES["bert-base-cased"] | labels | changes | (tiny if args.smoke else {})


def build(architecture, config: dict, device: torch.device | None = None, dtype: torch.dtype = torch.float32):
    return weights.build_model(architecture, config, None, 0, device or DEVICE, dtype)[0]


def distance(ours: torch.Tensor, theirs: torch.Tensor, floor: float = 0.0) -> float:
    """|ours - theirs| / |theirs|, with at least `floor` per element below: a gradient may be rounding errors only."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=floor * theirs.numel() ** 0.5 + 1e-12))


# Checks, against the CPU.


@section(20)
def environment() -> None:
    """Device, versions, and the speed of a large matrix product."""
    RESULT["versions"] = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "tokenizers", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            RESULT["versions"][name] = importlib.metadata.version(name)
    say("device", dist.device_name(DEVICE))
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        driver = Path("/proc/driver/nvidia/version")
        version = re.search(r"\d+\.\d+[.\d]*", driver.read_text()) if driver.is_file() else None
        details = {
            "capability": f"{properties.major}.{properties.minor}",
            "gib": round(properties.total_memory / 2**30, 1),
        }
        details |= {
            "driver": version and version.group(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        say("gpu", details | {"allocator": os.environ.get("PYTORCH_ALLOC_CONF")})
        say(
            "cuDNN attention is off",
            not torch.backends.cuda.cudnn_sdp_enabled(),
            not torch.backends.cuda.cudnn_sdp_enabled(),
        )
    name = RESULT["device"]
    say("peak_tflops_assumed", next((peak for part, peak in PEAKS.items() if part in name), None))
    n = 128 if args.smoke else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    say("peak_tflops_measured", round(2 * n**3 / clock(lambda: a @ b, 1.0) / 1e12, 1))


@section(30)
def attention_check() -> None:
    """Both implementations, forward and backward, against fp64 on the CPU, also for sizes without a flash kernel."""
    worst: dict[str, float] = {}
    for H, Hkv, Dh, causal in (
        (12, 12, 64, False),
        (16, 8, 128, True),
        (9, 3, 64, True),
        (12, 12, 32, False),
        (12, 12, 26, False),
    ):
        for lengths in ([1, 130, 7, 64, 1, 200], [33], [1, 1, 1]):
            torch.manual_seed(0)
            exact = [
                torch.randn(sum(lengths), heads, Dh, dtype=torch.float64).requires_grad_() for heads in (H, Hkv, Hkv)
            ]
            upstream = torch.randn(sum(lengths), H, Dh, dtype=torch.float64)
            rows = pack([[0] * length for length in lengths])
            expected = padded_attention(*exact, pad_layout(rows, torch.float64), causal)
            expected = expected, *torch.autograd.grad(expected, exact, upstream)
            for dtype in (torch.bfloat16, torch.float32):
                for way in (attention, padded_attention):
                    q, k, v = (x.detach().to(DEVICE, dtype).requires_grad_() for x in exact)
                    rows = pack([[0] * length for length in lengths], DEVICE)
                    layout = lay_out(rows, q, Dh) if way is attention else pad_layout(rows, dtype)
                    output = way(q, k, v, layout, causal)
                    actual = output, *torch.autograd.grad(output, (q, k, v), upstream.to(DEVICE, dtype))
                    name = f"{way.__name__}, {str(dtype).removeprefix('torch.')}, heads {H}/{Hkv} of {Dh}"
                    gaps = [distance(*pair, floor=1e-2) for pair in zip(actual, expected, strict=True)]
                    worst[name] = max(worst.get(name, 0.0), *gaps)
    for name, gap in worst.items():
        say(f"{name}: off by", f"{gap:.1e}", gap < (0.02 if "bfloat16" in name else 1e-4))


@section(40)
def models() -> None:
    """Logits and gradients of small models against fp32 on the CPU; activation checkpointing."""
    # A fresh model's attention is almost uniform, which would hide mistakes, so the weights are larger.
    rows = random_rows([3, 150, 61, 9, 200], 500)
    calm = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 2, "vocab_size": 600}
    calm |= {"initializer_range": 0.06}
    small = {"num_hidden_layers": 2, "vocab_size": 600, "initializer_range": 0.06}
    small_models = {
        "bert": (weights.BERT, bert_config(**calm)),
        "qwen3": (weights.DECODER, decoder_config(**small)),
        "llama": (weights.DECODER, decoder_config(**small) | {"model_type": "llama"}),
        "qwen2": (weights.DECODER, decoder_config(**small) | {"model_type": "qwen2"}),
        "qwen3 linear": (weights.DECODER_LINEAR, decoder_config(**small) | {"id2label": {"0": "a", "1": "b"}}),
    }

    def outcome(architecture, config, device, dtype, checkpointing=False):
        model = build(architecture, config, device).train()
        (model.bert if architecture is weights.BERT else model.model).activation_checkpointing = checkpointing
        batch = pack(rows, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            logits = model(batch, *([batch.last] if architecture is weights.DECODER else []))
        F.cross_entropy(logits, torch.arange(len(rows), device=device)[: len(logits)] % logits.shape[1]).backward()
        return logits, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    for name, (architecture, config) in small_models.items():
        expected = outcome(architecture, config, CPU, "fp32")
        for precision, bound in (("fp32", 1e-4), ("bf16", 0.05), ("bf16, checkpointing", 0.05)):
            actual = outcome(architecture, config, DEVICE, precision[:4], "checkpointing" in precision)
            gaps = [distance(*pair) for pair in zip(actual, expected, strict=True)]
            say(f"{name}, {precision}: logits, gradients off by", [f"{gap:.1e}" for gap in gaps], max(gaps) < bound)


def script(module, folder: Path, *flags: str) -> list[float]:
    """Runs a training script in this process, tiny; returns the losses."""
    fixed = "--max-train-rows 320 --max-eval-rows 40 --log-every 1 --max-steps 10 --save-every 5 --data synthetic"
    defaults = [] if "--model" in flags else ["--model", "tiny"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        module.main([*fixed.split(), *defaults, *flags, "--output-dir", str(folder)])
    return losses(folder)


def losses(folder: Path) -> list[float]:
    events = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [event["loss"] for event in events if event["event"] == "train"]


@section(90)
def scripts() -> None:
    """Ten steps of both scripts against the CPU in fp32, and a resumed run against the uninterrupted one."""
    device = "cpu" if DEVICE.type == "cpu" else str(DEVICE)
    sets = {
        train_bert: ["--global-batch-size", "32", "--learning-rate", "5e-3"],
        train_qwen: ["--global-batch-size", "32", "--micro-batch-size", "16", "--learning-rate", "2e-3"],
    }
    with tempfile.TemporaryDirectory() as folder:
        for module, flags in sets.items():
            name, here = module.__name__, Path(folder) / module.__name__
            if module is train_bert:  # a GPU's dropout draws other numbers
                script(module, here / "model", *flags, "--device", "cpu", "--dtype", "fp32")
                config = json.loads((here / "model" / "config.json").read_text())
                config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
                (here / "model" / "config.json").write_text(json.dumps(config))
                flags = [*flags, "--model", str(here / "model"), "--init", "random"]
            cpu = script(module, here / "cpu", *flags, "--device", "cpu", "--dtype", "fp32")
            for dtype, bound in (("fp32", 2e-3), ("bf16", 0.03)):
                on_device = script(module, here / dtype, *flags, "--device", device, "--dtype", dtype)
                gap = max(abs(a / b - 1) for a, b in zip(on_device, cpu, strict=True))
                say(f"{name}, {dtype}: losses of ten steps off the CPU's by", f"{gap:.1e}", gap < bound)
            run = here / "bf16"
            (run / "results.json").unlink()
            shutil.rmtree(run / "checkpoints" / "step-000010")
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                module.main(["--resume", str(run)])
            gap = max(abs(a / b - 1) for a, b in zip(losses(run), on_device, strict=True))
            say(f"{name}: resumed at step 5, losses off the uninterrupted ones by", f"{gap:.1e}", gap < 0.01)


@section(40)
def scoring_check() -> None:
    """The fast scorer against brute force, and decoding against the CPU, for short and long shared prefixes."""
    config = decoder_config(num_hidden_layers=3, vocab_size=600, initializer_range=0.06)
    ours, theirs = (build(weights.DECODER, config, device).eval() for device in (DEVICE, CPU))
    shapes = {"rests longer": (20, 10, 90), "prefix longer": (90, 3, 9), "nothing shared": (0, 5, 90)}
    for shape, (before, low, high) in shapes.items():
        rows = random_rows(np.random.default_rng(1).integers(low, high, 12), 600, before=before)
        for options in ([[11], [12], [13]], [[11, 14], [12], [13, 15, 16]]):
            expected = scorer.score_brute_force(theirs, rows, options, CPU)
            gap = float((scorer.score(ours, rows, options, DEVICE) - expected).abs().max())
            with bf16():
                rough = float((scorer.score(ours, rows, options, DEVICE) - expected).abs().max())
            option_length = "one token" if len(options[0]) == 1 else "several tokens"
            say(
                f"score, {shape}, {option_length}: nats off in fp32, bf16",
                [f"{gap:.1e}", f"{rough:.1e}"],
                gap < 1e-3 and rough < 0.15,
            )
        same = generate(ours, rows, 6, [], DEVICE) == generate(theirs, rows, 6, [], CPU)
        say(f"generate, {shape}, fp32: as on the CPU", same, same)


# Figures.


def work(config, lengths: list[int], targets: int, training: bool = True) -> float:
    """Floating-point operations of the matrix products in a pass over rows: 2 per weight and token, attention, the
    head; three times as many with the backward pass."""
    if hasattr(config, "num_key_value_heads"):
        heads = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        layer = config.hidden_size * (2 * heads + 2 * keys + 3 * config.intermediate_size)
        seen, head = sum(n * n for n in lengths) / 2, config.vocab_size * config.hidden_size
    else:
        heads, layer = config.hidden_size, config.hidden_size * (4 * config.hidden_size + 2 * config.intermediate_size)
        seen, head = sum(n * n for n in lengths), config.hidden_size**2
    forward = config.num_hidden_layers * (2 * layer * sum(lengths) + 4 * heads * seen) + 2 * head * targets
    return forward * (3 if training else 1)


def rates(lengths: list[int], seconds: float, operations: float) -> dict:
    tflops, peak = operations / seconds / 1e12, RESULT.get("peak_tflops_assumed")
    figures = {
        "samples_per_second": round(len(lengths) / seconds, 1),
        "tokens_per_second": round(sum(lengths) / seconds),
    }
    figures |= {"step_ms": round(1000 * seconds, 2), "tflops": round(tflops, 2)}
    return figures | ({"fraction_of_peak": round(tflops / peak, 3)} if peak else {})


def step(model, optimizer, loss_of: Callable, parts: list) -> None:
    """An optimizer step as in the training scripts, without logging."""
    total = torch.zeros((), device=DEVICE)
    for part in parts:
        loss = loss_of(part)
        loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    torch.stack([total, norm]).tolist()


def answer_rows(n: int, seed: int = 0) -> list[list[int]]:
    """Training rows as long as the published ones: 20 + 42 tokens of prompt around a text, and an answer of 7."""
    return random_rows(news_lengths(n, seed), decoder_config()["vocab_size"], seed, 20, 42 + 7)


def sft_loss(forward, part: list[list[int]]) -> torch.Tensor:
    labels = np.zeros(len(part), np.int64)
    targets = train_qwen.make_targets(part, labels, COUNTS, np.ones(1, np.float32), 0, DEVICE)
    with bf16():
        return train_qwen.targets_loss(forward, targets, None, 0.0)[0] / (7 * SFT_ROWS)


@section(60)
def sft() -> None:
    """Qwen3-0.6B, full parameters: steps of 96 rows, in micro-batches of 12 as published, and larger ones."""
    model = build(weights.DECODER, decoder_config()).train()
    optimizer = make_optimizer(model, 1e-5, 0.0)
    rows = answer_rows(SFT_ROWS)
    lengths = [len(row) - 1 for row in rows]
    operations = work(model.config, lengths, 7 * len(rows))
    loss = functools.partial(sft_loss, model)
    for micro in MICRO:
        parts = [rows[i : i + micro] for i in range(0, SFT_ROWS, micro)]
        one_step = functools.partial(step, model, optimizer, loss, parts)
        try:
            memory = peak_gib(one_step)
            figures = rates(lengths, clock(one_step, 4.0), operations) | {"peak_gib": memory}
            say(f"Qwen3-0.6B SFT, micro-batch {micro}", figures)
        except torch.cuda.OutOfMemoryError:
            say(f"Qwen3-0.6B SFT, micro-batch {micro}", "out of memory")
            optimizer.zero_grad()
    traced = trace(functools.partial(step, model, optimizer, loss, [rows[: MICRO[0]], rows[-MICRO[0] :]]))
    say(f"Qwen3-0.6B SFT, two micro-batches of {MICRO[0]}", traced)
    full = [random_rows([LONG] * MICRO[0], model.config.vocab_size)] * 2
    memory = peak_gib(functools.partial(step, model, optimizer, loss, full))
    say(f"Qwen3-0.6B SFT, {MICRO[0]} rows of {LONG}: peak GiB", memory)


def bert_loss(forward, part: list[list[int]]) -> torch.Tensor:
    labels = to_device(np.zeros(len(part), np.int64), DEVICE)
    with bf16():
        logits = forward(pack(part, DEVICE))
    return F.cross_entropy(logits, labels, reduction="sum") / len(part)


@section(40)
def bert_training() -> None:
    """Steps of 64 rows, as published, each of its own lengths; BERT-base and the size of MiniLM."""
    for name, changes in {"BERT-base": {}, "MiniLM-L6": MINILM}.items():
        model = build(weights.BERT, bert_config(**changes)).train()
        optimizer = make_optimizer(model, 1e-5, 1e-6)
        batches = [
            random_rows(news_lengths(BERT_ROWS, seed, 54), model.config.vocab_size, seed) for seed in range(BERT_STEPS)
        ]
        loss = functools.partial(bert_loss, model)

        def epoch(model=model, optimizer=optimizer, batches=batches, loss=loss) -> None:
            for part in batches:
                step(model, optimizer, loss, [part])

        lengths = [len(row) for part in batches for row in part]
        memory = peak_gib(epoch)
        operations = work(model.config, lengths, len(lengths))
        figures = rates(lengths, clock(epoch, 4.0, warm=2), operations)
        figures["step_ms"] = round(figures["step_ms"] / len(batches), 2)
        say(f"{name} training, batch {BERT_ROWS}", figures | {"peak_gib": memory})
        traced = trace(functools.partial(step, model, optimizer, loss, batches[:1]))
        say(f"{name} training, one step", traced)
        full = [random_rows([LONG] * BERT_ROWS, model.config.vocab_size)]
        memory = peak_gib(functools.partial(step, model, optimizer, loss, full))
        say(f"{name}, {BERT_ROWS} rows of {LONG}: peak GiB", memory)


@section(60)
def evaluation() -> None:
    """AG News' 7,600 test rows: scored by Qwen3-0.6B, and classified by BERT-base, as the scripts do between steps."""
    n = 50 if args.smoke else 7600
    model = build(weights.DECODER, decoder_config()).eval().requires_grad_(False)
    rows = random_rows(news_lengths(n), model.config.vocab_size, 0, 20, 42 + 4)
    for turn in ("first", "second"):
        sync()
        begin = time.perf_counter()
        with bf16():
            scorer.score(model, rows, LETTERS, DEVICE)
        seconds = time.perf_counter() - begin
        figures = rates(list(map(len, rows)), seconds, work(model.config, [len(row) - 20 for row in rows], n, False))
        say(f"Qwen3-0.6B, {n} rows scored, {turn} time", {"seconds": round(seconds, 2)} | figures)
    say("batches", len(length_batches(rows, scorer.MAX_TOKENS[DEVICE.type == "cuda"])))
    with bf16():
        say("scoring: peak GiB", peak_gib(lambda: scorer.score(model, rows[:1000], LETTERS, DEVICE)))
    model = build(weights.BERT, bert_config()).eval().requires_grad_(False)
    rows = random_rows(news_lengths(n, mean=54), model.config.vocab_size)
    with bf16():
        seconds = clock(lambda: classify_rows(model, rows, DEVICE), 3.0, warm=1)
    figures = rates(list(map(len, rows)), seconds, work(model.config, list(map(len, rows)), n, False))
    say(f"BERT-base, {n} rows classified", {"seconds": round(seconds, 2)} | figures)


@functools.cache
def model_directory(role: str) -> Path:
    """A directory with random bf16 weights, which all engines open; removed at the end."""
    folder = Path(FOLDER) / role
    texts = ["a few words"]
    if role == "bert":
        model = build(weights.BERT, bert_config(), dtype=torch.bfloat16)
        weights.save_model(model, bert_config(), train_bert_tokenizer(texts, 100), folder)
    else:
        model = build(weights.DECODER, decoder_config(), dtype=torch.bfloat16)
        weights.save_model(model, decoder_config(), train_qwen_tokenizer(texts, 300), folder)
    return folder


def requests(engine, name: str, role: str, seconds: float) -> None:
    """One request at a time, as in the published table."""
    config = bert_config() if role == "bert" else decoder_config()
    around = (0, 0) if role == "bert" else (20, 46)
    rows = random_rows(news_lengths(64, 7, 54 if role == "bert" else 51), config["vocab_size"], 7, *around)
    calls = {"classify": lambda row: engine.classify([row])}
    if role != "bert":
        calls = {
            "score": lambda row: engine.score([row], LETTERS),
            "generate 8": lambda row: engine.generate([row], 8, []),
        }
    for method, call in calls.items():
        engine.forget()
        for row in rows[:2] if args.smoke else rows[:16]:
            call(row)
        taken: list[float] = []
        for row in rows[2:4] if args.smoke else rows[16:]:
            begin = time.perf_counter()
            call(row)  # returns after the answer was copied to the CPU
            taken.append(time.perf_counter() - begin)
            if sum(taken) > seconds:
                break
        p50, p99 = (round(1000 * float(np.percentile(taken, p)), 2) for p in (50, 99))
        figures = {"requests_per_second": round(1 / float(np.mean(taken)), 1), "p50_ms": p50, "p99_ms": p99}
        if name == "minicls":
            figures |= trace(lambda call=call: call(rows[5]))
        say(f"{'BERT-base' if role == 'bert' else 'Qwen3-0.6B'}, {name}, {method}, one at a time", figures)


@section(50)
def single_requests() -> None:
    """minicls and transformers on the same weights."""
    for role in ("bert", "qwen"):
        ours = engines.Minicls(model_directory(role), torch.bfloat16, DEVICE)
        requests(ours, "minicls", role, 3.0)
        theirs = engines.Transformers(model_directory(role), torch.bfloat16, DEVICE)
        requests(theirs, "transformers", role, 3.0)
        rows = random_rows([9, 60, 113], (bert_config() if role == "bert" else decoder_config())["vocab_size"])
        answers = [
            engine.classify(rows) if role == "bert" else engine.score(rows, LETTERS) for engine in (ours, theirs)
        ]
        gap = float((answers[0] - answers[1]).abs().max())
        say(f"{role}: nats from transformers in bf16", f"{gap:.1e}", gap < 0.1)


def train_with_the_trainer(
    model, rows: list[list[int]], labels: list, micro: int, accumulate: int, steps: int
) -> list[float]:
    """Seconds of each HF Trainer step after the third, with padded batches, default attention and bf16 autocast."""
    from torch.nn.utils.rnn import pad_sequence
    from transformers import Trainer, TrainerCallback, TrainingArguments

    moments: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            sync()
            moments.append(time.perf_counter())

    def collate(items: list[tuple]) -> dict[str, torch.Tensor]:
        ids, masks = zip(
            *((torch.tensor(row), torch.ones(len(row), dtype=torch.long)) for row, _ in items), strict=True
        )
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence(masks, batch_first=True),
        }
        values = [torch.tensor(label) for _, label in items]
        many = values[0].dim() > 0
        return batch | {
            "labels": pad_sequence(values, batch_first=True, padding_value=-100) if many else torch.stack(values)
        }

    settings = TrainingArguments(
        FOLDER, max_steps=steps, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulate,
        train_sampling_strategy="sequential", bf16=True, use_cpu=DEVICE.type == "cpu", save_strategy="no",
        logging_strategy="no", remove_unused_columns=False, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    data = [*zip(rows, labels, strict=True)] * steps
    with contextlib.redirect_stdout(io.StringIO()):
        Trainer(model=model, args=settings, train_dataset=data, data_collator=collate, callbacks=[Clock()]).train()
    return np.diff(moments)[0 if args.smoke else 2 :].tolist()


@section(80)
def trainer() -> None:
    """The HF Trainer on the same rows and sizes."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    steps = 2 if args.smoke else 12
    config = decoder_config()
    theirs = AutoConfig.for_model(**config)
    rows = answer_rows(SFT_ROWS)
    lengths = [len(row) - 1 for row in rows]
    labels = [[-100] * (len(row) - 7) + row[-7:] for row in rows]
    for micro in MICRO[:2]:
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(theirs, dtype=torch.float32)
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = float(np.median(train_with_the_trainer(model, rows, labels, micro, SFT_ROWS // micro, steps)))
        figures = {
            "samples_per_second": round(SFT_ROWS / seconds, 1),
            "tokens_per_second": round(sum(lengths) / seconds),
        }
        memory = round(dist.peak_memory_bytes(DEVICE) / 2**30, 2)
        say(
            f"Qwen3-0.6B SFT, HF Trainer, micro-batch {micro}",
            figures | {"step_ms": round(1000 * seconds, 2), "peak_gib": memory},
        )
        del model
    config = bert_config()
    batches = [random_rows(news_lengths(BERT_ROWS, seed, 54), config["vocab_size"], seed) for seed in range(BERT_STEPS)]
    with torch.device(DEVICE):
        names = {int(key): value for key, value in config["id2label"].items()}
        model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**config | {"id2label": names}))
    rows = [row for batch in batches for row in batch]
    seconds = float(
        np.median(train_with_the_trainer(model, rows, [0] * len(rows), BERT_ROWS, 1, steps if args.smoke else 32))
    )
    per_step = sum(map(len, rows)) / len(batches)
    figures = {"samples_per_second": round(BERT_ROWS / seconds, 1), "tokens_per_second": round(per_step / seconds)}
    say(f"BERT-base training, HF Trainer, batch {BERT_ROWS}", figures | {"step_ms": round(1000 * seconds, 2)})


@section(110)
def compiled() -> None:
    """torch.compile: the same losses, single requests, and SFT steps."""
    if args.smoke and not os.environ.get("CXX"):
        return  # needs a C++ compiler on a CPU, and minutes
    device = str(DEVICE)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--device", device, "--global-batch-size", "32", "--learning-rate", "2e-3", "--dtype", "fp32"]
        plain = script(train_qwen, Path(folder) / "plain", *flags)
        begin = time.perf_counter()
        compiled_losses = script(train_qwen, Path(folder) / "compiled", *flags, "--compile")
        gap = max(abs(a / b - 1) for a, b in zip(compiled_losses, plain, strict=True))
        say("train_qwen --compile: losses off by", f"{gap:.1e}", gap < 2e-3)
        say("train_qwen --compile, tiny: seconds with compilation", round(time.perf_counter() - begin, 1))
    begin = time.perf_counter()
    engine = engines.Minicls(model_directory("qwen"), torch.bfloat16, DEVICE, compile=True)
    requests(engine, "minicls, compiled", "qwen", 3.0)
    say("Qwen3-0.6B, compiled requests: seconds in all", round(time.perf_counter() - begin, 1))
    say("graph breaks", dict(torch._dynamo.utils.counters["graph_break"]))


@section(90)
def compiled_training() -> None:
    """SFT steps through torch.compile."""
    if args.smoke and not os.environ.get("CXX"):
        return
    torch._dynamo.reset()
    model = build(weights.DECODER, decoder_config()).train()
    optimizer, rows = make_optimizer(model, 1e-5, 0.0), answer_rows(SFT_ROWS)
    lengths = [len(row) - 1 for row in rows]
    forward = torch.compile(model, dynamic=True)
    for micro in MICRO[:2]:
        parts = [rows[i : i + micro] for i in range(0, SFT_ROWS, micro)]
        seconds = clock(
            lambda parts=parts: step(model, optimizer, functools.partial(sft_loss, forward), parts), 4.0, warm=2
        )
        say(
            f"Qwen3-0.6B SFT, compiled, micro-batch {micro}",
            rates(lengths, seconds, work(model.config, lengths, 7 * SFT_ROWS)),
        )


def main(argv: None) -> int:
    global DEVICE, FOLDER
    unknown = {*(args.only or [])} - SECTIONS.keys()
    if unknown:
        parser.error(f"--only: no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    DEVICE = dist.start("cpu" if args.smoke else args.device, 1 if args.smoke else None, "bf16")
    name = "smoke" if args.smoke else torch.cuda.get_device_name(DEVICE)
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{name}-torch-{torch.__version__.split('+')[0]}".lower())
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        FOLDER = folder
        for name, (seconds, _) in SECTIONS.items():
            if args.only and name not in args.only and name != "environment":
                continue
            if time.perf_counter() - BEGIN + seconds > args.seconds:
                say(f"{name}: left out", f"{seconds:.0f} s do not fit into --seconds {args.seconds:.0f} any more")
                continue
            run_section(name, out / f"{slug}.json")
    RESULT["seconds"]["all"] = round(time.perf_counter() - BEGIN)
    (out / f"{slug}.json").write_text(json.dumps(RESULT, indent=2, default=str) + "\n")
    print(f"{len(RESULT['wrong'])} wrong: {'; '.join(RESULT['wrong'])}" if RESULT["wrong"] else "all checks passed")
    print(out / f"{slug}.json")
    return bool(RESULT["wrong"])


if __name__ == "__main__":
    run_main(main)

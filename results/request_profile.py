"""Where the time of a single request goes, by operator: the tables of docs/performance.md.

    python results/request_profile.py --model runs/bert --threads 2                     # eager, fp32
    python results/request_profile.py --model runs/bert --threads 2 --compile --int8

Prints milliseconds per request: without the profiler, then by operator with it. The profiler adds about a microsecond
to each call, so the two sums differ.
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["TORCHINDUCTOR_FREEZING"] = "1"  # as in bench.py

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from minicls import dist
from minicls.engines import Minicls
from minicls.results import table

REQUESTS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=54)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--int8", action="store_true")
    args = parser.parse_args()
    device = dist.start("cpu", args.threads, "fp32")
    engine = Minicls(args.model, torch.float32, device, args.compile, args.int8)
    vocabulary = engine.model.bert.embeddings.word_embeddings.num_embeddings
    row = np.random.default_rng(0).integers(1000, vocabulary, args.tokens).tolist()

    def answer() -> None:
        for _ in range(REQUESTS):
            engine.classify([row])

    answer()
    milliseconds = []
    for _ in range(5):
        begin = time.perf_counter()
        answer()
        milliseconds.append((time.perf_counter() - begin) / REQUESTS * 1000)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        answer()
    lines = []
    for event in sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total):
        name = event.key if len(event.key) < 60 else event.key[:57] + "..."
        own = event.self_cpu_time_total / REQUESTS / 1000
        lines.append({"operator": name, "calls": f"{event.count / REQUESTS:g}", "ms": f"{own:.2f}"})
    total = sum(float(line["ms"]) for line in lines)
    print(f"{engine.version}: {min(milliseconds):.1f} to {max(milliseconds):.1f} ms; with the profiler {total:.1f} ms")
    print(table(lines[:12]))


if __name__ == "__main__":
    main()

"""What a run tells: lines and a progress bar on the console, metrics.jsonl, TensorBoard. Only the first rank tells."""

import json
import time
from pathlib import Path

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0  # of progress, where there is no bar


class Logger:
    """Writes into a run directory (None on the other ranks: says nothing).

    A run resumed at `step` drops what its metrics.jsonl holds of later steps, unless `drop_later` is False.
    """

    def __init__(self, run_dir: Path | None, step: int, total_steps: int, drop_later: bool = True):
        self.file = None
        if run_dir is None:
            return
        path = run_dir / "metrics.jsonl"
        kept = [event for event in read_metrics(run_dir) if event["step"] <= step or not drop_later]
        aside = path.with_suffix(".tmp")
        aside.write_text("".join(json.dumps(event) + "\n" for event in kept))
        aside.replace(path)
        self.file = path.open("a")
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        # disable=None: no bar where the output is not a terminal, but a line now and then.
        self.bar = tqdm(total=total_steps, initial=step, unit="step", disable=None, dynamic_ncols=True)
        self.step, self.total_steps, self.told = step, total_steps, time.monotonic()

    def print(self, line: str) -> None:
        if self.file is not None:
            tqdm.write(line)

    def progress(self, **postfix) -> None:
        if self.file is not None:
            self.bar.set_postfix(postfix, refresh=False)
            self.bar.update()
            self.step += 1
            if self.bar.disable and (self.step == 1 or time.monotonic() - self.told >= SECONDS_BETWEEN_LINES):
                self.told = time.monotonic()
                self.print(
                    f"step {self.step} of {self.total_steps}: " + ", ".join(f"{k} {v}" for k, v in postfix.items())
                )

    def event(self, kind: str, step: int, **values) -> None:
        """Appends one line to metrics.jsonl, and its numbers to TensorBoard under `kind/…`."""
        if self.file is None:
            return
        self.file.write(json.dumps({"event": kind, "step": step} | values) + "\n")
        self.file.flush()
        folder = f"{kind}_{values['split']}" if "split" in values else kind
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(f"{folder}/{name}", value, step)

    def close(self) -> None:
        if self.file is not None:
            self.bar.close()
            self.file.close()
            self.board.close()


def read_metrics(run_dir: Path) -> list[dict]:
    """The events of metrics.jsonl in order. A line that is no event, torn by a kill for one, is left out; of a step evaluated
    twice, the later counts."""
    events = {}
    path = run_dir / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        try:
            event = json.loads(line)
            events[event["event"], event.get("split"), int(event["step"])] = event
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return sorted(events.values(), key=lambda event: event["step"])  # an evaluation may come long after the training

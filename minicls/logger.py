"""A run's log: lines and a progress bar on the console, metrics.jsonl, TensorBoard. Only the first rank writes."""

import json
import time
from pathlib import Path

from tqdm import tqdm

from minicls.config import written_aside

SECONDS_BETWEEN_LINES = 15.0  # between progress lines when the output is not a terminal


class Logger:
    """Writes into a run directory. With None, which all ranks but the first pass, it does nothing.

    A run that goes on after `step` drops the events of later steps from its metrics.jsonl.
    """

    def __init__(self, run_dir: Path | None, step: int, total_steps: int):
        self.file = None
        if run_dir is None:
            return
        path = run_dir / "metrics.jsonl"
        kept = [event for event in read_metrics(run_dir) if event["step"] <= step]
        with written_aside(path) as aside:
            aside.write_text("".join(json.dumps(event) + "\n" for event in kept))
        self.file = path.open("a")
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        # disable=None: no bar if the output is not a terminal.
        self.bar = tqdm(total=total_steps, initial=step, unit="step", disable=None, dynamic_ncols=True)
        self.step, self.total_steps, self.last_line = step, total_steps, time.monotonic()

    def print(self, *lines: str) -> None:
        if self.file is not None:
            tqdm.write("\n".join(lines))

    def progress(self, **values) -> None:
        """Advances the progress bar by a step. If the output is not a terminal, prints a line from time to time."""
        if self.file is not None:
            self.bar.set_postfix(values, refresh=False)
            self.bar.update()
            self.step += 1
            if self.bar.disable and (self.step == 1 or time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES):
                self.last_line = time.monotonic()
                shown = ", ".join(f"{name} {value}" for name, value in values.items())
                self.print(f"step {self.step} of {self.total_steps}: {shown}")

    def event(self, event: str, step: int, **values) -> None:
        """Appends one line to metrics.jsonl, and its numbers to TensorBoard under `event/…`."""
        if self.file is None:
            return
        self.file.write(json.dumps({"event": event, "step": step} | values) + "\n")
        self.file.flush()
        folder = f"{event}_{values['split']}" if "split" in values else event
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(f"{folder}/{name}", value, step)

    def close(self) -> None:
        if self.file is not None:
            self.bar.close()
            self.file.close()
            self.board.close()


def read_metrics(run_dir: Path) -> list[dict]:
    """The events of metrics.jsonl in the order of their steps.

    Broken lines, such as one torn by a kill, are skipped. If a step was evaluated twice, the later event counts.
    """
    events = {}
    path = run_dir / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []:
        try:
            event = json.loads(line)
            events[event["event"], event.get("split"), int(event["step"])] = event
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return sorted(events.values(), key=lambda event: event["step"])  # a checkpoint may be evaluated after the training

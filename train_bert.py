"""Fine-tune BERT with a linear head for text classification, in raw PyTorch.

    python train_bert.py                                        # the published experiment: bert-base-cased on AG News
    python train_bert.py --model DIR --data DIR                 # files instead of the hub
    python train_bert.py --model tiny --data synthetic --epochs 1 --learning-rate 1e-3      # a minute, no network, no GPU
    torchrun --nproc-per-node 2 train_bert.py                   # several devices, same batch and schedule
    python train_bert.py --resume runs/train_bert-...           # go on after a stop or a crash, on a CPU bit for bit

train_qwen.py keeps the same order of sections, so that a diff of the two is the comparison.
"""

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minicls import checkpoint, dist, plots, results, weights
from minicls.batch import pack, step_rows, to_device
from minicls.config import UserError, parse, run, setting
from minicls.data import describe, load_data, split_data
from minicls.logger import Logger
from minicls.optim import class_weights, cosine_lr, every_steps, make_optimizer
from minicls.predict import classify_rows
from minicls.tiny import SIZES, train_bert_tokenizer
from minicls.tokenizer import bert_rows, load_tokenizer


@dataclass(frozen=True)
class Settings:
    """The defaults reproduce the published experiment; anything it leaves unstated follows the HF Trainer."""

    model: str = setting("google-bert/bert-base-cased", "hub id, directory, or tiny", group="model")
    init: str = setting(
        "pretrained",
        "random keeps the model's size and tokenizer, not its weights",
        choices=("pretrained", "random"),
    )
    data: str = setting("fancyzhx/ag_news", "hub id, directory, or synthetic", group="data")
    text_column: str = setting("text", "column of the texts")
    label_column: str = setting("label", "column of the labels: class indices or class names")
    label_names: tuple[str, ...] | None = setting(None, "class names in the order of their indices")
    validation_size: float = setting(
        0.0,
        "training rows (below 1: a fraction of them) to hold out and choose the step by; 0: none, "
        "the last step counts unless --data has a validation split",
        minimum=0,
    )
    test_size: float = setting(
        0.0,
        "training rows (below 1: a fraction of them) to test on where --data has no test split",
        minimum=0,
    )
    max_train_rows: int | None = setting(
        None, "use a stratified sample of the training rows, drawn by --seed", minimum=1
    )
    max_eval_rows: int | None = setting(
        None,
        "use a stratified sample of the test (and validation) rows, the same for every seed",
        minimum=1,
    )
    max_length: int = setting(512, "tokens of a row, [CLS] and [SEP] included", minimum=3)
    long_text: str = setting("head", "part of a longer text to keep", choices=("head", "head-tail"))
    epochs: float = setting(5.0, "passes over the training rows", minimum=0, group="optimisation")
    max_steps: int | None = setting(None, "optimizer steps, whatever --epochs says", minimum=1)
    global_batch_size: int = setting(64, "rows of an optimizer step, over all ranks", minimum=1)
    micro_batch_size: int = setting(
        64, "rows of one forward pass; at most a rank's rows of a step", minimum=1
    )
    learning_rate: float = setting(1e-5, "peak of the cosine schedule", minimum=0)
    warmup_ratio: float = setting(0.0, "fraction of steps used for warm-up", minimum=0, maximum=1)
    weight_decay: float = setting(
        1e-6, "applied to matrices and embeddings, not to biases and norms", minimum=0
    )
    max_grad_norm: float = setting(
        1.0, "clip the gradient norm to this value; 0 disables clipping", minimum=0
    )
    class_weights: str = setting(
        "none",
        "balanced: rows of rare classes weigh more in the loss",
        choices=("none", "balanced"),
    )
    label_smoothing: float = setting(
        0.0, "fraction of a target spread over all classes", minimum=0, maximum=1
    )
    seed: int = setting(
        42, "seeds the order of rows, dropout, fresh weights and --max-train-rows", minimum=0
    )
    output_dir: str | None = setting(
        None,
        "run directory, new or empty; unset: runs/train_bert-<time>",
        group="evaluation and checkpoints",
    )
    eval_every: float = setting(
        0.1,
        "steps between evaluations; below 1 a fraction of all steps; 0: only after the last",
        minimum=0,
    )
    save_every: float = setting(
        0.1,
        "steps between checkpoints; below 1 a fraction of all steps; 0: only the last and the best on validation",
        minimum=0,
    )
    keep_checkpoints: int = setting(
        2, "newest checkpoints to keep, in addition to the best on validation", minimum=1
    )
    log_every: int = setting(10, "steps between lines of metrics.jsonl", minimum=1)
    patience: int | None = setting(
        None,
        "evaluations without a better validation score after which training stops; unset: never",
        minimum=1,
    )
    eval_only: bool = setting(
        False, "no training: test --model as it is, or the checkpoints of --resume"
    )
    resume: str | None = setting(None, "run directory to continue, under its own settings")
    dtype: str = setting(
        "bf16", "bf16 is autocast over fp32 weights", choices=("bf16", "fp32"), group="machine"
    )
    device: str | None = setting(None, "cpu, cuda or cuda:N; unset: cuda if there is one")
    threads: int | None = setting(None, "CPU threads; unset: torch's choice", minimum=1)
    compile: bool = setting(False, "torch.compile the model")
    activation_checkpointing: bool = setting(
        False, "recompute activations in the backward pass to save memory"
    )


def main(argv: list[str] | None = None) -> None:
    # 1. Settings, ranks, the run to resume.
    s = parse(Settings, argv, __doc__)
    previous = checkpoint.open_run(Path(s.resume)) if s.resume else None
    if previous and previous.finished and not s.eval_only:
        print(f"{s.resume} is finished; its results are in {previous.dir / 'results.json'}")
        return
    if previous and s.eval_only and not previous.newest:
        raise UserError(
            f"--eval-only: {s.resume} has no complete checkpoint; go on with it first, without --eval-only"
        )
    device = dist.start(s.device, s.threads, s.dtype)
    grad_accum_steps = dist.grad_accum_steps(s.global_batch_size, s.micro_batch_size)
    if dist.is_first() and not previous:
        checkpoint.check_output_dir(s.output_dir)
    lock = checkpoint.lock(previous.dir) if dist.is_first() and previous else None

    # 2. Tokenizer, data, model, optimizer.
    pinned = (
        previous.info if previous else {"revision": None, "data_revision": None}
    )  # the hub's commits
    columns = (s.text_column, s.label_column)
    data = load_data(s.data, *columns, s.label_names, pinned["data_revision"], s.test_size)
    data, validation = split_data(
        data, s.validation_size, s.max_train_rows, s.max_eval_rows, s.seed
    )
    if s.patience and not validation:
        raise UserError(
            f"--patience: {s.patience} needs validation rows to watch; hold some out with --validation-size"
        )
    grad_accum_steps = min(
        grad_accum_steps, math.ceil(len(data.train) / dist.world_size())
    )  # the others would be empty
    if previous and not data.matches(previous.info["data_fingerprint"]):
        raise UserError(
            f"--data: {s.data} has other rows or classes than {s.resume} was started on; restore them or start a new run"
        )
    if previous and previous.newest:
        directory, revision = previous.newest, pinned["revision"]
    else:
        directory, revision = (
            (None, None) if s.model == "tiny" else weights.find_model(s.model, pinned["revision"])
        )
    config = weights.read_config(directory, weights.BERT) if directory else SIZES["tiny-bert"]
    tokenizer = (
        load_tokenizer(directory)
        if directory
        else train_bert_tokenizer(data.train.texts, vocab_size=2000)
    )
    config = {"vocab_size": len(tokenizer)} | config
    trained_labels = config.get("id2label")
    config |= weights.label_config(data.label_names)
    random = s.init == "random" and not (previous and previous.newest)
    model, fresh, load_report = weights.build_model(
        weights.BERT, config, None if random else directory, s.seed, device
    )
    weights.check_fits(model.config, tokenizer, s.max_length)
    if s.eval_only and (fresh or trained_labels != config["id2label"]):
        raise UserError(
            f"--eval-only: {s.model} was not trained on the classes {', '.join(data.label_names)[:80]}; train it first"
        )
    model.bert.activation_checkpointing = s.activation_checkpointing
    forward = torch.compile(model, dynamic=True) if s.compile else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=s.dtype == "bf16")
    optimizer = make_optimizer(model, s.learning_rate, s.weight_decay)

    total_steps = s.max_steps or math.ceil(
        s.epochs * math.ceil(len(data.train) / s.global_batch_size)
    )
    if s.eval_only and not previous:
        total_steps = 0  # a run of its own, complete without a step
    eval_every, save_every = (
        every_steps(s.eval_every, total_steps),
        every_steps(s.save_every, total_steps),
    )
    state = {
        "step": 0,
        "train_seconds": 0.0,
        "eval_seconds": 0.0,
        "evaluations": 0,
        "samples": 0,
        "tokens": 0,
    }
    state |= {"best_on_validation": None, "best_on_test": None}  # [step, macro F1]
    state |= {"evaluations_since_best": 0}  # on validation
    if previous and previous.newest:
        state |= checkpoint.load_state(directory, model, None if s.eval_only else optimizer)
    splits = {} if s.eval_only else {"train": data.train}
    splits |= ({"validation": validation} if validation else {}) | {"test": data.test}
    tokenized = {
        name: bert_rows(tokenizer, split.texts, s.max_length, s.long_text)
        for name, split in splits.items()
    }
    train_rows = [] if s.eval_only else tokenized["train"][0]
    # With --eval-only, take num_train_rows from the run that trained the model, if there is one.
    before = checkpoint.info_of_model(directory) if s.eval_only and directory else {}
    trained_rows = before.get("num_train_rows", 0) if s.eval_only else len(data.train)
    # For minicls.json: a copy of the model directory is asked as this run asks.
    asked = {"script": "train_bert", "head": "linear", "label_names": data.label_names}
    asked |= {name: getattr(s, name) for name in ("max_length", "long_text", "dtype")}
    run_dir = None
    if dist.is_first():
        run_dir = previous.dir if previous else checkpoint.new_run_dir(s.output_dir, "train_bert")
        if not previous:
            lock = checkpoint.lock(run_dir)
            about = {
                "script": "train_bert",
                "total_steps": total_steps,
                "revision": revision,
                "data_revision": data.revision,
            }
            about |= {"data_fingerprint": data.fingerprint(), "num_train_rows": trained_rows}
            checkpoint.write_run_info(run_dir, dataclasses.asdict(s), device, about)
    logger = Logger(run_dir, state["step"], total_steps, drop_later=not s.eval_only)
    for line in describe(data, validation):
        logger.print(line)
    for name, (rows, cut) in tokenized.items():
        logger.print(
            f"{name}: {len(rows):,} rows, {sum(map(len, rows)):,} tokens, {cut:,} rows cut to {s.max_length}"
        )
    first = next(iter(splits))
    example = tokenizer.decode(tokenized[first][0][0])[:300]
    logger.print(f"example: {data.label_names[splits[first].labels[0]]} <- {example}")
    logger.print(
        f"{s.model}: {sum(p.numel() for p in model.parameters()):,} parameters; {load_report}; {dist.device_name(device)}"
    )

    # 3. The loss of one batch.
    row_weights_on_host = class_weights(
        data.train.labels, len(data.label_names), s.class_weights
    )  # (C,)
    row_weights = row_weights_on_host.to(device)

    def loss_sum(rows: np.ndarray) -> torch.Tensor:
        """The summed cross-entropy of some training rows, each times its class's weight."""
        targets = to_device(data.train.labels[rows], device)  # (B,)
        with autocast:
            logits = forward(pack([train_rows[row] for row in rows], device))  # (B, C) fp32
        losses = F.cross_entropy(
            logits, targets, reduction="none", label_smoothing=s.label_smoothing
        )  # (B,)
        return (losses * row_weights[targets]).sum()

    def check_finite(value: float, what: str, step: int) -> None:
        """Stops the run before anything of a spoiled step is saved: the last good checkpoint stays the newest."""
        if not math.isfinite(value):
            raise UserError(
                f"--learning-rate: the {what} became {value} at step {step}; lower {s.learning_rate} or try --dtype fp32 "
                f"(checkpoints from before it, if any, are in {run_dir})"
            )

    # 4. Evaluation.
    evaluated = [name for name in splits if name != "train"]

    def logits_of(rows: list[list[int]]) -> torch.Tensor:
        """The logits (n, C) fp32 of tokenized rows, on every rank's CPU."""
        model.eval()
        with autocast:
            logits = classify_rows(model, rows, device)
        model.train()
        return logits

    def evaluate() -> dict[str, torch.Tensor]:
        """Evaluates all splits, logs them, keeps the best steps in `state`; returns the logits of each."""
        started, logits = time.perf_counter(), {}
        for name in evaluated:
            logits[name] = logits_of(tokenized[name][0])
            scores, _ = results.evaluate_logits(logits[name], splits[name].labels)
            check_finite(scores["loss"], f"{name} loss", state["step"])
            logger.event("eval", state["step"], split=name, **scores)
            logger.print(
                f"step {state['step']} {name}: "
                + ", ".join(f"{k} {v:.4f}" for k, v in scores.items())
            )
            best = state[f"best_on_{name}"]
            better = best is None or scores["f1"] > best[1]
            if better:
                state[f"best_on_{name}"] = [state["step"], scores["f1"]]
            if name == "validation":
                state["evaluations_since_best"] = (
                    0 if better else state["evaluations_since_best"] + 1
                )
        state["eval_seconds"] += time.perf_counter() - started
        state["evaluations"] += 1
        return logits

    def stopped_early() -> bool:
        return s.patience is not None and state["evaluations_since_best"] >= s.patience

    def save(directory: Path) -> None:
        weights.save_model(model, config, tokenizer, directory, s.max_length)
        checkpoint.write_json(directory / "minicls.json", asked)

    # 5. The loop: lr -> micro-batches -> clip -> step -> log -> evaluate and save at intervals.
    model.train()
    logits = None
    with checkpoint.stop_on_signal() as stop:
        started, logged = time.perf_counter(), dict(state)
        for step in range(state["step"], 0 if s.eval_only or stopped_early() else total_steps):
            for group in optimizer.param_groups:
                group["lr"] = cosine_lr(step, total_steps, s.learning_rate, s.warmup_ratio)
            window = step_rows(step, len(train_rows), s.global_batch_size, s.seed)
            shares = np.array_split(window, grad_accum_steps * dist.world_size())
            total_weight = float(row_weights_on_host.numpy()[data.train.labels[window]].sum())
            step_loss = torch.zeros((), device=device)
            for micro_step in range(grad_accum_steps):
                rows = shares[micro_step * dist.world_size() + dist.rank()]
                checkpoint.seed_everything(s.seed, step, micro_step, dist.rank())
                if len(rows):  # the last window of an epoch may be too short for everyone
                    loss = loss_sum(rows) / total_weight
                    loss.backward()
                    step_loss += loss.detach()
            dist.sum_gradients(model)
            grad_norm = torch.nn.utils.clip_grad_norm_(
                model.parameters(), s.max_grad_norm or math.inf
            )
            optimizer.step()
            optimizer.zero_grad()
            # The only point of a step where the host waits for a GPU. Nothing is saved before the numbers are checked.
            step_loss, grad_norm = torch.stack([dist.all_sum(step_loss), grad_norm]).tolist()
            check_finite(step_loss, "loss", step + 1)
            check_finite(grad_norm, "gradient norm", step + 1)

            state["step"] = step + 1
            state["samples"] += len(window)
            state["tokens"] += sum(len(train_rows[row]) for row in window)
            state["train_seconds"] += time.perf_counter() - started
            seconds = state["train_seconds"] - logged["train_seconds"]
            rates = {
                f"{unit}_per_second": (state[unit] - logged[unit]) / seconds
                for unit in ("samples", "tokens")
            }
            logger.progress(
                loss=f"{step_loss:.4f}", samples_per_second=f"{rates['samples_per_second']:.1f}"
            )
            if state["step"] % s.log_every == 0 or state["step"] == total_steps:
                epoch, lr = state["samples"] / len(train_rows), optimizer.param_groups[0]["lr"]
                values = {
                    "epoch": epoch,
                    "loss": step_loss,
                    "learning_rate": lr,
                    "grad_norm": grad_norm,
                } | rates
                memory = dist.peak_memory_bytes(device)
                logger.event(
                    "train",
                    state["step"],
                    **values,
                    train_seconds=state["train_seconds"],
                    peak_memory_bytes=memory,
                )
                logged = dict(state)
            last, interrupted = state["step"] == total_steps, dist.any_rank(stop.is_set(), device)
            if last or (eval_every and state["step"] % eval_every == 0):
                logits = evaluate()
                if not last and stopped_early():
                    last = True
                    logger.print(
                        f"stopped early: {s.patience} evaluations without a better validation score"
                    )
            best_step = state["best_on_validation"][0] if state["best_on_validation"] else None
            due = (
                last
                or interrupted
                or best_step == state["step"]
                or (save_every and state["step"] % save_every == 0)
            )
            if due and dist.is_first():
                checkpoint.save_checkpoint(
                    run_dir, save, model, optimizer, state, s.keep_checkpoints, best_step
                )
            if interrupted and not last:
                logger.close()
                logger.print(
                    f"stopped at step {step + 1} of {total_steps}; go on: python train_bert.py --resume {run_dir}"
                )
                dist.stop()
                if lock:
                    lock.close()
                raise SystemExit(130)
            if last:
                break
            started = time.perf_counter()

    # 6. Final test and results.json.
    if s.eval_only:
        state |= {"eval_seconds": 0.0, "evaluations": 0}
        for step, checkpoint_dir in (
            checkpoint.checkpoints(previous.dir).items() if previous else [(0, None)]
        ):
            if checkpoint_dir:
                weights.load_weights(model, checkpoint_dir, weights.BERT)
            state["step"] = step
            logits = evaluate()
    headline_step = state["best_on_validation"][0] if state["best_on_validation"] else state["step"]
    if headline_step != state["step"]:
        if dist.is_first():
            weights.load_weights(
                model, checkpoint.checkpoints(run_dir)[headline_step], weights.BERT
            )
        dist.broadcast_model(model)
        logits = None
    if logits is None:
        started = time.perf_counter()
        logits = {name: logits_of(tokenized[name][0]) for name in evaluated}
        state["eval_seconds"] += time.perf_counter() - started
        state["evaluations"] += 1
    logger.close()
    if dist.is_first():
        save(run_dir)
        state["stopped_early"] = stopped_early()
        written = results.write_results(
            run_dir, data, validation, tokenizer, logits, state, headline_step, device
        )
        logger.print(results.steps_table(run_dir))
        logger.print(results.summary(written))
        logger.print(f"curves: {plots.plot_curves(run_dir)}")
        logger.print(
            f"confusion matrix: {plots.plot_confusion(written['confusion'], data.label_names, run_dir)}"
        )
    if lock:
        lock.close()
    dist.stop()


if __name__ == "__main__":
    run(main)

"""Fine-tune BERT with a linear head for text classification, in raw PyTorch.

    python train_bert.py                          # the published experiment on AG News
    python train_bert.py --model DIR --data DIR   # files instead of the hub
    python train_bert.py --model tiny --data synthetic --epochs 1 --learning-rate 1e-3  # no network
    torchrun --nproc-per-node 2 train_bert.py     # several devices, same batch and schedule
    python train_bert.py --resume RUN_DIR         # continue after a stop or a crash

train_qwen.py has the same sections, so a diff of the two scripts is the comparison of the methods.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from minicls import checkpoint, dist, plots, weights
from minicls.attention import Batch
from minicls.batch import pack, step_rows, to_device
from minicls.config import (
    EVAL_EVERY,
    EVALUATION,
    SAVE_EVERY,
    TrainingSettings,
    parse,
    run_main,
    setting,
    write_json,
)
from minicls.data import describe, describe_rows, load_splits
from minicls.distill import SoftTargets, add_soft_labels, distillation_loss
from minicls.optim import cosine_lr, make_class_weights, make_optimizer
from minicls.predict import classify_rows
from minicls.tiny import new_model
from minicls.tokenizer import bert_rows, load_tokenizer


@dataclass(frozen=True)
class Settings(TrainingSettings):
    """The defaults reproduce the published experiment, but in bf16; what it leaves unstated follows
    the HF Trainer. The settings that both scripts share are in minicls/config.py."""

    model: str = setting("google-bert/bert-base-cased", "hub id, directory, or tiny", group="model")
    long_text: str = setting("head", "part of a long text to keep", choices=("head", "head-tail"))
    epochs: float = setting(5.0, "passes over the training rows", minimum=0, group="optimisation")
    global_batch_size: int = setting(64, "rows per optimizer step, over all ranks", minimum=1)
    micro_batch_size: int = setting(64, "rows per forward pass, at most", minimum=1)
    learning_rate: float = setting(1e-5, "peak of the cosine schedule", minimum=0)
    warmup_ratio: float = setting(0.0, "fraction of steps used for warm-up", minimum=0, maximum=1)
    weight_decay: float = setting(1e-6, "for matrices and embeddings only", minimum=0)
    soft_labels: str | None = setting(None, "output of `predict`: soft targets to learn from")
    soft_label_weight: float | None = setting(
        None, "weight of a soft label in a labelled row's loss; default 0.5", minimum=0, maximum=1
    )
    temperature: float | None = setting(None, "for softening; default 1", minimum=0.1, maximum=100)
    eval_every: float = setting(0.1, EVAL_EVERY, minimum=0, group=EVALUATION)
    save_every: float = setting(0.1, SAVE_EVERY, minimum=0, group=EVALUATION)


def batch_loss(
    model: torch.nn.Module,
    batch: Batch,
    labels: np.ndarray,
    class_weights: torch.Tensor,
    label_smoothing: float,
    soft: tuple | None = None,
) -> torch.Tensor:
    """The cross-entropy of B packed rows, weighted by class and summed: a scalar.

    labels: (B,) int64 class indices; class_weights: (C,) fp32; soft: `SoftTargets[rows]` or None.
    """
    logits = model(batch)  # (B, C) fp32
    targets = to_device(labels, logits.device)  # (B,)
    losses = F.cross_entropy(  # (B,)
        logits, targets, reduction="none", label_smoothing=label_smoothing
    )
    if soft:
        losses = distillation_loss(losses, logits, *soft)
    return (losses * class_weights[targets]).sum()


def main(argv: list[str] | None = None) -> None:
    # 1. Settings, ranks, and the run: a new one, or the one to resume.
    s = parse(Settings, argv, __doc__)
    run = checkpoint.TrainingRun("train_bert", s)
    if run.finished:
        print(f"{s.resume} is finished; its results are in {Path(s.resume) / 'results.json'}")
        return
    device = dist.start(s.device, s.threads, s.dtype)
    grad_accum_steps = dist.grad_accum_steps(s.global_batch_size, s.micro_batch_size)
    run.claim()

    # 2. Data, tokenizer, model, optimizer.
    data = add_soft_labels(s, load_splits(s, run.data_revision))
    run.check_data(data)
    # With more micro-batches than rows, some would always be empty.
    grad_accum_steps = min(grad_accum_steps, math.ceil(len(data.train) / dist.world_size()))

    # A directory gives the config, the tokenizer and the weights; `--model tiny` makes its own, and
    # takes vocab_size from its tokenizer.
    directory, source = run.find_model()
    if directory:
        config, tokenizer = weights.read_config(directory, weights.BERT), load_tokenizer(directory)
    else:
        config, tokenizer = new_model("tiny-bert", data.train.texts, vocab_size=2000)
    config = {"vocab_size": len(tokenizer)} | config | weights.label_config(data.label_names)
    model, _, load_report = weights.build_model(weights.BERT, config, source, s.seed, device)
    weights.check_fits(model.config, tokenizer, s.max_length)
    model.bert.activation_checkpointing = s.activation_checkpointing
    forward = torch.compile(model, dynamic=True) if s.compile else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=s.dtype == "bf16")
    optimizer = make_optimizer(model, s.learning_rate, s.weight_decay)

    rows = {}  # split -> rows of token ids
    lines = describe(data)  # to be printed once there is a log
    for name, split in data.splits.items():
        rows[name], cut = bert_rows(tokenizer, split.texts, s.max_length, s.long_text)
        lines.append(describe_rows(name, rows[name], cut, s.max_length))
    labels = data.train.labels  # (n,)

    def save_model(directory: Path) -> None:
        weights.save_model(model, config, tokenizer, directory, s.max_length)
        # Inference needs these settings, so they are saved with the weights.
        info = {"script": "train_bert", "head": "linear", "label_names": data.label_names}
        info |= {"max_length": s.max_length, "long_text": s.long_text, "dtype": s.dtype}
        write_json(directory / "minicls.json", info)

    steps_per_epoch = math.ceil(len(labels) / s.global_batch_size)
    total_steps = s.max_steps or math.ceil(s.epochs * steps_per_epoch)
    run.start(total_steps, data, model, optimizer, save_model, device)
    example = tokenizer.decode(rows["train"][0])[:300]
    lines.append(f"example: {data.label_names[labels[0]]} <- {example}")
    lines.append(f"{s.model}: {load_report}; {dist.device_name(device)}")
    run.logger.print(*lines)

    # 3. The loss: `batch_loss`, with one weight per class, and soft targets if there are any.
    class_weights = make_class_weights(labels, len(data.label_names), s.class_weights)  # (C,)
    class_weights_on_device = torch.from_numpy(class_weights).to(device)
    soft = s.soft_labels and SoftTargets(data.train, s, device)

    # 4. Evaluation.
    def logits_of(split: str) -> torch.Tensor:
        """The logits (n, C) fp32 of a split's rows, on every rank's CPU."""
        model.eval()
        with autocast:
            logits = classify_rows(model, rows[split], device)
        model.train()
        return logits

    # 5. The loop.
    model.train()
    with checkpoint.stop_on_signal() as stop:
        for step in run.steps():
            # The learning rate is a function of the step, so resuming needs no scheduler state.
            learning_rate = cosine_lr(step, total_steps, s.learning_rate, s.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            # Micro-batches. Each loss is a sum divided by the total weight of the step, so that
            # neither accumulation nor the number of ranks changes the loss or its gradient.
            global_batch = step_rows(step, len(labels), s.global_batch_size, s.seed)  # row indices
            micro_batches = np.array_split(global_batch, grad_accum_steps * dist.world_size())
            total_weight = float(class_weights[labels[global_batch]].sum())
            step_loss = torch.zeros((), device=device)
            for micro_step in range(grad_accum_steps):
                micro_batch = micro_batches[micro_step * dist.world_size() + dist.rank()]
                checkpoint.seed_everything(s.seed, step, micro_step, dist.rank())
                if not len(micro_batch):  # an epoch's last batch may not fill all of them
                    continue
                batch = pack([rows["train"][row] for row in micro_batch], device)
                with autocast:
                    arguments = labels[micro_batch], class_weights_on_device, s.label_smoothing
                    loss = batch_loss(forward, batch, *arguments, soft and soft[micro_batch])
                (loss / total_weight).backward()
                step_loss += loss.detach() / total_weight

            # Sum the gradients of all ranks, clip them, and update the weights.
            dist.sum_gradients(model)
            max_norm = s.max_grad_norm or math.inf
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()

            # Count and log the step. Only here does the host wait for the GPU.
            step_loss, grad_norm = torch.stack([dist.all_sum(step_loss), grad_norm]).tolist()
            tokens = sum(len(rows["train"][row]) for row in global_batch)
            run.log_step(len(global_batch), tokens, learning_rate, grad_norm, loss=step_loss)

            # Evaluate before saving, so that a checkpoint holds its scores.
            run.evaluate_if_due(logits_of)
            run.save_if_due(stop)

    # 6. Keep the headline model, the best on validation or else the last, and report its scores.
    logits = run.save_headline_model(weights.BERT, logits_of)
    if dist.is_first():
        print(plots.finish(run.dir, data, tokenizer, logits, run.state, device))
    run.close()


if __name__ == "__main__":
    run_main(main)

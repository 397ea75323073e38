"""Fine-tune a small decoder to answer a multiple-choice question about each text, in raw PyTorch.

Llama, Qwen2 and Qwen3 architectures; the published experiment's model is Qwen3-0.6B.

    python train_qwen.py                          # the published experiment: Qwen3-0.6B on AG News
    python train_qwen.py --head linear            # the variant it left out: a linear head
    python train_qwen.py --model DIR --data DIR   # files instead of the hub
    python train_qwen.py --model tiny --data synthetic --train-on letter --learning-rate 2e-3
                                                  # a minute, no network, no GPU
    torchrun --nproc-per-node 2 train_qwen.py     # several devices, same batch and schedule
    python train_qwen.py --resume RUN_DIR         # continue after a stop or a crash

train_bert.py has the same sections, so a diff of the two scripts is the comparison of the methods.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from minicls import checkpoint, dist, plots, weights
from minicls.attention import Batch
from minicls.batch import pack_shared, step_rows, to_device
from minicls.config import (
    EVAL_EVERY,
    EVALUATION,
    SAVE_EVERY,
    TrainingSettings,
    UserError,
    flag_of,
    parse,
    run_main,
    setting,
    write_json,
)
from minicls.data import describe, describe_rows, load_splits
from minicls.kernels import on_gpu
from minicls.optim import cosine_lr, make_class_weights, make_optimizer
from minicls.predict import classify_rows
from minicls.prompt import PROMPTS, make_chat, make_template
from minicls.scorer import common_prefix, score
from minicls.tiny import new_model
from minicls.tokenizer import load_tokenizer, text_rows
from train_bert import batch_loss


@dataclass(frozen=True)
class Settings(TrainingSettings):
    """The defaults reproduce the published experiment; anything it leaves unstated follows the HF
    Trainer. The settings that both scripts share are in minicls/config.py."""

    model: str = setting("Qwen/Qwen3-0.6B", "hub id, directory, or tiny", group="model")
    head: str = setting("options", "option scores or a linear layer", choices=("options", "linear"))
    linear_input: str = setting("text", "input of the linear head", choices=("text", "prompt"))
    prompt: str = setting(
        "published", f"the question: {', '.join(PROMPTS)}, or a file with {{text}} and {{options}}"
    )
    think_in: str = setting("response", "where the think block is", choices=("response", "prompt"))
    train_on: str = setting("response", "tokens to train on", choices=("response", "letter"))
    normalize: str = setting("mean", "log-likelihood per token or summed", choices=("mean", "sum"))
    epochs: float = setting(1.0, "passes over the training rows", minimum=0, group="optimisation")
    global_batch_size: int = setting(96, "rows per optimizer step, over all ranks", minimum=1)
    micro_batch_size: int = setting(12, "rows per forward pass, at most", minimum=1)
    learning_rate: float = setting(1.2e-5, "peak of the cosine schedule", minimum=0)
    warmup_ratio: float = setting(0.01, "fraction of steps used for warm-up", minimum=0, maximum=1)
    weight_decay: float = setting(0.0, "for matrices and embeddings only", minimum=0)
    eval_every: float = setting(0.2, EVAL_EVERY, minimum=0, group=EVALUATION)
    save_every: float = setting(0.2, SAVE_EVERY, minimum=0, group=EVALUATION)


class Targets(NamedTuple):
    r"""The T tokens of a batch that the model learns to predict; L of them are letters. For Qwen3:

    row      <|im_start|>user … assistant\n   <think> \n\n </think> \n\n   C   <|im_end|> \n
    input    every token but the last
    targets                                  `----- format ------'  letter  `- format -'
    at       the token before each target, because a token predicts the next one
    """

    batch: Batch
    at: torch.Tensor  # (T,) int64, indices into the batch's tokens
    ids: torch.Tensor  # (T,) int64, the tokens to predict
    weights: torch.Tensor  # (T,) fp32: 1 for the format, the class's weight for a letter
    letter_index: torch.Tensor  # (L,) int64, indices into the targets


def make_targets(
    rows: list[list[int]],
    labels: np.ndarray,
    target_counts: np.ndarray,
    class_weights: np.ndarray,
    num_shared: int,
    device: torch.device,
) -> Targets:
    """Packs B training rows and finds their targets.

    labels: (B,); target_counts: (C, 3), the targets that end a row of each class: format, letter,
    format; class_weights: (C,). The first `num_shared` ids of all rows are equal and packed once.
    """
    batch = pack_shared([row[:-1] for row in rows], num_shared, device)
    ends = num_shared + np.cumsum([len(row) - 1 - num_shared for row in rows])  # (B,)
    counts = target_counts[labels]  # (B, 3)
    totals = counts.sum(1)  # (B,)
    at = [np.arange(end - total, end) for end, total in zip(ends, totals, strict=True)]
    ids = [row[-total:] for row, total in zip(rows, totals, strict=True)]
    is_letter = np.concatenate([np.repeat([False, True, False], count) for count in counts])  # (T,)
    scale = np.where(is_letter, np.repeat(class_weights[labels], totals), np.float32(1))  # (T,)
    arrays = np.concatenate(at), np.concatenate(ids), scale, np.flatnonzero(is_letter)
    return Targets(batch, *(to_device(array, device) for array in arrays))


def targets_loss(
    model: torch.nn.Module, targets: Targets, letter_ids: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    """The weighted cross-entropy of all targets and that of the letters alone, as sums: (2,) fp32.

    letter_ids: (O,) the ids of all letters, over which label smoothing spreads a letter's target.
    """
    logits = model(targets.batch, targets.at)  # (T, V) fp32
    losses = F.cross_entropy(logits, targets.ids, reduction="none")  # (T,)
    if label_smoothing:
        log_likelihoods = logits[targets.letter_index].log_softmax(1)[:, letter_ids]  # (L, O)
        kept = (1 - label_smoothing) * losses[targets.letter_index]  # (L,)
        smoothed = kept - label_smoothing * log_likelihoods.mean(1)
        losses = losses.index_copy(0, targets.letter_index, smoothed)
    losses = losses * targets.weights
    return torch.stack([losses.sum(), losses[targets.letter_index].sum()])


def check_head(s: Settings) -> None:
    """Raises UserError for a setting that the chosen head would ignore."""
    unused = ("train_on", "think_in", "normalize") if s.head == "linear" else ("linear_input",)
    unused += ("prompt",) if s.head == "linear" and s.linear_input == "text" else ()
    for name in unused:
        if getattr(s, name) != getattr(Settings, name):
            remedy = ", or add --linear-input prompt" if name == "prompt" else ""
            fault = f"--head {s.head} does not use it"
            raise UserError(f"{flag_of(name)}: {fault}; leave it out{remedy}")


def main(argv: list[str] | None = None) -> None:
    # 1. Settings, ranks, and the run: a new one, or the one to resume.
    s = parse(Settings, argv, __doc__)
    check_head(s)
    run = checkpoint.TrainingRun("train_qwen", s)
    if run.finished:
        print(f"{s.resume} is finished; its results are in {Path(s.resume) / 'results.json'}")
        return
    device = dist.start(s.device, s.threads, s.dtype)
    grad_accum_steps = dist.grad_accum_steps(s.global_batch_size, s.micro_batch_size)
    run.claim()

    # 2. Data, tokenizer, model, optimizer.
    data = load_splits(s, run.data_revision)
    run.check_data(data)
    # With more micro-batches than rows, some would always be empty.
    grad_accum_steps = min(grad_accum_steps, math.ceil(len(data.train) / dist.world_size()))

    # A directory gives the config, the tokenizer and the weights; `--model tiny` makes its own, and
    # takes vocab_size from its tokenizer.
    directory, source = run.find_model()
    architecture = weights.DECODER if s.head == "options" else weights.DECODER_LINEAR
    uses_prompt = s.head == "options" or s.linear_input == "prompt"  # else the bare text
    if directory:
        config, tokenizer = weights.read_config(directory, architecture), load_tokenizer(directory)
    else:
        before = after = ""
        if uses_prompt:
            before, after = make_template(data.label_names, s.prompt, no_think=True)
        turns = [before + text + after for text in data.train.texts]
        config, tokenizer = new_model("tiny-qwen3", turns, vocab_size=2000)
    config = {"vocab_size": len(tokenizer)} | config | weights.label_config(data.label_names)
    eos, pad = tokenizer.eos_and_pad(config)
    # The padding token's embedding gets no gradient as an input, as in transformers, whose linear
    # heads need such a token. With options, an end token is one only if config.json says so.
    padding_idx = config.get("pad_token_id") if s.head == "options" and pad == eos else pad
    config |= {"eos_token_id": eos, "pad_token_id": padding_idx}
    model, _, load_report = weights.build_model(architecture, config, source, s.seed, device)
    weights.check_fits(model.config, tokenizer, s.max_length)
    model.model.activation_checkpointing = s.activation_checkpointing
    forward = torch.compile(model, dynamic=True) if s.compile else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=s.dtype == "bf16")
    optimizer = make_optimizer(model, s.learning_rate, s.weight_decay)

    # A resumed run asks the question that it began with, even if the prompt's file has changed.
    chat, saved_chat = None, {}
    if uses_prompt:
        response = {"think_in": s.think_in, "train_on": s.train_on}
        chat = make_chat(run.info, tokenizer, data.label_names, s.max_length, s.prompt, **response)
        saved_chat = chat.to_dict()
        if s.label_smoothing and s.head == "options" and max(map(len, chat.options)) > 1:
            fault = "it needs options of one token, and this tokenizer splits them"
            raise UserError(f"--label-smoothing: {fault}; leave it out")
    rows = {}  # split -> rows of token ids
    lines = describe(data)  # to be printed once there is a log
    for name, split in data.splits.items():
        if name == "train" and s.head == "options":
            rows[name], cut = chat.training_rows(split.texts, split.labels)
        elif uses_prompt:
            rows[name], cut = chat.questions(split.texts)
        else:
            rows[name], cut = text_rows(tokenizer, split.texts, s.max_length)
        lines.append(describe_rows(name, rows[name], cut, s.max_length))
    labels = data.train.labels  # (n,)

    def save_model(directory: Path) -> None:
        weights.save_model(model, config, tokenizer, directory, None if chat else s.max_length)
        # Inference needs these settings, so they are saved with the weights.
        info = {"script": "train_qwen", "head": s.head, "label_names": data.label_names}
        names = "linear_input", "max_length", "dtype", "normalize", "think_in", "train_on"
        info |= {name: getattr(s, name) for name in names} | saved_chat
        write_json(directory / "minicls.json", info)
        if s.head == "options":  # greedy decoding, even if the pretrained model's file samples
            generation = {"do_sample": False, "eos_token_id": chat.stop_ids, "pad_token_id": pad}
            write_json(directory / "generation_config.json", generation)

    steps_per_epoch = math.ceil(len(labels) / s.global_batch_size)
    total_steps = s.max_steps or math.ceil(s.epochs * steps_per_epoch)
    run.start(total_steps, data, model, optimizer, save_model, device, **saved_chat)
    example = tokenizer.decode(rows["train"][0])
    lines.append(f"example: {data.label_names[labels[0]]} <- {example}")
    lines.append(f"{s.model}: {load_report}; {dist.device_name(device)}")

    # 3. The loss: `targets_loss` or, for a linear head, BERT's; with one weight per class.
    class_weights = make_class_weights(labels, len(data.label_names), s.class_weights)  # (C,)
    class_weights_on_device = torch.from_numpy(class_weights).to(device)
    # Targets of a row of each class, (C, 3): format, letter, format; (0, 1, 0) for a linear head.
    letter_ids, target_counts = None, np.array([(0, 1, 0)] * len(data.label_names))
    if s.head == "options":
        target_counts = np.array([chat.target_counts(c) for c in range(len(data.label_names))])
        letter_ids = torch.tensor([option[0] for option in chat.options], device=device)  # (O,)
        if s.train_on == "response":
            lines.append("loss is that of the whole response; compare answer_loss with BERT's loss")
    # On a CPU, the prefix that all rows share is computed once per batch: less work for the same
    # loss and gradients. A GPU's attention kernel needs whole rows.
    num_shared = 0
    if not on_gpu(device):
        num_targets = target_counts[labels].sum(1)  # (n,)
        questions = [row[:-num] for row, num in zip(rows["train"], num_targets, strict=True)]
        num_shared = len(common_prefix(questions))
        if num_shared:
            lines.append(f"all rows share a prefix of {num_shared} tokens, computed once per batch")
    run.logger.print(*lines)

    # 4. Evaluation.
    def logits_of(split: str) -> torch.Tensor:
        """The logits (n, C) fp32 of a split's rows, or the options' scores, on every rank's CPU."""
        model.eval()
        with autocast:
            if s.head == "options":
                logits = score(model, rows[split], chat.options, device, s.normalize)
            else:
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
            counts = target_counts[labels[global_batch]]  # (rows, 3)
            letter_weight = float((class_weights[labels[global_batch]] * counts[:, 1]).sum())
            total_weight = letter_weight + float(counts[:, [0, 2]].sum())
            step_losses = torch.zeros(2, device=device)  # all targets, letters alone
            for micro_step in range(grad_accum_steps):
                micro_batch = micro_batches[micro_step * dist.world_size() + dist.rank()]
                checkpoint.seed_everything(s.seed, step, micro_step, dist.rank())
                if not len(micro_batch):  # an epoch's last batch may not fill all of them
                    continue
                ids = [rows["train"][row] for row in micro_batch]
                with autocast:
                    if s.head == "options":
                        arguments = labels[micro_batch], target_counts, class_weights, num_shared
                        targets = make_targets(ids, *arguments, device)
                        losses = targets_loss(forward, targets, letter_ids, s.label_smoothing)
                    else:  # BERT's loss, twice: a row's only target counts as its letter
                        batch = pack_shared(ids, num_shared, device)
                        arguments = labels[micro_batch], class_weights_on_device, s.label_smoothing
                        losses = batch_loss(forward, batch, *arguments).expand(2)
                (losses[0] / total_weight).backward()
                step_losses += losses.detach()

            # Sum the gradients of all ranks, clip them, and update the weights.
            dist.sum_gradients(model)
            max_norm = s.max_grad_norm or math.inf
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()

            # Count and log the step. Only here does the host wait for the GPU.
            sums = torch.cat([dist.all_sum(step_losses), grad_norm[None]])
            total_loss, letter_loss, grad_norm = sums.tolist()
            logged = {"loss": total_loss / total_weight}
            if total_weight > letter_weight:  # there are format tokens
                logged["answer_loss"] = letter_loss / letter_weight
                logged["format_loss"] = (total_loss - letter_loss) / (total_weight - letter_weight)
            tokens = sum(len(rows["train"][row]) for row in global_batch)
            run.log_step(len(global_batch), tokens, learning_rate, grad_norm, **logged)

            # Evaluate before saving, so that a checkpoint holds its scores.
            run.evaluate_if_due(logits_of)
            run.save_if_due(stop)

    # 6. Keep the headline model, the best on validation or else the last, and report its scores.
    logits = run.save_headline_model(architecture, logits_of)
    if dist.is_first():
        print(plots.finish(run.dir, data, tokenizer, logits, run.state, device))
    run.close()


if __name__ == "__main__":
    run_main(main)

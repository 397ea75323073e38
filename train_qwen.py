"""Fine-tune a small decoder to answer a multiple-choice question about each text (or with a linear head), in raw PyTorch.

Qwen3, Qwen2 and Llama architectures; the published experiment's is Qwen3-0.6B.

    python train_qwen.py                                        # the published experiment: Qwen3-0.6B on AG News
    python train_qwen.py --head linear                          # the variant it left out
    python train_qwen.py --model DIR --data DIR                 # files instead of the hub
    python train_qwen.py --model tiny --data synthetic --train-on letter --learning-rate 2e-3 --global-batch-size 12
                                                                # a minute, no network, no GPU
    python train_qwen.py --model DIR --data DIR --eval-only     # zero-shot: the model as it is
    torchrun --nproc-per-node 2 train_qwen.py                   # several devices, same batch and schedule
    python train_qwen.py --resume runs/train_qwen-...           # go on after a stop or a crash, on a CPU bit for bit

train_bert.py keeps the same order of sections, so that a diff of the two is the comparison.
"""

import dataclasses
import functools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from minicls import checkpoint, dist, plots, results, weights
from minicls.attention import on_gpu
from minicls.batch import Batch, pack_shared, step_rows, to_device
from minicls.config import UserError, parse, run, setting
from minicls.data import describe, load_data, split_data
from minicls.logger import Logger
from minicls.optim import class_weights, cosine_lr, every_steps, make_optimizer
from minicls.predict import classify_rows
from minicls.prompt import PROMPTS, make_chat, make_template
from minicls.scorer import common_prefix, score
from minicls.tiny import SIZES, train_qwen_tokenizer
from minicls.tokenizer import Tokenizer, load_tokenizer, text_rows


@dataclass(frozen=True)
class Settings:
    """The defaults reproduce the published experiment; anything it leaves unstated follows the HF Trainer."""

    model: str = setting("Qwen/Qwen3-0.6B", "hub id, directory, or tiny", group="model")
    init: str = setting(
        "pretrained",
        "random keeps the model's size and tokenizer, not its weights",
        choices=("pretrained", "random"),
    )
    head: str = setting(
        "options", "answer by option perplexity, or by a linear head", choices=("options", "linear")
    )
    linear_input: str = setting(
        "text", "the linear head's input: the bare text or the question", choices=("text", "prompt")
    )
    prompt: str = setting(
        "published",
        f"the question: {', '.join(PROMPTS)}, or a text file with {{text}} and {{options}} in it",
    )
    think_in: str = setting(
        "response", "part that the empty think block belongs to", choices=("response", "prompt")
    )
    train_on: str = setting(
        "response", "the whole response, or the letter alone", choices=("response", "letter")
    )
    normalize: str = setting(
        "mean", "an option's log-likelihood per token, or its sum", choices=("mean", "sum")
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
    max_length: int = setting(512, "tokens of a row, question and answer included", minimum=1)
    epochs: float = setting(1.0, "passes over the training rows", minimum=0, group="optimisation")
    max_steps: int | None = setting(None, "optimizer steps, whatever --epochs says", minimum=1)
    global_batch_size: int = setting(96, "rows of an optimizer step, over all ranks", minimum=1)
    micro_batch_size: int = setting(
        12, "rows of one forward pass; at most a rank's rows of a step", minimum=1
    )
    learning_rate: float = setting(1.2e-5, "peak of the cosine schedule", minimum=0)
    warmup_ratio: float = setting(0.01, "fraction of steps used for warm-up", minimum=0, maximum=1)
    weight_decay: float = setting(
        0.0, "applied to matrices and embeddings, not to norms", minimum=0
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
        42, "seeds the order of rows, fresh weights and --max-train-rows", minimum=0
    )
    output_dir: str | None = setting(
        None,
        "run directory, new or empty; unset: runs/train_qwen-<time>",
        group="evaluation and checkpoints",
    )
    eval_every: float = setting(
        0.2,
        "steps between evaluations; below 1 a fraction of all steps; 0: only after the last",
        minimum=0,
    )
    save_every: float = setting(
        0.2,
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


class Targets(NamedTuple):
    """What a batch of training rows is trained on: T targets of all rows, L of them tokens of a letter.

    row      <|im_start|>user … assistant\\n   <think> \\n\\n </think> \\n\\n   C   <|im_end|> \\n
    read     every token but the last
    targets                                   `------ format ------'  letter  `- format -'
    `at`     one place to the left: the token before a target predicts it
    """

    batch: Batch
    at: torch.Tensor  # (T,) int64, indices in the batch
    ids: torch.Tensor  # (T,) int64
    letters: torch.Tensor  # (L,) int64, indices in `ids`
    classes: torch.Tensor  # (L,) int64, the class of each letter's row


def make_targets(
    rows: list[list[int]],
    labels: np.ndarray,
    endings: np.ndarray,
    shared: int,
    device: torch.device,
) -> Targets:
    """Packs B training rows and says where their targets are.

    labels: (B,); endings: (C, 3), the targets at the end of a row of each class: format, letter, format again.
    `shared`: all rows begin with so many equal ids, which are packed once.
    """
    batch = pack_shared([row[:-1] for row in rows], shared, device)
    counts = endings[labels]  # (B, 3)
    totals = counts.sum(1)  # (B,)
    own = np.array([len(row) - 1 - shared for row in rows])
    row_ends = shared + own.cumsum()  # (B,)
    firsts = np.concatenate([[0], totals.cumsum()[:-1]])  # (B,) a row's first target among all
    at = np.arange(totals.sum()) + np.repeat(row_ends - totals - firsts, totals)
    letters = np.arange(counts[:, 1].sum()) + np.repeat(
        firsts + counts[:, 0] - np.concatenate([[0], counts[:, 1].cumsum()[:-1]]), counts[:, 1]
    )
    ids = np.concatenate([row[-total:] for row, total in zip(rows, totals, strict=True)])
    indices = (at, ids, letters, np.repeat(labels, counts[:, 1]))
    return Targets(batch, *(to_device(x.astype(np.int64), device) for x in indices))


def answer_loss(
    logits: torch.Tensor,
    targets: Targets,
    weights: torch.Tensor,
    smoothing: float,
    letter_ids: torch.Tensor,
) -> torch.Tensor:
    """The summed cross-entropy of all targets and of the letters alone, (2,) fp32.

    logits: (T, V) fp32; weights: (C,), of a class's letters; letter_ids: (O,). Label smoothing spreads its share of
    a letter's target evenly over all letters. The format's tokens have weight 1 and no smoothing.
    """
    losses = F.cross_entropy(logits, targets.ids, reduction="none")  # (T,)
    of_letters = losses[targets.letters]  # (L,)
    if smoothing:
        log_likelihoods = logits[targets.letters].log_softmax(1)[:, letter_ids]  # (L, O)
        of_letters = (1 - smoothing) * of_letters - smoothing * log_likelihoods.mean(1)
    of_letters = of_letters * weights[targets.classes]
    return torch.stack([losses.index_copy(0, targets.letters, of_letters).sum(), of_letters.sum()])


def upgrade(values: dict) -> dict:
    """The settings of an older run: its question stands in its run.json, so the flags that made it are not needed."""
    old = {name: value for name, value in values.items() if name not in ("language", "options")}
    return old | ({"prompt": "published"} if values.get("prompt") is None else {})


def check_head(s: Settings) -> None:
    """Raises UserError for a setting that the chosen head would ignore."""
    unused = ("train_on", "think_in", "normalize") if s.head == "linear" else ("linear_input",)
    unused += ("prompt",) if s.head == "linear" and s.linear_input == "text" else ()
    for name in unused:
        if getattr(s, name) != getattr(Settings, name):
            remedy = ", or add --linear-input prompt" if name == "prompt" else ""
            raise UserError(
                f"--{name.replace('_', '-')}: --head {s.head} does not use it; leave it out{remedy}"
            )


def end_and_pad(tokenizer: Tokenizer, config: dict) -> tuple[int, int]:
    """The ids of the end-of-sequence and the padding token, for config.json; one serves as the other where it is missing."""
    names = {name: tokenizer.special_token(f"{name}_token") for name in ("eos", "pad")}
    ids = {
        name: tokenizer.control_ids([token])[0] if token else config.get(f"{name}_token_id")
        for name, token in names.items()
    }
    ids = {name: value[0] if isinstance(value, list) else value for name, value in ids.items()}
    given = [value for value in ids.values() if value is not None]
    if not given:
        raise UserError(
            "--model: neither its tokenizer_config.json nor its config.json names an eos_token or pad_token; add one"
        )
    return tuple(given[0] if value is None else value for value in ids.values())


def main(argv: list[str] | None = None) -> None:
    # 1. Settings, ranks, the run to resume.
    s = parse(Settings, argv, __doc__, upgrade=upgrade)
    check_head(s)
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
    pinned = previous.info if previous else {"revision": None, "data_revision": None}
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
    asks = (
        s.head == "options" or s.linear_input == "prompt"
    )  # the model reads a question, not the bare text
    if previous and previous.newest:
        directory, revision = previous.newest, pinned["revision"]
    else:
        directory, revision = (
            (None, None) if s.model == "tiny" else weights.find_model(s.model, pinned["revision"])
        )
    kind = weights.DECODER if s.head == "options" else weights.DECODER_LINEAR
    config = weights.read_config(directory, kind) if directory else SIZES["tiny-qwen3"]
    if directory:
        tokenizer = load_tokenizer(directory)
    else:
        before, after = (
            make_template(data.label_names, s.prompt, no_think=True) if asks else ("", "")
        )
        tokenizer = train_qwen_tokenizer(
            [before + text + after for text in data.train.texts], vocab_size=2000
        )
    config = {"vocab_size": len(tokenizer)} | config
    end, pad = end_and_pad(tokenizer, config)
    trained_labels = config.get("id2label")
    # The padding token's embedding gets no gradient. A row with options has no padding, but it may hold
    # the end token: that one is padding only where config.json says so, as in transformers.
    padding = config.get("pad_token_id") if s.head == "options" and pad == end else pad
    config |= weights.label_config(data.label_names) | {
        "pad_token_id": padding,
        "eos_token_id": end,
    }
    random = s.init == "random" and not (previous and previous.newest)
    model, fresh, load_report = weights.build_model(
        kind, config, None if random else directory, s.seed, device
    )
    weights.check_fits(model.config, tokenizer, s.max_length)
    if s.eval_only and s.head == "linear" and (fresh or trained_labels != config["id2label"]):
        raise UserError(
            f"--eval-only: {s.model} was not trained on the classes {', '.join(data.label_names)[:80]}; train it first"
        )
    model.model.activation_checkpointing = s.activation_checkpointing
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
    targets = {"think_in": s.think_in, "train_on": s.train_on}
    chat = (
        make_chat(pinned, tokenizer, data.label_names, s.max_length, s.prompt, **targets)
        if asks
        else None
    )
    read = (
        chat.questions if chat else functools.partial(text_rows, tokenizer, max_length=s.max_length)
    )
    tokenized = {}
    for name, split in splits.items():
        answered = name == "train" and s.head == "options"
        tokenized[name] = (
            chat.training_rows(split.texts, split.labels) if answered else read(split.texts)
        )
    train_rows = [] if s.eval_only else tokenized["train"][0]
    # With --eval-only, take num_train_rows from the run that trained the model, if there is one.
    before = checkpoint.info_of_model(directory) if s.eval_only and directory and not random else {}
    trained_rows = before.get("num_train_rows", 0) if s.eval_only else len(data.train)
    # For minicls.json: a copy of the model directory is asked as this run asks.
    asked = {"script": "train_qwen", "label_names": data.label_names} | (
        chat.saved() if chat else {}
    )
    asked |= {
        name: getattr(s, name)
        for name in (
            "head",
            "linear_input",
            "max_length",
            "dtype",
            "normalize",
            "think_in",
            "train_on",
        )
    }
    run_dir = None
    if dist.is_first():
        run_dir = previous.dir if previous else checkpoint.new_run_dir(s.output_dir, "train_qwen")
        if not previous:
            lock = checkpoint.lock(run_dir)
            about = {
                "script": "train_qwen",
                "total_steps": total_steps,
                "revision": revision,
                "data_revision": data.revision,
            }
            about |= {"data_fingerprint": data.fingerprint(), "num_train_rows": trained_rows} | (
                chat.saved() if chat else {}
            )
            checkpoint.write_run_info(run_dir, dataclasses.asdict(s), device, about)
    logger = Logger(run_dir, state["step"], total_steps, drop_later=not s.eval_only)
    for line in describe(data, validation):
        logger.print(line)
    for name, (rows, cut) in tokenized.items():
        logger.print(
            f"{name}: {len(rows):,} rows, {sum(map(len, rows)):,} tokens, {cut:,} rows cut to {s.max_length}"
        )
    first = next(iter(splits))
    logger.print(
        f"example: {data.label_names[splits[first].labels[0]]} <- {tokenizer.decode(tokenized[first][0][0])}"
    )
    logger.print(
        f"{s.model}: {sum(p.numel() for p in model.parameters()):,} parameters; {load_report}; {dist.device_name(device)}"
    )

    trained_prompt = (
        upgrade(before["settings"]).get("prompt")
        if before.get("template") and not previous
        else s.prompt
    )
    if asks and trained_prompt != s.prompt:
        logger.print(
            f"note: the model was trained with --prompt {trained_prompt}, and is asked otherwise here"
        )

    # 3. The loss of one batch.
    # Targets at the end of a row of each class: (format, letter, format again). A linear head has one target.
    endings = [
        chat.target_counts(label) if s.head == "options" else (0, 1, 0)
        for label in range(len(data.label_names))
    ]
    endings = np.array(endings)  # (C, 3)
    row_weights_on_host = class_weights(
        data.train.labels, len(data.label_names), s.class_weights
    )  # (C,)
    row_weights = row_weights_on_host.to(device)
    letter_ids = None
    if s.label_smoothing and s.head == "options":
        if any(len(option) > 1 for option in chat.options):
            raise UserError(
                "--label-smoothing: an option of several tokens has no letters to spread to; leave it out"
            )
        letter_ids = torch.tensor(chat.options, device=device)[:, 0]  # (O,)
    if s.head == "options" and s.train_on == "response":
        logger.print(
            f"loss: the mean over the {endings[0].sum()} tokens of an answer, of which only {endings[0][1]} depend on the text. "
            "Compare answer_loss (the letter) with BERT's loss; format_loss covers the fixed tokens"
        )

    # What all questions begin with goes through the model once a batch: less to compute, the same loss and gradients. Not on
    # a GPU, whose attention kernel wants every row whole.
    shared = 0
    if not on_gpu(device) and not s.eval_only:
        questions = [
            row[: -endings[label].sum()]
            for row, label in zip(train_rows, data.train.labels, strict=True)
        ]
        shared = len(common_prefix(questions))
        if shared:
            logger.print(
                f"all questions begin with the same {shared} tokens, which a batch reads once"
            )

    def count_targets(rows: np.ndarray) -> tuple[float, float]:
        """The targets of some training rows, and the letters' tokens among them, each letter counted by its weight."""
        labels = data.train.labels[rows]
        num_letters = float((row_weights_on_host.numpy()[labels] * endings[labels, 1]).sum())
        return float(endings[labels][:, [0, 2]].sum()) + num_letters, num_letters

    def loss_sums(rows: np.ndarray) -> torch.Tensor:
        """The summed cross-entropy of some training rows: (2,) of all targets, and of the letters alone."""
        labels, ids = data.train.labels[rows], [train_rows[row] for row in rows]
        if s.head == "linear":
            batch, targets = pack_shared(ids, shared, device), to_device(labels, device)
            with autocast:
                logits = forward(batch)  # (B, C) fp32
            losses = F.cross_entropy(
                logits, targets, reduction="none", label_smoothing=s.label_smoothing
            )  # (B,)
            return (losses * row_weights[targets]).sum().expand(2)
        targets = make_targets(ids, labels, endings, shared, device)
        with autocast:
            logits = forward(targets.batch, targets.at)  # (T, V) fp32
        return answer_loss(logits, targets, row_weights, s.label_smoothing, letter_ids)

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
        """The logits (n, C) fp32 of tokenized rows, on every rank's CPU: a head's, or the options' scores."""
        model.eval()
        with autocast:
            if s.head == "options":
                logits = score(model, rows, chat.options, device, s.normalize)
            else:
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
        weights.save_model(model, config, tokenizer, directory, None if chat else s.max_length)
        checkpoint.write_json(directory / "minicls.json", asked)
        if (
            s.head == "options"
        ):  # greedy, whatever the pretrained model's file says: an answer is not to be sampled
            generation = {"do_sample": False, "eos_token_id": chat.stop_ids, "pad_token_id": pad}
            checkpoint.write_json(directory / "generation_config.json", generation)

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
            num_targets, num_letters = count_targets(window)
            sums = torch.zeros(2, device=device)
            for micro_step in range(grad_accum_steps):
                rows = shares[micro_step * dist.world_size() + dist.rank()]
                checkpoint.seed_everything(s.seed, step, micro_step, dist.rank())
                if len(rows):  # the last window of an epoch may be too short for everyone
                    losses = loss_sums(rows)
                    (losses[0] / num_targets).backward()
                    sums += losses.detach()
            dist.sum_gradients(model)
            grad_norm = torch.nn.utils.clip_grad_norm_(
                model.parameters(), s.max_grad_norm or math.inf
            )
            optimizer.step()
            optimizer.zero_grad()
            # The only point of a step where the host waits for a GPU. Nothing is saved before the numbers are checked.
            total_loss, letters_loss, grad_norm = torch.cat(
                [dist.all_sum(sums), grad_norm[None]]
            ).tolist()
            step_loss, parts = total_loss / num_targets, {}
            if num_targets > num_letters:
                format_loss = (total_loss - letters_loss) / (num_targets - num_letters)
                parts = {"answer_loss": letters_loss / num_letters, "format_loss": format_loss}
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
            shown = {name: f"{value:.4f}" for name, value in ({"loss": step_loss} | parts).items()}
            logger.progress(**shown, samples_per_second=f"{rates['samples_per_second']:.1f}")
            if state["step"] % s.log_every == 0 or state["step"] == total_steps:
                epoch, lr = state["samples"] / len(train_rows), optimizer.param_groups[0]["lr"]
                values = (
                    {"epoch": epoch, "loss": step_loss, "learning_rate": lr, "grad_norm": grad_norm}
                    | parts
                    | rates
                )
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
                    f"stopped at step {step + 1} of {total_steps}; go on: python train_qwen.py --resume {run_dir}"
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
                weights.load_weights(model, checkpoint_dir, kind)
            state["step"] = step
            logits = evaluate()
    headline_step = state["best_on_validation"][0] if state["best_on_validation"] else state["step"]
    if headline_step != state["step"]:
        if dist.is_first():
            weights.load_weights(model, checkpoint.checkpoints(run_dir)[headline_step], kind)
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

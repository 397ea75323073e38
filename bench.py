"""Measure speed and memory: minicls against its peers, each in processes of its own, started in turn on the same machine.

    python bench.py --task train --bert DIR --data DIR                  # training steps beside the HF Trainer's
    python bench.py --task train --qwen DIR --data DIR                  # SFT steps, likewise
    python bench.py --task score --qwen DIR --data DIR                  # options scored beside transformers, and vLLM if named
    python bench.py --task generate --qwen DIR --data DIR               # greedy decoding, one request at a time
    python bench.py ... --init random                                   # DIR needs no weights: time does not depend on them

Prints a table, writes bench.json, and ends with the same as one JSON line. Nothing here is a test: a shared machine is
noisy, so read the ratio, and its spread over the rounds.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import minicls
import train_bert
import train_qwen
from minicls import checkpoint, dist, weights
from minicls.config import UserError, parse, run, setting
from minicls.data import Data, load_data, step_rows, stratified_rows
from minicls.generate import generate, read_answers
from minicls.prompt import Chat, make_template
from minicls.scorer import score
from minicls.tokenizer import bert_rows, load_tokenizer

SIDES = ("minicls", "transformers", "vllm")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """All sides get the same rows, and the settings of train_bert.py and train_qwen.py where none is named here."""

    task: str = setting("train", "what to measure", choices=("train", "score", "generate"))
    bert: str | None = setting(None, "hub id or directory, for --task train")
    qwen: str | None = setting(None, "hub id or directory")
    init: str = setting("pretrained", "random needs no weights in the directory", choices=("pretrained", "random"))
    data: str = setting("fancyzhx/ag_news", "hub id, directory, or synthetic")
    text_column: str = setting("text", "column of the texts")
    label_column: str = setting("label", "column of the labels")
    max_steps: int = setting(5, "training steps of one process; the first is not counted", minimum=2)
    num_questions: int = setting(64, "test rows of one process, to score or to generate for", minimum=1)
    max_new_tokens: int = setting(8, "generated for each request; no answer stops before", minimum=1)
    rounds: int = setting(3, "processes of each side", minimum=1)
    global_batch_size: int | None = setting(None, "rows of a training step; off: 64 for BERT, 12 for Qwen3", minimum=1)
    max_length: int = setting(512, "tokens of a row", minimum=3)
    dtype: str = setting("bf16", "training: bf16 is autocast over fp32 weights; else: of the weights", choices=("bf16", "fp32"))
    device: str | None = setting(None, "cpu, cuda or cuda:N; off: cuda if there is one")
    threads: int | None = setting(None, "CPU threads of each side; off: torch's choice", minimum=1)
    compile: bool = setting(False, "torch.compile minicls' model")
    seed: int = setting(42, "of the order of rows", minimum=0)
    vllm_python: str | None = setting(None, "interpreter of an environment with vLLM, for --task score and generate; off: no vLLM")
    output_dir: str | None = setting(None, "for bench.json, new or empty; off: runs/bench-<time>")
    side: str | None = setting(None, "measure this side alone, in this process (what the comparison starts)", choices=SIDES)


def command_line(settings: dict) -> list[str]:
    """Settings as flags; those that are off are left out."""
    flags = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags += [flag] if value else []
        elif value is not None:
            flags += [flag, str(value)]
    return flags


def read_data(s: Settings) -> Data:
    return load_data(s.data, s.text_column, s.label_column)


def make_chat(s: Settings, data: Data) -> Chat:
    tokenizer = load_tokenizer(weights.find_model(s.qwen)[0])
    return Chat(tokenizer, make_template(data.label_names), len(data.label_names), s.max_length)


def training_rows(s: Settings, data: Data, rows: np.ndarray) -> list[list[int]]:
    texts = [data.train.texts[row] for row in rows]
    if s.bert:
        return bert_rows(load_tokenizer(weights.find_model(s.bert)[0]), texts, s.max_length)[0]
    return make_chat(s, data).training_rows(texts, data.train.labels[rows])[0]


def asked(s: Settings, chat: Chat, texts: list[str]) -> list[list[int]]:
    """The ids an engine gets: a question ready for its option, or a prompt to be answered."""
    return (chat.questions if s.task == "score" else chat.prompts)(texts)[0]


def question_texts(s: Settings, data: Data) -> list[str]:
    return data.test.select(stratified_rows(data.test, min(s.num_questions, len(data.test)))).texts


# Training.


def train_minicls(s: Settings) -> dict:
    """The real script, logged at every step."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        shared = ("data", "text_column", "label_column", "max_steps", "global_batch_size", "max_length", "dtype", "seed", "compile")
        flags = {name: getattr(s, name) for name in (*shared, "device", "threads")}
        flags |= {"model": s.bert or s.qwen, "output_dir": run_dir, "micro_batch_size": s.global_batch_size, "log_every": 1}
        flags |= {"eval_every": 0, "save_every": 0, "max_eval_rows": 8}
        (train_bert if s.bert else train_qwen).main(command_line(flags))
        events = [e for e in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if e["event"] == "train"]
    clock = [event["train_seconds"] for event in events]
    return {
        "seconds": np.diff(clock).tolist(),
        "peak_memory_bytes": events[-1]["peak_memory_bytes"],
        "losses": [e["loss"] for e in events],
        "version": minicls.__version__,
    }


def train_transformers(s: Settings) -> dict:
    """The HF Trainer over the same rows in the same order: dynamic padding, its default attention, no checkpoints."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer, TrainingArguments

    device = dist.start(s.device, s.threads)
    data = read_data(s)
    rows = np.concatenate([step_rows(step, len(data.train), s.global_batch_size, s.seed) for step in range(s.max_steps)])
    ids = training_rows(s, data, rows)
    if s.bert:
        directory, labels = weights.find_model(s.bert)[0], data.train.labels[rows].tolist()
        model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=len(data.label_names))
    else:
        directory, chat = weights.find_model(s.qwen)[0], make_chat(s, data)
        trained = [sum(chat.target_counts(label)) for label in data.train.labels[rows]]
        labels = [[-100] * (len(row) - n) + row[-n:] for row, n in zip(ids, trained, strict=True)]
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    clock = []

    def collate(rows: list[tuple[list[int], int | list[int]]]) -> dict[str, torch.Tensor]:
        """Pads to the longest row of the batch, as transformers' own collators do."""
        ids, labels = [torch.tensor(ids) for ids, _ in rows], [torch.tensor(label) for _, label in rows]
        mask = [torch.ones_like(row) for row in ids]
        padded = {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": pad_sequence(mask, batch_first=True)}
        return padded | {"labels": pad_sequence(labels, batch_first=True, padding_value=-100) if s.qwen else torch.stack(labels)}

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if device.type == "cuda":
                torch.cuda.synchronize()
            clock.append(time.perf_counter())

    defaults = (train_bert if s.bert else train_qwen).Settings()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                max_steps=s.max_steps,
                per_device_train_batch_size=s.global_batch_size,
                train_sampling_strategy="sequential",
                learning_rate=defaults.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=defaults.warmup_ratio,
                weight_decay=defaults.weight_decay,
                bf16=s.dtype == "bf16",
                use_cpu=device.type == "cpu",
                save_strategy="no",
                logging_steps=1,
                remove_unused_columns=False,
                report_to=[],
                disable_tqdm=True,
                seed=s.seed,
            ),
            train_dataset=list(zip(ids, labels, strict=True)),
            data_collator=collate,
            callbacks=[Clock()],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": np.diff(clock).tolist(),
        "peak_memory_bytes": dist.peak_memory_bytes(device),
        "losses": losses,
        "version": transformers.__version__,
    }


# Scoring and generation: weights in --dtype, tokenisation inside the clock.


def ask(s: Settings, data: Data, version: str, answer, device: torch.device) -> dict:
    """Times `answer(texts)` once it has warmed up; `answer` returns one prediction a text.

    Scoring gets all texts at once, generation one text at a time.
    """
    texts = question_texts(s, data)
    at_once = len(texts) if s.task == "score" else 1
    answer(data.train.texts[: min(8, at_once)])  # other texts: engines may remember what they have seen
    seconds, predictions = [], []
    for start in range(0, len(texts), at_once):
        begin = time.perf_counter()
        predictions += answer(texts[start : start + at_once])
        seconds.append(time.perf_counter() - begin)
    memory = dist.peak_memory_bytes(device)
    return {"seconds": seconds, "predictions": predictions, "peak_memory_bytes": memory, "version": version}


def ask_minicls(s: Settings) -> dict:
    """minicls' scorer, or its greedy decoding."""
    device = dist.start(s.device, s.threads)
    directory, _ = weights.find_model(s.qwen)
    config = weights.read_config(directory, weights.QWEN3)
    model, _, _ = weights.build_model(weights.QWEN3, config, directory, s.seed, device, DTYPES[s.dtype])
    data = read_data(s)
    chat = make_chat(s, data)
    model = model.eval().requires_grad_(False)
    if s.compile:
        model.compile(dynamic=True)

    def answer(texts: list[str]) -> list:
        rows = asked(s, chat, texts)
        if s.task == "score":
            return score(model, rows, chat.options, device).argmax(1).tolist()
        return generate(model, rows, s.max_new_tokens, [], device)

    return ask(s, data, minicls.__version__, answer, device)


@torch.inference_mode()
def ask_transformers(s: Settings) -> dict:
    """One forward pass a question that gives the logits of all positions, as lm-evaluation-harness does; or `generate`."""
    import transformers

    device = dist.start(s.device, s.threads)
    directory, _ = weights.find_model(s.qwen)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[s.dtype]).eval().to(device)
    data = read_data(s)
    chat = make_chat(s, data)
    new = {"max_new_tokens": s.max_new_tokens, "min_new_tokens": s.max_new_tokens, "do_sample": False, "pad_token_id": 0}

    def answer(texts: list[str]) -> list:
        rows = [torch.tensor([ids], device=device) for ids in asked(s, chat, texts)]
        if s.task == "score":
            return [model(ids).logits.log_softmax(-1)[0, -1, [o[0] for o in chat.options]].argmax().item() for ids in rows]
        return [
            model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **new)[0, ids.shape[1] :].tolist()
            for ids in rows
        ]

    return ask(s, data, transformers.__version__, answer, device)


def ask_vllm(s: Settings) -> dict:
    """vLLM's engine in this process: one token with the options' log-probabilities, or greedy decoding."""
    import vllm

    device = dist.start(s.device, s.threads)
    data = read_data(s)
    chat = make_chat(s, data)
    directory, _ = weights.find_model(s.qwen)
    engine = vllm.LLM(str(directory), dtype=DTYPES[s.dtype], max_model_len=s.max_length + 16, max_num_seqs=64)
    options = [option[0] for option in chat.options]
    if s.task == "score":
        parameters = vllm.SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=options)
    else:
        parameters = vllm.SamplingParams(temperature=0, max_tokens=s.max_new_tokens, ignore_eos=True)

    def answer(texts: list[str]) -> list:
        prompts = [{"prompt_token_ids": ids} for ids in asked(s, chat, texts)]
        outputs = engine.generate(prompts, parameters, use_tqdm=False)
        if s.task == "generate":
            return [list(o.outputs[0].token_ids) for o in outputs]
        return [int(np.argmax([o.outputs[0].logprobs[0][option].logprob for option in options])) for o in outputs]

    return ask(s, data, vllm.__version__, answer, device)


# The comparison.


def measure(s: Settings, side: str) -> dict:
    """Runs one side in a process of its own; returns what it measured."""
    python, env = sys.executable, dict(os.environ)
    if side == "vllm":
        python = s.vllm_python
        # Both cores, a small cache, the engine in its own process' memory: without these, a CPU's figures are halved.
        cores = f"0-{(s.threads or os.cpu_count()) - 1}"
        env |= {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
        env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    flags = command_line(asdict(replace(s, side=side, output_dir=None, vllm_python=None)))
    done = subprocess.run([python, __file__, *flags], capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise UserError(f"--side {side}: failed ({(done.stderr.strip().splitlines() or ['no message'])[-1][:300]}); run it alone")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(s: Settings) -> dict:
    """Every side in alternating processes. Returns medians over all steps or requests, and each round's ratios to minicls."""
    data = read_data(s)
    sides = [*SIDES[:2], *(["vllm"] if s.vllm_python else [])]
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    for number in range(s.rounds):
        for side in sides:
            runs[side].append(measure(s, side))
            print(
                f"round {number + 1} of {s.rounds}, {side}: {statistics.median(runs[side][-1]['seconds']):.2f} s", file=sys.stderr
            )
    if s.task == "train":
        windows = [step_rows(step, len(data.train), s.global_batch_size, s.seed) for step in range(1, s.max_steps)]
        lengths = [[len(row) for row in training_rows(s, data, window)] for window in windows]
    else:
        chat = make_chat(s, data)
        rows = asked(s, chat, question_texts(s, data))
        lengths = [[*map(len, rows)]] if s.task == "score" else [[len(row)] for row in rows]
    samples, tokens = (statistics.mean(f(part) for part in lengths) for f in (len, sum))  # of one step, or one request
    rows = []
    for side in sides:
        seconds = statistics.median(value for one in runs[side] for value in one["seconds"])
        row = {"side": side, "version": runs[side][0]["version"], "seconds": seconds}
        row |= {"samples_per_second": samples / seconds, "tokens_per_second": tokens / seconds}
        row |= {"peak_memory_bytes": max(one["peak_memory_bytes"] for one in runs[side])}
        if s.task == "train":
            row["losses"] = runs[side][0]["losses"]
        else:
            pairs = zip(runs["minicls"][0]["predictions"], runs[side][0]["predictions"], strict=True)
            row["agreement"] = statistics.mean(a == b for a, b in pairs)  # with minicls, prediction by prediction
        if s.task == "generate":
            _, row["unreadable"] = read_answers(chat.tokenizer, runs[side][0]["predictions"], chat.num_options)
        rows.append(row)
    ratios = {
        side: [
            statistics.median(b["seconds"]) / statistics.median(a["seconds"])
            for a, b in zip(runs["minicls"], runs[side], strict=True)
        ]
        for side in sides[1:]
    }
    return {
        "task": s.task,
        "rows": rows,
        "speedup": {side: statistics.median(values) for side, values in ratios.items()},
        "speedup_of_each_round": ratios,
        "memory_ratio": {row["side"]: rows[0]["peak_memory_bytes"] / row["peak_memory_bytes"] for row in rows[1:]},
        "real_over_padded_tokens": statistics.mean(sum(part) / (max(part) * len(part)) for part in lengths),
        "settings": asdict(s),
        "torch": torch.__version__,
        "device": dist.device_name(dist.start(s.device, s.threads)),
    }


def with_random_weights(s: Settings, folder: str) -> Settings:
    """The settings with a model directory of the same size and random weights, the same ones for every side."""
    directory, _ = weights.find_model(s.bert or s.qwen)
    tokenizer, data = load_tokenizer(directory), read_data(s)
    kind, dtype = (weights.BERT, torch.float32) if s.bert else (weights.QWEN3, torch.bfloat16)
    config = weights.read_config(directory, kind) | weights.label_config(data.label_names)
    model, _, _ = weights.build_model(kind, config, None, s.seed, torch.device("cpu"), dtype)
    made = Path(folder) / directory.name
    weights.save_model(model, config, tokenizer, made)
    return replace(s, **{"bert" if s.bert else "qwen": str(made)})


def main(argv: list[str] | None = None) -> None:
    s = parse(Settings, argv, __doc__)
    if bool(s.bert) == bool(s.qwen) or (s.bert and s.task != "train"):
        raise UserError(f"--task {s.task}: name one model, --qwen DIR" + (" or --bert DIR" if s.task == "train" else ""))
    s = replace(s, global_batch_size=s.global_batch_size or (64 if s.bert else 12))
    if s.side:
        sides = {"minicls": ask_minicls, "transformers": ask_transformers, "vllm": ask_vllm}
        if s.task == "train":
            sides = {"minicls": train_minicls, "transformers": train_transformers}
        print(json.dumps(sides[s.side](s)))
        return
    if s.vllm_python and s.task == "train":
        raise UserError("--vllm-python: vLLM does not train; leave it out")
    output_dir = checkpoint.new_run_dir(s.output_dir, "bench")
    with tempfile.TemporaryDirectory() as folder:
        result = compare(with_random_weights(s, folder) if s.init == "random" else s)
    result["settings"] = asdict(replace(s, vllm_python=None, output_dir=None))  # paths of this machine say nothing elsewhere
    checkpoint.write_json(output_dir / "bench.json", result)
    print(f"{'':14}{'samples/s':>11}{'tokens/s':>11}{'seconds':>9}{'peak memory':>14}")
    for row in result["rows"]:
        rates = f"{row['samples_per_second']:11.2f}{row['tokens_per_second']:11.0f}{row['seconds']:9.2f}"
        agreement = f", {row['agreement']:.1%} of answers as minicls'" if "agreement" in row else ""
        agreement += f", {row['unreadable']:.1%} name no option" if "unreadable" in row else ""
        print(f"{row['side']:14}{rates}{row['peak_memory_bytes'] / 2**30:10.2f} GiB   {row['version']}{agreement}")
    for side, ratios in result["speedup_of_each_round"].items():
        spread = f"{min(ratios):.2f} to {max(ratios):.2f} over {s.rounds} rounds"
        print(f"minicls is {result['speedup'][side]:.2f} times as fast as {side} ({spread}), {result['device']}")
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)

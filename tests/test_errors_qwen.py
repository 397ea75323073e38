"""Like test_errors.py for train_bert.py, for the mistakes that only train_qwen.py can meet.

    python -m pytest tests/test_errors_qwen.py

Every case is a working call with one thing wrong: one line that names the flag or file, and nothing left behind.
"""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_errors import CSV, EVALUATE, ROOT, TRAIN, change, check, remove, tensors, tokenizer_without

import minicls.__main__
import train_bert
import train_qwen
from minicls import weights
from minicls.prompt import make_template
from minicls.tiny import train_qwen_tokenizer

LENGTH = 180  # tokens: enough for the question, whose words the tokenizer below has merged


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The files of a working call: `data/` of two classes and `model/`; and, to be refused, `bert/` and `linear/`."""
    folder = tmp_path_factory.mktemp("files")
    for name, csv in (
        ("data", CSV),
        ("classes", "text,label\n" + "".join(f"a text,class {i:02}\n" for i in range(27))),
    ):
        (folder / name).mkdir()
        for split in ("train", "test"):
            (folder / name / f"{split}.csv").write_text(csv)
    tokenizer = train_qwen_tokenizer(["".join(make_template(["bad", "good"]))] * 2, 600)
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    sizes |= {
        "intermediate_size": 8,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 200,
        "rope_theta": 10_000.0,
    }
    config = {"model_type": "qwen3", "tie_word_embeddings": True} | sizes
    model, _, _ = weights.build_model(weights.DECODER, config, None, 0, torch.device("cpu"))
    weights.save_model(model, config, tokenizer, folder / "model")
    argv = ["--data", str(folder / "data"), "--output-dir", str(folder / "bert"), "--device", "cpu", "--threads", "1"]
    train_bert.main(["--model", "tiny", "--max-steps", "1", "--max-length", "16", *argv])
    shutil.rmtree(folder / "bert" / "checkpoints")
    (folder / "question.txt").write_text("{text}\n{options}\n")
    with contextlib.chdir(folder):
        train_qwen.main(linear("--output-dir", "linear"))
    shutil.rmtree(folder / "linear" / "checkpoints")
    return folder


@pytest.fixture
def here(files, tmp_path, monkeypatch) -> Path:
    """The working directory, with a copy of the files for the case to damage."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*flags: str) -> list[str]:
    """A working call; flags given here come last and win."""
    argv = [*TRAIN, "--max-length", str(LENGTH), "--model", "model", "--data", "data", "--prompt", "question.txt"]
    return [*argv, "--micro-batch-size", "4", "--output-dir", "out", *flags]


def linear(*flags: str) -> list[str]:
    """A working call for a head that reads the bare text, so without a question."""
    argv = call("--head", "linear", *flags)
    where = argv.index("--prompt")
    return argv[:where] + argv[where + 2 :]


@pytest.mark.parametrize("head", ["options", "linear"])
def test_the_calls_that_the_cases_spoil_work(head, here):
    if head == "options":
        train_qwen.main(call("--output-dir", "options"))
    minicls.__main__.main([*EVALUATE, head])
    assert json.loads((here / "out" / "results.json").read_text())["final_step"] == 0


FLAGS = {  # flags -> parts of the message
    "--model bert": ["bert: this is a bert model", "takes llama, qwen2 and qwen3", "pass another"],
    "--model bert --init random": [
        "bert: this is a bert model",
        "takes llama, qwen2 and qwen3",
        "pass another",
    ],
    "--model bert --head linear": [
        "bert: this is a bert model",
        "takes llama, qwen2 and qwen3",
        "pass another",
    ],
    "--max-length 201": ["--max-length", "201", "200", "pass less"],
    "--max-length 10": ["--max-length", "10", "leaves no room", "the prompt alone takes"],
    "--max-length 10 --head linear --linear-input prompt": ["--max-length", "10", "leaves no room"],
    "--data classes": ["--head", "27", "--head linear"],
    "--data classes --head linear --linear-input prompt": ["--head", "27", "--head linear"],
    "--prompt nowhere.txt": ["--prompt", "nowhere.txt", "not readable", "pass a UTF-8 text file"],
    "--prompt data": ["--prompt", "data", "not readable", "pass a UTF-8 text file"],
    "--prompt data/train.csv": ["--prompt", "data/train.csv", "{text} 0 times", "put it in once"],
    "--prompt model/model.safetensors": [
        "--prompt",
        "model/model.safetensors",
        "not readable",
        "pass a UTF-8 text file",
    ],
    "--head lines": ["--head", "'lines'", "options", "linear"],
    "--long-text head": ["unknown flag --long-text"],
    "--think-on prompt": ["unknown flag --think-on", "--think-in"],
    "--output-dir model": ["--output-dir", "model", "not empty", "new directory", "--resume"],
    "--output-dir data/train.csv": ["--output-dir", "data/train.csv", "another directory"],
    "--data classes --head linear --model linear": ["linear/model.safetensors", "score.weight", "(2, 8)", "(27, 8)"],
    "--resume bert": ["bert/run.json", "resume it with the script"],
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(flags, here):
    bare = "--head linear" in flags and "--linear-input" not in flags
    argv = flags.split() if flags.startswith("--resume") else (linear if bare else call)(*flags.split())
    check(here, argv, FLAGS[flags], train_qwen)


def test_a_linear_head_of_other_classes_is_not_tested(here):
    change("linear/config.json", **weights.label_config(["cat", "dog"]))()
    argv = [*EVALUATE, "linear"]
    check(here, argv, ["linear", "minicls.json and config.json name different classes"], minicls.__main__)


def test_evaluating_with_too_little_room(here):
    argv = [*EVALUATE, "model", "--max-length", "10"]
    check(here, argv, ["--max-length", "10", "leaves no room", "the prompt alone takes"], minicls.__main__)


LAYER = "model.layers.0.self_attn.q_norm.weight"


def shrink_embedding() -> None:
    tensors(lambda t: t.update({"model.embed_tokens.weight": torch.zeros(9, 8)}))()
    change("model/config.json", vocab_size=9)()


MODEL = {  # the fault: (a function that causes it, parts of the message)
    "another kind of layer": (
        change("model/config.json", hidden_act="gelu"),
        ["model: its config.json", "hidden_act", "pass another"],
    ),
    "odd heads": (change("model/config.json", num_key_value_heads=3), ["model: its config.json", "3", "pass another"]),
    "a tensor missing": (tensors(lambda t: t.pop(LAYER)), ["model", LAYER, "missing", "complete weights"]),
    "tokenizer without <|im_end|>": (
        tokenizer_without("<|im_end|>"),
        ["model: ", "lacks <|im_end|>;", "this kind of model"],
    ),
    "BERT's tokenizer": (
        lambda: shutil.copy("bert/tokenizer.json", "model/tokenizer.json") and None,
        ["model: ", "lacks <|im_end|>", "this kind of model"],
    ),
    "no tokenizer": (remove("model/tokenizer.json"), ["model", "no tokenizer.json", "save_pretrained"]),
    "a tokenizer larger than the embedding": (
        shrink_embedding,
        ["model: its tokenizer", "9 rows", "files that fit"],
    ),
}


@pytest.mark.parametrize("case", MODEL)
def test_model(case, here):
    spoil, parts = MODEL[case]
    spoil()
    check(here, call(), parts, train_qwen)


def test_the_script_exits_with_2_and_the_line_without_a_traceback(here):
    command = [sys.executable, str(ROOT / "train_qwen.py"), *call("--prompt", "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True)
    reason = "[Errno 2] No such file or directory: 'nowhere'"
    assert (
        done.stderr
        == f"error: --prompt: nowhere is not readable ({reason}); pass a UTF-8 text file, or one of options-first, published-zh, published\n"
    )
    assert done.returncode == 2 and not (here / "out").exists()

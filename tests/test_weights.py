"""Model directories: what loads, what is refused and how, fresh weights, and the way to transformers and back.

    python -m pytest tests/test_weights.py
    MINICLS_SHARED=DIR python -m pytest tests/test_weights.py      # also the real tokenizers on real texts

Loaded numbers are equal to the last bit; what two implementations compute from them, up to fp32's rounding.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from runs import train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import train_qwen
from minicls import dist, weights
from minicls.batch import pack
from minicls.bert import BertConfig, BertForSequenceClassification
from minicls.config import UserError
from minicls.data import load_data, split_data
from minicls.predict import Classifier
from minicls.tiny import train_bert_tokenizer
from minicls.tokenizer import bert_rows, load_tokenizer

TEXTS = [
    "[SEP] shares [CLS]",
    "<|im_end|> <think> profit",
    "Ünï cafe\u0301 中文 😀",
    "\n",
    "a" * 300,
    "profit of shares " * 300,
]
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIZES |= {"max_position_embeddings": 32, "num_labels": 3}
VALUES = SIZES | {"model_type": "bert"}
HEAD = {"classifier.weight", "classifier.bias"}
POOLER = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
EXTRAS = {  # tensors of a pretraining checkpoint, and of files by older versions of transformers
    "cls.seq_relationship.weight": torch.zeros(2, 16),
    "cls.predictions.bias": torch.zeros(40),
    "bert.embeddings.position_ids": torch.arange(32)[None],
}


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """A complete set, every number another."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES))
    return {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}


def write_config(directory: Path, **values) -> None:
    (directory / "config.json").write_text(json.dumps(VALUES | values))


def write(directory: Path, *shards: dict[str, torch.Tensor]) -> Path:
    """A model directory: one file, or, of several shards, files with an index."""
    write_config(directory)
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors")
    else:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        for name, shard in zip(names, shards, strict=True):
            save_file(shard, directory / name)
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        (directory / weights.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def build(directory: Path | None, seed: int = 0, values: dict | None = None):
    """(parameters by name, names of the fresh ones, report) of a directory, or of random weights."""
    values = values or (weights.read_config(directory, weights.BERT) if directory else VALUES)
    model, fresh, report = weights.build_model(weights.BERT, values, directory, seed, torch.device("cpu"))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, fresh, report


def only(tensors: dict, *prefixes: str) -> dict:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}


def gamma_beta(tensors: dict) -> dict:
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    return {re.sub(r"LayerNorm\.\w+$", lambda match: old[match[0]], name): tensor for name, tensor in tensors.items()}


def headless(tensors: dict) -> dict:
    return {name.removeprefix("bert."): tensor for name, tensor in tensors.items() if name.startswith("bert.")}


def halves(tensors: dict) -> list[dict]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in part} for part in (names[::2], names[1::2])]


# Allowed differences between a file and the model: (the tensors, the names that then start fresh, how many are ignored).
LAYOUTS = {
    "as it is": (lambda t: [t], set(), 0),
    "gamma and beta": (lambda t: [gamma_beta(t)], set(), 0),
    "two shards": (halves, set(), 0),
    "pretraining heads": (lambda t: [only(t, "bert.") | EXTRAS], HEAD, 3),
    "pretraining heads in a shard of their own": (lambda t: [only(t, "bert."), only(EXTRAS, "cls.")], HEAD, 2),
    "no prefix": (lambda t: [headless(t)], HEAD, 0),
    "no prefix, position_ids": (lambda t: [headless(t | only(EXTRAS, "bert."))], HEAD, 1),
    "no prefix, no pooler": (lambda t: [headless(only(t, "bert.embeddings", "bert.encoder"))], HEAD | POOLER, 0),
    "no prefix, two shards": (lambda t: halves(headless(t)), HEAD, 0),
    "half precision": (lambda t: [{name: tensor.half() for name, tensor in t.items()}], set(), 0),
    "bfloat16": (lambda t: [{name: tensor.bfloat16() for name, tensor in t.items()}], set(), 0),
    "half precision, two shards": (lambda t: halves({name: tensor.half() for name, tensor in t.items()}), set(), 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_load_with_a_report(layout, tensors, tmp_path):
    make_shards, fresh_names, num_ignored = LAYOUTS[layout]
    model, fresh, report = build(write(tmp_path, *make_shards(tensors)))
    assert fresh == fresh_names
    for name in model.keys() - fresh:
        stored = torch.float16 if "half" in layout else torch.bfloat16 if "bf" in layout else torch.float32
        expected = tensors[name].to(stored).float()
        torch.testing.assert_close(model[name], expected, rtol=0, atol=0, msg=name)  # dtype included: always fp32
    assert report.startswith(f"{sum(p.numel() for p in model.values()):,} parameters; weights: ")
    counts = [int(count) for count in re.findall(r"(\d+)(?= tensors loaded|,| \(|$)", report.split("; ")[1])]
    assert counts == [len(tensors) - len(fresh), len(fresh), num_ignored], report
    assert "\n" not in report
    assert all(name in report for name in sorted(fresh)[:3])


REFUSED = {  # the tensors, and the words that the message must name
    "missing": (
        lambda t: [{name: t[name] for name in t if name != "bert.embeddings.LayerNorm.bias"}],
        "bert.embeddings.LayerNorm.bias",
    ),
    "no prefix, missing": (
        lambda t: [
            {name: tensor for name, tensor in headless(t).items() if name != "encoder.layer.1.output.dense.weight"}
        ],
        "bert.encoder.layer.1.output.dense.weight",
    ),
    "extra layer": (
        lambda t: [t | {"bert.encoder.layer.2.output.dense.bias": torch.zeros(16)}],
        "bert.encoder.layer.2.output.dense.bias",
    ),
    "extra in a shard": (lambda t: [t, {"adapter.weight": torch.zeros(1)}], "adapter.weight"),
    "shape": (lambda t: [t | {"bert.pooler.dense.bias": torch.zeros(17)}], r"bert.pooler.dense.bias.*\(17,\).*\(16,\)"),
    "transposed": (
        lambda t: [t | {"bert.encoder.layer.0.intermediate.dense.weight": torch.zeros(16, 24)}],
        r"bert.encoder.layer.0.intermediate.dense.weight.*\(16, 24\).*\(24, 16\)",
    ),
    "number of classes": (
        lambda t: [t | {"classifier.weight": torch.zeros(5, 16)}],
        r"classifier.weight.*\(5, 16\).*\(3, 16\)",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_tensor_missing_extra_or_of_another_shape_is_named(reason, tensors, tmp_path):
    make_shards, named = REFUSED[reason]
    with pytest.raises(UserError, match=named) as error:
        build(write(tmp_path, *make_shards(tensors)))
    assert str(error.value).startswith(str(tmp_path)) and " 0 " not in str(error.value)


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


DAMAGES = {  # damage to a directory of one file, and the words that the message must name
    "torn weights": (lambda d: truncate(d / "model.safetensors", 5000), "model.safetensors"),
    "torn header": (lambda d: truncate(d / "model.safetensors", 100), "model.safetensors"),
    "empty weights": (lambda d: truncate(d / "model.safetensors", 0), "model.safetensors"),
    "another format": (lambda d: (d / "model.safetensors").write_bytes(b"PK\3\4" + bytes(2000)), "model.safetensors"),
    "Git LFS pointer": (
        lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com"),
        "model.safetensors",
    ),
    "only a pickle": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "pytorch_model.bin.*save_pretrained",
    ),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json"),
    "torn config": (lambda d: truncate(d / "config.json", 30), "config.json"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "config.json"),
    "another architecture": (lambda d: write_config(d, model_type="roberta"), "roberta"),
    "no architecture": (lambda d: write_config(d, model_type=None), "has no model_type"),
    "another activation": (lambda d: write_config(d, hidden_act="relu"), "relu"),
    "heads that do not divide": (lambda d: write_config(d, num_attention_heads=3), "16.*3"),
}
SHARD_DAMAGES = {
    "missing shard": (
        lambda d: (d / "model-00002-of-00002.safetensors").unlink(),
        "model-00002-of-00002.safetensors: not a readable",
    ),
    "torn shard": (
        lambda d: truncate(d / "model-00002-of-00002.safetensors", 2000),
        "model-00002-of-00002.safetensors",
    ),
    "torn index": (lambda d: truncate(d / weights.INDEX, 50), weights.INDEX),
    "index is a list": (lambda d: (d / weights.INDEX).write_text("[]"), weights.INDEX),
}


@pytest.mark.parametrize(
    ("layout", "damage"), [*(("as it is", name) for name in DAMAGES), *(("two shards", name) for name in SHARD_DAMAGES)]
)
def test_a_damaged_directory_is_a_user_error(layout, damage, tensors, tmp_path):
    harm, named = (DAMAGES | SHARD_DAMAGES)[damage]
    harm(write(tmp_path, *LAYOUTS[layout][0](tensors)))
    with pytest.raises(UserError, match=named):
        build(tmp_path)


def test_loaded_parameters_are_copies_of_the_file(tensors, tmp_path):
    model, _, _ = build(write(tmp_path, tensors))
    file = tmp_path / "model.safetensors"
    with safe_open(file, framework="pt") as mapped:
        view = mapped.get_tensor("bert.embeddings.word_embeddings.weight")
        with file.open("r+b") as stream:  # overwritten in place, after its header
            header = int.from_bytes(stream.read(8), "little")
            stream.seek(8 + header)
            stream.write(bytes(file.stat().st_size - 8 - header))
        assert (view == 0).all()  # a view of the mapped file changes with it
    for name, parameter in model.items():
        assert torch.equal(parameter, tensors[name]), name


def test_loading_takes_the_memory_of_one_copy(tmp_path):
    values = VALUES | {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 2048}
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(**{key: value for key, value in values.items() if key != "model_type"})
    )
    save_file(dict(model.named_parameters()), tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 100e6
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the memory now resident
    before = dist.resident_peak_bytes()
    loaded, _, _ = weights.build_model(weights.BERT, values, tmp_path, 0, torch.device("cpu"), torch.bfloat16)
    assert loaded.classifier.weight.dtype == torch.bfloat16
    assert dist.resident_peak_bytes() - before < 0.75 * size  # half of it, in bf16, and one tensor of the file


def test_fresh_weights_have_transformers_statistics_and_depend_on_the_seed():
    values = VALUES | {"vocab_size": 2000, "hidden_size": 64, "intermediate_size": 256, "initializer_range": 0.05}
    model, fresh, report = build(None, values=values)
    assert fresh == model.keys()
    assert "random" in report
    for name, parameter in model.items():
        n = parameter.numel()
        if parameter.ndim == 1:
            assert (parameter == (1.0 if name.endswith("LayerNorm.weight") else 0.0)).all(), name
        else:  # five standard errors of a normal sample's mean and deviation; the seed is fixed, so there is no chance in it
            assert abs(parameter.mean()) < 5 * 0.05 / n**0.5, name
            assert abs(parameter.std() / 0.05 - 1) < 5 / (2 * n) ** 0.5, name
    matrices = [name for name in model if model[name].ndim == 2]
    starts = {tuple(model[name].flatten()[:8].tolist()) for name in matrices}
    assert len(starts) == len(matrices)  # no two drawn from one generator's start
    again, other = build(None, values=values)[0], build(None, seed=1, values=values)[0]
    for name in matrices:
        assert torch.equal(model[name], again[name])
        assert not torch.equal(model[name], other[name])


def test_a_fresh_head_does_not_depend_on_what_else_is_fresh(tensors, tmp_path):
    torch.manual_seed(1)  # nor on torch's own generator
    everything, _, _ = build(None, seed=7)
    head_only, fresh, _ = build(write(tmp_path, only(tensors, "bert.")), seed=7)
    assert fresh == HEAD
    head_and_pooler, fresh, _ = build(write(tmp_path, only(tensors, "bert.embeddings", "bert.encoder")), seed=7)
    assert fresh == HEAD | POOLER
    for name in HEAD:
        assert torch.equal(head_only[name], everything[name])
        assert torch.equal(head_and_pooler[name], everything[name])
    for name in POOLER:
        assert torch.equal(head_and_pooler[name], everything[name])


def test_a_tokenizer_or_a_length_beyond_the_embeddings_is_a_user_error():
    tokenizer = train_bert_tokenizer(["some words"], vocab_size=100)
    fits = BertConfig(**SIZES | {"vocab_size": len(tokenizer)})
    weights.check_fits(fits, tokenizer, max_length=32)
    with pytest.raises(UserError, match=r"--max-length: 33 .* 32 positions"):
        weights.check_fits(fits, tokenizer, max_length=33)
    fits.vocab_size -= 1
    with pytest.raises(UserError, match=rf"tokenizer has {len(tokenizer)} tokens.* {len(tokenizer) - 1} rows"):
        weights.check_fits(fits, tokenizer, max_length=32)


@pytest.mark.parametrize("max_shard_size", ["1GB", "4KB"])
@pytest.mark.parametrize(
    "their_class", ["BertForSequenceClassification", "BertModel", "BertForPreTraining", "BertForMaskedLM"]
)
def test_what_transformers_saves_opens_here(their_class, max_shard_size, tmp_path):
    torch.manual_seed(0)
    labels = {i: f"class {i}" for i in range(3)}
    theirs = getattr(transformers, their_class)(
        transformers.BertConfig(**SIZES, id2label=labels, label2id={v: k for k, v in labels.items()})
    )
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "1GB")
    model, fresh, _ = build(tmp_path)
    expected = {
        name if their_class != "BertModel" else f"bert.{name}": parameter
        for name, parameter in theirs.named_parameters()
    }
    assert fresh == model.keys() - expected.keys()
    assert fresh <= HEAD | POOLER
    for name in model.keys() - fresh:
        assert torch.equal(model[name], expected[name]), name


def test_a_run_directory_opens_in_transformers_with_the_same_results(bert_run):
    data = split_data(load_data("synthetic"), max_train_rows=256, max_eval_rows=100)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(bert_run).eval()
    assert tuple(theirs.config.id2label[i] for i in range(4)) == data.label_names
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(bert_run)
    ours, fresh, _ = weights.build_model(weights.BERT, weights.read_config(bert_run), bert_run, 0, torch.device("cpu"))
    assert not fresh
    rows, _ = bert_rows(load_tokenizer(bert_run), data.test.texts, max_length=512)
    encoded = their_tokenizer(data.test.texts, padding=True, return_tensors="pt")
    assert [
        ids[mask.bool()].tolist() for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    ] == rows
    with torch.inference_mode():
        expected, logits = theirs(**encoded).logits, ours.eval()(pack(rows))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert logits.std(0).min() > 20 * (logits - expected).abs().max()  # so that it is not the same whatever the text
    table = pq.read_table(bert_run / "predictions.parquet").to_pydict()
    assert table["prediction"] == expected.argmax(1).tolist()
    probabilities = torch.tensor([table[f"probability_{c}"] for c in range(4)]).T
    torch.testing.assert_close(probabilities, expected.softmax(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("run", ["bert", "linear"])
def test_a_pipeline_on_a_run_directory_gives_its_labels_and_probabilities(run, bert_run, tmp_path):
    """From text to label in transformers, control tokens and all; long texts are cut as in training, where one asks for a cut."""
    folder = bert_run
    if run == "linear":
        folder = train(
            tmp_path / "run",
            "--head",
            "linear",
            "--max-steps",
            "8",
            "--max-length",
            "40",
            "--dtype",
            "fp32",
            script=train_qwen,
        )
    texts = [*split_data(load_data("synthetic"), max_eval_rows=40).test.texts, *TEXTS]
    classifier = Classifier(folder, torch.device("cpu"))
    probabilities = classifier.scores(texts).softmax(1)
    theirs = transformers.pipeline("text-classification", str(folder), device="cpu")(texts, truncation=True, top_k=None)
    scores = [{row["label"]: row["score"] for row in rows} for rows in theirs]
    expected = torch.tensor([[row[name] for name in classifier.label_names] for row in scores], dtype=torch.float64)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-6)
    assert len({tuple(row) for row in probabilities.tolist()}) == len(texts)


# Heads, and what config.json says of them.


def classifier_dir(folder: Path, **config) -> Path:
    """A BERT with a trained head as transformers saves it, and a tokenizer."""
    torch.manual_seed(0)
    tokenizer = train_bert_tokenizer(TEXTS, vocab_size=100)
    sizes = SIZES | {"vocab_size": len(tokenizer), "initializer_range": 0.5}
    del sizes["num_labels"]
    transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, **config)).save_pretrained(folder)
    tokenizer.save(folder, text_length=32)
    return folder


def edit_config(folder: Path, **values) -> Path:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))
    return folder


NOT_SOFTMAX = {
    "one label": ({"num_labels": 1}, {}, "LABEL_0.* two or more"),
    "one label in an older file": ({"num_labels": 1}, {"id2label": None, "num_labels": 1}, "two or more"),
    "regression": ({"num_labels": 3}, {"problem_type": "regression"}, "problem_type regression"),
    "several labels at once": (
        {"num_labels": 3},
        {"problem_type": "multi_label_classification"},
        "problem_type multi_label_classification",
    ),
    "numbered from 1": ({"num_labels": 2}, {"id2label": {"1": "no", "2": "yes"}}, "yes.*numbered from 0"),
    "a list": ({"num_labels": 2}, {"id2label": ["no", "yes"]}, "yes.*numbered from 0"),
    "one name twice": ({"num_labels": 2}, {"id2label": {"0": "yes", "1": "yes"}}, "yes.*different names"),
}


@pytest.mark.parametrize("case", NOT_SOFTMAX)
def test_a_head_that_is_no_softmax_over_classes_is_refused(case, tmp_path):
    config, changes, named = NOT_SOFTMAX[case]
    with pytest.raises(UserError, match=rf"config.json: .*{named}"):
        Classifier(edit_config(classifier_dir(tmp_path, **config), **changes), torch.device("cpu"))


@pytest.mark.parametrize(
    "config", [{}, {"num_labels": 3}, {"num_labels": 3, "problem_type": "single_label_classification"}]
)
def test_classes_without_names_have_transformers_names(config, tmp_path):
    folder = classifier_dir(tmp_path, **config)
    assert ("id2label" in json.loads((folder / "config.json").read_text())) == bool(
        config
    )  # two are the default, and left out
    theirs = transformers.pipeline("text-classification", str(folder), device="cpu")("profit of shares", top_k=None)
    ours = Classifier(folder, torch.device("cpu"))
    (probabilities,) = ours.scores(["profit of shares"]).softmax(1).tolist()
    assert {row["label"]: row["score"] for row in theirs} == pytest.approx(
        dict(zip(ours.label_names, probabilities, strict=True)), abs=1e-5
    )


def test_a_decoder_that_knows_no_classes_is_no_classifier(qwen_run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(qwen_run, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["id2label"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no trained classifier"):
        Classifier(folder, torch.device("cpu"))


STALE = {  # fields of a pretrained config.json that do not hold for the model trained from it
    "num_labels": 2,
    "_num_labels": 7,
    "id2label": {"0": "negative", "1": "positive"},
    "label2id": {"negative": 0, "positive": 1},
    "problem_type": "multi_label_classification",
    "architectures": ["BertForMaskedLM"],
    "torch_dtype": "float16",
    "dtype": "bfloat16",
    "auto_map": {"AutoModel": "elsewhere.Model"},
    "quantization_config": {"quant_method": "fp8"},
    "return_dict": False,
    "torchscript": True,
    "_name_or_path": "elsewhere",
}


def test_a_run_of_a_model_with_a_stale_config_opens_in_transformers(tmp_path):
    encoder = classifier_dir(tmp_path / "model", num_labels=2)
    tensors = {
        name: x for name, x in load_file(encoder / "model.safetensors").items() if not name.startswith("classifier")
    }
    save_file(tensors, encoder / "model.safetensors")
    edit_config(encoder, **STALE)
    flags = ["--model", str(encoder), "--max-length", "32", "--max-steps", "1", "--dtype", "fp32"]
    run_dir = train(tmp_path / "run", *flags)
    theirs, loading = transformers.AutoModelForSequenceClassification.from_pretrained(run_dir, output_loading_info=True)
    assert not any(loading.values()), loading
    assert theirs.dtype == torch.float32 and theirs.config.problem_type == "single_label_classification"
    assert theirs.config.label2id == {"World": 0, "Sports": 1, "Business": 2, "Sci/Tech": 3}
    ours = Classifier(run_dir, torch.device("cpu"))
    expected = transformers.pipeline("text-classification", str(run_dir), device="cpu")(
        TEXTS[-1], truncation=True, top_k=None
    )
    (probabilities,) = ours.scores(TEXTS[-1:]).softmax(1).tolist()
    assert {row["label"]: row["score"] for row in expected} == pytest.approx(
        dict(zip(ours.label_names, probabilities, strict=True))
    )


def test_a_bert_whose_tokens_see_only_what_is_before_them_is_refused(tmp_path):
    with pytest.raises(UserError, match="is_decoder"):
        Classifier(edit_config(classifier_dir(tmp_path), is_decoder=True), torch.device("cpu"))


@pytest.mark.parametrize("max_shard_size", ["1GB", "8KB"])
@pytest.mark.parametrize("model_type", ["Qwen3", "Qwen2", "Llama"])
def test_a_tied_model_with_another_head_in_its_file_is_refused(model_type, max_shard_size, tmp_path):
    """A copy of the embedding is fine; so is any head where the model has none, to be trained with a linear one."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    config = getattr(transformers, f"{model_type}Config")(
        **sizes, intermediate_size=24, head_dim=8, tie_word_embeddings=False
    )
    theirs = getattr(transformers, f"{model_type}ForCausalLM")(config)
    linear = weights.DECODER_LINEAR

    def load(architecture=weights.DECODER):
        theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
        values = weights.read_config(edit_config(tmp_path, tie_word_embeddings=True), architecture)
        return weights.build_model(architecture, values, tmp_path, 0, torch.device("cpu"))

    with pytest.raises(UserError, match=r"lm_head.weight differs from .*tie_word_embeddings"):
        load()
    assert load(linear)[1] == {"score.weight"}
    with torch.no_grad():
        theirs.lm_head.weight.copy_(theirs.model.embed_tokens.weight)
    model, fresh, report = load()
    assert not fresh and "ignored 1 (lm_head.weight)" in report
    assert torch.equal(model.model.embed_tokens.weight, theirs.lm_head.weight)


def two_layers(model):
    model.classifier = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), model.classifier)


def no_pooler(model):
    model.bert.pooler = nn.Identity()


class Scaled(nn.Linear):
    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / self.temperature


def one_more(model):
    model.classifier = Scaled(64, 4)


@pytest.mark.parametrize("change", [two_layers, no_pooler, one_more])
def test_a_changed_model_does_not_pass_for_transformers_class(change, tmp_path, monkeypatch, capsys):
    """As after a change of bert.py. It trains, resumes and predicts here, but opens nowhere else."""
    original = BertForSequenceClassification.__init__

    def init(self, config):
        original(self, config)
        change(self)

    monkeypatch.setattr(BertForSequenceClassification, "__init__", init)
    run_dir = train(tmp_path / "run", "--max-steps", "2", "--dtype", "fp32")
    assert "only minicls opens what is saved" in capsys.readouterr().out
    assert json.loads((run_dir / "config.json").read_text())["architectures"] == [
        "MiniclsBertForSequenceClassification"
    ]
    with pytest.raises(ValueError, match="minicls-bert"):
        transformers.AutoModelForSequenceClassification.from_pretrained(run_dir)
    saved = pq.read_table(run_dir / "predictions.parquet").to_pydict()
    texts = split_data(load_data("synthetic"), max_eval_rows=100).test.texts
    for folder in (run_dir, max((run_dir / "checkpoints").iterdir())):
        scores = Classifier(folder, torch.device("cpu")).scores(texts)
        assert scores.argmax(1).tolist() == saved["prediction"]
    again = train(tmp_path / "again", "--model", str(run_dir), "--max-steps", "1", "--dtype", "fp32")
    assert json.loads((again / "config.json").read_text())["model_type"] == "minicls-bert"


@pytest.mark.parametrize(("name", "config"), [("BertForSequenceClassification", {}), *((f"{f}For{k}", {"head_dim": 8, "num_key_value_heads": 1, "tie_word_embeddings": t}) for f in ("Qwen3", "Qwen2", "Llama") for k in ("CausalLM", "SequenceClassification") for t in (True, False))])  # fmt: skip
def test_an_unchanged_model_has_transformers_parameters(name, config):
    theirs = getattr(transformers, name)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    their_config = theirs.config_class(**sizes, **config, pad_token_id=0)
    architecture = weights.ARCHITECTURES[name]
    model, *_ = weights.build_model(architecture, their_config.to_dict(), None, 0, torch.device("cpu"))
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in theirs(their_config).named_parameters()}
    assert weights.class_name(model) == name and not weights.is_own(model)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_weights_have_the_mode_of_other_files(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        weights.write_tensors({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
        (tmp_path / "b.safetensors").touch(mode=0o400)  # the mode of an earlier run's file is ignored
        weights.write_tensors({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    finally:
        os.umask(before)
    assert [file.stat().st_mode & 0o777 for file in sorted(tmp_path.iterdir())] == [mode, mode]


def test_all_files_of_a_run_have_one_mode(bert_run, qwen_run):
    for run_dir in (bert_run, qwen_run):
        files = [file for file in run_dir.rglob("*") if file.is_file()]
        assert {"model.safetensors", "optimizer.safetensors", "predictions.parquet"} <= {file.name for file in files}
        assert {file.stat().st_mode & 0o777 for file in files} == {(run_dir / "run.json").stat().st_mode & 0o777}


@pytest.mark.parametrize(("name", "dataset"), [("bert-base-cased", "ag_news"), ("bert-base-chinese", "thucnews_small")])
def test_real_tokenizers_give_the_ids_of_transformers(name, dataset, shared):
    texts = pq.read_table(shared / "data" / dataset / "test.parquet")["text"].to_pylist()[:200]
    ours, theirs = (
        read(shared / "tokenizers" / name) for read in (load_tokenizer, transformers.AutoTokenizer.from_pretrained)
    )
    whole = theirs(texts)["input_ids"]
    assert bert_rows(ours, texts, max_length=512) == (whole, 0)
    for max_length in (32, 16):  # no title is longer than 32
        cut = sum(len(ids) > max_length for ids in whole)
        assert bert_rows(ours, texts, max_length) == (
            theirs(texts, truncation=True, max_length=max_length)["input_ids"],
            cut,
        )
    assert cut > 0

"""Model directories in Hugging Face's layout: find, read, load with a report, save.

Only safetensors files are read: nothing is ever unpickled. Tensors are copied one by one from the mapped file into
parameters that are already allocated. So loading needs no second copy of the model, and parameters have torch's own
alignment: on a view of a mapped file kernels round differently, and a resumed run would drift.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from minicls.bert import BertConfig, BertForSequenceClassification
from minicls.config import UserError, read_json, write_json, written_aside
from minicls.data import derived_seed, download, local_path
from minicls.decoder import FAMILIES, DecoderConfig, DecoderForCausalLM, DecoderForSequenceClassification
from minicls.prompt import make_template
from minicls.tiny import SIZES, new_model
from minicls.tokenizer import Tokenizer, load_tokenizer

INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model class, and the allowed differences between its names and a file's; any other difference is an error."""

    model: type[nn.Module]
    config: type
    model_types: tuple[str, ...]  # the values of config.json's model_type
    prefix: str  # name of the encoder, which files without a head leave out (sentence-transformers' layout)
    fresh: tuple[str, ...]  # prefixes of names that a file may lack: they start from random values
    ignored: tuple[str, ...]  # prefixes of names in a file that the model does not use


BERT = Architecture(
    model=BertForSequenceClassification,
    config=BertConfig,
    model_types=("bert",),
    prefix="bert.",
    fresh=("classifier.", "bert.pooler."),
    ignored=("cls.", "bert.embeddings.position_ids"),
)
DECODER = Architecture(
    model=DecoderForCausalLM,
    config=DecoderConfig,
    model_types=tuple(FAMILIES),
    prefix="model.",
    fresh=(),
    ignored=("lm_head.",),  # a copy of the embedding; if the head is separate, it is a parameter
)
DECODER_LINEAR = dataclasses.replace(DECODER, model=DecoderForSequenceClassification, fresh=("score.",))

# Keys: the names of the classes in transformers.
ARCHITECTURES = {"BertForSequenceClassification": BERT}
ARCHITECTURES |= {f"{family.prefix}ForCausalLM": DECODER for family in FAMILIES.values()}
ARCHITECTURES |= {f"{family.prefix}ForSequenceClassification": DECODER_LINEAR for family in FAMILIES.values()}
SUPPORTED = "train_bert.py takes bert; train_qwen.py takes llama, qwen2 and qwen3, "
SUPPORTED += "without sliding windows, RoPE scaling and other biases"


def class_name(model: nn.Module) -> str:
    """The name of the model's class in transformers."""
    name = type(model).__name__
    return name.replace("Decoder", model.config.family.prefix) if name.startswith("Decoder") else name


# Prefixes of class and model_type in config.json if a model differs from transformers', which then refuses to open it.
OWN = ("Minicls", "minicls-")


def is_own(model: nn.Module) -> bool:
    """Whether the parameters differ from those of transformers' class, for example after a change to the head.

    transformers would start those that it does not find from random values, and ignore those that it does not know.
    """
    config = model.config
    if isinstance(config, BertConfig):
        layer = "attention.self.query attention.self.key attention.self.value attention.output.dense "
        layer += "attention.output.LayerNorm intermediate.dense output.dense output.LayerNorm"
        biased = ["bert.embeddings.LayerNorm", "bert.pooler.dense", "classifier"]
        biased += [f"bert.encoder.layer.N.{module}" for module in layer.split()]
        others = [f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")]
    else:
        qkv = [f"model.layers.N.self_attn.{name}_proj" for name in "qkv"]
        layer = "self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj input_layernorm post_attention_layernorm"
        layer += " self_attn.q_norm self_attn.k_norm" if config.family.qk_norm else ""
        head = "score" if isinstance(model, DecoderForSequenceClassification) else "lm_head"
        biased = qkv if config.family.qkv_bias else []
        others = ["model.embed_tokens", "model.norm", *qkv, *(f"model.layers.N.{module}" for module in layer.split())]
        others += [] if head == "lm_head" and config.tie_word_embeddings else [head]
    theirs = {f"{module}.weight" for module in biased + others} | {f"{module}.bias" for module in biased}
    return theirs != {re.sub(r"\.\d+\.", ".N.", name) for name, _ in model.named_parameters()}


def find_model(model: str, revision: str | None = None, flag: str = "--model") -> tuple[Path, str | None]:
    """The directory of a model, downloaded from the hub (at `revision`) if it is not local, and its hub commit."""
    path = local_path(model)
    if path.is_dir():
        return path, None
    return download(flag, model, "model", ["*.json", "*.jinja", "*.safetensors"], revision)


def read_config(directory: Path, architecture: Architecture | None = None) -> dict:
    """The directory's config.json. Raises UserError if it is that of another architecture."""
    config = read_json(directory / "config.json", "pass a directory in Hugging Face layout")
    if str(config.get("model_type")).startswith(OWN[1]):
        config["model_type"] = config["model_type"].removeprefix(OWN[1])
        config["architectures"] = [name.removeprefix(OWN[0]) for name in config.get("architectures") or []]
    if architecture and (name := config.get("model_type")) not in architecture.model_types:
        fault = f"this is a {name} model" if name else "its config.json has no model_type"
        raise UserError(f"{directory}: {fault}; pass another: {SUPPORTED}")
    return config


def label_config(label_names: Sequence[str]) -> dict:
    """The part of a config.json that describes the classes."""
    return {
        "id2label": {str(i): name for i, name in enumerate(label_names)},
        "label2id": {name: i for i, name in enumerate(label_names)},
        "problem_type": "single_label_classification",
    }


def head_labels(config: dict, directory: Path) -> list[str]:
    """The class names in a trained classifier's config.json, in the order of their indices.

    Without names there are two classes, LABEL_0 and LABEL_1, as in transformers. Raises UserError if the head does not
    score classes of which one is right.
    """
    labels = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(config.get("num_labels") or 2)}
    numbered = isinstance(labels, dict) and labels.keys() == {str(i) for i in range(len(labels))}
    names = [str(labels[str(i)]) for i in range(len(labels))] if numbered else []
    kind = config.get("problem_type")
    if kind in ("regression", "multi_label_classification") or len(names) < 2 or len({*names}) < len(names):
        fault = f"problem_type {kind} and id2label {str(labels)[:80]} do not describe a choice between classes"
        remedy = "it takes two or more, numbered from 0, with different names, of which one is right"
        raise UserError(f"{directory / 'config.json'}: {fault}; {remedy}")
    return names


def build_model(
    architecture: Architecture,
    values: dict,
    directory: Path | None,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    flag: str = "--model",
) -> tuple[nn.Module, set[str], str]:
    """Builds a model from the values of a config.json; fills it from a directory or, without one, with random values.

    Returns the model on the device, the names of the parameters that started from random values, and the load report.
    Each tensor is converted to the dtype as it is loaded. A message names the directory, else the flag.
    """
    source = directory or flag
    if architecture is BERT and values.get("is_decoder"):
        raise UserError(f"{source}: its config.json sets is_decoder, so tokens do not see later ones; {SUPPORTED}")
    known = {field.name for field in dataclasses.fields(architecture.config)}
    fields = {name: value for name, value in values.items() if name in known}
    fields |= {"num_labels": len(values["id2label"])} if values.get("id2label") else {}
    try:
        config = architecture.config(**fields)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{source}: its config.json does not fit ({error}); pass another: {SUPPORTED}") from None
    if (config.pad_token_id or 0) >= config.vocab_size:
        problem = f"its tokenizer pads with id {config.pad_token_id}, its embedding has only {config.vocab_size} rows"
        raise UserError(f"{source}: {problem}; pass files that fit")
    with torch.device("meta"):  # shapes only: memory is allocated once, without the default initialisation
        model = architecture.model(config).to(dtype)
    model.to_empty(device=device)
    if directory is None:
        fresh, report = {name for name, _ in model.named_parameters()}, "weights: random"
    else:
        fresh, report = load_weights(model, directory, architecture)
    init_weights(model, fresh, config.initializer_range, seed)
    if is_own(model):
        report += f"; parameters differ from transformers' {class_name(model)}, so only minicls opens what is saved"
    return model, fresh, f"{sum(p.numel() for p in model.parameters()):,} parameters; {report}"


def weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the shards that the index names."""
    single, index = directory / "model.safetensors", directory / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        remedy = "pass a directory that holds it; pytorch_model.bin and its like, which can run code, are not read"
        raise UserError(f"{directory}: no model.safetensors; {remedy} (transformers' save_pretrained converts them)")
    weight_map = read_json(index, "download it again", weight_map=dict)["weight_map"]
    return [directory / name for name in sorted({*weight_map.values()})]


@torch.no_grad()
def init_weights(model: nn.Module, names: set[str], std: float, seed: int) -> None:
    """Initialises the named parameters as transformers does: normal(0, std) matrices, zero biases, unit norm weights.

    Each parameter has its own generator, seeded by its position, so a fresh head does not depend on the others.
    """
    for position, (name, parameter) in enumerate(model.named_parameters()):
        if name in names and parameter.ndim >= 2:
            generator = torch.Generator().manual_seed(derived_seed(seed, position))  # on the CPU, for every device
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        elif name in names:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors file, which is opened just for it.

    Pages read through an open mapping stay in this process's memory, and would add up to a second copy of the weights.
    """
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


@torch.no_grad()
def load_weights(model: nn.Module, directory: Path, architecture: Architecture) -> tuple[set[str], str]:
    """Copies a directory's tensors into the model. Returns the names of the parameters without a tensor, and a report.

    Raises UserError for a tensor that is missing, has another shape, or is unknown, unless `architecture` allows it.
    """
    parameters, prefix = dict(model.named_parameters()), architecture.prefix
    stored, loaded, ignored, unknown = {}, set(), [], []  # stored: tensors and their files

    def listed(names: Iterable[str]) -> str:
        names = sorted(names)
        return f"{len(names)}" + (f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else "")

    try:
        for file in weight_files(directory):
            with safe_open(file, framework="pt") as tensors:
                stored |= dict.fromkeys(tensors.keys(), file)
        headless = not any(name.startswith(prefix) for name in stored)
        for stored_name, file in stored.items():
            name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", stored_name)  # names as old as BERT
            name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
            candidates = [prefix + name, name] if headless else [name]
            name = next((candidate for candidate in candidates if candidate in parameters), None)
            if name:
                tensor, shape = read_tensor(file, stored_name), parameters[name].shape
                if tensor.shape != shape:
                    problem = f"{stored_name} has shape {(*tensor.shape,)}, the model wants {(*shape,)}"
                    raise UserError(f"{file}: {problem}; does config.json have another size or number of classes?")
                parameters[name].copy_(tensor)
                loaded.add(name)
            else:
                known = any(candidate.startswith(architecture.ignored) for candidate in candidates)
                (ignored if known else unknown).append(stored_name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error}); download or save it again") from None
    fresh = parameters.keys() - loaded
    if missing := [name for name in fresh if not name.startswith(architecture.fresh)]:
        raise UserError(f"{directory}: missing tensors: {listed(missing)}; pass complete weights")
    if unknown:
        raise UserError(f"{directory}: unknown tensors: {listed(unknown)}; is it another architecture?")
    if architecture is DECODER and "lm_head.weight" in ignored:  # it would be lost, unless it is a copy
        embedding, file = parameters["model.embed_tokens.weight"], stored["lm_head.weight"]
        if not torch.equal(read_tensor(file, "lm_head.weight").to(embedding), embedding):
            problem = "lm_head.weight differs from model.embed_tokens.weight, but config.json sets tie_word_embeddings"
            raise UserError(f"{file}: {problem}; set that to false, or delete the tensor")
    return fresh, f"weights: {len(loaded)} tensors loaded, fresh {listed(fresh)}, ignored {listed(ignored)}"


def check_fits(config, tokenizer: Tokenizer, max_length: int) -> None:
    """Raises UserError if ids or positions exceed the embeddings."""
    if len(tokenizer) > config.vocab_size:
        problem = f"its tokenizer has {len(tokenizer)} tokens, its embedding has only {config.vocab_size} rows"
        raise UserError(f"{tokenizer.source}: {problem}; pass files that fit")
    if max_length > config.max_position_embeddings:
        limit = f"the model's {config.max_position_embeddings} positions"
        raise UserError(f"--max-length: {max_length} is more than {limit}; pass less")


def save_model(
    model: nn.Module, config: dict, tokenizer: Tokenizer, directory: Path, text_length: int | None = None
) -> None:
    """Writes config.json, model.safetensors and the tokenizer; `text_length` is that of `Tokenizer.save`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(dict(model.named_parameters()), directory / "model.safetensors")
    tokenizer.save(directory, text_length, model.config.pad_token_id)
    # Fields that the model's own values replace, and fields that do not hold for plain weights.
    stale = "torch_dtype _name_or_path num_labels _num_labels auto_map quantization_config pruned_heads return_dict "
    stale += "torchscript"
    config = {name: value for name, value in config.items() if name not in stale.split()}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config |= {"architectures": [class_name(model)], "dtype": dtype, "vocab_size": model.config.vocab_size}
    config |= {"pad_token_id": model.config.pad_token_id}
    if is_own(model):
        config |= {"architectures": [OWN[0] + class_name(model)], "model_type": OWN[1] + config["model_type"]}
    write_json(directory / "config.json", config)


def write_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Writes a safetensors file. Raises OSError, also for the library's own error about a full disk."""
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_aside(file) as aside:
        aside.touch()
        mode = aside.stat().st_mode  # set by the umask; the library would let only the owner read the file
        try:
            save_file(contents, aside, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{file}: {error}") from None
        aside.chmod(mode)


def save_random_model(
    model: str,
    architecture: Architecture,
    texts: Sequence[str],
    label_names: Sequence[str],
    seed: int,
    folder: Path,
    flag: str = "--model",
) -> Path:
    """Writes a model directory with random weights into `folder`; returns its path.

    `model`, which the user gave with `flag`, is the source of config and tokenizer: a directory, a hub id, or one of
    SIZES, for which the tokenizer is learned from the texts.
    """
    if model in SIZES and not Path(model).is_dir():
        if SIZES[model]["model_type"] not in architecture.model_types:
            raise UserError(f"{flag}: {model} is a {SIZES[model]['model_type']} model; give it to another flag")
        before, after = ("", "") if architecture is BERT else make_template(label_names, no_think=True)
        config, tokenizer = new_model(model, [before + text + after for text in texts[:20_000]], 20_000)
    else:
        directory, _ = find_model(model, flag=flag)
        config, tokenizer = read_config(directory, architecture), load_tokenizer(directory)
    config |= label_config(label_names)
    if architecture is not BERT:
        end, pad = tokenizer.eos_and_pad(config)
        config |= {"pad_token_id": pad, "eos_token_id": end}
    dtype = torch.float32 if architecture is BERT else torch.bfloat16
    built, _, _ = build_model(architecture, config, None, seed, torch.device("cpu"), dtype, flag)
    save_model(built, config, tokenizer, folder / Path(model).name)
    return folder / Path(model).name

"""Model directories in Hugging Face's layout: find, read, load with a report, save.

Only safetensors are read: nothing is ever unpickled. Tensors are copied one by one from the mapped file into parameters
that are already allocated, so that loading needs no second copy of the model, and so that parameters have torch's own
alignment: kernels round differently on a view of a mapped file, and a resumed run would drift.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from minicls.bert import BertConfig, BertForSequenceClassification
from minicls.config import UserError
from minicls.data import derived_seed, download
from minicls.decoder import FAMILIES, DecoderConfig, DecoderForCausalLM, DecoderForSequenceClassification
from minicls.tokenizer import Tokenizer

INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model class, and how the names in a file may differ from its own; any other difference is an error."""

    model: type[nn.Module]
    config: type
    model_types: tuple[str, ...]  # the values of config.json's model_type
    prefix: str  # of the encoder, which files without a head leave out (sentence-transformers' layout)
    fresh: tuple[str, ...]  # begin the names that a file may lack: they start from random values
    ignored: tuple[str, ...]  # begin the names in a file that the model has no use for
    renamed: tuple[tuple[str, str], ...] = ()  # (pattern, replacement), for files older than today's names


BERT = Architecture(
    model=BertForSequenceClassification,
    config=BertConfig,
    model_types=("bert",),
    prefix="bert.",
    fresh=("classifier.", "bert.pooler."),
    ignored=("cls.", "bert.embeddings.position_ids"),
    renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
)

DECODER = Architecture(
    model=DecoderForCausalLM,
    config=DecoderConfig,
    model_types=tuple(FAMILIES),
    prefix="model.",
    fresh=(),
    ignored=("lm_head.",),  # where it is the embedding once more; a model with a head of its own has the parameter
)
DECODER_LINEAR = dataclasses.replace(DECODER, model=DecoderForSequenceClassification, fresh=("score.",))

# By the name that transformers gives a model's class.
ARCHITECTURES = {"BertForSequenceClassification": BERT}
ARCHITECTURES |= {f"{family.prefix}ForCausalLM": DECODER for family in FAMILIES.values()}
ARCHITECTURES |= {f"{family.prefix}ForSequenceClassification": DECODER_LINEAR for family in FAMILIES.values()}
SUPPORTED = "train_bert.py takes bert; train_qwen.py takes llama, qwen2 and qwen3, without sliding windows, stretched RoPE and other biases"


def class_name(model: nn.Module) -> str:
    """The name that transformers gives the model's class."""
    name = type(model).__name__
    return name.replace("Decoder", model.config.family.prefix) if name.startswith("Decoder") else name


# Begins class and model_type in config.json where a model is another one than transformers', so that nobody opens it there.
OWN = ("Minicls", "minicls-")


def is_own(model: nn.Module) -> bool:
    """Whether the parameters are others than those of transformers' class, as after a change to the head.

    transformers would give what it does not find random values, and ignore what it does not know.
    """
    linear = type(model).__name__.endswith("ForSequenceClassification")
    if isinstance(model.config, BertConfig):
        parts = "attention.self.query attention.self.key attention.self.value attention.output.dense attention.output.LayerNorm "
        parts += "intermediate.dense output.dense output.LayerNorm"
        modules = ["bert.embeddings.LayerNorm", "bert.pooler.dense", "classifier"]
        modules += [f"bert.encoder.layer.N.{part}" for part in parts.split()]
        names = {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
        names |= {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    else:
        family, projections = model.config.family, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
        parts = [
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
            "input_layernorm",
            "post_attention_layernorm",
        ]
        parts += projections + (["self_attn.q_norm", "self_attn.k_norm"] if family.qk_norm else [])
        names = {"model.embed_tokens.weight", "model.norm.weight", *(f"model.layers.N.{part}.weight" for part in parts)}
        names |= {f"model.layers.N.{part}.bias" for part in projections if family.qkv_bias}
        names |= {"score.weight"} if linear else set() if model.config.tie_word_embeddings else {"lm_head.weight"}
    return names != {re.sub(r"\.\d+\.", ".N.", name) for name, _ in model.named_parameters()}


def find_model(model: str, revision: str | None = None, flag: str = "--model") -> tuple[Path, str | None]:
    """The directory of a model, downloaded from the hub if need be (at this commit), and the hub's commit."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path, None
    return download(flag, model, "model", ["*.json", "*.jinja", "*.safetensors"], revision)


def read_config(directory: Path, kind: Architecture | None = None) -> dict:
    """The directory's config.json. Raises UserError where it is of another kind of model than `kind`."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory / 'config.json'}: not readable ({error}); pass a directory in Hugging Face layout"
        ) from None
    if str(config.get("model_type")).startswith(OWN[1]):
        config["model_type"] = config["model_type"].removeprefix(OWN[1])
        config["architectures"] = [name.removeprefix(OWN[0]) for name in config.get("architectures") or []]
    if kind and config.get("model_type") not in kind.model_types:
        name = config.get("model_type") or "nameless"
        raise UserError(f"--model: {directory} is a {name} model; pass another: {SUPPORTED}")
    return config


def label_config(label_names: Sequence[str]) -> dict:
    """The part of a config.json that says what the classes are."""
    return {
        "id2label": {str(i): name for i, name in enumerate(label_names)},
        "label2id": {name: i for i, name in enumerate(label_names)},
        "problem_type": "single_label_classification",
    }


def head_labels(config: dict, directory: Path) -> list[str]:
    """The classes of a trained classifier's config.json in the order of their indices; without names, as in transformers, they
    are two, LABEL_0 and LABEL_1. Raises UserError where the head gives no scores of classes that exclude each other."""
    file, count = directory / "config.json", config.get("num_labels") or 2
    labels = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(count)}
    needed = "minicls reads a score for each of two or more classes, one of which is right"
    if config.get("problem_type") in ("regression", "multi_label_classification"):
        raise UserError(f"{file}: problem_type is {config['problem_type']}; {needed}: pass such a classifier")
    if len(labels) == 1:
        raise UserError(
            f"{file}: num_labels is 1, so its head gives a number or the logit of yes; {needed}: pass such a classifier"
        )
    if not isinstance(labels, dict) or labels.keys() != {str(i) for i in range(len(labels))}:
        raise UserError(
            f"{file}: id2label {str(labels)[:80]} does not number the classes 0, 1, 2 and so on; correct it"
        )
    names = [str(labels[str(i)]) for i in range(len(labels))]
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{file}: id2label has two classes with the name {twice!r}; give each a name of its own")
    return names


def build_model(
    kind: Architecture,
    values: dict,
    directory: Path | None,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, set[str], str]:
    """Makes a model from the values of a config.json and fills it from a directory, or, without one, at random.

    Returns the model (on the device, in the dtype, which a file's tensors are converted to one by one), the names of the
    parameters that started fresh, and the load report.
    """
    known = {field.name for field in dataclasses.fields(kind.config)}
    num_labels = {"num_labels": len(values["id2label"])} if values.get("id2label") else {}
    if kind is BERT and values.get("is_decoder"):
        raise UserError(f"--model: its config.json says is_decoder, so a token sees only those before it; {SUPPORTED}")
    try:
        config = kind.config(**{name: value for name, value in values.items() if name in known} | num_labels)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"--model: its config.json does not fit ({error}); pass another: {SUPPORTED}") from None
    if (config.pad_token_id or 0) >= config.vocab_size:
        raise UserError(
            f"--model: its tokenizer's padding token has id {config.pad_token_id}, its embedding only {config.vocab_size} rows; "
            "pass files that fit"
        )
    with torch.device("meta"):  # shapes only: the memory is taken once, and the default initialisation skipped
        model = kind.model(config).to(dtype)
    model.to_empty(device=device)
    if directory is None:
        fresh, report = {name for name, _ in model.named_parameters()}, "weights: random"
    else:
        fresh, report = load_weights(model, directory, kind)
    init_weights(model, fresh, config.initializer_range, seed)
    if is_own(model):
        report += f"; not the parameters of transformers' {class_name(model)}, so what is saved opens in minicls alone"
    return model, fresh, f"{sum(p.numel() for p in model.parameters()):,} parameters; {report}"


def weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the shards that the index names."""
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    if (directory / INDEX).is_file():
        try:
            names = sorted(set(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{directory / INDEX}: not a readable index ({error!r}); download it again") from None
        for name in names:
            if not (directory / name).is_file():
                raise UserError(f"{directory}: {INDEX} names {name}, which is missing; download it again")
        return [directory / name for name in names]
    others = [f.name for pattern in ("*.bin", "*.pt", "*.ckpt", "*.h5", "*.msgpack") for f in directory.glob(pattern)]
    if others:
        raise UserError(
            f"{directory}: only {others[0]}, no model.safetensors; such files can run code when read, so they are not: "
            "convert it with transformers' save_pretrained"
        )
    raise UserError(f"{directory}: no model.safetensors; pass a directory that holds one")


@torch.no_grad()
def init_weights(model: nn.Module, names: set[str], std: float, seed: int) -> None:
    """Fills the named parameters as transformers would: normal(0, std) matrices, zero biases, unit norm weights.

    Each parameter has a generator seeded by its name's place, so that a fresh head does not depend on what else is fresh.
    """
    for place, (name, parameter) in enumerate(model.named_parameters()):
        if name in names and parameter.ndim >= 2:
            generator = torch.Generator().manual_seed(
                derived_seed(seed, place)
            )  # a CPU's, so that every device starts alike
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        elif name in names:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors file. The file is opened for it alone: it is mapped, and the pages of all that is read from
    an open one count as memory of this process until it is closed, a second copy of the weights in the end."""
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


@torch.no_grad()
def load_weights(model: nn.Module, directory: Path, kind: Architecture) -> tuple[set[str], str]:
    """Copies a directory's tensors into the model; returns the names of the parameters not in the file, and the report.

    Raises UserError naming a tensor that is missing, of another shape, or unknown, beyond what `kind` explains.
    """
    parameters = dict(model.named_parameters())
    loaded, ignored, unknown, head = set(), [], [], None
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as tensors:
                stored = list(tensors.keys())
                headless = not any(name.startswith(kind.prefix) for name in stored)
                for stored_name in stored:
                    name = stored_name
                    for pattern, replacement in kind.renamed:
                        name = re.sub(pattern, replacement, name)
                    if headless and kind.prefix + name in parameters:
                        name = kind.prefix + name
                    if name in parameters:
                        shape, wanted = tuple(tensors.get_slice(stored_name).get_shape()), tuple(parameters[name].shape)
                        if shape != wanted:
                            raise UserError(
                                f"{file}: {stored_name} has shape {shape}, the model wants {wanted}; "
                                "is config.json of another size, or the number of classes another?"
                            )
                        parameters[name].copy_(read_tensor(file, stored_name))
                        loaded.add(name)
                    elif name.startswith(kind.ignored) or (headless and (kind.prefix + name).startswith(kind.ignored)):
                        ignored.append(stored_name)
                        head = file if name == "lm_head.weight" and kind is DECODER else head
                    else:
                        unknown.append(stored_name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: not a readable safetensors file ({error}); download or save it again") from None
    fresh = parameters.keys() - loaded
    missing = sorted(name for name in fresh if not name.startswith(kind.fresh))
    if missing:
        raise UserError(
            f"{directory}: {missing[0]} and {len(missing) - 1} other tensors are missing; pass complete weights"
        )
    if unknown:
        raise UserError(
            f"{directory}: unknown tensor {unknown[0]} and {len(unknown) - 1} others; is it another architecture?"
        )

    if head:  # the embedding is the head; a head that was trained apart from it must not be lost without a word
        embedding = model.get_parameter("model.embed_tokens.weight")
        stored = read_tensor(head, "lm_head.weight").to(embedding)
        if stored.shape != embedding.shape or not torch.equal(stored, embedding):
            raise UserError(
                f"{head}: lm_head.weight is another than model.embed_tokens.weight, but config.json says that they are one "
                "(tie_word_embeddings); set that to false, or delete the tensor"
            )

    def listed(names):
        names = sorted(names)
        return f"{len(names)}" + (f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else "")

    return fresh, f"weights: {len(loaded)} tensors loaded, fresh {listed(fresh)}, ignored {listed(ignored)}"


def check_fits(config, tokenizer: Tokenizer, max_length: int) -> None:
    """Raises UserError where ids or positions would fall outside the embeddings."""
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"--model: its tokenizer has {len(tokenizer)} tokens, its embedding only {config.vocab_size} rows; pass files that fit"
        )
    if max_length > config.max_position_embeddings:
        raise UserError(
            f"--max-length: {max_length} is more than the model's {config.max_position_embeddings} positions; pass less"
        )


def save_model(
    model: nn.Module, config: dict, tokenizer: Tokenizer, directory: Path, text_length: int | None = None
) -> None:
    """Writes config.json, model.safetensors and the tokenizer; the weights aside first, so that they are whole or absent.

    `text_length`: for a model that reads bare texts, of at most so many ids (see `Tokenizer.save`).
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(dict(model.named_parameters()), directory / ".model.tmp")
    (directory / ".model.tmp").replace(directory / "model.safetensors")
    tokenizer.save(directory, text_length, model.config.pad_token_id)
    # What the model's own values below replace, and what is not true of plain weights.
    stale = (
        "torch_dtype",
        "_name_or_path",
        "num_labels",
        "_num_labels",
        "auto_map",
        "quantization_config",
        "pruned_heads",
    )
    config = {name: value for name, value in config.items() if name not in (*stale, "return_dict", "torchscript")}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config |= {"architectures": [class_name(model)], "dtype": dtype, "vocab_size": model.config.vocab_size}
    config |= {"pad_token_id": model.config.pad_token_id}
    if is_own(model):
        config |= {"architectures": [OWN[0] + class_name(model)], "model_type": OWN[1] + config["model_type"]}
    (directory / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Writes a safetensors file; raises OSError (the library has an error of its own for a full disk)."""
    file.unlink(missing_ok=True)
    file.touch()
    mode = file.stat().st_mode  # as the umask says; the library makes its files readable by nobody else
    try:
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, file, metadata={"format": "pt"})
        file.chmod(mode)
    except SafetensorError as error:
        file.unlink(missing_ok=True)
        raise OSError(f"{file}: {error}") from None

"""Llama, Qwen2 and Qwen3 against their references: transformers, itself without a cache, itself in other batches, and its files both ways.

    python -m pytest tests/test_decoder.py -m "not slow"
    MINICLS_SHARED=DIR python -m pytest tests/test_decoder.py      # also the real 0.6B size: a minute, 3 GB of memory

Small random models, fp32 unless a test says otherwise. Tolerances allow for rounding alone: fp32 has seven digits, sums
run over up to a few hundred terms in another order on the two sides, and two or three layers follow each other.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from minicls import weights
from minicls.batch import Batch, pack, pack_shared
from minicls.bert import BertConfig, BertForSequenceClassification
from minicls.config import UserError
from minicls.data import AG_NEWS_LABELS
from minicls.decoder import FAMILIES, DecoderConfig, DecoderForCausalLM, DecoderForSequenceClassification, KVCache
from minicls.generate import generate
from minicls.prompt import Chat, make_template
from minicls.tiny import train_qwen_tokenizer
from minicls.tokenizer import load_tokenizer

POSITIONS = 64
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": POSITIONS,
}
SIZES |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
PAD = SIZES["vocab_size"] - 1  # in no random row
MANY = [*range(1, 32), *range(POSITIONS, 55, -1)]  # 40 rows: more than two of the attention's groups of 16
CPU = torch.device("cpu")

# A head is 8 numbers of a hidden size of 32 in the first two, so they could do without head_dim; the others could not.
CONFIGS = {
    "plain": {},
    "tied, 4 heads a key": {"tie_word_embeddings": True, "num_key_value_heads": 1, "rope_theta": 100.0},
    "wide heads, as many keys": {"head_dim": 16, "num_key_value_heads": 4, "rms_norm_eps": 0.1},
    "narrow heads, 3 a key": {
        "num_attention_heads": 6,
        "head_dim": 4,
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
    },
    "rope_parameters": {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 20.0}},
    "llama": {"model_type": "llama"},
    "llama, tied, no head_dim, 3 heads a key": {
        "model_type": "llama",
        "hidden_size": 48,
        "num_attention_heads": 6,
        "head_dim": None,
        "tie_word_embeddings": True,
    },
    "qwen2": {"model_type": "qwen2", "head_dim": None},
    "qwen2, tied, 4 heads a key": {
        "model_type": "qwen2",
        "head_dim": None,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_theta": 100.0,
    },
}


def values_of(name: str, **others) -> dict:
    values = SIZES | CONFIGS[name] | others
    return {key: value for key, value in values.items() if value is not None}


def family_of(config: str, **values) -> str:
    """The start of transformers' class names for a config."""
    return FAMILIES[(CONFIGS[config] | values).get("model_type", "qwen3")].prefix


def stir(model: torch.nn.Module) -> torch.nn.Module:
    """Sets large weights, the norms' too: with those of a fresh model, attention is all but uniform and hides mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(center + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def make_model(kind=DecoderForCausalLM, config: str = "plain", **values) -> torch.nn.Module:
    return stir(kind(DecoderConfig(**values_of(config, **values)))).eval()


def make_theirs(config: str = "plain", kind=DecoderForCausalLM, **values) -> torch.nn.Module:
    family, values = family_of(config, **values), values_of(config, **values)
    values.pop("model_type", None)
    their_config = getattr(transformers, f"{family}Config")(**values, attn_implementation="eager")
    return stir(getattr(transformers, kind.__name__.replace("Decoder", family))(their_config)).eval()


def make_pair(config: str = "plain", kind=DecoderForCausalLM, **values) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our model and transformers', with the same weights."""
    ours, theirs = make_model(kind, config, **values), make_theirs(config, kind, **values)
    ours.load_state_dict(dict(theirs.named_parameters()))  # strict: the names are the same, all of them
    return ours, theirs


def random_rows(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(PAD, size=length).tolist() for length in lengths]


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """The batch as transformers wants it, padded on the right."""
    input_ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD
    )
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": input_ids, "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()}


def everywhere(batch: Batch) -> torch.Tensor:
    return torch.arange(len(batch.input_ids))


@torch.inference_mode()
def all_logits(model: torch.nn.Module, rows: list[list[int]]) -> list[torch.Tensor]:
    """The logits after every token of each row, without a cache."""
    batch = pack(rows)
    return list(model(batch, everywhere(batch)).split([len(row) for row in rows]))


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_gradients_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    # Rounding errors are as large as the terms of a sum, and a gradient may be a small sum of large ones (of queries and
    # keys in rows of one token, exactly 0): so the allowance is a share of the largest gradient.
    largest = max(gradient.abs().max() for gradient in wanted.values()).item()
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        message = f"{name}: {{}}".format
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5 * largest, msg=message)


LENGTHS = {"one token": [1], "short": [2, 1, 3], "very different": [POSITIONS, 1, 30, 2, POSITIONS, 5], "many": MANY}


@pytest.mark.parametrize("at", ["all", "some"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("config", CONFIGS)
def test_logits_loss_and_gradients_equal_transformers(config, lengths, at):
    ours, theirs = make_pair(config)
    rows = random_rows(LENGTHS[lengths])
    batch, their_batch = pack(rows), padded(rows)
    asked = (
        everywhere(batch)
        if at == "all"
        else torch.randperm(len(batch.input_ids), generator=torch.Generator().manual_seed(1))
    )
    asked = asked[: max(1, len(asked) // 3)] if at == "some" else asked
    targets = torch.from_numpy(np.random.default_rng(2).integers(SIZES["vocab_size"], size=len(asked)))
    real = their_batch["attention_mask"].bool()  # (B, S); its True places in their order are our packed tokens
    packed_targets = torch.full_like(batch.input_ids, -100)
    packed_targets[asked] = targets
    shift_labels = torch.full_like(their_batch["input_ids"], -100).masked_scatter(real, packed_targets)

    logits = ours(batch, asked)
    loss = F.cross_entropy(logits, targets)
    expected = theirs(**their_batch, labels=shift_labels, shift_labels=shift_labels)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected.logits[real][asked], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert_gradients_equal(gradients(ours, loss), gradients(theirs, expected.loss))


@pytest.mark.parametrize("lengths", [[4], [1, 9, 2], MANY[:35]], ids=["one row", "three rows", "35 rows"])
@pytest.mark.parametrize("kind", [DecoderForCausalLM, DecoderForSequenceClassification])
def test_a_shared_beginning_read_once_changes_no_logits_and_no_gradients(kind, lengths):
    model, (beginning,), rests = make_model(kind), random_rows([6]), random_rows(lengths, seed=1)
    rows = [beginning + rest for rest in rests]
    whole, once = pack(rows), pack_shared(rows, len(beginning))
    assert len(whole.input_ids) - len(once.input_ids) == len(beginning) * (len(rests) - 1)
    runs = []
    for batch in (once, whole):
        logits = model(batch, *([batch.last] if kind is DecoderForCausalLM else []))
        runs.append((logits, gradients(model, F.cross_entropy(logits, torch.arange(len(rests)) % logits.shape[1]))))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-4, atol=2e-5)
    assert_gradients_equal(runs[0][1], runs[1][1])


def test_theta_is_read_from_where_files_keep_it():
    places = [{"rope_theta": 20.0}, {"rope_parameters": {"rope_theta": 20.0}}, {"rope_scaling": {"rope_theta": 20.0}}]
    assert [DecoderConfig(**SIZES | place).rope_theta for place in places] == [20.0] * 3
    rows = random_rows([30])
    (near,), (far,) = (all_logits(make_model(rope_theta=theta), rows) for theta in (20.0, 10_000.0))
    assert (near[1:] - far[1:]).abs().max() > 0.1  # so that the comparisons with transformers would notice


def test_a_position_may_be_asked_for_twice_and_out_of_order():
    model, batch = make_model(), pack(random_rows([5, 1, 9]))
    at = torch.tensor([14, 0, 5, 5, 2])
    with torch.inference_mode():
        # Only rounding differs: kernels cut matrices of other sizes into other blocks.
        torch.testing.assert_close(model(batch, at), model(batch, everywhere(batch))[at], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("config", ["plain", "tied, 4 heads a key", "rope_parameters", "llama", "qwen2"])
def test_classification_equals_transformers(config, lengths):
    ours, theirs = make_pair(config, DecoderForSequenceClassification, num_labels=3, pad_token_id=PAD)
    rows = random_rows(LENGTHS[lengths])
    labels = torch.arange(len(rows)) % 3
    logits = ours(pack(rows))
    loss = F.cross_entropy(logits, labels)
    expected = theirs(**padded(rows), labels=labels)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert_gradients_equal(gradients(ours, loss), gradients(theirs, expected.loss))


def test_classification_reads_the_last_token_whatever_it_is():
    ours, theirs = make_pair(kind=DecoderForSequenceClassification, num_labels=3)  # no pad_token_id: one row at a time
    rows = [[3, 4, PAD], [PAD], [7, PAD, PAD]]
    with torch.inference_mode():
        expected = torch.cat([theirs(**padded([row])).logits for row in rows])
        torch.testing.assert_close(ours(pack(rows)), expected, rtol=1e-4, atol=2e-5)


def test_what_a_layer_keeps_for_the_backward_pass():
    """Under bf16 autocast on a CPU, counted in bytes: a step's peak memory consists of its activations.

    Two residuals in fp32; both norms' outputs in bf16; q and k as projected; q, k, v and the weights of attention, one for each
    position of the longest row; the input of o_proj; gate, its silu, up and their product. Beside these a few numbers a
    token: scales, indices, the mask.
    """
    D, H, Hkv, Dh, wide = 64, 4, 2, 32, 96
    sizes = {
        "hidden_size": D,
        "num_attention_heads": H,
        "num_key_value_heads": Hkv,
        "head_dim": Dh,
        "intermediate_size": wide,
    }
    S = 12
    rows = random_rows([S] * 16)
    kept = []
    for layers in (1, 2):
        model, batch, storages = make_model(num_hidden_layers=layers, **sizes).train(), pack(rows), {}
        parameters = {parameter.data_ptr() for parameter in model.parameters()}
        alive = []  # or the memory of one tensor would be another's

        def keep(x, parameters=parameters, storages=storages, alive=alive):
            alive.append(x)
            if x.data_ptr() not in parameters:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            model(batch, batch.last).sum()
        kept.append(sum(storages.values()))
    in_bf16 = 2 * sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2)  # the weights' copies
    activations = (
        2 * 4 * D + 2 * 2 * D + 2 * (H + Hkv) * Dh + 2 * ((H + 2 * Hkv) * Dh + H * S) + 2 * H * Dh + 4 * 2 * wide
    )
    a_few = 4 * (2 + 2 * H + Hkv) + 64
    found = (kept[1] - kept[0] - in_bf16) / len(batch.input_ids)
    assert activations <= found <= activations + a_few


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", [DecoderForCausalLM, DecoderForSequenceClassification])
def test_activation_checkpointing_changes_no_gradient(kind, dtype):
    model, batch = make_model(kind).train(), pack(random_rows([9, POSITIONS, 3]))
    runs = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    last = [batch.last] if kind is DecoderForCausalLM else []

    def loss_gradients(checkpointing):
        model.model.activation_checkpointing = checkpointing
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            logits = model(batch, *last)
        return gradients(model, F.cross_entropy(logits, torch.tensor([0, 1, 0])))

    plain = loss_gradients(False)
    assert len(runs) == 1
    # Bit for bit: the same operations run on the same numbers, only twice.
    torch.testing.assert_close(loss_gradients(True), plain, rtol=0, atol=0)
    assert len(runs) == 3  # it did run twice


def assert_logits_close(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    """Up to rounding: with a cache, or in another batch, the same sums run in other blocks."""
    torch.testing.assert_close(torch.cat(list(found)), torch.cat(list(wanted)), rtol=1e-4, atol=2e-5)


@torch.inference_mode()
def feed(model: torch.nn.Module, cache: KVCache, chunks: list[list[int]], starts: list[int]) -> list[torch.Tensor]:
    """The logits after every token of one chunk per row."""
    batch = pack(chunks, "cpu", starts)
    return list(model(batch, everywhere(batch), cache).split([len(chunk) for chunk in chunks]))


def cuts(length: int, pieces: int, rng: np.random.Generator) -> list[int]:
    """The positions that cut a row into this many chunks of at least one token."""
    return [0, *sorted(rng.choice(np.arange(1, length), pieces - 1, replace=False).tolist()), length]


@pytest.mark.parametrize("pieces", [1, 2, 5])
@pytest.mark.parametrize("config", CONFIGS)
def test_rows_fed_in_chunks_equal_whole_rows(config, pieces, way):
    model, rows = make_model(config=config), random_rows([7, 12, 5, POSITIONS, *range(6, 42)])
    rng = np.random.default_rng(0)
    bounds = [cuts(len(row), pieces, rng) for row in rows]
    cache, found = KVCache(len(rows), POSITIONS), [[] for _ in rows]
    for piece in range(pieces):
        starts = [bound[piece] for bound in bounds]
        chunks = [row[bound[piece] : bound[piece + 1]] for row, bound in zip(rows, bounds, strict=True)]
        for i, logits in enumerate(feed(model, cache, chunks, starts)):
            found[i].append(logits)
    assert_logits_close(map(torch.cat, found), all_logits(model, rows))


def test_token_by_token_equals_whole_rows():
    model, rows = make_model(), random_rows([9] * 3)  # equally long, so every step is one token per row
    cache = KVCache(3, 9)
    steps = [feed(model, cache, [[row[t]] for row in rows], [t] * 3) for t in range(9)]
    assert_logits_close([torch.cat(logits) for logits in zip(*steps, strict=True)], all_logits(model, rows))


def test_going_back_overwrites_what_came_later(way):
    model, beginnings = make_model(), random_rows([7, 1, 20, 3])
    cache = KVCache(4, 32)
    feed(model, cache, beginnings, [0] * 4)
    starts = [len(row) for row in beginnings]
    # Longer than, shorter than and as long as the one before: what is left of a longer one must not be seen.
    for seed, lengths in enumerate([[9, 5, 12, 8], [1, 1, 1, 1], [2, 6, 1, 3], [2, 6, 1, 3]]):
        endings = random_rows(lengths, seed=10 + seed)
        whole = all_logits(model, [a + b for a, b in zip(beginnings, endings, strict=True)])
        expected = [logits[start:] for logits, start in zip(whole, starts, strict=True)]
        assert_logits_close(feed(model, cache, endings, starts), expected)
    earlier = [start - 1 for start in starts]  # back into the beginning itself, for one row to its very start
    endings = random_rows([4, 2, 3, 9], seed=20)
    whole = all_logits(model, [a[:-1] + b for a, b in zip(beginnings, endings, strict=True)])
    expected = [logits[start:] for logits, start in zip(whole, earlier, strict=True)]
    assert_logits_close(feed(model, cache, endings, earlier), expected)


@pytest.mark.parametrize("config", ["plain", "wide heads, as many keys"])
def test_a_prefix_cache_is_shared_by_rows_and_left_as_it_was(config, way):
    model, (prefix,) = make_model(config=config), random_rows([6])
    prefix_cache = KVCache(1, len(prefix))
    feed(model, prefix_cache, [prefix], [0])
    before = [tensor.clone() for layer in prefix_cache.layers for tensor in layer]
    for lengths in ([5], [1, 9, 2], MANY[:35]):
        rests = random_rows(lengths, seed=1)
        cache = KVCache(len(rests), len(prefix) + max(lengths), prefix_cache)
        expected = [logits[len(prefix) :] for logits in all_logits(model, [prefix + rest for rest in rests])]
        assert_logits_close(feed(model, cache, rests, [len(prefix)] * len(rests)), expected)
        feed(model, cache, [[1]] * len(rests), [0] * len(rests))  # overwritten in the rows' own cache
    assert all(torch.equal(a, b) for a, b in zip(before, sum(prefix_cache.layers, ()), strict=True))


@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
def test_a_row_does_not_depend_on_its_batch(cached, way):
    model, rows = make_model(), random_rows(MANY)
    alone = [all_logits(model, [row])[0] for row in rows]
    for order in ([*range(40)], [*range(39, -1, -1)], [*range(0, 40, 3)], [39, 0], [5, 5, 5]):
        batch = [rows[row] for row in order]
        together = (
            feed(model, KVCache(len(batch), POSITIONS + 3), batch, [0] * len(batch))
            if cached
            else all_logits(model, batch)
        )
        assert_logits_close(together, [alone[row] for row in order])


def test_bf16_autocast_keeps_the_head_in_fp32():
    for kind in (DecoderForCausalLM, DecoderForSequenceClassification):
        model, batch = make_model(kind), pack(random_rows(MANY))
        last = [batch.last] if kind is DecoderForCausalLM else []
        with torch.inference_mode():
            exact = model(batch, *last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch, *last)
        assert logits.dtype == torch.float32
        assert not torch.equal(
            logits, logits.bfloat16().float()
        )  # the head ran in fp32, it was not only cast at the end
        # bf16 has 8 bits, an error of 0.4 % an operation; a few of them in a row stay within a tenth of the logits' spread.
        error = (logits - exact).square().mean().sqrt() / exact.std()
        assert 1e-4 < error < 0.1


# Model directories.


def write(directory: Path, values: dict, *shards: dict[str, torch.Tensor]) -> Path:
    """A model directory: one file, or, of several shards, files with an index."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3"} | values))
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors")
        return directory
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, directory / name)
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (directory / weights.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def build(directory: Path, kind=weights.DECODER, dtype: torch.dtype = torch.float32):
    """(model, names of the fresh parameters, report)."""
    return weights.build_model(kind, weights.read_config(directory, kind), directory, 0, CPU, dtype)


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def headless(tensors: dict) -> dict:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}


def halves(tensors: dict) -> list[dict]:
    names = sorted(tensors)
    return [{name: tensors[name] for name in part} for part in (names[::2], names[1::2])]


TIED = values_of("tied, 4 heads a key")
UNTIED = values_of("plain")
CLASSES = {f"LABEL_{i}": i for i in range(3)}
LABELLED = {"id2label": {i: name for name, i in CLASSES.items()}, "label2id": CLASSES, "pad_token_id": PAD}


def with_lm_head(tensors: dict) -> dict:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


# The config, what is written, the names that then start fresh, and how many tensors are ignored.
LAYOUTS = {
    "untied": (weights.DECODER, UNTIED, lambda t: [t], set(), 0),
    "untied, two shards": (weights.DECODER, UNTIED, halves, set(), 0),
    "untied, head in a shard of its own": (
        weights.DECODER,
        UNTIED,
        lambda t: [{name: t[name] for name in t if name != "lm_head.weight"}, {"lm_head.weight": t["lm_head.weight"]}],
        set(),
        0,
    ),
    "tied": (weights.DECODER, TIED, lambda t: [t], set(), 0),
    "tied, with its head": (weights.DECODER, TIED, lambda t: [with_lm_head(t)], set(), 1),
    "tied, with its head in a shard of its own": (
        weights.DECODER,
        TIED,
        lambda t: [t, {"lm_head.weight": t["model.embed_tokens.weight"].clone()}],
        set(),
        1,
    ),
    "tied, no prefix": (weights.DECODER, TIED, lambda t: [headless(t)], set(), 0),
    "tied, no prefix, two shards": (weights.DECODER, TIED, lambda t: halves(headless(t)), set(), 0),
    "bf16": (weights.DECODER, UNTIED, lambda t: [{name: x.bfloat16() for name, x in t.items()}], set(), 0),
    "classes": (weights.DECODER_LINEAR, TIED | LABELLED, lambda t: [t], set(), 0),
    "classes, fresh": (
        weights.DECODER_LINEAR,
        TIED | LABELLED,
        lambda t: [with_lm_head({name: t[name] for name in t if name != "score.weight"})],
        {"score.weight"},
        1,
    ),
    "classes, no prefix": (weights.DECODER_LINEAR, TIED | LABELLED, lambda t: [headless(t)], {"score.weight"}, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_load_with_a_report(layout, tmp_path):
    kind, values, make_shards, fresh_names, num_ignored = LAYOUTS[layout]
    num_labels = {"num_labels": 3} if kind is weights.DECODER_LINEAR else {}
    sizes = {name: value for name, value in values.items() if name not in ("id2label", "label2id")} | num_labels
    tensors = tensors_of(stir(kind.model(DecoderConfig(**sizes))))
    model, fresh, report = build(write(tmp_path, values, *make_shards(tensors)), kind)
    found = tensors_of(model)
    assert found.keys() == tensors.keys()
    assert fresh == fresh_names
    for name in found.keys() - fresh:
        expected = tensors[name].bfloat16().float() if layout == "bf16" else tensors[name]
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0, msg=name)  # dtype included: fp32
    assert f"{len(tensors) - len(fresh)} tensors loaded, fresh {len(fresh)}" in report
    assert f"ignored {num_ignored}" in report
    if fresh:
        assert found["score.weight"].shape == (3, SIZES["hidden_size"])
        assert 0 < found["score.weight"].std() < 0.04  # initializer_range 0.02, not the previous content of the memory


REFUSED_FILES = {  # the config, the change to the tensors, and the words that the message must name
    "untied without its head": (
        UNTIED,
        lambda t: {name: t[name] for name in t if name != "lm_head.weight"},
        "lm_head.weight",
    ),
    "untied, no prefix": (UNTIED, headless, "lm_head.weight"),
    "missing": (
        UNTIED,
        lambda t: {name: t[name] for name in t if name != "model.layers.1.self_attn.q_norm.weight"},
        "model.layers.1.self_attn.q_norm.weight",
    ),
    "a layer too many": (
        UNTIED,
        lambda t: t | {"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)},
        "model.layers.2.mlp.up_proj.weight",
    ),
    "a bias": (
        UNTIED,
        lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)},
        "layers.0.self_attn.q_proj.bias",
    ),
    "another head size": (UNTIED | {"head_dim": 16}, lambda t: t, r"self_attn.*shape.*model wants"),
}


@pytest.mark.parametrize("reason", REFUSED_FILES)
def test_a_file_that_does_not_fit_is_a_user_error(reason, tmp_path):
    values, change, named = REFUSED_FILES[reason]
    tensors = tensors_of(make_model())
    with pytest.raises(UserError, match=named):
        build(write(tmp_path, values, change(tensors)))


REFUSED_CONFIGS = {  # changes to a config.json, and the words that the message must name
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
    "yarn in an older file": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type"),
    "yarn in a newer file": ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, "rope_type"),
    "attention bias": ({"attention_bias": True}, "attention_bias"),
    "attention dropout": ({"attention_dropout": 0.1}, "attention_dropout"),
    "sliding window": ({"use_sliding_window": True, "sliding_window": 16}, "use_sliding_window"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "heads that do not divide": ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4.*3"),
    "no key heads": ({"num_key_value_heads": 0}, "does not fit"),
}


@pytest.mark.parametrize("kind", [weights.DECODER, weights.DECODER_LINEAR], ids=["options", "linear"])
@pytest.mark.parametrize("reason", REFUSED_CONFIGS)
def test_a_config_of_another_model_is_a_user_error(reason, kind):
    changes, named = REFUSED_CONFIGS[reason]
    with pytest.raises(UserError, match=named):
        weights.build_model(kind, {"model_type": "qwen3"} | SIZES | changes, None, 0, CPU)
    harmless = {
        "rope_scaling": None,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "use_cache": True,
        "bos_token_id": 1,
    }
    weights.build_model(kind, {"model_type": "qwen3"} | SIZES | harmless, None, 0, CPU)


LLAMA3_ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
UNSUPPORTED = {  # values in a config.json, and the start of the message
    "Gemma 3": ({"model_type": "gemma3"}, "is a gemma3 model"),
    "ModernBERT": ({"model_type": "modernbert"}, "is a modernbert model"),
    "no type": ({"model_type": None}, "its config.json has no model_type"),
    "Llama 3.2": ({"model_type": "llama", "rope_scaling": LLAMA3_ROPE}, "rope_type 'llama3' is not supported"),
    "Llama 3.2, saved again": (
        {"model_type": "llama", "rope_parameters": LLAMA3_ROPE | {"rope_theta": 5e5}},
        "rope_type 'llama3'",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_model_is_one_line_that_lists_those_that_are(name, tmp_path):
    values, named = UNSUPPORTED[name]
    directory = write(tmp_path, SIZES | values, tensors_of(make_model()))
    with pytest.raises(UserError) as error:
        weights.build_model(weights.DECODER, weights.read_config(directory, weights.DECODER), directory, 0, CPU)
    message = str(error.value)
    assert message.startswith(f"{directory}: ") and named in message and len(message.splitlines()) == 1
    assert "train_bert.py takes bert; train_qwen.py takes llama, qwen2 and qwen3" in message


def test_a_bert_directory_is_refused_by_its_name(tmp_path):
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    directory = write(tmp_path, {"model_type": "bert", "vocab_size": 10, "hidden_size": 8}, tensors_of(bert))
    with pytest.raises(UserError, match=rf"{directory}: this is a bert model; pass another: .*llama, qwen2 and qwen3"):
        build(directory)


def test_bf16_weights_give_logits_near_those_of_fp32(tmp_path):
    directory = write(tmp_path, UNTIED, tensors_of(make_model()))
    exact, rounded = build(directory)[0].eval(), build(directory, dtype=torch.bfloat16)[0].eval()
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    rows = random_rows([3, 30, 1, 17])
    wanted, found = (torch.cat(all_logits(model, rows)) for model in (exact, rounded))
    cached = torch.cat(feed(rounded, KVCache(4, 30), rows, [0] * 4))
    for logits in (found, cached):
        assert logits.dtype == torch.float32
        # bf16 has 8 bits, an error of 0.4 % an operation; a few of them in a row stay within a tenth of the logits' spread.
        error = (logits - wanted).square().mean().sqrt() / wanted.std()
        assert 1e-4 < error < 0.1


@pytest.mark.parametrize(("max_shard_size", "dtype"), [("1GB", "float32"), ("8KB", "float16"), ("8KB", "bfloat16")])
@pytest.mark.parametrize(
    ("kind", "config", "others"),
    [
        ("ForCausalLM", "tied, 4 heads a key", {}),
        ("ForCausalLM", "plain", {}),
        ("Model", "tied, 4 heads a key", {}),
        ("ForSequenceClassification", "tied, 4 heads a key", LABELLED),
        ("ForCausalLM", "llama, tied, no head_dim, 3 heads a key", {}),
        ("ForCausalLM", "llama", {}),
        ("ForSequenceClassification", "llama", LABELLED),
        ("ForCausalLM", "qwen2, tied, 4 heads a key", {}),
        ("ForSequenceClassification", "qwen2", LABELLED),
    ],
    ids=[
        "tied",
        "untied",
        "base model",
        "classes",
        "llama, tied",
        "llama",
        "llama, classes",
        "qwen2, tied",
        "qwen2, classes",
    ],
)
def test_what_transformers_saves_opens_here(kind, config, others, max_shard_size, dtype, tmp_path):
    values, family = values_of(config, **others), family_of(config)
    given = {name: value for name, value in values.items() if name != "model_type"}
    theirs = stir(getattr(transformers, family + kind)(getattr(transformers, f"{family}Config")(**given)))
    theirs.to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "1GB")
    ours, fresh, _ = build(tmp_path, weights.DECODER_LINEAR if "id2label" in values else weights.DECODER)
    assert not fresh
    assert ours.config.rope_theta == values["rope_theta"]  # transformers writes it into rope_parameters
    expected = {name if kind != "Model" else f"model.{name}": x for name, x in tensors_of(theirs.float()).items()}
    torch.testing.assert_close(tensors_of(ours), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_as_in_transformers(family):
    theirs = getattr(transformers, f"{FAMILIES[family].prefix}Config")(hidden_size=1024, num_attention_heads=32)
    ours = DecoderConfig(model_type=family, hidden_size=1024, num_attention_heads=32)
    names = ("vocab_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "max_position_embeddings")
    for name in (*names, "rms_norm_eps", "tie_word_embeddings", "initializer_range", "hidden_act"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == getattr(theirs, "head_dim", None) or ours.head_dim == 32
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


TEXTS = ["A minister said that the shares of the satellite company fell.", "The coach said so, too."]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (weights.DECODER, "tied, 4 heads a key"),
        (weights.DECODER, "rope_parameters"),
        (weights.DECODER_LINEAR, "tied, 4 heads a key"),
        (weights.DECODER_LINEAR, "wide heads, as many keys"),
        (weights.DECODER, "llama, tied, no head_dim, 3 heads a key"),
        (weights.DECODER_LINEAR, "llama"),
        (weights.DECODER, "qwen2"),
        (weights.DECODER_LINEAR, "qwen2, tied, 4 heads a key"),
    ],
    ids=["tied", "untied", "classes, tied", "classes, untied", "llama", "llama, classes", "qwen2", "qwen2, classes"],
)
def test_what_is_saved_opens_in_transformers(kind, config, tmp_path):
    tokenizer = train_qwen_tokenizer(TEXTS, vocab_size=300)
    (pad,) = tokenizer.control_ids(["<|endoftext|>"])
    linear = kind is weights.DECODER_LINEAR
    values = {"model_type": "qwen3"} | values_of(config, vocab_size=len(tokenizer), pad_token_id=pad)
    values |= weights.label_config(["World", "Sports", "Business"]) if linear else {}
    model = stir(weights.build_model(kind, values, None, 0, CPU)[0]).eval()
    weights.save_model(model, values, tokenizer, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == tensors_of(model).keys()

    auto = transformers.AutoModelForSequenceClassification if linear else transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == weights.class_name(model)
    assert theirs.config.model_type == values["model_type"]
    assert theirs.dtype == torch.float32
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    encoded = their_tokenizer(TEXTS, padding=True, padding_side="right", return_tensors="pt")
    rows = tokenizer.encode(TEXTS)
    real = encoded["attention_mask"].bool()
    assert [ids[mask].tolist() for ids, mask in zip(encoded["input_ids"], real, strict=True)] == rows
    batch = pack(rows)
    with torch.inference_mode():
        expected = theirs(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
        logits = model(batch) if linear else model(batch, everywhere(batch))
    torch.testing.assert_close(logits, expected if linear else expected[real], rtol=0, atol=1e-4)
    assert logits.std(0).min() > 1e-2  # so that it is not the same whatever the text
    if linear:
        assert theirs.config.id2label == {0: "World", 1: "Sports", 2: "Business"}


@pytest.mark.slow
def test_the_real_size_equals_transformers(shared):
    """0.6B random weights, 2.4 GB in fp32, the same memory on both sides."""
    directory = shared / "tokenizers" / "Qwen3-0.6B"
    ours, _, _ = weights.build_model(weights.DECODER, weights.read_config(directory), None, 0, CPU)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("norm.weight"):  # not the 1 of a fresh model, which would hide a norm in the wrong place
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    assert sum(parameter.numel() for parameter in ours.parameters()) == 596_049_920
    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    state = dict(ours.named_parameters()) | {"lm_head.weight": ours.model.embed_tokens.weight}
    theirs.load_state_dict(state, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)  # its frequencies are in no file
    rows = [np.random.default_rng(0).integers(config.vocab_size, size=length).tolist() for length in (24, 1, 9)]
    batch = pack(rows)
    with torch.inference_mode():
        expected = torch.cat([theirs.eval()(**padded([row]), logits_to_keep=1).logits[:, 0] for row in rows])
        logits = ours.eval()(batch, batch.last)
    # 28 layers hand a rounding error on to one another; logits of a fresh model spread over about 0.6.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert logits.std() > 0.1


@pytest.mark.slow
@pytest.mark.skipif(
    "MINICLS_SMOLLM2" not in os.environ, reason="MINICLS_SMOLLM2 names no directory with SmolLM2-135M-Instruct"
)
def test_the_real_smollm2_equals_transformers():
    """Its published weights: the ids of a chat, the logits in fp32, and what it writes."""
    folder = Path(os.environ["MINICLS_SMOLLM2"])
    theirs_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours, fresh, _ = build(folder)
    assert not fresh
    chat = Chat(load_tokenizer(folder), make_template(AG_NEWS_LABELS), 4, 512)
    texts = [
        "Stocks fell on Monday.",
        "The cup final went to penalties, 4-3.",
        "",
        "caf\u00e9, \u4e2d\u6587 and \U0001f600 \n",
    ]
    messages = [[{"role": "user", "content": text.join(chat.template)}] for text in texts]
    rows = [theirs_tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in messages]
    assert chat.questions(texts) == (rows, 0)
    answered = [[*m, {"role": "assistant", "content": "ABCD"[i]}] for i, m in enumerate(messages)]
    whole = [theirs_tokenizer.apply_chat_template(m, return_dict=False) for m in answered]
    assert chat.training_rows(texts, [0, 1, 2, 3]) == (whole, 0)
    for row, logits in zip(rows, all_logits(ours, rows), strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(logits, theirs(torch.tensor([row])).logits[0], rtol=0, atol=1e-3)
    written = generate(ours, rows[:2], 12, chat.stop_ids, CPU)
    for row, ids in zip(rows, written, strict=False):
        with torch.inference_mode():
            output = theirs.generate(torch.tensor([row]), do_sample=False, max_new_tokens=12)[0, len(row) :]
        assert chat.tokenizer.decode(ids) == theirs_tokenizer.decode(output, skip_special_tokens=True) != ""

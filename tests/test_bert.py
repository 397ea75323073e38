"""BERT against its references: transformers, a naive attention, itself in other batches, and ten steps of the HF Trainer.

    python -m pytest tests/test_bert.py

Small random models, fp32 unless a test says otherwise. Tolerances allow for rounding alone: fp32 has seven digits, sums
run over up to a few hundred terms in another order on the two sides, and two or three layers follow each other.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import train_bert
from minicls.attention import Layout, attention, lay_out, pad_layout, padded_attention
from minicls.batch import pack, pack_shared, step_rows
from minicls.bert import BertConfig, BertForSequenceClassification
from minicls.data import load_data, split_data
from minicls.logger import read_metrics
from minicls.tiny import train_bert_tokenizer
from minicls.tokenizer import bert_rows
from minicls.weights import BERT, label_config, load_weights

POSITIONS = 64
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"max_position_embeddings": POSITIONS, "num_labels": 3}
MANY = [*range(1, 32), *range(POSITIONS, 55, -1)]  # 40 rows: more than two of the attention's groups of 16


def stir(model: torch.nn.Module) -> None:
    """Sets large weights, biases too: with those of a fresh model, attention is all but uniform and hides mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            parameter.copy_(center + 0.3 * torch.randn(parameter.shape, generator=generator))


def make_model(**values) -> BertForSequenceClassification:
    model = BertForSequenceClassification(BertConfig(**SIZES | values))
    stir(model)
    return model


def random_rows(lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(SIZES["vocab_size"], size=length).tolist() for length in lengths]


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """The batch as transformers wants it."""
    input_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": input_ids, "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()}


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "lengths",
    [[1], [2, 1, 3], [POSITIONS, 1, 30, 2, POSITIONS, 5], MANY],
    ids=["one token", "short", "very different", "many"],
)
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"num_attention_heads": 1, "layer_norm_eps": 0.1, "type_vocab_size": 1},
        {"num_attention_heads": 8, "num_hidden_layers": 3, "type_vocab_size": 5, "num_labels": 2, "pad_token_id": 7},
    ],
    ids=["plain", "one head", "three layers"],
)
def test_logits_loss_and_gradients_equal_transformers(values, lengths):
    theirs = transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES | values, attn_implementation="eager")
    )
    stir(theirs)
    ours = make_model(**values)
    ours.load_state_dict(theirs.state_dict())  # strict: the names are the same, all of them
    rows = random_rows(lengths)
    labels = torch.arange(len(rows)) % ours.config.num_labels
    logits = ours.eval()(pack(rows))
    loss = F.cross_entropy(logits, labels)
    expected = theirs.eval()(**padded(rows), labels=labels)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)
    our_gradients, their_gradients = gradients(ours, loss), gradients(theirs, expected.loss)
    # Rounding errors are as large as the terms of a sum, and a gradient may be a small sum of large ones (a key's bias
    # is exactly 0): so the allowance is a share of the largest gradient.
    largest = max(gradient.abs().max() for gradient in their_gradients.values()).item()
    for name, gradient in our_gradients.items():
        message = f"{name}: {{}}".format
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-5 * largest, msg=message)


@pytest.mark.parametrize("place", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"])
def test_each_dropout_acts_in_training_and_nowhere_else(place):
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    batch = pack(random_rows([9, 4]))
    plain, dropping = make_model(**off).train(), make_model(**off | {place: 0.5})
    torch.testing.assert_close(dropping.eval()(batch), plain(batch), rtol=0, atol=0)
    assert not torch.allclose(dropping.train()(batch), plain(batch), atol=1e-3)


def naive_attention(q, k, v, lengths, causal):
    """softmax(Q K^T / sqrt(Dh)) V, row by row and head by head."""
    rows = []
    for q_row, k_row, v_row in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        heads = []
        for head in range(q.shape[1]):
            shared = head * k.shape[1] // q.shape[1]  # the key and value head of this head's group
            scores = q_row[:, head] @ k_row[:, shared].T / q.shape[2] ** 0.5  # (T, T)
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ v_row[:, shared])
        rows.append(torch.stack(heads, 1))
    return torch.cat(rows)


def layout_of(lengths: list[int], dtype: torch.dtype, shared: int = 0) -> Layout:
    """The layout that pads."""
    return pad_layout(pack_shared([[0] * length for length in lengths], shared), dtype)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_bf16_goes_backward_near_fp32(causal, way):
    """bf16 has 8 bits: values of the order of 1, rounded a few times, are within 0.05 and stay bf16."""
    torch.manual_seed(0)
    lengths = [7, 1, 12]
    exact = [torch.randn(20, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    for tensors in (exact, rounded):
        with torch.autocast("cpu", torch.bfloat16, enabled=tensors is rounded):
            output = padded_attention(*tensors, layout_of(lengths, tensors[0].dtype), causal)
        assert output.dtype == tensors[0].dtype
        output.square().sum().backward()
    for x, y in zip(exact, rounded, strict=True):
        assert y.grad.dtype == torch.bfloat16
        torch.testing.assert_close(y.grad.float(), x.grad, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("lengths", [[7], [1], MANY], ids=["one row", "one token", "40 rows"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("function", [attention, padded_attention])
def test_attention_equals_the_naive_one(function, causal, kv_heads, lengths, way):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, 8) for heads in (4, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    batch = pack([[0] * length for length in lengths])
    layout = lay_out(batch, q, 8) if function is attention else pad_layout(batch, q.dtype)
    output = function(q, k, v, layout, causal)
    expected = naive_attention(q, k, v, lengths, causal)
    weights = torch.randn(
        output.shape, generator=generator, dtype=torch.float64
    )  # weights of a loss that distinguishes the outputs
    found = [output, *torch.autograd.grad((output * weights).sum(), (q, k, v))]
    wanted = [expected, *torch.autograd.grad((expected * weights).sum(), (q, k, v))]
    torch.testing.assert_close(
        found, wanted, rtol=1e-9, atol=1e-9
    )  # float64 has 16 digits, so only a mistake is as large


@pytest.mark.parametrize("lengths", [[7], [4, 9], MANY], ids=["one row", "two rows", "40 rows"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_attention_to_a_shared_beginning_equals_whole_rows(causal, lengths, way):
    """With causal masks the beginning's own outputs are everyone's; without one they would differ from row to row."""
    shared, generator = 3, torch.Generator().manual_seed(0)
    lengths = [shared + length for length in lengths]
    begins = [0, *(start + shared for start in np.cumsum(lengths)[:-1])]  # where each row's own tokens begin
    own = torch.cat([torch.arange(a, b) for a, b in zip(begins, np.cumsum(lengths), strict=True)])
    shapes = [(len(own), heads, 8) for heads in (4, 2, 2)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    own_lengths = [lengths[0], *(length - shared for length in lengths[1:])]
    whole = []
    for x in (q, k, v):
        first, *others = x.split(own_lengths)
        whole.append(torch.cat([first, *(torch.cat([first[:shared], other]) for other in others)]))
    output = attention(q, k, v, layout_of(lengths, q.dtype, shared), causal)
    expected = naive_attention(*whole, lengths, causal)[own]
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    found = [output, *torch.autograd.grad((output * weights).sum(), (q, k, v))]
    wanted = [expected, *torch.autograd.grad((expected * weights).sum(), (q, k, v))]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("trains", [True, False])
def test_attention_dropout_drops_probabilities_and_keeps_their_mean(trains):
    """Equal keys make all L probabilities 1/L; with values of 1 an output is then (number kept) / (L * (1 - p))."""
    lengths, heads, p = MANY, 4, 0.25
    x = torch.zeros(sum(lengths), heads, 8, requires_grad=trains)

    def outputs(seed):
        torch.manual_seed(seed)
        return padded_attention(x, x, torch.ones_like(x), layout_of(lengths, x.dtype), dropout_p=p).detach()

    found = outputs(0)
    assert torch.equal(found, outputs(0))
    assert not torch.equal(found, outputs(1))
    L = torch.tensor(lengths).repeat_interleave(torch.tensor(lengths))[:, None]  # (N, 1), the length of a token's row
    kept = found[..., 0] * L * (1 - p)  # (N, H)
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-3)  # whole numbers, up to fp32's seven digits
    assert not torch.equal(kept[:, 0], kept[:, 1])  # heads drop on their own
    # An output's variance is p / ((1 - p) * L), so a row adds the same to the sum's, whatever its length. Five standard errors:
    allowed = 5 * (p / (1 - p) * len(lengths) / heads) ** 0.5 / sum(lengths)
    assert abs(found.mean() - 1) < allowed < 0.01


def test_a_row_does_not_depend_on_its_batch():
    model, rows = make_model().eval(), random_rows(MANY)
    with torch.inference_mode():
        alone = torch.cat([model(pack([row])) for row in rows])
        for batch in ([*range(40)], [*range(39, -1, -1)], [*range(0, 40, 3)], [39, 0], [5, 5, 5]):
            together = model(pack([rows[row] for row in batch]))
            # Only rounding differs: kernels cut matrices of other sizes into other blocks.
            torch.testing.assert_close(together, alone[batch], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_activation_checkpointing_changes_no_gradient(dtype):
    model, batch = make_model().train(), pack(random_rows([9, POSITIONS, 3]))
    runs = []
    model.bert.encoder.layer[0].register_forward_pre_hook(lambda *_: runs.append(1))

    def loss_gradients(checkpointing, dropout=True):
        model.bert.activation_checkpointing = checkpointing
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            logits = model.train(dropout)(batch)
        return gradients(model, F.cross_entropy(logits, torch.tensor([0, 1, 2])))

    plain = loss_gradients(False)
    assert len(runs) == 1
    # Bit for bit: the same operations run on the same numbers, only twice.
    torch.testing.assert_close(loss_gradients(True), plain, rtol=0, atol=0)
    assert len(runs) == 3  # it did run twice
    assert not torch.equal(loss_gradients(False, dropout=False)["classifier.weight"], plain["classifier.weight"])


def test_bf16_autocast_gives_fp32_logits_near_those_of_fp32():
    model, batch = make_model().eval(), pack(random_rows(MANY))
    with torch.inference_mode():
        exact = model(batch)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())  # the head ran in fp32, it was not only cast at the end
    # bf16 has 8 bits, an error of 0.4 % an operation; a few of them in a row stay within a tenth of the logits' spread.
    error = (logits - exact).square().mean().sqrt() / exact.std()
    assert 1e-4 < error < 0.1


def test_ten_steps_equal_the_hf_trainer(tmp_path):
    """The real script against transformers' Trainer on the same rows, in the same order, from the same weights.

    144 rows in steps of 32: two epochs of four full windows and a short one, in micro-batches here, in one piece there.
    """
    steps, lr, decay, model_dir = 10, 3e-3, 0.3, tmp_path / "model"
    data = split_data(load_data("synthetic"), max_train_rows=144, max_eval_rows=8, seed=5)
    tokenizer = train_bert_tokenizer(data.train.texts, vocab_size=2000)
    values = SIZES | {"vocab_size": len(tokenizer), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    del values["num_labels"]
    theirs = transformers.BertForSequenceClassification(
        transformers.BertConfig(**values, **label_config(data.label_names))
    )
    stir(theirs)
    theirs.save_pretrained(model_dir)
    tokenizer.save(model_dir)

    flags = f"--max-steps {steps} --learning-rate {lr} --weight-decay {decay} --warmup-ratio 0.15 --max-grad-norm 1 --dtype fp32"
    flags += " --data synthetic --max-train-rows 144 --max-eval-rows 8 --global-batch-size 32 --micro-batch-size 8 --log-every 1"
    flags += f" --max-length {POSITIONS} --eval-every 0 --save-every 0 --device cpu --threads 1 --seed 5"
    train_bert.main([*flags.split(), "--model", str(model_dir), "--output-dir", str(tmp_path / "run")])
    ours = [event for event in read_metrics(tmp_path / "run") if event["event"] == "train"]

    rows, _ = bert_rows(tokenizer, data.train.texts, max_length=POSITIONS)
    windows = [step_rows(step, len(rows), 32, seed=5) for step in range(steps)]
    assert [len(window) for window in windows] == [32, 32, 32, 32, 16] * 2
    batches = [
        padded([rows[row] for row in window]) | {"labels": torch.from_numpy(data.train.labels[window])}
        for window in windows
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "hf"),
        max_steps=steps,
        learning_rate=lr,
        weight_decay=decay,
        warmup_steps=0.15,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=1,  # an item of the dataset is a whole step
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(theirs, arguments, train_dataset=batches, data_collator=lambda items: items[0])
    trainer.train()
    expected = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    for name in ("loss", "grad_norm", "learning_rate"):
        found, wanted = ([event[name] for event in events] for events in (ours, expected))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-9, err_msg=name)
    assert max(event["grad_norm"] for event in ours) > 1  # so that clipping had something to do
    reached = BertForSequenceClassification(BertConfig(**values, num_labels=4))
    load_weights(reached, tmp_path / "run", BERT)
    for name, parameter in theirs.named_parameters():
        # Softmax ignores what a key's bias adds: its gradient is rounding noise, which Adam scales up to a step of the lr.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(
                reached.get_parameter(name), parameter, rtol=0, atol=2e-5, msg=f"{name}: {{}}".format
            )

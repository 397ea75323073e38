"""Option perplexity: the brute force against transformers, and the fast way against the brute force, whatever the batches.

    python -m pytest tests/test_scorer.py

Small random models in fp32. Scores are of the order of 10 and both sides add up the same numbers in other blocks, in two
layers and over at most six tokens, so that rounding stays below 1e-5 of that: the allowance is 1e-5, and as much relative.
"""

import pytest
import torch
import transformers  # noqa: F401 - imported by test_decoder in any case, and slow: not to be counted to the first test
from test_decoder import CPU, make_model, make_pair, random_rows
from test_prompt import BEGINS, TEMPLATES, tokenizer_dir

from minicls.data import AG_NEWS_LABELS
from minicls.prompt import Chat, make_template
from minicls.scorer import common_prefix, read_prefix, score, score_brute_force
from minicls.tiny import train_qwen_tokenizer
from minicls.tokenizer import load_tokenizer

SAME = [7, 8, 9, 10, 11, 12]  # the common start of a prompt's questions
QUESTIONS = {
    "none": [],
    "one": [[5, 6, 7]],
    "one token": [[5]],
    "one token each": [[5], [6], [5]],
    "nothing in common": random_rows([9, 4, 17, 1, 30]),
    "a prefix in common": [SAME + row for row in random_rows([9, 4, 17, 1, 30])],
    "identical": [SAME] * 5,
    "one a prefix of another": [SAME, SAME[:3], [*SAME, 3], SAME[:4], SAME[:3]],
    "the shortest is what they share": [[*SAME, 1, 2], [*SAME, 4], SAME],
    "many": [
        SAME + row for row in random_rows([*range(35, 0, -1)], seed=1)
    ],  # the longest first; more than two groups of 16
}
OPTIONS = {
    "one token": [[1], [2], [3], [4]],
    "several tokens": [[1, 2], [3, 4], [5, 6]],
    "of different lengths": [[20, 21, 22, 23, 24, 25], [26], [27, 28, 29], [30, 31]],
    "prefixes of one another": [[1, 2, 3, 4], [1], [1, 2, 3], [1, 2], [1, 2, 5]],
    "identical": [[1, 2], [1, 2]],
    "a single one": [[6, 6, 6]],
}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return make_model()


def assert_scores_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    assert found.device.type == "cpu"
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("questions", "options"),
    [
        *((questions, options) for questions in QUESTIONS for options in ("one token", "of different lengths")),
        *(
            ("a prefix in common", options)
            for options in ("several tokens", "prefixes of one another", "identical", "a single one")
        ),
        *(("one a prefix of another", options) for options in ("several tokens", "prefixes of one another")),
    ],
)
def test_score_equals_the_brute_force(questions, options, model, way):
    questions, options = QUESTIONS[questions], OPTIONS[options]
    total = score_brute_force(model, questions, options, CPU, "sum")
    mean = total / torch.tensor([len(option) for option in options])
    assert total.shape == (len(questions), len(options))
    assert (total < 0).all()
    for share_prefix in (True, False):
        for max_tokens in (1, 50, 10**6):
            assert_scores_close(score(model, questions, options, CPU, "sum", max_tokens, share_prefix), total)
        assert_scores_close(score(model, questions, options, CPU, "mean", None, share_prefix), mean)
    assert_scores_close(score(model, questions, options, CPU), mean)  # unsaid, it is the mean


@pytest.mark.parametrize(("config", "template"), [("qwen2", "Qwen2.5"), ("llama", "SmolLM2"), ("llama", "Llama 3")])
def test_score_equals_the_brute_force_in_other_chat_formats(config, template, tmp_path):
    """The system turn is in every question and is computed once."""
    texts = ["Stocks fell.", "The cup final, after a long night of rain, went to penalties.", "", "A new chip"]
    tiny = train_qwen_tokenizer(["".join(make_template(AG_NEWS_LABELS))] * 2, 500)
    tokenizer = load_tokenizer(tokenizer_dir(tmp_path, tiny, *TEMPLATES[template], begins=template in BEGINS))
    chat = Chat(tokenizer, make_template(AG_NEWS_LABELS), 4, 400)
    questions, cut = chat.questions(texts)
    start, _, _ = tokenizer.decode(questions[0]).partition("Stocks")
    shared = tokenizer.decode(common_prefix(questions))
    assert (
        cut == 0 and start.startswith(shared) and shared.endswith("Article")
    )  # its line break may be one token with a text's
    assert ("assistant" in start) == (template != "Llama 3")  # a system turn
    model = make_model(config=config, vocab_size=len(tokenizer), max_position_embeddings=400)
    expected = score_brute_force(model, questions, chat.options, CPU)
    assert_scores_close(score(model, questions, chat.options, CPU), expected)
    assert_scores_close(score(model, questions, chat.options, CPU, share_prefix=False, max_tokens=300), expected)


@pytest.mark.parametrize("options", ["one token", "of different lengths"])
def test_a_prefix_read_before_serves_later_questions(options, model):
    """As in successive requests: the prefix of two earlier questions serves a third with the same start."""
    first, second, third = QUESTIONS["a prefix in common"][:3]
    prefix = read_prefix(model, [first, second], CPU)
    assert (
        prefix.ids == SAME
        and prefix.begins([third, first])
        and not prefix.begins([third, SAME])
        and not prefix.begins([[5, 6]])
    )
    assert read_prefix(model, [first], CPU) is None and read_prefix(model, [[1, 2], [3, 4]], CPU) is None
    keys = prefix.cache.layers[0][0].clone()
    found = score(model, [third], OPTIONS[options], CPU, "sum", prefix=prefix)
    assert_scores_close(found, score_brute_force(model, [third], OPTIONS[options], CPU, "sum"))
    assert torch.equal(prefix.cache.layers[0][0], keys)  # nothing was written into it


@pytest.mark.parametrize("config", ["tied, 4 heads a key", "wide heads, as many keys", "narrow heads, 3 a key"])
def test_score_equals_the_brute_force_in_other_models(config):
    model = make_model(config=config)
    for questions in (QUESTIONS["nothing in common"], QUESTIONS["one a prefix of another"]):
        expected = score_brute_force(model, questions, OPTIONS["of different lengths"], CPU)
        assert_scores_close(score(model, questions, OPTIONS["of different lengths"], CPU, max_tokens=20), expected)


def test_scores_come_in_the_order_of_the_questions(model):
    questions, options = QUESTIONS["many"], OPTIONS["of different lengths"]
    found = score(model, questions, options, CPU, max_tokens=50)
    distances = torch.cdist(found, found).fill_diagonal_(torch.inf)
    assert distances.min() > 1e-3  # rows cannot be mixed up unnoticed
    order = [*range(1, 35, 2), *range(0, 35, 2)]
    assert_scores_close(score(model, [questions[row] for row in order], options, CPU, max_tokens=50), found[order])
    backwards = score(model, questions, options[::-1], CPU, max_tokens=50)
    assert_scores_close(backwards, found.flip(1))


def by_hand(theirs: torch.nn.Module, question: list[int], option: list[int]) -> float:
    """log P(option | question) from transformers' logits."""
    ids = torch.tensor([question + option])
    with torch.inference_mode():
        logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    total = 0.0
    for i, token in enumerate(option):
        distribution = logits[len(question) + i - 1].double().softmax(0)  # the prediction before the token
        total += distribution[token].log().item()
    return total


@pytest.mark.parametrize("options", ["one token", "of different lengths", "prefixes of one another"])
def test_the_brute_force_equals_what_transformers_says(options):
    ours, theirs = make_pair()
    questions, options = QUESTIONS["nothing in common"], OPTIONS[options]
    total = torch.tensor([[by_hand(theirs, question, option) for option in options] for question in questions])
    assert_scores_close(score_brute_force(ours, questions, options, CPU, "sum"), total)
    mean = total / torch.tensor([len(option) for option in options])
    assert_scores_close(score_brute_force(ours, questions, options, CPU, "mean"), mean)
    assert_scores_close(score_brute_force(ours, questions, options, CPU), mean)  # unsaid, it is the mean


def test_exp_of_minus_the_score_is_the_perplexity():
    """The usual definition: exp of transformers' language-model loss, with labels for the option alone."""
    ours, theirs = make_pair()
    questions, options = QUESTIONS["a prefix in common"], OPTIONS["of different lengths"]
    found = (-score(ours, questions, options, CPU)).exp()
    for row, question in enumerate(questions):
        for o, option in enumerate(options):
            ids = torch.tensor([question + option])
            labels = torch.tensor([[-100] * len(question) + option])
            with torch.inference_mode():
                loss = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
            # exp makes a relative error of an absolute one of 1e-5.
            torch.testing.assert_close(found[row, o], loss.exp(), rtol=3e-5, atol=0)


def test_a_model_that_knows_nothing_has_a_perplexity_of_its_vocabulary():
    model = make_model()
    torch.nn.init.zeros_(model.lm_head.weight)  # every token is as likely as any other
    found = score(model, QUESTIONS["a prefix in common"], OPTIONS["of different lengths"], CPU)
    assert_scores_close((-found).exp(), torch.full_like(found, float(model.config.vocab_size)))


class Counted:
    """The model, with the numbers of tokens and of logits of each pass through it."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.tokens, self.logits = model, [], []

    def __call__(self, batch, at, cache=None):
        self.tokens.append(len(batch.input_ids))
        self.logits.append(len(at))
        return self.model(batch, at, cache)


@pytest.mark.parametrize("options", ["one token", "of different lengths"])
def test_the_prefix_goes_through_the_model_once(options, model):
    questions, options = QUESTIONS["a prefix in common"], OPTIONS[options]
    prefix, n = len(common_prefix(questions)), len(questions)
    assert prefix == len(SAME)
    further = sum(len(option) - 1 for option in options)  # tokens of the options that a question is followed by
    for share_prefix in (True, False):
        for max_tokens in (1, 20, None):
            counted = Counted(model)
            score(counted, questions, options, CPU, max_tokens=max_tokens, share_prefix=share_prefix)
            rests = sum(map(len, questions)) - (n * prefix if share_prefix else 0)
            assert sum(counted.tokens) == (prefix if share_prefix else 0) + rests + n * further
            assert sum(counted.logits) == share_prefix + n + n * further  # and the head only where it is read


def test_batches_are_as_large_as_allowed(model):
    questions = QUESTIONS["nothing in common"]
    # Each row has the room of the longest: 1 | 4 | 9 | 17 | 30, ..., 3 x 9 | 17 | 30, 3 x 9 | 2 x 30, 4 x 17 | 30, all.
    for max_tokens, passes in ((1, 5), (30, 3), (60, 2), (68, 2), (150, 1)):
        counted = Counted(model)
        score(counted, questions, OPTIONS["one token"], CPU, max_tokens=max_tokens)
        assert len(counted.tokens) == passes
        assert max(counted.tokens) <= max(max_tokens, 30)


PREFIXES = [
    ([[1, 2, 3], [1, 2, 4]], [1, 2]),
    ([[1, 2, 3], [1, 2, 3]], [1, 2]),  # the last one is left over
    ([[1, 2, 3], [1, 2]], [1]),
    ([[1, 2], [1, 2, 3], [1, 2, 3, 4]], [1]),
    ([[1], [1, 2]], []),
    ([[1], [1]], []),
    ([[1, 2, 3], [4, 2, 3]], []),
    ([[1, 5, 9], [1, 7, 9], [1, 6, 9]], [1]),
    ([[1, 2, 9, 4, 4], [1, 2, 3, 4, 4], [1, 2, 5, 4, 4]], [1, 2]),  # the middle row is neither first nor last
    ([[1, 2, 3, 4], [2, 2, 3, 4], [1, 2, 3, 4]], []),
    ([[10, 9, 1], [10, 10, 1], [9, 9, 1]], []),
    ([[3, 1, 4]], [3, 1]),
]


@pytest.mark.parametrize(("rows", "expected"), PREFIXES)
def test_common_prefix(rows, expected):
    assert common_prefix(rows) == expected
    assert common_prefix(rows[::-1]) == expected

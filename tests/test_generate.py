"""Greedy decoding against transformers and against no cache at all, and the option read out of what a model wrote.

    python -m pytest tests/test_generate.py

Small random models in fp32. Ids are compared, so there is no tolerance: the two likeliest tokens would have to be within
rounding of each other, which a test makes sure they never are.
"""

import pytest
import torch
import transformers  # noqa: F401 - imported by test_decoder in any case, and slow: not to be counted to the first test
from test_decoder import CPU, MANY, make_model, make_pair, random_rows
from test_prompt import BEGINS, TEMPLATES, tokenizer_dir

from minicls.batch import pack
from minicls.data import AG_NEWS_LABELS
from minicls.generate import generate, read_answer
from minicls.prompt import Chat, make_template
from minicls.tiny import train_qwen_tokenizer
from minicls.tokenizer import load_tokenizer

PROMPTS = random_rows([5, 1, 12, 30, 5, 2])
CONFIGS = ["plain", "narrow heads, 3 a key"]


def until(ids: list[int], stop_ids: list[int]) -> list[int]:
    """The ids before the first stop id."""
    return ids[: next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))]


@torch.inference_mode()
def argmax_without_cache(model, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The whole row through the model for each new token."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        logits = model(pack([ids]), torch.tensor([len(ids) - 1]))[0]
        first, second = logits.topk(2).values
        assert first - second > 1e-3  # rounding is a hundredth of that
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@torch.inference_mode()
def theirs_generate(theirs, prompt: list[int], max_new_tokens: int, stop_ids: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    # The mask said: without it transformers guesses one from ids that look like padding.
    options = {"attention_mask": torch.ones_like(ids), "eos_token_id": stop_ids or None, "pad_token_id": 0}
    output = theirs.generate(ids, do_sample=False, max_new_tokens=max_new_tokens, **options)
    return until(output[0, len(prompt) :].tolist(), stop_ids)


def stops_for(answers: list[list[int]]) -> list[int]:
    """Two ids at which some answers end: at once, later, and one perhaps never."""
    return [answers[0][0], answers[3][4]]


@pytest.mark.parametrize("config", CONFIGS)
def test_generate_equals_transformers_and_plain_argmax(config):
    ours, theirs = make_pair(config)
    plain = [argmax_without_cache(ours, prompt, 12) for prompt in PROMPTS]
    assert generate(ours, PROMPTS, 12, [], CPU) == plain
    assert [theirs_generate(theirs, prompt, 12, []) for prompt in PROMPTS] == plain
    stop_ids = stops_for(plain)
    expected = [until(answer, stop_ids) for answer in plain]
    assert expected[0] == [] and len({len(answer) for answer in expected}) > 2  # rows do end at different times
    assert generate(ours, PROMPTS, 12, stop_ids, CPU) == expected
    assert [theirs_generate(theirs, prompt, 12, stop_ids) for prompt in PROMPTS] == expected


@pytest.mark.parametrize(
    ("config", "template", "stop"), [("qwen2", "Qwen2.5", "<|im_end|>"), ("llama", "Llama 3", "<|eot_id|>")]
)
def test_an_answer_ends_where_the_chat_format_ends_it(config, template, stop, tmp_path):
    """At the end of a turn, as transformers' generate ends it with these ids."""
    tiny = train_qwen_tokenizer(["".join(make_template(AG_NEWS_LABELS))] * 2, 500)
    tokenizer = load_tokenizer(tokenizer_dir(tmp_path, tiny, *TEMPLATES[template], begins=template in BEGINS))
    chat = Chat(tokenizer, make_template(AG_NEWS_LABELS), 4, 400)
    (stop_id,) = tokenizer.control_ids([stop])
    assert chat.stop_ids == [stop_id, *tokenizer.control_ids(["<|endoftext|>"] if config == "qwen2" else [])]
    questions, _ = chat.prompts(["Stocks fell.", "The cup final went to penalties.", "", "A new chip"])
    ours, theirs = make_pair(config, vocab_size=len(tokenizer), max_position_embeddings=400)
    likely = generate(ours, questions[:1], 3, [], CPU)[0][2]
    for model in (ours, theirs):  # where this token would be the likeliest, the end is likelier
        with torch.no_grad():
            model.lm_head.weight[stop_id] = 1.5 * model.lm_head.weight[likely]
    expected = [until(argmax_without_cache(ours, question, 8), chat.stop_ids) for question in questions]
    assert len(expected[0]) < 3
    assert generate(ours, questions, 8, chat.stop_ids, CPU) == expected
    assert [theirs_generate(theirs, question, 8, chat.stop_ids) for question in questions] == expected


def test_no_batch_changes_an_answer():
    model = make_model()
    prompts = random_rows(MANY[::-1])
    plain = [argmax_without_cache(model, prompt, 4) for prompt in prompts]
    for stop_ids in ([], [plain[0][0], plain[7][3]]):
        expected = [until(answer, stop_ids) for answer in plain]
        for max_tokens in (1, 50, 10**6):
            assert generate(model, prompts, 4, stop_ids, CPU, max_tokens) == expected
        assert generate(model, prompts[::-1], 4, stop_ids, CPU) == expected[::-1]
        assert generate(model, prompts[3:4], 4, stop_ids, CPU) == expected[3:4]


def test_fewer_new_tokens_are_the_beginning_of_more():
    model = make_model()
    twelve = generate(model, PROMPTS, 12, [], CPU)
    for n in (0, 1, 2, 7):
        assert generate(model, PROMPTS, n, [], CPU) == [answer[:n] for answer in twelve]


def test_it_goes_no_further_than_the_last_row_needs():
    model, steps = make_model(), []

    def counted(*arguments):
        steps.append(len(arguments[0].input_ids))
        return model(*arguments)

    first = generate(model, PROMPTS[:1], 1, [], CPU)[0]
    assert generate(counted, PROMPTS[:1], 50, first, CPU) == [[]]
    assert steps == [5]  # the prompt, at whose end the first new token was a stop id
    steps.clear()
    generate(counted, PROMPTS[:1], 4, [], CPU)
    assert steps == [5, 1, 1, 1]  # the last token is not fed: nothing comes after it


READ = [
    ("A", 0),
    ("D", 3),
    ("A.", 0),
    ("\n\nB", 1),
    ("  C\n", 2),
    ("(D)", 3),
    ("**B**", 1),
    ('"C"', 2),
    ("B. Sports", 1),
    ("B: Sports", 1),
    ("B) Sports", 1),
    ("A or B", None),
    ("<think>\n\n</think>\n\nC", 2),
    ("<think>\nA is wrong, so\n</think>\n\nB", 1),
    ("<think>B</think></think>D", 3),
    ("\n\n</think>\n\nA<|im_end|>", 0),
    ("", None),
    ("\n\n", None),
    ("<think>\n\n</think>\n\n", None),
    ("<think>\nA is the", None),  # the thought was cut off, and no answer
    ("C</think>", None),
    ("Apple", None),
    ("Business", None),
    ("AB", None),
    ("A1", None),
    ("a", None),
    ("E", None),  # there are four options
    ("Z.", None),
    ("1", None),
    ("The answer is B", None),
    ("Answer: B", None),
    ("答案是B", None),
    ("B。", 1),
    ("\uff08C\uff09", 2),  # Chinese brackets
    ("Ä", None),
]


@pytest.mark.parametrize(("text", "expected"), READ)
def test_read_answer(text, expected):
    assert read_answer(text, 4) == expected


@pytest.mark.parametrize(("letter", "index"), [("A", 0), ("E", 4), ("Y", 24), ("Z", 25)])
def test_a_letter_is_an_option_if_there_are_as_many(letter, index):
    assert read_answer(f"{letter}.", index + 1) == index
    assert read_answer(f"{letter}.", index) is None


def test_read_answer_of_generated_ids():
    tokenizer = train_qwen_tokenizer(["A B C D Sports Apple"], vocab_size=300)
    start, end, stop = tokenizer.control_ids(["<think>", "</think>", "<|im_end|>"])
    (blank,) = tokenizer.encode(["\n\n"])

    def read(answers: list[list[int]]) -> list[int | None]:
        return [read_answer(tokenizer.decode(ids), 4) for ids in answers]

    answers = tokenizer.encode(["A", "B. Sports", "Apple", "", "E"])
    assert read(answers) == [0, 1, None, None, None]
    thought = [start, *blank, end, *blank]
    answers = [thought + ids for ids in answers[:2]]
    assert read([*answers, [*answers[1], stop]]) == [0, 1, 1]
    assert read([thought, []]) == [None, None]

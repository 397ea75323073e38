"""The multiple-choice question in the model's own chat format: texts and classes -> rows of ids.

A chat template is rendered around a marker, not around each text. The text around the marker is
constant, and its control tokens are inserted by id, so no part of a text can become one.
The turn is encoded as one string: an article's last full stop and the blank line after it are one
token, so encoding the parts separately would give other ids.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase

from minicls.batch import Rows
from minicls.config import UserError
from minicls.data import AG_NEWS_LABELS
from minicls.tokenizer import CHAT_TEMPLATE_REMEDY, Tokenizer

PROMPTS = {file.stem: file for file in sorted((Path(__file__).parent / "prompts").glob("*.txt"))}
# The published prompts speak of news. Data other than AG News gets these words instead.
NEWS = {"news article": "text", "Article": "Text", "新闻文章": "文本", "文章": "文本"}
TURN, LETTER = "\u2063minicls\u2063", "\u2063A\u2063"  # markers for the turn and the answer


def make_template(
    label_names: Sequence[str], prompt: str = "published", no_think: bool = False
) -> tuple[str, str]:
    """The user's turn before and after the text.

    `prompt` names one of PROMPTS or a text file with {text} and {options} in it. `no_think` ends
    one of PROMPTS with `/no_think`, as published; a file is used as it is.
    """
    names = [name.strip() for name in label_names]
    about_news = (*label_names,) == AG_NEWS_LABELS
    if len(names) > len(ascii_uppercase):
        raise UserError(f"--head: {len(names)} classes, 26 letters; use --head linear on bare text")
    for i, name in enumerate(names):
        if len(name.splitlines()) != 1 or name in names[:i]:
            need = "options need different names of one line"
            raise UserError(f"--label-names: class {i} is called {name!r}; {need}")
    if about_news:
        names[3] = "Science/Technology"  # as published
    options = "\n".join(f"{ascii_uppercase[i]}. {name}" for i, name in enumerate(names))
    file = PROMPTS.get(prompt, Path(prompt))
    try:
        template = file.read_text(encoding="utf-8-sig").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        remedy = f"pass a UTF-8 text file, or one of {', '.join(PROMPTS)}"
        raise UserError(f"--prompt: {prompt} is not readable ({error}); {remedy}") from None
    if prompt in PROMPTS:
        for news, other in NEWS.items() if not about_news else ():
            template = template.replace(news, other)
        template += "/no_think" * no_think
    for part in ("{text}", "{options}"):
        if (count := template.count(part)) != 1:
            raise UserError(f"--prompt: {file} has {part} {count} times; put it in once")
    before, after = template.split("{text}")  # before adding options: a class may be "{text}"
    return before.replace("{options}", options), after.replace("{options}", options)


@dataclass(frozen=True)
class ChatFormat:
    """The constant texts of a conversation: before + turn + after + think + gap + letter + ending.

    The defaults are for a model without a chat template; the comments show Qwen3's values.
    """

    before: str = ""  # <|im_start|>user\n; elsewhere it may begin with a default system turn
    after: str = ""  # <|im_end|>\n<|im_start|>assistant\n
    think: str = ""  # <think>\n\n</think>\n\n, an empty block: answer without thinking
    gap: str = " "  # empty; Mistral's template has a space here
    ending: str = ""  # <|im_end|>\n
    strips: bool = False  # whether the template strips whitespace around the turn


def render_chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """Learns the format by rendering the tokenizer's chat template around markers.

    Without a template: the bare turn, a space, the letter, and the end-of-sequence token.
    """
    if not tokenizer.chat_template:
        return ChatFormat(ending=tokenizer.named_tokens.get("eos_token", ""))

    def render(turn: str, *answer: str, **options) -> str:
        messages = [{"role": "user", "content": turn}]
        messages += [{"role": "assistant", "content": letter} for letter in answer]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=not answer, **options)

    thinking, direct = render(TURN), render(TURN, enable_thinking=False)
    answered = render(TURN, LETTER)
    counts = [text.count(TURN) for text in (thinking, direct, answered)]
    if [*counts, answered.count(LETTER)] != [1, 1, 1, 1]:
        fault = "drops or repeats the user's turn or the answer"
        raise UserError(f"{tokenizer.source}: its chat template {fault}; {CHAT_TEMPLATE_REMEDY}")
    # Disabling thinking adds an empty block at the end, or changes the prompt itself: keep that.
    prompt = thinking if direct.startswith(thinking) else direct
    before, after = prompt.split(TURN)
    start, ending = answered.split(LETTER)
    gap = start.removeprefix(direct) if start.startswith(direct) else ""
    strips = TURN + " " not in render(f" {TURN} ")
    return ChatFormat(before, after, direct[len(prompt) :], gap, ending, strips)


@dataclass
class Chat:
    """Turns texts into rows of ids, by a question's template and the chat format around it.

        prompt         the user's turn, up to where the assistant begins to write
        question       prompt + empty think block, to which the scorer appends each option
        training row   question + option + ending

    `think_in`: whether the empty think block belongs to the "response", which is trained on, or to
    the "prompt". `train_on`: the whole "response", or only the "letter".
    """

    tokenizer: Tokenizer
    template: tuple[str, str]
    num_options: int
    max_length: int
    think_in: str = "response"
    train_on: str = "response"
    format: ChatFormat | None = None  # None: rendered from the tokenizer's chat template
    think: list[int] = field(init=False)  # ids of the empty think block
    ending: list[int] = field(init=False)  # ids after the letter

    def __post_init__(self):
        self.format = self.format or render_chat_format(self.tokenizer)
        self.think = self.tokenizer.encode_with_control_tokens(self.format.think)
        self.ending = self.tokenizer.encode_with_control_tokens(self.format.ending)

    def _pieces(self, text: str) -> list[str]:
        """Splits constant text at control tokens, which are the elements at odd indices."""
        tokens = sorted(self.tokenizer.added_tokens, key=len, reverse=True)
        return re.split(f"({'|'.join(map(re.escape, tokens))})", text) if tokens else [text]

    @functools.cached_property
    def _around(self) -> tuple[list[int], str, str, list[int]]:
        """The constant parts of a prompt: ids, string, (the turn), string, ids.

        The turn is encoded together with the two strings, which reach to the control tokens nearest
        to it on either side.
        """
        encode = self.tokenizer.encode_with_control_tokens
        before, after = self._pieces(self.format.before), self._pieces(self.format.after)
        # With no template text before the turn, the tokenizer's own <s> comes first.
        first = [] if self.format.before else self.tokenizer.added_before()
        ids, last = first + encode("".join(before[:-1])), encode("".join(after[1:]))
        # Some tokenizers read text after a control token differently from text on its own.
        turn = "A text."
        expected = first + encode(f"{self.format.before}{turn}{self.format.after}")
        if expected != [*ids, *self.tokenizer.encode([before[-1] + turn + after[0]])[0], *last]:
            raise UserError(
                f"{self.tokenizer.source}: its tokenizer does not encode the chat template's "
                "pieces as it encodes them together; use another model, or --head linear on the "
                "bare text"
            )
        return ids, before[-1], after[0], last

    @functools.cached_property
    def options(self) -> list[list[int]]:
        """The ids of each letter, usually one, as the tokenizer encodes it after the question."""
        encode, options = self.tokenizer.encode_with_control_tokens, []
        question = self.template[1] + self.format.after + self.format.think  # its end is enough
        start = encode(question)
        for letter in ascii_uppercase[: self.num_options]:
            answered = question + self.format.gap + letter
            ids, with_ending = encode(answered), encode(answered + self.format.ending)
            if ids[: len(start)] != start or with_ending != ids + self.ending:
                raise UserError(
                    f"{self.tokenizer.source}: its tokenizer merges the option {letter} with the "
                    f"text around it, {question[-20:]!r}; use another model, or --prompt FILE with "
                    "another ending"
                )
            options.append(ids[len(start) :])
        return options

    @functools.cached_property
    def stop_ids(self) -> list[int]:
        """The control token after an answer, and the end-of-sequence and padding tokens."""
        special = map(self.tokenizer.named_tokens.get, ("eos_token", "pad_token"))
        tokens = [*self._pieces(self.format.ending)[1:2], *special]
        return self.tokenizer.control_ids([*dict.fromkeys(token for token in tokens if token)])

    @functools.cached_property
    def response_length(self) -> int:
        """The most ids that can follow a prompt. Seven with Qwen3's tokenizer."""
        return len(self.think) + max(map(len, self.options)) + len(self.ending)

    def prompts(self, texts: Sequence[str]) -> tuple[Rows, int]:
        """The prompts, and the number of texts cut so that a response fits into `max_length`."""
        first, start, end, last = self._around
        before, after = self.template

        def turns(texts: Sequence[str]) -> Rows:
            contents = [f"{before}{text}{after}" for text in texts]
            contents = [content.strip() for content in contents] if self.format.strips else contents
            return self.tokenizer.encode([f"{start}{content}{end}" for content in contents])

        room = self.max_length - self.response_length - len(first) - len(last)
        encoded, cut = turns(texts), 0
        for row, ids in enumerate(encoded):
            text, keep = texts[row], len(ids)
            cut += len(ids) > room
            while len(ids) > room:
                if not text:
                    needed = self.max_length - room + len(ids)
                    fault = f"{self.max_length} leaves no room for a text"
                    raise UserError(f"--max-length: {fault}; the prompt alone takes {needed}")
                # Cut the excess off the text's end. Repeat, since the tokens at the cut may change.
                keep = min(keep - 1, len(self.tokenizer.encode([text])[0]) - (len(ids) - room))
                text = self.tokenizer.head(text, keep)
                (ids,) = turns([text])
            encoded[row] = ids
        return [[*first, *ids, *last] for ids in encoded], cut

    def questions(self, texts: Sequence[str]) -> tuple[Rows, int]:
        """The questions, to which an option can be appended, and the number of texts cut."""
        prompts, cut = self.prompts(texts)
        return [ids + self.think for ids in prompts], cut

    def training_rows(self, texts: Sequence[str], labels: Sequence[int]) -> tuple[Rows, int]:
        """Questions with answers, up to the last trained token, and the number of texts cut."""
        questions, cut = self.questions(texts)
        ending = [] if self.train_on == "letter" else self.ending
        answers = [option + ending for option in self.options]
        return [ids + answers[y] for ids, y in zip(questions, labels, strict=True)], cut

    def target_counts(self, label: int) -> tuple[int, int, int]:
        """The targets that end a class's training rows: tokens before, in and after the letter."""
        if self.train_on == "letter":
            return 0, len(self.options[label]), 0
        before = len(self.think) if self.think_in == "response" else 0
        return before, len(self.options[label]), len(self.ending)

    def to_dict(self) -> dict:
        """The part of minicls.json from which `make_chat` restores the question."""
        return {"template": list(self.template), "chat": dataclasses.asdict(self.format)}


def make_chat(
    saved: dict,
    tokenizer: Tokenizer,
    label_names: Sequence[str],
    max_length: int,
    prompt: str = "published",
    source: Path | str = "minicls.json",
    **settings,
) -> Chat:
    """The question saved by `Chat.to_dict`, or if there is none, a new one from `prompt`.

    settings: `think_in` and `train_on`. `source`: the name in the message if `saved` is damaged.
    """
    no_think = "<think>" in tokenizer.added_tokens  # `/no_think` is for models that can
    template = saved.get("template") or make_template(label_names, prompt, no_think)
    try:
        chat_format = ChatFormat(**saved["chat"]) if saved.get("chat") else None
    except TypeError as error:
        fault = f"its chat format is not valid ({error})"
        raise UserError(f"{source}: {fault}; copy the whole model directory again") from None
    count = len(label_names)
    return Chat(tokenizer, tuple(template), count, max_length, format=chat_format, **settings)

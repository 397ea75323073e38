"""The multiple-choice prompt in the model's own chat format: texts and classes -> rows of ids.

A chat template is rendered once, around a mark in place of the user's turn. What stands around the mark
is constant, and its control tokens are inserted by id, so nothing in a text can become one. The turn
is encoded as one string, because an article's last full stop and the blank line after it are one
token: encoding the parts separately gives other ids.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase

from minicls.config import UserError
from minicls.data import AG_NEWS_LABELS
from minicls.tokenizer import Tokenizer

PROMPTS = {file.stem: file for file in sorted((Path(__file__).parent / "prompts").glob("*.txt"))}
# The published prompts speak of news. For other data than AG News they speak of a text.
NEWS = {"news article": "text", "Article": "Text", "新闻文章": "文本", "文章": "文本"}
MARK = "\u2063minicls\u2063"  # stands for the user's turn while a template is rendered
LETTER = "\u2063A\u2063"  # and this for the answer


def make_template(
    label_names: Sequence[str], prompt: str = "published", no_think: bool = False
) -> tuple[str, str]:
    """The user's turn before and after the text.

    `prompt` names one of PROMPTS or a text file with {text} and {options} in it. `no_think` appends
    the published prompt's `/no_think` to the former; a file says all that is to be said.

    Raises UserError where the classes make no options or the file is no template.
    """
    if len(label_names) > len(ascii_uppercase):
        raise UserError(
            f"--head: options are letters, and {len(label_names)} classes are too many; use --head linear on the bare text"
        )
    names = [name.strip() for name in label_names]
    for i, name in enumerate(names):
        if not name:
            raise UserError(
                f"--label-names: the name of class {i} is empty, so it makes no option; name it"
            )
        if len(name.splitlines()) > 1:
            raise UserError(
                f"--label-names: the name of class {i} has a line break, {name!r}; an option is one line"
            )
        if name in names[:i]:
            raise UserError(
                f"--label-names: classes {names.index(name)} and {i} are both {name!r}; give them different names"
            )
    about_news = tuple(label_names) == AG_NEWS_LABELS
    if about_news:
        names[3] = "Science/Technology"
    lines = "\n".join(
        f"{letter}. {name}" for letter, name in zip(ascii_uppercase, names, strict=False)
    )
    file = PROMPTS.get(prompt, Path(prompt))
    try:
        template = file.read_text(encoding="utf-8-sig").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompt: {prompt} is not readable ({error}); pass a UTF-8 text file, or one of {', '.join(PROMPTS)}"
        ) from None
    if prompt in PROMPTS:
        for news, other in NEWS.items() if not about_news else ():
            template = template.replace(news, other)
        template += "/no_think" * no_think
    for part in ("{text}", "{options}"):
        if template.count(part) != 1:
            raise UserError(
                f"--prompt: {file} has {part} {template.count(part)} times; put it in once, where it belongs"
            )
    before, after = template.split("{text}")  # first, since a class may be called anything
    return before.replace("{options}", lines), after.replace("{options}", lines)


def thinks(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer belongs to a model that can think: `<think>` is one of its added tokens."""
    return "<think>" in tokenizer.added_tokens


@dataclass(frozen=True)
class ChatFormat:
    """What a chat template puts around the user's turn and the answer.

    SmolLM2's, for example, where `before` also holds a system turn:

        <|im_start|>user\\n  {turn}  <|im_end|>\\n<|im_start|>assistant\\n  {letter}  <|im_end|>\\n
        `---- before ----'         `--------------- after --------------'         `--- ending ---'
    """

    before: str = ""
    after: str = ""
    think: str = (
        ""  # the empty think block that Qwen3's template ends with when it is told not to think
    )
    gap: str = (
        " "  # between that and the letter: Mistral's template has one, and so has the bare question
    )
    ending: str = ""
    strips: bool = False  # whether the template removes blanks around the turn


def render_chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """Renders the chat template of tokenizer_config.json as transformers' `apply_chat_template` does.

    Without a template: the bare turn, a blank, the letter, and the end-of-sequence token.
    Raises UserError where a template cannot be rendered or does not hold the turn exactly once.
    """
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    source = tokenizer.config.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if not source:
        return ChatFormat(ending=tokenizer.special_token("eos_token") or "")

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value, **options) -> str:
        return json.dumps(value, **({"ensure_ascii": False} | options))

    def strftime_now(form: str) -> str:
        import datetime

        return datetime.datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    # transformers marks the assistant's part with these and renders what is between them. Another tag
    # takes their place, because a tag's dashes decide which blanks around it stay.
    source = re.sub(r"(\{%[-+]?)\s*generation\s*([-+]?%\})", r"\1 if true \2", source)
    source = re.sub(r"(\{%[-+]?)\s*endgeneration\s*([-+]?%\})", r"\1 endif \2", source)
    names = (
        "bos_token",
        "eos_token",
        "unk_token",
        "pad_token",
        "sep_token",
        "cls_token",
        "mask_token",
    )
    tokens = {name: token for name in names if (token := tokenizer.special_token(name)) is not None}

    def render(turn: str, answer: str | None = None, **options) -> str:
        messages = [{"role": "user", "content": turn}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        given = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": answer is None,
        }
        try:
            return environment.from_string(source).render(**given, **options, **tokens)
        except Exception as error:  # a template is a program: whatever can go wrong in one
            raise UserError(
                f"--model: its chat template cannot render a user's turn ({type(error).__name__}: {error}); it may ask "
                "for a system turn: correct chat_template, or delete it to ask the bare question"
            ) from None

    prompt, question = render(MARK), render(MARK, enable_thinking=False)
    answered = render(MARK, LETTER)
    if (
        any(text.count(MARK) != 1 for text in (prompt, question, answered))
        or answered.count(LETTER) != 1
    ):
        raise UserError(
            "--model: its chat template drops or repeats the user's turn or the answer; correct chat_template, or delete "
            "it to ask the bare question"
        )
    if not question.startswith(
        prompt
    ):  # a template that thinks by default: without thoughts, the prompt is another
        prompt = question
    before, after = prompt.split(MARK)
    start, ending = answered.split(LETTER)
    gap = start.removeprefix(question) if start.startswith(question) else ""
    strips = MARK + " " not in render(f" {MARK} ")
    return ChatFormat(before, after, question[len(prompt) :], gap, ending, strips)


@dataclass(frozen=True)
class Chat:
    """A question's template and the chat format around it: turns texts into rows of ids.

    `think_in` says to which part the empty think block belongs: the response, which is trained on, or
    the prompt. `train_on` is the whole response or the letter alone.
    """

    tokenizer: Tokenizer
    template: tuple[str, str]
    num_options: int
    max_length: int
    think_in: str = "response"
    train_on: str = "response"
    format: ChatFormat | None = None  # None: the one that the tokenizer's chat template renders

    def __post_init__(self):
        if self.format is None:
            object.__setattr__(self, "format", render_chat_format(self.tokenizer))

    def _pieces(self, text: str) -> list[str]:
        """The constant text, cut at control tokens, which are the odd elements."""
        tokens = sorted(self.tokenizer.added_tokens, key=len, reverse=True)
        return re.split(f"({'|'.join(map(re.escape, tokens))})", text) if tokens else [text]

    def _ids(self, pieces: Sequence[str]) -> list[int]:
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            if piece:
                (encoded,) = (
                    [self.tokenizer.control_ids([piece])]
                    if i % 2
                    else self.tokenizer.encode([piece])
                )
                ids += encoded
        return ids

    @cached_property
    def _around(self) -> tuple[list[int], str, str, list[int]]:
        """The ids before the string that holds the turn, that string's two ends, and the ids after it.

        The string reaches from the last control token before the turn to the first one after it.
        """
        before, after = self._pieces(self.format.before), self._pieces(self.format.after)
        first = [] if self.format.before else self.tokenizer.added_before()
        ids = first + self._ids(before[:-1]), before[-1], after[0], self._ids(["", *after[1:]])
        # Some tokenizers read a text that follows a control token otherwise than one that stands alone.
        turn = "A text."
        whole = self.tokenizer.encode_with_control_tokens(
            f"{self.format.before}{turn}{self.format.after}"
        )
        if first + whole != [*ids[0], *self.tokenizer.encode([ids[1] + turn + ids[2]])[0], *ids[3]]:
            raise UserError(
                "--model: its tokenizer does not encode the chat template's pieces as it encodes them together; such a "
                "tokenizer is not supported, so use --head linear on the bare text"
            )
        return ids

    @cached_property
    def think(self) -> list[int]:
        """The empty think block's ids; none where the template has no such block."""
        return self._ids(self._pieces(self.format.think))

    @cached_property
    def _tail(self) -> str:
        """The text between the last control token and the letter; without control tokens, all that is constant."""
        return self._pieces(self.template[1] + self.format.after + self.format.think)[-1]

    @cached_property
    def options(self) -> list[list[int]]:
        """The ids of each letter as it is tokenized after what precedes it, one or several each.

        Raises UserError where the tokenizer merges a letter with the text around it.
        """
        letters = ascii_uppercase[: self.num_options]
        end = self._pieces(self.format.ending)[0]
        tail, last = self.tokenizer.encode([self._tail, end])
        answers = self.tokenizer.encode(
            [f"{self._tail}{self.format.gap}{letter}" for letter in letters]
        )
        ended = self.tokenizer.encode(
            [f"{self._tail}{self.format.gap}{letter}{end}" for letter in letters]
        )
        for letter, ids, whole in zip(letters, answers, ended, strict=True):
            if ids[: len(tail)] != tail or whole != ids + last:
                raise UserError(
                    f"--model: its tokenizer merges the option {letter} with the text around it, {self._tail[-20:]!r}; use "
                    "another model, or --prompt FILE with another ending"
                )
        return [ids[len(tail) :] for ids in answers]

    @cached_property
    def ending(self) -> list[int]:
        """What follows the letter: for Qwen3, `<|im_end|>` and the newline that closes a turn."""
        return self._ids(self._pieces(self.format.ending))

    @cached_property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer: the control token after it, and the end-of-sequence and padding tokens."""
        tokens = [
            *self._pieces(self.format.ending)[1:2],
            *map(self.tokenizer.special_token, ("eos_token", "pad_token")),
        ]
        return self.tokenizer.control_ids([*dict.fromkeys(token for token in tokens if token)])

    @cached_property
    def response_length(self) -> int:
        """The most ids that follow the prompt: think block, letter, ending. Seven with Qwen3's tokenizer."""
        return len(self.think) + max(map(len, self.options)) + len(self.ending)

    def prompts(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """The ids up to where the assistant begins to write, and the number of texts that were cut.

        A row leaves room for the response in `max_length`. Where it is too long, the text's end is cut
        and the turn encoded again. Raises UserError where even the empty text does not fit.
        """
        first, start, end, last = self._around
        before, after = self.template

        def turns(texts: Sequence[str]) -> list[list[int]]:
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
                    raise UserError(
                        f"--max-length: {self.max_length} leaves no room for a text; the prompt alone takes {needed}"
                    )
                # Fewer tokens of the text by the excess; and again, should the seam have made new ones.
                keep = min(keep - 1, len(self.tokenizer.encode([text])[0]) - (len(ids) - room))
                text = self.tokenizer.head(text, keep)
                (ids,) = turns([text])
            encoded[row] = ids
        return [[*first, *ids, *last] for ids in encoded], cut

    def questions(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Prompts with the think block, ready for an option: the scorer's rows; and the number of texts that were cut."""
        prompts, cut = self.prompts(texts)
        return [ids + self.think for ids in prompts], cut

    def training_rows(
        self, texts: Sequence[str], labels: Sequence[int]
    ) -> tuple[list[list[int]], int]:
        """Prompts with their answers, up to the last token that is trained on; and the number of texts that were cut."""
        questions, cut = self.questions(texts)
        ending = [] if self.train_on == "letter" else self.ending
        options = self.options
        return [
            ids + options[label] + ending for ids, label in zip(questions, labels, strict=True)
        ], cut

    def target_counts(self, label: int) -> tuple[int, int, int]:
        """The targets at the end of a training row of this class: (format tokens, letter tokens, format tokens)."""
        if self.train_on == "letter":
            return 0, len(self.options[label]), 0
        before = len(self.think) if self.think_in == "response" else 0
        return before, len(self.options[label]), len(self.ending)

    def saved(self) -> dict:
        """What minicls.json needs to ask the same question again."""
        return {"template": list(self.template), "chat": dataclasses.asdict(self.format)}


def make_chat(
    saved: dict,
    tokenizer: Tokenizer,
    label_names: Sequence[str],
    max_length: int,
    prompt: str = "published",
    place: Path | str = "minicls.json",
    **settings,
) -> Chat:
    """The question that `Chat.saved` wrote down; where `saved` has none, the one that `prompt` names.

    settings: `think_in` and `train_on`. Raises UserError that names `place` where the saved format is not one.
    """
    template = saved.get("template") or make_template(label_names, prompt, thinks(tokenizer))
    try:
        form = ChatFormat(**saved["chat"]) if saved.get("chat") else None
    except TypeError as error:
        raise UserError(
            f"{place}: its chat format is none ({error}); copy the whole model directory again"
        ) from None
    return Chat(tokenizer, tuple(template), len(label_names), max_length, format=form, **settings)

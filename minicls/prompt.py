"""The multiple-choice prompt and Qwen's chat format: texts and classes -> rows of ids.

The user turn is encoded as one string, because an article's last full stop and the blank line after it are one token:
encoding the parts apart gives other ids. Control tokens are put in by id; nothing in a text can become one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase

from minicls.config import UserError
from minicls.data import AG_NEWS_LABELS
from minicls.tokenizer import Tokenizer

# The published prompt's wording, word for word, and the same in Chinese: instruction, text, question, ending, a blank line
# between any two. {noun} is what a text is called.
TEMPLATES = {
    "en": (
        "Please read the following {noun} and determine its category from the options below.",
        "{Title}:\n{text}",
        "Question: What is the most appropriate category for this {noun}?\n{options}",
        "Answer:/no_think",
    ),
    "zh": (
        "请阅读下面的{noun}，并从给出的选项中判断它的类别。",
        "{Title}：\n{text}",
        "问题：这篇{noun}最合适的类别是什么？\n{options}",
        "答案：/no_think",
    ),
}
NOUNS = {"en": (("news article", "Article"), ("text", "Text")), "zh": (("新闻文章", "文章"), ("文本", "文本"))}  # AG News, others


def make_template(
    label_names: Sequence[str], language: str = "en", options: str = "after", file: str | None = None
) -> tuple[str, str]:
    """The user turn before and after the text: the published wording, or that of a file with {text} and {options} in it.

    A file has a language and an order of its own.

    Raises UserError where the classes make no options or the file no template.
    """
    if len(label_names) > len(ascii_uppercase):
        count = len(label_names)
        raise UserError(f"--head: options are letters, and {count} classes are too many; use --head linear on the bare text")
    names = [name.strip() for name in label_names]
    for i, name in enumerate(names):
        if not name:
            raise UserError(f"--label-names: the name of class {i} is empty, so it makes no option; name it")
        if len(name.splitlines()) > 1:
            raise UserError(f"--label-names: the name of class {i} has a line break, {name!r}; an option is one line")
        if name in names[:i]:
            raise UserError(f"--label-names: classes {names.index(name)} and {i} are both {name!r}; give them different names")
    published = tuple(label_names) == AG_NEWS_LABELS
    if published:
        names[3] = "Science/Technology"
    lines = "\n".join(f"{letter}. {name}" for letter, name in zip(ascii_uppercase, names, strict=False))
    if file is None:
        noun, title = NOUNS[language][0 if published else 1]
        instruction, text, question, ending = TEMPLATES[language]
        middle = (text, question) if options == "after" else (question, text)
        template = "\n\n".join([instruction, *middle, ending]).replace("{noun}", noun).replace("{Title}", title)
    else:
        try:
            template = Path(file).read_text(encoding="utf-8-sig").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt: {file} is not readable ({error}); pass a UTF-8 text file") from None
    for part in ("{text}", "{options}"):
        if template.count(part) != 1:
            raise UserError(f"--prompt: {file} has {part} {template.count(part)} times; put it in once, where it belongs")
    before, after = template.split("{text}")  # first, since a class may be called anything
    return before.replace("{options}", lines), after.replace("{options}", lines)


@dataclass(frozen=True)
class Chat:
    """A template and the ids around it: `<|im_start|>user`, the turn, `<|im_end|>`, `<|im_start|>assistant`, the answer.

    Equals the chat template of Qwen3's tokenizer_config.json for a conversation of one user turn and one answer without
    thinking. `think_in` says whose the empty think block is, the response's (trained on) or the prompt's.
    """

    tokenizer: Tokenizer
    template: tuple[str, str]
    num_options: int
    max_length: int
    think_in: str = "response"
    train_on: str = "response"

    @cached_property
    def think(self) -> list[int]:
        """`<think>`, a blank line, `</think>`, a blank line: what Qwen3 puts in place of thoughts."""
        start, end = self.tokenizer.control_ids(["<think>", "</think>"])
        (blank,) = self.tokenizer.encode(["\n\n"])
        return [start, *blank, end, *blank]

    @cached_property
    def options(self) -> list[list[int]]:
        """The ids of each letter as they stand after the think block; where a letter is several tokens, they are several.

        Raises UserError where the tokenizer joins a letter with what stands before it.
        """
        blank, *answers = self.tokenizer.encode(["\n\n", *(f"\n\n{letter}" for letter in ascii_uppercase[: self.num_options])])
        if any(ids[: len(blank)] != blank for ids in answers):
            raise UserError("--model: its tokenizer joins a blank line and a letter; use the tokenizer of a Qwen3 model")
        return [ids[len(blank) :] for ids in answers]

    @cached_property
    def response_length(self) -> int:
        """The most ids that follow `assistant\\n`: think block, letter, `<|im_end|>`, newline. Seven with Qwen's tokenizer."""
        return len(self.think) + max(map(len, self.options)) + len(self.ending)

    def prompts(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """The ids up to `assistant\\n` of each text, leaving room for the response in `max_length`; and how many were cut.

        Where a row is too long, the text's end is cut, and the turn encoded again. Raises UserError where even the empty
        text does not fit.
        """
        (start,) = self.tokenizer.control_ids(["<|im_start|>"])
        (assistant,) = self.tokenizer.encode(["assistant\n"])
        around = [start], [*self.ending, start, *assistant]
        before, after = self.template

        def turns(texts: Sequence[str]) -> list[list[int]]:
            return self.tokenizer.encode([f"user\n{before}{text}{after}" for text in texts])

        room = self.max_length - self.response_length - sum(map(len, around))
        encoded, cut = turns(texts), 0
        for row, ids in enumerate(encoded):
            text, keep = texts[row], len(ids)
            cut += len(ids) > room
            while len(ids) > room:
                if not text:
                    needed = self.max_length - room + len(ids)
                    raise UserError(f"--max-length: {self.max_length} leaves no room for a text; the prompt alone takes {needed}")
                # Fewer tokens of the text by what was too much; once more, should the seam have made new ones.
                keep = min(keep - 1, len(self.tokenizer.encode([text])[0]) - (len(ids) - room))
                text = self.tokenizer.head(text, keep)
                (ids,) = turns([text])
            encoded[row] = ids
        return [[*around[0], *ids, *around[1]] for ids in encoded], cut

    def questions(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Prompts with the think block, ready for an option: what is scored; and how many were cut."""
        prompts, cut = self.prompts(texts)
        return [ids + self.think for ids in prompts], cut

    def training_rows(self, texts: Sequence[str], labels: Sequence[int]) -> tuple[list[list[int]], int]:
        """Prompts with their answers, up to the last token that is trained on; and how many were cut."""
        questions, cut = self.questions(texts)
        ending = [] if self.train_on == "letter" else self.ending
        options = self.options
        return [ids + options[label] + ending for ids, label in zip(questions, labels, strict=True)], cut

    @cached_property
    def ending(self) -> list[int]:
        """`<|im_end|>` and the newline that closes a turn."""
        return [*self.tokenizer.control_ids(["<|im_end|>"]), *self.tokenizer.encode(["\n"])[0]]

    def target_counts(self, label: int) -> tuple[int, int, int]:
        """How a training row of this class ends: tokens trained on of the format, of the letter, and of the format again."""
        if self.train_on == "letter":
            return 0, len(self.options[label]), 0
        before = len(self.think) if self.think_in == "response" else 0
        return before, len(self.options[label]), len(self.ending)

"""Text -> ids with the `tokenizers` library. Text is data: nothing in it can become a control token.

`tokenizer.json` lists added tokens such as `[SEP]` or `<|im_end|>`. The library cuts them out of any text it encodes
unless `encode_special_tokens` is set, and even then those that are not marked special, such as Qwen's `<think>`. So all
are marked special before loading, and the code that knows a format inserts its control tokens by id. One exception:
words added to a BERT vocabulary (`add_tokens`) are vocabulary, and are matched in a text as transformers matches them.
"""

import datetime
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from minicls.config import UserError, read_json, write_json

CHUNK = 10_000  # texts at a time: the library's encodings are some ten times larger than their ids

# Control tokens, by their names in tokenizer_config.json.
BERT_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
TOKEN_NAMES = ("bos_token", "eos_token", *BERT_TOKENS)
CHAT_TEMPLATE_REMEDY = "correct chat_template, or delete it to ask the bare question"
# Fields of tokenizer_config.json that BertTokenizer builds its normalizer from, and their names in tokenizer.json.
BERT_NORMALIZER = {"do_lower_case": "lowercase", "strip_accents": "strip_accents"}
BERT_NORMALIZER |= {"tokenize_chinese_chars": "handle_chinese_chars"}


def _content(token: str | dict) -> str:
    """A token of tokenizer_config.json, which may be written as an object with flags."""
    return token["content"] if isinstance(token, dict) else token


class Tokenizer:
    """A `tokenizer.json`, and the few fields of `tokenizer_config.json` that matter here."""

    def __init__(self, json_text: str, config: dict, source: Path | str = "--model"):
        """`source`: the directory or the flag that messages name."""
        self.json_text, self.config, self.source = json_text, config, source
        self.named_tokens = {name: _content(config[name]) for name in TOKEN_NAMES if config.get(name)}
        additional = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
        additional = additional.values() if isinstance(additional, dict) else additional
        self.additional_tokens = [_content(token) for token in additional]  # control tokens without a name
        spec = self._spec()
        self.added_tokens = [token["content"] for token in spec["added_tokens"]]
        self.is_bert = all(t in self.added_tokens or t in spec["model"]["vocab"] for t in ("[CLS]", "[SEP]"))
        for token in spec["added_tokens"]:
            token["special"] |= not self.is_bert
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._tokenizer.encode_special_tokens = True

    def _spec(self) -> dict:
        """The content of tokenizer.json, corrected for both uses: reading texts here, and files for transformers."""
        spec = json.loads(self.json_text)
        # Some files (sentence-transformers') set truncation and padding; both are the caller's job.
        spec["truncation"] = spec["padding"] = None
        control_tokens = {*BERT_TOKENS.values(), *self.named_tokens.values(), *self.additional_tokens}
        for token in spec["added_tokens"]:
            token["special"] |= token["content"] in control_tokens
        normalizer = spec.get("normalizer") or {}
        # If the two files contradict each other, transformers' BertTokenizer follows the config, so a pretrained model
        # was trained that way. A field that the config lacks stays as tokenizer.json has it.
        if normalizer.get("type") == "BertNormalizer" and "Bert" in (self.config.get("tokenizer_class") or "Bert"):
            normalizer |= {name: self.config[field] for field, name in BERT_NORMALIZER.items() if field in self.config}
        return spec

    def __len__(self) -> int:
        """The rows that an embedding needs: the largest id plus one, even if ids are skipped."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without control tokens. Runs in threads unless TOKENIZERS_PARALLELISM=0 is set."""
        ids = []
        for start in range(0, len(texts), CHUNK):
            chunk = list(texts[start : start + CHUNK])
            ids += [encoding.ids for encoding in self._tokenizer.encode_batch_fast(chunk, add_special_tokens=False)]
        return ids

    def head(self, text: str, num_tokens: int) -> str:
        """The beginning of a text, up to where the first token after `num_tokens` starts.

        The end of the last token kept would not do: before normalisation it can lie between a letter and its accent.
        """
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return text if num_tokens >= len(offsets) else text[: offsets[num_tokens][0]] if num_tokens > 0 else ""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, with control tokens spelled out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def control_ids(self, tokens: Sequence[str]) -> list[int]:
        """The ids of control tokens. Raises UserError for those that the vocabulary lacks."""
        ids = [self._tokenizer.token_to_id(token) for token in tokens]
        if missing := ", ".join(token for token, i in zip(tokens, ids, strict=True) if i is None):
            raise UserError(f"{self.source}: its tokenizer lacks {missing}; is it the tokenizer of this kind of model?")
        return ids

    def eos_and_pad(self, config: dict) -> tuple[int, int]:
        """The ids of the end-of-sequence and the padding token; each serves as the other if that one is missing.

        tokenizer_config.json comes before `config`, the values of config.json. Raises UserError if neither names one.
        """

        def find(name: str) -> int | None:
            if token := self.named_tokens.get(f"{name}_token"):
                return self.control_ids([token])[0]
            ids = config.get(f"{name}_token_id")
            return ids[0] if isinstance(ids, list) else ids

        eos, pad = find("eos"), find("pad")
        if eos is None and pad is None:
            fault = "neither its tokenizer_config.json nor its config.json names an eos_token or pad_token"
            raise UserError(f"{self.source}: {fault}; add one")
        return (pad if eos is None else eos), (eos if pad is None else pad)

    def added_before(self) -> list[int]:
        """The ids that the tokenizer's own post-processor puts before a text: Llama's <s>, BERT's [CLS], often none."""
        (text,) = self.encode(["a"])
        ids = self._tokenizer.encode("a", add_special_tokens=True).ids
        return ids[: next((i for i in range(len(ids)) if ids[i : i + len(text)] == text), 0)]

    def encode_with_control_tokens(self, text: str) -> list[int]:
        """The ids of a trusted text, a rendered chat template, in which a control token's spelling is that token."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            self._tokenizer.encode_special_tokens = True

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template, the default one if there are several by name."""
        source = self.config.get("chat_template")
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        return source

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool, **options) -> str:
        """The messages in the model's chat format; equals transformers' method of this name.

        Raises UserError if the template fails: it is a program, which can fail in any way.
        """
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str):
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        environment.globals["strftime_now"] = datetime.datetime.now().strftime
        environment.globals["raise_exception"] = raise_exception
        # transformers adds a block {% generation %} around the assistant's part. `if true` renders the same, and keeps
        # the tag's dashes, which strip the whitespace next to it.
        source = self.chat_template
        for tag, known in (("generation", "if true"), ("endgeneration", "endif")):
            source = re.sub(rf"({{%[-+]?)\s*{tag}\s*([-+]?%}})", rf"\1 {known} \2", source)
        variables = self.named_tokens | {"tools": None, "documents": None, "messages": messages}
        try:
            return environment.from_string(source).render(
                variables, add_generation_prompt=add_generation_prompt, **options
            )
        except Exception as error:
            problem = f"its chat template cannot render a user's turn ({type(error).__name__}: {error})"
            raise UserError(f"{self.source}: {problem}; it may need a system turn: {CHAT_TEMPLATE_REMEDY}") from None

    def save(self, directory: Path, text_length: int | None = None, pad_token_id: int | None = None) -> None:
        """Writes tokenizer.json and tokenizer_config.json, from which transformers' AutoTokenizer encodes alike.

        The config names a class that takes tokenizer.json as it is. Classes such as BertTokenizer would build a
        normalizer from fields and defaults, which can differ from the one used in training.

        `text_length`: the most ids of a row, for a model that reads plain texts. transformers then also reads a spelled
        out control token as text; a chat format needs control tokens, so by default it does not. `pad_token_id`: the
        model's, by which transformers' decoders find a row's last token.
        """
        spec, named = self._spec(), self.named_tokens.copy()
        if self.is_bert:
            named |= BERT_TOKENS
        elif pad_token_id is not None:
            named["pad_token"] = self._tokenizer.id_to_token(pad_token_id)
        vocab = self._tokenizer.get_vocab()
        kept = ["model_max_length", "clean_up_tokenization_spaces", "chat_template"]
        kept += [] if self.is_bert else ["padding_side"]
        inputs = ["input_ids", *(["token_type_ids"] if self.is_bert else []), "attention_mask"]
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs}
        config |= {name: self.config[name] for name in kept if name in self.config}
        config |= {name: token for name, token in named.items() if token in vocab}
        if additional := [token for token in self.additional_tokens if token in vocab]:
            config["additional_special_tokens"] = additional
        spec["post_processor"] = self._post_processor(spec)
        if text_length:
            config |= {"model_max_length": text_length, "split_special_tokens": True}
            for token in spec["added_tokens"]:
                token["special"] |= not self.is_bert
        write_json(directory / "tokenizer.json", spec, indent=None)
        write_json(directory / "tokenizer_config.json", config)

    def _post_processor(self, spec: dict) -> dict | None:
        """The control tokens that transformers adds to a text: the same as in `bert_rows` or `text_rows`."""
        if self.is_bert:
            cls, sep = self.control_ids(["[CLS]", "[SEP]"])
            return {"type": "BertProcessing", "sep": ["[SEP]", sep], "cls": ["[CLS]", cls]}
        own = spec.get("post_processor") or {}
        # ByteLevel adds nothing, but it affects the offsets at which a long text is cut.
        steps = [step for step in own.get("processors", [own]) if step.get("type") == "ByteLevel"]
        if before := [(self._tokenizer.id_to_token(i), i) for i in self.added_before()]:
            text, second_text = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
            single = [*({"SpecialToken": {"id": token, "type_id": 0}} for token, _ in before), text]
            step = {"type": "TemplateProcessing", "single": single, "pair": [*single, second_text]}
            steps.append(step | {"special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in before}})
        return {"type": "Sequence", "processors": steps} if steps else None


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a model directory. Raises UserError if a file is absent or unreadable."""
    path, config_path = directory / "tokenizer.json", directory / "tokenizer_config.json"
    template = directory / "chat_template.jinja"  # newer directories keep the template here, not in the config
    if not path.is_file():
        raise UserError(f"{directory}: no tokenizer.json; save it with transformers' fast tokenizer (save_pretrained)")
    config = read_json(config_path, "download or save it again") if config_path.is_file() else {}
    try:
        if template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
        return Tokenizer(path.read_text(encoding="utf-8"), config, directory)
    except Exception as error:  # tokenizers raises a bare Exception for a broken file
        files = " or ".join(str(file) for file in (path, config_path, template) if file.is_file())
        raise UserError(f"{files}: not a readable tokenizer ({error}); download or save it again") from None


def bert_rows(
    tokenizer: Tokenizer, texts: Sequence[str], max_length: int, long_text: str = "head"
) -> tuple[list[list[int]], int]:
    """`[CLS] text [SEP]` for each text, at most `max_length` ids. Returns the rows and the number of texts cut.

    A long text keeps its beginning or, with `head-tail`, a quarter of the room from its beginning and the rest from its
    end: the best way that Sun et al. tried (arXiv 1905.05583, section 5.3.1: 128 + 382 tokens).
    """
    cls, sep = tokenizer.control_ids(["[CLS]", "[SEP]"])
    room = max_length - 2
    head = round(room * 128 / 510) if long_text == "head-tail" else room
    rows, cut = [], 0
    for ids in tokenizer.encode(texts):
        if len(ids) > room:
            ids, cut = ids[:head] + ids[len(ids) - (room - head) :], cut + 1
        rows.append([cls, *ids, sep])
    return rows, cut


def text_rows(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], int]:
    """The ids of each plain text, for a decoder's linear head, at most `max_length`; and the number of texts cut.

    A row begins with the ids that the tokenizer's own post-processor adds, such as Llama's `<s>`. The row of an empty
    text is one end-of-sequence token: the head needs a token to read.
    """
    before = tokenizer.added_before()
    empty = tokenizer.control_ids([tokenizer.named_tokens.get("eos_token") or "<|im_end|>"])
    rows = [[*before, *ids] or empty for ids in tokenizer.encode(texts)]
    return [ids[:max_length] for ids in rows], sum(len(ids) > max_length for ids in rows)

"""Text -> ids with the `tokenizers` library. Text is data: nothing in it can become a control token.

`tokenizer.json` lists added tokens such as `[SEP]` or `<|im_end|>`. The library cuts them out of any text it encodes,
unless `encode_special_tokens` says to treat them as text; and that covers only those marked special, which Qwen's
`<think>` and others are not. So all are marked special before loading, text is encoded so, and control tokens are put in
by id, by the code that knows the format. The exception: words that somebody added to a BERT vocabulary (`add_tokens`) are
vocabulary, and are matched in a text as transformers matches them.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from minicls.config import UserError

CHUNK = 10_000  # texts at a time: the library's encodings are some ten times larger than their ids


# The names that tokenizer_config.json has for control tokens.
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BERT_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}

# Fields of tokenizer_config.json that BertTokenizer builds its normalizer from, and their names in tokenizer.json.
BERT_NORMALIZER = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


class Tokenizer:
    """A `tokenizer.json` and what little of `tokenizer_config.json` matters here."""

    def __init__(self, json_text: str, config: dict):
        self.json_text, self.config = json_text, config
        spec = self._spec()
        names = {token["content"] for token in spec["added_tokens"]}
        self.is_bert = all(token in names or token in spec["model"]["vocab"] for token in ("[CLS]", "[SEP]"))
        for token in spec["added_tokens"]:
            token["special"] |= not self.is_bert
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self._tokenizer.encode_special_tokens = True
        self.added_tokens = [token["content"] for token in spec["added_tokens"]]

    def _spec(self) -> dict:
        """The content of tokenizer.json, as both directions need it: reading texts here, and files for transformers."""
        spec = json.loads(self.json_text)
        # Some files (sentence-transformers') carry a truncation and padding of their own; both are the caller's business.
        spec["truncation"] = spec["padding"] = None
        named = {*BERT_TOKENS.values(), *self._named_tokens().values(), *self._additional_tokens()}
        for token in spec["added_tokens"]:
            token["special"] |= token["content"] in named
        normalizer = spec.get("normalizer") or {}
        # Where the two files contradict each other, transformers' BertTokenizer follows the config, so a pretrained model was
        # trained that way. A field that the config lacks stays as tokenizer.json has it.
        if normalizer.get("type") == "BertNormalizer" and "Bert" in (self.config.get("tokenizer_class") or "Bert"):
            normalizer |= {name: self.config[field] for field, name in BERT_NORMALIZER.items() if field in self.config}
        return spec

    def _named_tokens(self) -> dict[str, str]:
        """The control tokens that tokenizer_config.json names, such as {"eos_token": "<|im_end|>"}."""
        return {name: token for name in TOKEN_NAMES if (token := self.special_token(name))}

    def _additional_tokens(self) -> list[str]:
        """The control tokens that it lists without a name."""
        tokens = self.config.get("additional_special_tokens") or self.config.get("extra_special_tokens") or []
        tokens = tokens.values() if isinstance(tokens, dict) else tokens
        return [token["content"] if isinstance(token, dict) else token for token in tokens]

    def __len__(self) -> int:
        """Rows that an embedding needs: the largest id plus one, also where a vocabulary has holes."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, and of nothing but the text. Runs in threads (TOKENIZERS_PARALLELISM=0 turns them off)."""
        ids = []
        for start in range(0, len(texts), CHUNK):
            chunk = list(texts[start : start + CHUNK])
            ids += [e.ids for e in self._tokenizer.encode_batch_fast(chunk, add_special_tokens=False)]
        return ids

    def head(self, text: str, num_tokens: int) -> str:
        """The beginning of a text that its first `num_tokens` tokens cover: up to where the next one starts.

        Not to where the last one ends, which is inside a letter whose accent is a character of its own until normalised.
        """
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return text if num_tokens >= len(offsets) else text[: offsets[num_tokens][0]] if num_tokens > 0 else ""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens shown."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def control_ids(self, tokens: Sequence[str]) -> list[int]:
        """The ids of control tokens; raises UserError naming those that the vocabulary lacks."""
        ids = [self._tokenizer.token_to_id(token) for token in tokens]
        missing = [token for token, i in zip(tokens, ids, strict=True) if i is None]
        if missing:
            raise UserError(
                f"--model: its tokenizer lacks {', '.join(missing)}; is it the tokenizer of this kind of model?"
            )
        return ids

    def special_token(self, name: str) -> str | None:
        """The token that tokenizer_config.json names, `eos_token` for one."""
        token = self.config.get(name)
        return token["content"] if isinstance(token, dict) else token

    def eos_and_pad(self, config: dict) -> tuple[int, int]:
        """The ids of the end-of-sequence and the padding token; each serves as the other if that one is missing.

        tokenizer_config.json comes before `config`, the values of config.json. Raises UserError if neither names one.
        """
        ids = []
        for name in ("eos", "pad"):
            token, value = self.special_token(f"{name}_token"), config.get(f"{name}_token_id")
            value = self.control_ids([token])[0] if token else value
            ids.append(value[0] if isinstance(value, list) else value)
        eos, pad = ids
        if eos is None and pad is None:
            raise UserError(
                "--model: neither its tokenizer_config.json nor its config.json names an eos_token or pad_token; add one"
            )
        return (pad if eos is None else eos), (eos if pad is None else pad)

    def added_before(self) -> list[int]:
        """The ids that the tokenizer's own post-processor puts before a text: Llama's <s>, BERT's [CLS], often none."""
        (text,) = self.encode(["a"])
        ids = self._tokenizer.encode("a", add_special_tokens=True).ids
        return ids[: next((i for i in range(len(ids)) if ids[i : i + len(text)] == text), 0)]

    def encode_with_control_tokens(self, text: str) -> list[int]:
        """The ids of a trusted text, in which the spelling of a control token is that token: a rendered chat template."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            self._tokenizer.encode_special_tokens = True

    def save(self, directory: Path, text_length: int | None = None, pad_token_id: int | None = None) -> None:
        """Writes tokenizer.json and tokenizer_config.json, from which transformers' AutoTokenizer reads texts as `encode` does.

        The config names a class that takes tokenizer.json as it is. transformers' classes for a kind of model, BertTokenizer
        for one, build a normalizer of their own from fields or defaults, and another one than the model was trained with.

        `text_length`: for a model that reads bare texts, of at most so many ids. Control tokens that are spelled out in a text
        are then text for transformers too. A chat format needs them to be control tokens, so without it they are.
        `pad_token_id`: the model's, which transformers' decoders find a row's last token by.
        """
        spec, named = self._spec(), self._named_tokens()
        if self.is_bert:
            named |= BERT_TOKENS
        elif pad_token_id is not None:
            named["pad_token"] = self._tokenizer.id_to_token(pad_token_id)
        named = {
            name: token for name, token in named.items() if token and self._tokenizer.token_to_id(token) is not None
        }
        inputs = ["input_ids", *(["token_type_ids"] if self.is_bert else []), "attention_mask"]
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs}
        kept = (
            "model_max_length",
            "clean_up_tokenization_spaces",
            "chat_template",
            *(() if self.is_bert else ("padding_side",)),
        )
        config |= {name: self.config[name] for name in kept if name in self.config} | named
        additional = [token for token in self._additional_tokens() if self._tokenizer.token_to_id(token) is not None]
        config |= {"additional_special_tokens": additional} if additional else {}
        if self.is_bert:
            cls, sep = self.control_ids(["[CLS]", "[SEP]"])
            spec["post_processor"] = {"type": "BertProcessing", "sep": ["[SEP]", sep], "cls": ["[CLS]", cls]}
        else:  # what stands before a text stays; nothing comes after it, as in text_rows
            before = [(self._tokenizer.id_to_token(i), i) for i in self.added_before()]
            parts = [{"SpecialToken": {"id": token, "type_id": 0}} for token, _ in before]
            single, second = [*parts, {"Sequence": {"id": "A", "type_id": 0}}], {"Sequence": {"id": "B", "type_id": 0}}
            tokens = {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in before}
            processor = {
                "type": "TemplateProcessing",
                "single": single,
                "pair": [*single, second],
                "special_tokens": tokens,
            }
            steps = spec.get("post_processor") or {}
            # ByteLevel adds nothing, but has a say in the offsets that a long text is cut at.
            steps = [step for step in steps.get("processors", [steps]) if step.get("type") == "ByteLevel"]
            steps += [processor] if before else []
            spec["post_processor"] = {"type": "Sequence", "processors": steps} if steps else None
        if text_length:
            config |= {"model_max_length": text_length, "split_special_tokens": True}
            for token in spec["added_tokens"]:
                token["special"] |= not self.is_bert
        for name, values, indent in (("tokenizer.json", spec, None), ("tokenizer_config.json", config, 2)):
            (directory / name).write_text(
                json.dumps(values, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8"
            )


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a model directory; raises UserError where a file is absent or unreadable."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{directory}: no tokenizer.json; save it with transformers' fast tokenizer (save_pretrained) first"
        )
    config_path = directory / "tokenizer_config.json"
    try:
        config = dict(json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {})
    except (ValueError, TypeError) as error:
        raise UserError(f"{config_path}: not readable ({error}); download or save it again") from None
    template = directory / "chat_template.jinja"  # where newer directories keep what used to stand in the config
    if template.is_file():
        config |= {"chat_template": template.read_text(encoding="utf-8")}
    try:
        return Tokenizer(path.read_text(encoding="utf-8"), config)
    except Exception as error:  # tokenizers raises a bare Exception for a broken file
        raise UserError(f"{path}: not a readable tokenizer ({error}); download or save it again") from None


def bert_rows(
    tokenizer: Tokenizer, texts: Sequence[str], max_length: int, long_text: str = "head"
) -> tuple[list[list[int]], int]:
    """`[CLS] text [SEP]` for each text, at most `max_length` ids; returns the rows and how many had to be cut.

    A long text keeps its head, or, with `head-tail`, a quarter of its room from the start and the rest from the end, the
    best of the ways tried by Sun et al. (arXiv 1905.05583, section 5.3.1: 128 + 382 tokens).
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
    """The ids of each text alone, for a decoder's linear head, cut to `max_length`; and the number of texts that were cut.

    What the tokenizer's own post-processor puts before a text, Llama's `<s>` for one, is put there. A row without ids, an
    empty text's, is one end-of-sequence token: the head needs a token to read.
    """
    before = tokenizer.added_before()
    empty = tokenizer.control_ids([tokenizer.special_token("eos_token") or "<|im_end|>"])
    rows = [[*before, *ids] or empty for ids in tokenizer.encode(texts)]
    return [ids[:max_length] for ids in rows], sum(len(ids) > max_length for ids in rows)

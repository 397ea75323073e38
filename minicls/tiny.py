"""The parts of an offline smoke run: model sizes, two small tokenizers, and synthetic texts."""

import random
from collections import Counter
from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from minicls.tokenizer import BERT_TOKENS, Tokenizer

SMALL_QWEN3 = {
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
# config.json of the models that can be made without files. The tiny ones are large enough to learn the synthetic texts,
# and small enough to do so in a minute on a CPU. vLLM serves no attention head below 32 dimensions.
SIZES = {
    "tiny-bert": {
        "model_type": "bert",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "max_position_embeddings": 512,
    },
    "tiny-qwen3": SMALL_QWEN3 | {"hidden_size": 64, "num_hidden_layers": 2, "head_dim": 32, "intermediate_size": 192},
    # 3.1M parameters in four layers, trained from random weights in results/; the vocabulary is that of its tokenizer.
    "qwen3-small": SMALL_QWEN3 | {"hidden_size": 256, "num_hidden_layers": 4, "head_dim": 64, "intermediate_size": 768},
    "bert-base-cased": {"model_type": "bert", "vocab_size": 28_996},  # the rest are BertConfig's defaults
    "Qwen3-0.6B": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
    },
}


def train_bert_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A small uncased WordPiece tokenizer in BERT's format: every character, then the most common words.

    The library's WordPieceTrainer numbers the pieces in the order of a hash table, which differs in every process.
    """
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    counts = Counter()
    for text in texts:
        words = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        counts.update(word for word, _ in words)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = sorted({character for word in counts for character in word})
    words = sorted(counts, key=lambda word: (-counts[word], word))
    pieces = [*special, *characters, *(f"##{character}" for character in characters), *words]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces[: max(vocab_size, len(special))]))}
    tokenizer.model = models.WordPiece(vocab, unk_token="[UNK]")
    tokenizer.add_special_tokens(special)
    return Tokenizer(tokenizer.to_str(), {"model_max_length": 512} | BERT_TOKENS)


QWEN_CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")

# Qwen splits a text like this before merging byte pairs: letters, single digits, punctuation with line breaks, spaces.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen's chat format without tools and thinking, for serving a tiny model's directory.
QWEN_CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
    "{%- endif %}{%- endif %}"
)


def train_qwen_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A small byte-level BPE tokenizer in Qwen's format.

    Every byte is a token, so no text has unknown parts; merges by frequency follow (Sennrich et al., arXiv 1508.07909).
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pattern = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pattern, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = max(vocab_size - len(QWEN_CONTROL_TOKENS), len(alphabet))
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # As in Qwen's own file, control tokens come after the merges, and some are not marked special.
    for token in QWEN_CONTROL_TOKENS:
        tokenizer.add_tokens([AddedToken(token, special=token.startswith("<|"), normalized=False)])
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": QWEN_CHAT_TEMPLATE}
    return Tokenizer(tokenizer.to_str(), config | {"model_max_length": 4096})


def new_model(size: str, texts: Sequence[str], vocab_size: int) -> tuple[dict, Tokenizer]:
    """The config.json of one of SIZES and a small tokenizer learned from `texts`, for a model with random weights.

    For a decoder, pass the texts with their prompt, so that the words of the prompt become tokens as well.
    """
    if SIZES[size]["model_type"] == "bert":
        tokenizer = train_bert_tokenizer(texts, vocab_size)
        config = {"architectures": ["BertForSequenceClassification"]}
    else:
        tokenizer = train_qwen_tokenizer(texts, vocab_size)
        pad, end = tokenizer.control_ids(["<|endoftext|>", "<|im_end|>"])
        config = {"architectures": ["Qwen3ForCausalLM"], "eos_token_id": end, "pad_token_id": pad}
    return {"vocab_size": len(tokenizer)} | config | SIZES[size], tokenizer


# Words that hint at a class, and words that do not.
_TOPIC_WORDS = (
    "minister election treaty embassy border troops parliament rebels ceasefire refugees president sanctions envoy "
    "hostages province militants diplomats capital protest summit",
    "coach season striker playoff champion stadium defeat inning goal medal tournament quarterback league injury "
    "victory rookie racket relay referee penalty",
    "shares profit merger quarter investors earnings oil bank stocks revenue analysts dividend retailer inflation "
    "shareholders bankruptcy lender trade pension forecast",
    "software internet satellite browser scientists chip telescope virus wireless server researchers laptop genome "
    "broadband spacecraft encryption robot download network fossil",
)
_COMMON_WORDS = (
    "the a of in on for with after before over new early late another first last big small two three more than said "
    "says reported announced expected could will may monday tuesday friday week month year today people group "
    "officials plan deal record talks team company world home top major long open move set back next against under"
)


def synthetic_texts(n: int) -> tuple[list[str], list[int]]:
    """n news-like texts in AG News' four classes and their labels, the same in every process.

    Some words of a text hint at its class, fewer at a random one, and one label in twenty is random. So no model gets
    every row right, and a model that has learned nothing gets a quarter.
    """
    rng = random.Random(0)
    topics, common = [words.split() for words in _TOPIC_WORDS], _COMMON_WORDS.split()
    texts, labels = [], []
    for _ in range(n):
        topic = rng.randrange(4)
        words = []
        for _ in range(rng.randint(12, 40)):
            draw = rng.random()
            choices = topics[topic] if draw < 0.16 else topics[rng.randrange(4)] if draw < 0.3 else common
            words.append(rng.choice(choices))
        texts.append(" ".join(words).capitalize() + ".")
        labels.append(rng.randrange(4) if rng.random() < 0.05 else topic)
    return texts, labels

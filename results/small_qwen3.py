"""A directory for `train_qwen.py --model DIR --init random`: a small Qwen3's config.json, and a tokenizer of its texts.

    python results/small_qwen3.py models/qwen3-small --data data/ag_news

3.1M parameters in four layers, and 2.1M in an embedding of 8,192 tokens. The tokenizer learns from the training texts
inside their prompt, so that the prompt's own words are tokens too.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from minicls.data import load_data
from minicls.prompt import make_template
from minicls.tiny import train_qwen_tokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("directory", type=Path)
parser.add_argument("--data", required=True)
parser.add_argument("--prompt", default="published")
parser.add_argument("--vocab-size", type=int, default=8192)
args = parser.parse_args()

data = load_data(args.data)
before, after = make_template(data.label_names, args.prompt, no_think=True)
tokenizer = train_qwen_tokenizer([before + text + after for text in data.train.texts], args.vocab_size)
pad, end = tokenizer.control_ids(["<|endoftext|>", "<|im_end|>"])
config = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": len(tokenizer),
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": end,
    "pad_token_id": pad,
}
args.directory.mkdir(parents=True, exist_ok=True)
tokenizer.save(args.directory)
(args.directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
print(f"{args.directory}: {len(tokenizer):,} tokens")

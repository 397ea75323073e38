"""A directory for `train_qwen.py --model DIR --init random`: a small Qwen3's config.json, and a tokenizer of its texts.

    python results/small_qwen3.py models/qwen3-small --data data/ag_news

3.1M parameters in four layers, and 2.1M in an embedding of 8,192 tokens. The tokenizer learns from the training texts
inside their prompt, so that the prompt's own words become tokens, too.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from minicls.config import write_json
from minicls.data import load_data
from minicls.prompt import make_template
from minicls.tiny import new_model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--prompt", default="published")
    parser.add_argument("--vocab-size", type=int, default=8192)
    args = parser.parse_args(argv)
    data = load_data(args.data)
    before, after = make_template(data.label_names, args.prompt, no_think=True)
    config, tokenizer = new_model("qwen3-small", [before + text + after for text in data.train.texts], args.vocab_size)
    args.directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(args.directory)
    write_json(args.directory / "config.json", config)
    print(f"{args.directory}: {len(tokenizer):,} tokens")


if __name__ == "__main__":
    main()

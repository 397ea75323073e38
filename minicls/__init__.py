"""minicls: text classification with a fine-tuned BERT or a fine-tuned small LLM, in raw PyTorch."""

import importlib

__version__ = "0.1.0"


def __getattr__(name: str):
    """`from minicls import Classifier`, without importing torch, which takes seconds, for those who do not need it."""
    if name == "Classifier":
        return importlib.import_module("minicls.predict").Classifier
    raise AttributeError(f"module 'minicls' has no attribute {name!r}")

"""minicls: text classification with a fine-tuned BERT or a fine-tuned small LLM, in raw PyTorch."""

__version__ = "0.1.0"

"""A baseline for the networks: logistic regression on word counts, or on the frozen embeddings of a BERT.

    python -m minicls baseline --data DIR                        # TF-IDF of words and pairs of words
    python -m minicls baseline --data DIR --features MODEL_DIR   # mean-pooled last hidden states, not trained

With the flags of a training run, the baseline is fitted and tested on the same rows. It writes a run directory for
`python -m minicls report`, but saves no model.

TF-IDF is scikit-learn's TfidfVectorizer on lower-cased words and pairs of neighbouring words (each Chinese or Japanese
character is a word), with each count replaced by 1 + ln(count), fitted on the training rows. An embedding is the mean
over all tokens of a row, [CLS] and [SEP] included, as sentence-transformers pools; it is neither normalised nor
standardised. The classifier is scikit-learn's LogisticRegression (L2, lbfgs). Its C is the one of 0.01, 0.1, … 1,000
with the best macro F1 on the validation rows; on a tie, the one with the lowest loss. Rows held out with
`--validation-size`, as the scripts hold them out, are never fitted on. Without validation rows, a stratified fifth of
the training rows chooses C, and the classifier is then fitted on all training rows.
"""

import dataclasses
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minicls import checkpoint, dist, plots, results, weights
from minicls.batch import length_batches, pack
from minicls.config import DataSettings, UserError, flag_of, parse, setting
from minicls.data import Split, describe, load_splits, stratified_rows
from minicls.kernels import on_gpu
from minicls.logger import Logger
from minicls.metrics import evaluate_logits
from minicls.predict import EVAL_TOKENS
from minicls.tokenizer import Tokenizer, bert_rows, load_tokenizer

GRID = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)  # values of C, the inverse of the L2 penalty
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # written without spaces: a character is a word
WORD = rf"[{CJK}]|[^\W{CJK}]+"
UNSEEN_GAP = 30.0  # nats by which a class without training rows is behind the likeliest: the loss stays finite


@dataclass(frozen=True)
class Settings(DataSettings):
    """The rows are those of a training run with the same flags. Validation rows choose C."""

    features: str = setting("tfidf", "tfidf, or a BERT to embed the texts with: hub id or directory", group="model")
    class_weights: str = setting("none", "balanced: classes weigh the same in the loss", choices=("none", "balanced"))
    max_length: int = setting(512, "tokens of a row to embed, [CLS] and [SEP] included", minimum=3)
    output_dir: str | None = setting(None, "run directory, new or empty; unset: runs/baseline-<time>", group="machine")
    dtype: str = setting("bf16", "dtype of embedding: bf16 is autocast over fp32 weights", choices=("bf16", "fp32"))


@torch.inference_mode()
def embeddings(
    directory: Path, splits: Sequence[Split], s: Settings, device: torch.device
) -> tuple[list[np.ndarray], Tokenizer]:
    """The mean of each row's last hidden states, (n, D) float32 for each split, and the tokenizer."""
    config, tokenizer = weights.read_config(directory, weights.BERT), load_tokenizer(directory)
    model, fresh, load_report = weights.build_model(weights.BERT, config, directory, 0, device)
    print(f"{directory}: {load_report}" + " (the head and the pooler are not used)" * bool(fresh))
    weights.check_fits(model.config, tokenizer, s.max_length)
    model.eval()
    embedded = []
    for split in splits:
        rows, _ = bert_rows(tokenizer, split.texts, s.max_length)
        means = np.zeros((len(rows), model.config.hidden_size), np.float32)
        for batch in length_batches(rows, EVAL_TOKENS[on_gpu(device)]):
            packed = pack([rows[row] for row in batch], device)
            every_token = torch.arange(len(packed.input_ids), device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=s.dtype == "bf16"):
                hidden = model.bert(packed, every_token).float()  # (N, D)
            lengths = packed.cu_seqlens.diff().long()  # (B,)
            means[batch] = torch.segment_reduce(hidden, "mean", lengths=lengths).cpu().numpy()
        embedded.append(means)
    return embedded, tokenizer


def tfidf(fitted_on: Sequence[str], *texts: Sequence[str]) -> list:
    """Sparse TF-IDF vectors of the first texts, on which the vectorizer is fitted, and of the others."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=WORD)
    try:
        return [vectorizer.fit_transform(fitted_on), *map(vectorizer.transform, texts)]
    except ValueError as error:  # an empty vocabulary
        problem = f"no word in the training texts ({error})"
        raise UserError(f"--features tfidf: {problem}; is --text-column the right one?") from None


def fit(features, labels: np.ndarray, C: float, s: Settings):
    """The logistic regression of features (n, D) on class indices (n,)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=C, max_iter=1000, class_weight=None if s.class_weights == "none" else s.class_weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features, labels)
    if model.n_iter_.max() >= 1000:
        print(f"C {C:g}: not converged after 1,000 iterations")
    return model


def logits(model, features, num_labels: int) -> torch.Tensor:
    """(n, C) float64, whose softmax is the model's probabilities.

    A class without training rows gets the row's highest score minus UNSEEN_GAP.
    """
    scores = model.decision_function(features)
    if scores.ndim == 1:  # two classes have one score
        scores = np.stack([np.zeros_like(scores), scores], axis=1)
    full = np.repeat(scores.max(1, keepdims=True) - UNSEEN_GAP, num_labels, axis=1)
    full[:, model.classes_] = scores
    return torch.from_numpy(full)


def main(argv: list[str] | None = None) -> None:
    s = parse(Settings, argv, __doc__, "python -m minicls baseline")
    unused = ("max_length", "dtype") if s.features == "tfidf" else ()
    for name in unused:
        if getattr(s, name) != getattr(Settings, name):
            raise UserError(f"{flag_of(name)}: --features tfidf does not use it; leave it out, or name a model")
    device = dist.start(s.device, s.threads)
    checkpoint.check_output_dir(s.output_dir)
    data = load_splits(s)
    print(*describe(data), sep="\n")
    train, labels, num_labels = data.train, data.train.labels, len(data.label_names)
    if len(np.unique(labels)) < 2:
        problem = f"the {len(train)} training rows are all {data.label_names[labels[0]]}"
        raise UserError(f"--data: {problem}; use rows of two classes or more")
    # C is chosen on the validation rows, else on a fifth of the training rows; `rest` is fitted on until then.
    fifth = np.array([], np.int64) if data.validation else stratified_rows(train, max(1, len(train) // 5))
    rest = np.setdiff1d(np.arange(len(train)), fifth)
    choosing = data.validation or train.select(fifth)

    import sklearn
    from threadpoolctl import threadpool_limits

    threadpool_limits(s.threads)  # for scikit-learn, as `dist.start` did for torch
    started, tokenizer, revision = time.perf_counter(), None, None
    if s.features == "tfidf":
        # The vectorizer must not know the words of the rows on which C is chosen.
        rest_features, choosing_features = tfidf(train.select(rest).texts, choosing.texts)
        train_features, test_features = tfidf(train.texts, data.test.texts)
    else:
        directory, revision = weights.find_model(s.features, flag="--features")
        features, tokenizer = embeddings(directory, (train, data.test, choosing), s, device)
        train_features, test_features, choosing_features = features
        rest_features = train_features[rest]
    tried = {}  # C -> its scores on the choosing rows
    for C in GRID if len(np.unique(labels[rest])) > 1 else ():
        candidate = fit(rest_features, labels[rest], C, s)
        tried[C], _ = evaluate_logits(logits(candidate, choosing_features, num_labels), choosing.labels)
        print(f"C {C:g}: validation accuracy {tried[C]['accuracy']:.4f}, macro F1 {tried[C]['f1']:.4f}")
    if not tried:
        print("too few training rows to choose C, so C is 1")
    C = max(tried, key=lambda C: (tried[C]["f1"], -tried[C]["loss"]), default=1.0)
    model = fit(train_features, labels, C, s)
    state = checkpoint.new_state() | {"train_seconds": time.perf_counter() - started, "samples": len(train)}

    run_dir = checkpoint.new_run_dir(s.output_dir, "baseline")
    details = {"C": C, "scikit_learn": sklearn.__version__, "total_steps": 0, "revision": revision}
    settings = dataclasses.asdict(s) | dict.fromkeys(unused)
    checkpoint.write_run_info(run_dir, "baseline", settings, device, data, details)
    logger = Logger(run_dir, 0, 0)
    if tried and not data.validation:
        logger.event("eval", 0, split="validation", **tried[C])
        state["best_on_validation"] = [0, tried[C]["f1"]]
    features = {"validation": choosing_features, "test": test_features}

    def logits_of(split: str) -> torch.Tensor:
        return logits(model, features[split], num_labels)

    split_logits = checkpoint.evaluate(data.eval_splits, logits_of, state, logger)
    logger.close()
    print(f"C {C:g}, fitted on {len(train):,} rows with {train_features.shape[1]:,} features of {s.features}")
    written = results.write_results(run_dir, data, tokenizer, split_logits, state, device)
    print(results.summary(written))
    print(f"confusion matrix: {plots.plot_confusion(written['confusion'], data.label_names, run_dir)}")
    print(f"run: {run_dir}")

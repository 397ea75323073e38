#!/usr/bin/env bash
# docs/experiments.md at a size for two CPU cores and an evening: MiniLM for BERT, and a small Qwen3 from random weights.
#
#     for part in bert long harder qwen; do results/experiments.sh $part; done
#
# Needs models/ and data/ as in results/README.md; writes runs/. Finished runs are skipped.
set -euo pipefail

train() { # SCRIPT NAME FLAGS...
    [ -f "runs/$2/results.json" ] && return
    "${PYTHON:-python}" "$1" --output-dir "runs/$2" --threads 1 --eval-every 0 --save-every 0 --warmup-ratio 0.1 \
        --global-batch-size 32 "${@:3}"
}
evaluate() {
    [ -f "runs/$1/results.json" ] && return
    "${PYTHON:-python}" -m minicls evaluate "$2" --output-dir "runs/$1" --threads 1 "${@:3}"
}
bert() { train train_bert.py "$1" --model models/all-MiniLM-L6-v2 --micro-batch-size 32 "${@:2}"; }
qwen() { train train_qwen.py "$1" --init random --learning-rate 6e-4 --train-on letter --micro-batch-size 32 "${@:2}"; }

case $1 in
bert)
    # Learning rate by seed, chosen by F1 on 400 held-out training rows.
    for rate in 1e-4 3e-4 1e-3; do
        for seed in 42 43; do
            bert "grid-$rate-$seed" --data data/ag_news --learning-rate $rate --seed $seed --max-train-rows 1000 \
                --validation-size 400 --epochs 2 --max-eval-rows 1000
        done
    done
    # Learning curve; more epochs where rows are few.
    bert rows-bert-100 --data data/ag_news --learning-rate 3e-4 --max-train-rows 100 --epochs 10 --max-eval-rows 2000
    bert rows-bert-1000 --data data/ag_news --learning-rate 3e-4 --max-train-rows 1000 --epochs 2 --max-eval-rows 2000
    bert rows-bert-10000 --data data/ag_news --learning-rate 3e-4 --max-train-rows 10000 --epochs 1 --max-eval-rows 2000
    bert rows-bert-all --data data/ag_news --learning-rate 3e-4 --epochs 1 --max-eval-rows 2000
    # The last model on the whole test set, for comparison with Qwen3's.
    evaluate all-bert runs/rows-bert-all --data data/ag_news
    ;;
long) # Texts cut to their start, or to start and end. Chinese ones by a small BERT from random weights.
    for long_text in head head-tail; do
        bert "movie_reviews-bert-$long_text" --data data/movie_reviews --long-text $long_text --learning-rate 1e-4 \
            --max-train-rows 200 --epochs 2 --micro-batch-size 8
        train train_bert.py "fudan_long-bert-$long_text" --model models/bert-chinese-small --init random --data data/fudan_long \
            --long-text $long_text --learning-rate 5e-4 --global-batch-size 8 --epochs 3 --micro-batch-size 8
    done
    # At their full length.
    qwen movie_reviews-qwen --model models/qwen3-small --data data/movie_reviews --max-length 4096 --max-train-rows 200 \
        --epochs 2 --micro-batch-size 4
    qwen fudan_long-qwen --model models/qwen3-small-zh --data data/fudan_long --prompt published-zh --max-length 4096 --threads 2 \
        --global-batch-size 4 --epochs 1 --micro-batch-size 4
    ;;
harder) # 77 classes, and 20.
    bert banking77-bert --data data/banking77 --learning-rate 3e-4 --epochs 2
    bert 20newsgroups-bert --data data/20newsgroups --max-length 128 --learning-rate 3e-4 --max-train-rows 2000 --epochs 1 \
        --max-eval-rows 1000
    # 20 letters to choose from.
    qwen 20newsgroups-qwen --model models/qwen3-small --data data/20newsgroups --max-train-rows 4000 --epochs 1 --max-eval-rows 1000
    ;;
qwen)
    # Chinese.
    qwen thucnews-qwen --model models/qwen3-small-zh --data data/thucnews_small --prompt published-zh --max-train-rows 12800 \
        --epochs 1
    # The same rows through a linear head on the bare text.
    qwen thucnews-qwen-linear --model models/qwen3-small-zh --data data/thucnews_small --head linear --max-train-rows 12800 \
        --epochs 1
    # Learning curve.
    qwen rows-qwen-1000 --model models/qwen3-small --data data/ag_news --max-train-rows 1000 --epochs 3 --max-eval-rows 2000
    qwen rows-qwen-100 --model models/qwen3-small --data data/ag_news --max-train-rows 100 --epochs 20 --max-eval-rows 2000
    qwen rows-qwen-10000 --model models/qwen3-small --data data/ag_news --max-train-rows 10000 --epochs 1 --max-eval-rows 2000
    qwen rows-qwen-all --model models/qwen3-small --data data/ag_news --epochs 1 --max-eval-rows 2000
    # The last model on the whole test set, for comparison with BERT's.
    evaluate all-qwen runs/rows-qwen-all --data data/ag_news
    ;;
esac

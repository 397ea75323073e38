"""Commands on finished runs.

python -m minicls predict RUN "Stocks fell after the report."     # texts or files: .csv .tsv .jsonl .json .parquet .txt
python -m minicls predict RUN news.csv --out predictions.csv      # the file's columns, labels and probabilities
cat texts.txt | python -m minicls predict RUN --format jsonl --top-k 3
python -m minicls evaluate MODEL --data DIR                       # test a model as it is; a language model: zero-shot
python -m minicls evaluate RUN                                    # test every checkpoint of a run
python -m minicls predict SMALL news.csv --then LARGE             # a cascade: SMALL defers to LARGE where it is unsure
python -m minicls report RUN RUN ... --bench bench.json           # compare finished runs; requests/s against accuracy
python -m minicls report --cascade SMALL LARGE                    # what a cascade of two runs brings and costs
python -m minicls baseline --data DIR                             # logistic regression on word counts, to compare with
"""

import sys
import time
from pathlib import Path

from minicls import baseline
from minicls.comparison import open_runs, read_bench, write_report
from minicls.config import Parser, UserError, run_main
from minicls.predict import FORMATS, evaluate, predict_texts


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m minicls", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    predict = commands.add_parser("predict", help="classify new texts with a trained run")
    add = predict.add_argument
    add("run", type=Path, metavar="RUN", help="run directory, or a model directory with a trained head")
    add(
        "inputs", nargs="*", metavar="FILE|TEXT", help="files or texts; - or nothing: standard input, one text per line"
    )
    add("--format", choices=FORMATS, help="default: by the suffix of --out, else table")
    add("--out", type=Path, metavar="FILE", help="a new file, .jsonl, .csv or .parquet (default: standard output)")
    add("--top-k", type=int, metavar="INT", help="only the most probable classes, best first (default: all)")
    add("--text-column", default="text", metavar="STR", help="column of the texts (default: %(default)s)")
    add("--then", type=Path, metavar="RUN", help="a larger run to defer to where the first is unsure")
    add("--threshold", type=float, metavar="FLOAT", help="confidence at which it is unsure (default: by validation)")
    add("--device", metavar="STR", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--threads", type=int, metavar="INT", help="CPU threads (default: PyTorch's choice)")
    report = commands.add_parser("report", help="compare finished runs")
    report.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run directories with results")
    report.add_argument("--bench", type=Path, metavar="FILE", help="a bench.json of bench.py")
    report.add_argument(
        "--cascade",
        nargs=2,
        type=Path,
        metavar=("SMALL", "LARGE"),
        help="two runs: SMALL defers to LARGE where it is unsure",
    )
    report.add_argument("--out", type=Path, metavar="DIR", help="new or empty directory (default: runs/report-<time>)")
    commands.add_parser("evaluate", help="test a model as it is, or every checkpoint of a run")
    commands.add_parser("baseline", help="logistic regression on word counts or frozen embeddings")
    argv = sys.argv[1:] if argv is None else argv
    own_settings = {"evaluate": evaluate, "baseline": baseline.main}  # dataclasses, like the training scripts'
    if argv and argv[0] in own_settings:
        own_settings[argv[0]](argv[1:])
        return
    # argparse ends a list of positional arguments at the first flag; here it may continue after one.
    args, more = parser.parse_known_args(argv)
    flags = more[: more.index("--")] if "--" in more else more
    for flag in flags:
        if flag.startswith("-") and flag != "-":
            commands.choices[args.command].error(f"unrecognized arguments: {flag}")
    more = [item for item in more if item != "--"]
    if args.command == "predict":
        predict_texts(args, [*args.inputs, *more])
        return
    run_dirs = [*args.runs, *map(Path, more), *(args.cascade or ())]
    if not run_dirs:
        report.error("the following arguments are required: RUN")
    out = args.out or Path(f"runs/report-{time.strftime('%Y%m%d-%H%M%S')}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out: {out} is not empty; name a new directory")
    runs = open_runs(run_dirs)
    names = {run.dir.resolve(): name for name, run in runs.items()}
    small_and_large = args.cascade and [names[path.resolve()] for path in args.cascade]
    if small_and_large and len({*small_and_large}) == 1:
        raise UserError(f"--cascade: {args.cascade[0]} is given twice; name a small and a large run")
    print(write_report(runs, read_bench(args.bench) if args.bench else [], out, small_and_large))


if __name__ == "__main__":
    run_main(main)

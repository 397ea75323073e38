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
from pathlib import Path

from minicls import baseline
from minicls.checkpoint import check_output_dir
from minicls.comparison import open_runs, read_bench, write_report
from minicls.config import Parser, UserError, run_main
from minicls.predict import OUTPUT_FORMATS, evaluate, predict_texts


def predict(argv: list[str]) -> None:
    parser = Parser("python -m minicls predict", "Classify new texts with a trained run.")
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory, or a model directory with a trained head")
    add("inputs", nargs="*", metavar="FILE|TEXT", help="files or texts; - or nothing: standard input, one text a line")
    add("--format", choices=OUTPUT_FORMATS, help="default: by the suffix of --out, else table")
    add("--out", type=Path, metavar="FILE", help="a new file, .jsonl, .csv or .parquet (default: standard output)")
    add("--top-k", type=int, metavar="INT", help="only the most probable classes, best first (default: all)")
    add("--text-column", default="text", metavar="STR", help="column of the texts (default: %(default)s)")
    add("--then", type=Path, metavar="RUN", help="a larger run to defer to where the first is unsure")
    threshold_help = "confidence up to which texts are deferred (default: chosen on the runs' validation rows)"
    add("--threshold", type=float, metavar="FLOAT", help=threshold_help)
    add("--device", metavar="STR", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--threads", type=int, metavar="INT", help="CPU threads (default: PyTorch's choice)")
    predict_texts(parser.parse_intermixed_args(argv))  # the inputs may continue after a flag


def report(argv: list[str]) -> None:
    parser = Parser("python -m minicls report", "Compare finished runs.")
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="run directories with results")
    add("--bench", type=Path, metavar="FILE", help="a bench.json of bench.py")
    add("--cascade", nargs=2, type=Path, metavar=("SMALL", "LARGE"), help="SMALL defers to LARGE where it is unsure")
    add("--out", type=Path, metavar="DIR", help="new or empty directory (default: runs/report-<time>)")
    args = parser.parse_intermixed_args(argv)
    run_dirs = [*args.runs, *(args.cascade or ())]
    if not run_dirs:
        parser.error("the following arguments are required: RUN")
    check_output_dir(args.out, "--out")
    runs = open_runs(run_dirs)
    names = {run.dir.resolve(): name for name, run in runs.items()}
    small_and_large = args.cascade and [names[path.resolve()] for path in args.cascade]
    if small_and_large and len({*small_and_large}) == 1:
        raise UserError(f"--cascade: {args.cascade[0]} is given twice; name a small and a large run")
    print(write_report(runs, read_bench(args.bench) if args.bench else [], args.out, small_and_large))


COMMANDS = {"predict": predict, "evaluate": evaluate, "report": report, "baseline": baseline.main}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser("python -m minicls", __doc__)
    parser.add_argument("command", choices=COMMANDS, help="COMMAND --help lists its flags")
    COMMANDS[parser.parse_args(argv[:1]).command](argv[1:])


if __name__ == "__main__":
    run_main(main)

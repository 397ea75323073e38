"""Commands on finished runs.

python -m minicls predict RUN "Stocks fell after the report."     # texts, or files: .csv .tsv .jsonl .json .parquet .txt
python -m minicls predict RUN news.csv --out predictions.csv      # the file's columns, labels and probabilities
cat texts.txt | python -m minicls predict RUN --format jsonl --top-k 3
python -m minicls report RUN RUN ...                              # finished runs side by side: report.md and its pictures
python -m minicls report results/a results/b --bench bench.json   # what is kept of runs will do; requests/s against accuracy
python -m minicls baseline --data DIR                            # logistic regression on word counts, as a run to compare with
"""

import sys
import time
from pathlib import Path

from minicls import baseline
from minicls.comparison import open_runs, read_bench, write_report
from minicls.config import Parser, UserError, run_main
from minicls.predict import FORMATS, predict_texts


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m minicls", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    predict = commands.add_parser("predict", help="classify new texts with a trained run")
    predict.add_argument(
        "run", type=Path, metavar="RUN", help="run directory, or a model directory with a trained head"
    )
    predict.add_argument(
        "inputs", nargs="*", metavar="FILE|TEXT", help="files or texts; -, or none: standard input, a text a line"
    )
    predict.add_argument("--format", choices=FORMATS, help="default: by the suffix of --out, else table")
    predict.add_argument(
        "--out", type=Path, metavar="FILE", help="a new file, .jsonl, .csv or .parquet (default: standard output)"
    )
    predict.add_argument(
        "--top-k", type=int, metavar="INT", help="only the most probable classes, best first (default: all)"
    )
    predict.add_argument(
        "--text-column", default="text", metavar="STR", help="column of the texts (default: %(default)s)"
    )
    predict.add_argument("--device", metavar="STR", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    predict.add_argument("--threads", type=int, metavar="INT", help="CPU threads (default: torch's choice)")
    compare = commands.add_parser("report", help="finished runs side by side")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories with results")
    compare.add_argument("--bench", type=Path, metavar="FILE", help="a bench.json of bench.py --task rps")
    compare.add_argument("--out", type=Path, metavar="DIR", help="new or empty directory (default: runs/report-<time>)")
    commands.add_parser(
        "baseline", help="logistic regression on word counts or frozen embeddings: what a network has to beat"
    )
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["baseline"]:  # its settings are a dataclass, as the training scripts' are
        baseline.main(argv[1:])
        return
    # argparse ends a list of positional arguments at the first flag; what comes after it belongs to the list all the same.
    args, more = parser.parse_known_args(argv)
    flags = more[: more.index("--")] if "--" in more else more
    for flag in flags:
        if flag.startswith("-") and flag != "-":
            commands.choices[args.command].error(f"unrecognized arguments: {flag}")
    more = [item for item in more if item != "--"]
    if args.command == "report":
        out = args.out or Path(f"runs/report-{time.strftime('%Y%m%d-%H%M%S')}")
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"--out: {out} is not empty; name a new directory")
        runs, bench = open_runs([*args.runs, *map(Path, more)]), read_bench(args.bench) if args.bench else []
        print(write_report(runs, bench, out))
        return
    predict_texts(args, [*args.inputs, *more])


if __name__ == "__main__":
    run_main(main)

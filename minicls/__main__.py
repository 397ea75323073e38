"""Commands on finished runs.

python -m minicls predict RUN "Stocks fell after the report."     # texts, or files: .csv .jsonl .parquet .txt
python -m minicls predict RUN news.csv --format jsonl
cat texts.txt | python -m minicls predict RUN
python -m minicls report RUN RUN ...                              # finished runs side by side: report.md and its pictures
python -m minicls report results/a results/b --bench bench.json   # what is kept of runs will do; requests/s beside accuracy
python -m minicls baseline --data DIR                            # logistic regression on word counts, as a run to compare with
"""

import sys
import time
from pathlib import Path

from minicls import baseline, dist
from minicls.comparison import open_runs, read_bench, write_report
from minicls.config import Parser, UserError, run
from minicls.data import checked_text, lines_of
from minicls.predict import Classifier, gather_texts, jsonl, table


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m minicls", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    predict = commands.add_parser("predict", help="classify new texts with a trained run")
    predict.add_argument("run", type=Path, metavar="RUN", help="run directory, or a model directory with a trained head")
    predict.add_argument("inputs", nargs="*", metavar="FILE|TEXT", help="files or texts (default: standard input, a text a line)")
    predict.add_argument("--format", choices=("table", "jsonl"), default="table", help="default: %(default)s")
    predict.add_argument("--text-column", default="text", metavar="STR", help="column of the texts (default: %(default)s)")
    predict.add_argument("--device", metavar="STR", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    predict.add_argument("--threads", type=int, metavar="INT", help="CPU threads (default: torch's choice)")
    compare = commands.add_parser("report", help="finished runs side by side")
    compare.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories with results")
    compare.add_argument("--bench", type=Path, metavar="FILE", help="a bench.json of bench.py --task rps")
    compare.add_argument("--out", type=Path, metavar="DIR", help="new or empty directory (default: runs/report-<time>)")
    commands.add_parser("baseline", help="logistic regression on word counts or frozen embeddings: what a network has to beat")
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["baseline"]:  # its settings are a dataclass, as the training scripts' are
        baseline.main(argv[1:])
        return
    args = parser.parse_args(argv)
    if args.command == "report":
        out = args.out or Path(f"runs/report-{time.strftime('%Y%m%d-%H%M%S')}")
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"--out: {out} is not empty; name a new directory")
        runs, bench = open_runs(args.runs), read_bench(args.bench) if args.bench else []
        print(write_report(runs, bench, out))
        return
    if not args.run.is_dir():
        raise UserError(f"{args.run}: no such run directory; check the path")
    # A line of standard input is a text, whatever it looks like: it may come from anybody, and must not name a file to open.
    try:
        piped = lines_of("" if args.inputs or sys.stdin.isatty() else sys.stdin.read())
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not {error.encoding} ({error.reason}); convert it") from None
    texts = gather_texts(args.inputs, args.text_column)
    texts += [checked_text(line, f"standard input, line {number}") for number, line in enumerate(piped, start=1)]
    if not texts:
        raise UserError("FILE|TEXT: nothing to classify; pass texts or files, or write texts to standard input, one a line")
    classifier = Classifier(args.run, dist.start(args.device, args.threads))
    scores = classifier.scores(texts)
    probabilities = scores.softmax(1)
    if args.format == "jsonl":
        print(jsonl(texts, probabilities, classifier.label_names, classifier.perplexities(scores)))
    else:
        print(table(texts, probabilities, classifier.label_names))


if __name__ == "__main__":
    run(main)

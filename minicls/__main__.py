"""Commands on finished runs.

python -m minicls predict RUN "Stocks fell after the report."     # texts, or files: .csv .jsonl .parquet .txt
python -m minicls predict RUN news.csv --format jsonl
cat texts.txt | python -m minicls predict RUN
python -m minicls report RUN RUN ...                              # finished runs side by side
"""

import sys
from pathlib import Path

from minicls import dist
from minicls.config import Parser, UserError, run
from minicls.predict import Classifier, gather_texts, jsonl, table
from minicls.report import runs_table


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
    args = parser.parse_args(argv)
    if args.command == "report":
        print(runs_table(args.runs))
        return
    if not args.run.is_dir():
        raise UserError(f"{args.run}: no such run directory; check the path")
    inputs = args.inputs or ([] if sys.stdin.isatty() else sys.stdin.read().splitlines())
    texts = gather_texts(inputs, args.text_column)
    classifier = Classifier(args.run, dist.start(args.device, args.threads))
    scores = classifier.scores(texts)
    probabilities = scores.softmax(1)
    if args.format == "jsonl":
        print(jsonl(texts, probabilities, classifier.label_names, classifier.perplexities(scores)))
    else:
        print(table(texts, probabilities, classifier.label_names))


if __name__ == "__main__":
    run(main)

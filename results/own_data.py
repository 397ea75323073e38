"""The README's recipe for your own data on three samples of 1,000 rows, and TF-IDF on the same rows.

    python results/own_data.py --data DIR --model DIR --out results/own_data/NAME           # the recipe
    python results/own_data.py --data DIR --model DIR --out results/own_data/NAME --grid    # the grid behind it

`--data` has a train and a test file. Each seed's 1,000 rows are written to a directory of their own, as users would
have them; a fifth of them are the validation rows. The recipe was chosen on the validation rows of banking77, seed 42.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow as pa
import pyarrow.parquet as pq

import train_bert
from minicls import baseline
from minicls.data import load_data, stratified_rows
from results.thin import thin_run

RECIPE = {"learning_rate": 5e-4, "epochs": 15, "global_batch_size": 32}
GRID = [
    {"learning_rate": rate, "epochs": epochs, "global_batch_size": batch}
    for rate in (1e-4, 2e-4, 5e-4)
    for epochs, batch in ((15, 32), (30, 32))
]
FLAGS = "--validation-size 0.2 --warmup-ratio 0.1 --eval-every 0.2 --save-every 0 --patience 2 --keep-checkpoints 1"


def write_rows(data: str, rows: int, test_rows: int | None, seed: int, folder: Path) -> None:
    """A data directory with a stratified sample of the training rows and the test rows."""
    read = load_data(data)
    folder.mkdir(parents=True, exist_ok=True)
    train = read.train.select(stratified_rows(read.train, rows, seed))
    test = read.test.select(stratified_rows(read.test, min(test_rows or len(read.test), len(read.test))))
    for name, split in (("train", train), ("test", test)):
        pq.write_table(pa.table({"text": split.texts, "label": split.labels}), folder / f"{name}.parquet")
    (folder / "labels.txt").write_text("\n".join(read.label_names) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--test-rows", type=int, help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--device")
    parser.add_argument("--work", type=Path, default=Path("runs/own_data"))
    args = parser.parse_args()
    device = ["--device", args.device] if args.device else []
    for seed in args.seeds:
        folder = args.work / f"{Path(args.data).name}-{seed}"
        if not folder.is_dir():
            write_rows(args.data, args.rows, args.test_rows, seed, folder)
        for settings in GRID if args.grid else [RECIPE]:
            name = "-".join([f"seed-{seed}", *(f"{value:g}" for value in settings.values())])
            flags = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", f"{value:g}")]
            flags += ["--micro-batch-size", flags[-1], *FLAGS.split(), "--seed", str(seed), *device]
            run(args, name, train_bert.main, ["--model", args.model, "--data", str(folder), *flags])
        if not args.grid:
            run(args, f"seed-{seed}-tfidf", baseline.main, ["--data", str(folder), "--seed", str(seed)])


def run(args: argparse.Namespace, name: str, script, flags: list[str]) -> None:
    out, work = args.out / name, args.work / args.out.name / name
    if (out / "results.json").is_file():
        return
    begin = time.perf_counter()
    shutil.rmtree(work, ignore_errors=True)
    script([*flags, "--output-dir", str(work)])
    thin_run(work, out, text_hash=False)
    shutil.rmtree(work)
    accuracy = json.loads((out / "results.json").read_text())["accuracy"]
    print(f"{name}: test accuracy {accuracy:.4f}, {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()

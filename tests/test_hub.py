"""Models and data from the hub, or rather from a stand-in for it on the loopback.   python -m pytest tests/test_hub.py

huggingface_hub reads its environment when it is imported, so the script runs in a process of its own, one for all tests.
They run in their order, the hub first up and then down.
"""

import contextlib
import io
import json
import multiprocessing
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import hub_server
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

FLAGS = ["--max-steps", "2", "--global-batch-size", "8", "--device", "cpu", "--threads", "1"]
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)  # runs.py would set HF_HUB_OFFLINE
NAMES = ["ant", "bee", "cat", "dog"]
CARD = """---
license: mit
dataset_info:
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': Ant
          '1': Bee
          '2': Cat
          '3': Dog
  splits:
  - name: train
    num_examples: 32
---
# Four animals
"""

CONFIGS = """---
configs:
- config_name: numbers
  data_files: data/train-*
- config_name: animals
  default: true
  data_files:
  - split: train
    path: animals/train-*
  - split: test
    path: animals/test-*.parquet
"""


def script(argv: list[str]) -> tuple[int, str]:
    """train_bert.py as its command line runs it; returns the exit code and what it wrote to stderr."""
    import train_bert
    from minicls.config import run_main

    sys.argv = ["train_bert.py", *argv]
    with contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            run_main(train_bert.main)
        except SystemExit as stop:
            return stop.code or 0, error.getvalue()


def write_dataset(folder: Path, metadata: dict | None = None) -> Path:
    (folder / "data").mkdir(parents=True)
    for split, size in (("train", 32), ("test", 8), ("unsupervised", 8)):
        table = pa.table(
            {"text": [f"number {i} of {size}" for i in range(size)], "label": [i % 4 for i in range(size)]}
        )
        pq.write_table(table.replace_schema_metadata(metadata), folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


class Client:
    """A hub that can go down, the cache of a machine, and the process that uses both."""

    def __init__(self, bert_run: Path, folder: Path):
        self.folder, self.down = folder, contextlib.ExitStack()
        model = folder / "model"
        model.mkdir()
        for name in MODEL_FILES:
            shutil.copy(bert_run / name, model)
        for name in ("pytorch_model.bin", "tf_model.h5", "README.md"):
            (model / name).write_text("never needed")
        features = {"text": {"dtype": "string"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        card = write_dataset(folder / "card")
        (card / "README.md").write_text(CARD)
        configs = write_dataset(folder / "configs", metadata)  # the hub's default config is another one
        shutil.copytree(card / "data", configs / "animals")
        (configs / "README.md").write_text(CONFIGS + CARD.removeprefix("---\n"))
        datasets = {
            "org/configs": configs,
            "org/card": card,
            "org/parquet": write_dataset(folder / "parquet", metadata),
        }
        self.hub = self.down.enter_context(hub_server.serve({"org/bert": model}, datasets))
        with pytest.MonkeyPatch.context() as env:
            for name, value in {
                "ENDPOINT": self.hub.endpoint,
                "HOME": str(folder / "cache"),
                "HUB_OFFLINE": "0",
            }.items():
                env.setenv(f"HF_{name}", value)
            env.setenv("NO_PROXY", "127.0.0.1")
            self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            self.process.submit(int).result()  # it starts here, in this environment

    def run(self, *argv: str) -> tuple[int, str]:
        return self.process.submit(script, [*argv]).result()

    def train(self, name: str, *flags: str) -> tuple[Path, int, str]:
        run = self.folder / "runs" / name
        return run, *self.run(*flags, *FLAGS, "--output-dir", str(run))


@pytest.fixture(scope="module")
def client(bert_run, tmp_path_factory):
    client = Client(bert_run, tmp_path_factory.mktemp("hub"))
    with client.down, client.process:
        yield client


@pytest.fixture(scope="module")
def downloaded(client):
    """A run from hub to hub for each data set; they share the model."""
    runs = {}
    for data in ("parquet", "card", "configs"):
        runs[data], code, error = client.train(data, "--model", "org/bert", "--data", f"org/{data}")
        assert code == 0, error
    return runs


@pytest.mark.parametrize(
    ("data", "names"),
    [("parquet", NAMES), ("card", [name.title() for name in NAMES]), ("configs", [name.title() for name in NAMES])],
)
def test_class_names_come_from_the_parquet_metadata_or_the_card(data, names, downloaded):
    assert [*json.loads((downloaded[data] / "config.json").read_text())["label2id"]] == names


def test_run_names_its_commits(downloaded):
    info = json.loads((downloaded["parquet"] / "run.json").read_text())
    assert info["revision"] == info["data_revision"] == hub_server.COMMIT
    assert (info["settings"]["model"], info["settings"]["data"], info["num_train_rows"]) == (
        "org/bert",
        "org/parquet",
        32,
    )


def test_only_what_is_needed_is_fetched_and_only_once(client, downloaded):
    fetched = [path.rsplit("/", 1)[1] for path in client.hub.requests if path.startswith("GET") and "/resolve/" in path]
    data = ["test-00000-of-00001.parquet", "train-00000-of-00001.parquet"]
    assert sorted(fetched) == sorted([*MODEL_FILES, *data, *data, *data, "README.md", "README.md"])
    assert not [
        path
        for path in client.hub.requests
        if path.startswith("GET") and "org/configs/resolve" in path and "/data/" in path
    ]


@pytest.mark.parametrize(("flag", "kind"), [("--model", "model"), ("--data", "dataset")])
def test_unknown_name_is_an_error(flag, kind, client, downloaded):
    names = {"--model": "org/bert", "--data": "org/parquet"} | {flag: "org/absent"}
    _, code, error = client.train(f"absent {kind}", *(part for item in names.items() for part in item))
    last = error.splitlines()[-1]
    assert code == 2 and "Traceback" not in error
    assert last == f"error: {flag}: org/absent is neither a directory here nor a {kind} on the hub; check the name"


@pytest.fixture(scope="module")
def down(client, downloaded):
    client.down.close()
    return client


def test_hub_down_but_cached(down, downloaded):
    run, code, error = down.train("cached", "--model", "org/bert", "--data", "org/parquet")
    assert code == 0, error
    assert (run / "model.safetensors").read_bytes() == (downloaded["parquet"] / "model.safetensors").read_bytes()


def test_resuming_asks_for_the_commit_it_was_started_on(down, downloaded):
    """A run that has no checkpoint starts over, from the commit in run.json: what `main` is by now does not matter."""
    run = downloaded["parquet"]
    expected = (run / "model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints")
    (run / "results.json").unlink()
    references = [*(down.folder / "cache").rglob("refs/main")]
    assert len(references) == 4
    for reference in references:
        reference.write_text("f" * 40)
    code, error = down.run("--resume", str(run))
    assert code == 0, error
    assert (run / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("flag", ["--model", "--data"])
def test_hub_down_names_the_way_around_it(flag, down):
    names = {"--model": str(down.folder / "model"), "--data": str(down.folder / "card")} | {flag: "org/elsewhere"}
    _, code, error = down.train(f"down {flag}", *(part for item in names.items() for part in item))
    last = error.splitlines()[-1]
    assert code == 2 and "Traceback" not in error
    assert last.startswith(f"error: {flag}: there is no directory org/elsewhere here, and the hub did not give it (")
    assert last.endswith(f"check the path or the network, or download it elsewhere and pass its directory: {flag} DIR")

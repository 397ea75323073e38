"""The README's commands run, its figures are those of the result files, and its translation says the same.

python -m pytest -m "slow or not slow" tests/test_readme.py
"""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import bench
import minicls.__main__
import train_bert
import train_qwen
from minicls.config import Parser, parse
from results import hf_trainer, readme

TABLES = {
    "README.md": {"answer", "rates"},
    "results/README.md": {"curves", "pairs", "decoders", "decoder_grid", "banking_grid", "own_data", "own_data_grid"}
    | {
        "banking_curves",
        "cascades",
        "distill_ag_news",
        "distill_banking77",
        "speed",
        "requests",
        "results",
        "small",
        "small_pairs",
        "grid",
    },
    "docs/performance.md": {"gpu", "profile"},
}
TABLES["README.zh-CN.md"] = TABLES["README.md"]
PAGES = {page: (ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "README.zh-CN.md")}
DOCS = {f"docs/{file.name}": file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))}
DOCS["results/README.md"] = (ROOT / "results/README.md").read_text(encoding="utf-8")
README, CHINESE = PAGES.values()
SCRIPTS = {"train_bert.py": train_bert, "train_qwen.py": train_qwen, "bench.py": bench}
SCRIPTS["results/hf_trainer.py"] = hf_trainer


def blocks(page: str) -> list[str]:
    """The page's commands, each on one line."""
    return [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)]


# A trailing comment says what a command needs that a test has not; the make targets run by themselves.
SKIPPED = ("# needs", "# downloads")


def commands(block: str) -> str:
    return "\n".join(
        line
        for line in block.splitlines()
        if not any(mark in line for mark in SKIPPED) and not line.startswith("make ")
    )


def without_comments(block: str) -> str:
    return re.sub(r"\s+#.*", "", block)


def lines_of_scripts(page: str) -> list[tuple[str, list[str]]]:
    """Script and arguments of each command, in a sentence if it has flags; loop variables have their first values."""
    found, prose = [], re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    inline = [command.replace("\n", " ") for command in re.findall(r"`((?:python|torchrun) [^`]* --[^`]*)`", prose)]
    for block in [*map(without_comments, blocks(page)), *inline]:
        for name, value in re.findall(r"for (\w+) in (\S+)", block):
            block = block.replace(f"${name}", value)
        found += re.findall(rf"(?:python|torchrun .*?) (-m minicls|{'|'.join(SCRIPTS)})(.*)", block)
    return [(script, shlex.split(arguments)) for script, arguments in found]


@pytest.mark.slow
def test_commands_run_in_their_order(tmp_path):
    """All blocks in one shell, in a folder that sees the checkout through links, so that runs/ stays out of it."""
    for path in ROOT.iterdir():  # a command may name any file of the checkout, but writes a runs/ of its own
        if path.name != "runs" and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "bin").mkdir()
    for name in ("python", "python3"):  # python3 makes the README's environment
        (tmp_path / "bin" / name).symlink_to(sys.executable)
    script = "set -euxo pipefail\n" + "\n".join(f"{commands(block)}\n" for block in blocks(README))
    assert script.count("python ") > 6  # the marks did not skip everything
    # A link to an environment's python is outside the environment: PYTHONPATH brings its packages back.
    packages = [p for p in sys.path if p.endswith("site-packages")]
    env = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": ":".join([str(tmp_path), *packages]),
    }
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "is finished" in done.stdout and '"probabilities": {"bad"' in done.stdout
    for file in ("results.json", "curves.png", "confusion.png", "predictions.parquet", "metrics.jsonl"):
        assert (tmp_path / "runs/smoke" / file).stat().st_size > 0


@pytest.mark.slow
def test_demo(tmp_path):
    """`make demo`'s own recipe, with this interpreter: it trains, gives an interval, and says where the curves are."""
    recipe = subprocess.run(["make", "-n", "-B", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = [
        line
        for line in recipe.replace("\\\n", " ").splitlines()
        if line.startswith(".venv/bin/python") and " -m pip " not in line
    ]
    demo = re.search(r"--output-dir (\S+)/bert", recipe).group(1)
    printed = ""
    for command in commands:
        argv = [sys.executable, *command.replace(demo, str(tmp_path)).split()[1:]]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        printed += done.stdout
    for name in ("bert", "qwen"):
        assert f"| {tmp_path / name} | tiny |" in printed and (tmp_path / name / "curves.png").is_file()
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert 0.6 < results["f1"] < 1.0  # learnable by tiny, and not to perfection
        assert f"{results['f1']:.4f} ({results['f1_low']:.4f} to {results['f1_high']:.4f})" in printed
    ours = [row for row in json.loads((tmp_path / "bench" / "bench.json").read_text()) if row["engine"] == "minicls"]
    assert (
        printed.endswith(f"report: {tmp_path / 'report' / 'report.md'}\n")
        and (tmp_path / "report" / "deploy.png").is_file()
    )
    assert len(ours) == 6 and {row["status"] for row in ours} == {"ok"}  # classify, generate, score; single and offline


@pytest.mark.parametrize("page", readme.PAGES)
def test_tables_are_those_of_the_result_files(page):
    text, tables = (PAGES | DOCS)[page], readme.tables()
    assert {*re.findall(r"<!-- (\w+):", text)} == TABLES[page]
    for name in TABLES[page]:
        assert f"-->\n{tables[name]}\n<!-- /{name} -->" in text, "stale: run `make readme`"
    assert text == readme.fill(text)


def test_the_translation_has_the_same_commands_and_tables():
    """Apart from what comments say: so running the one page's commands proves both."""
    assert list(map(without_comments, blocks(README))) == list(map(without_comments, blocks(CHINESE)))
    for name in TABLES["README.md"]:
        table = rf"<!-- {name}: .*<!-- /{name} -->"
        assert re.search(table, README, re.DOTALL)[0] == re.search(table, CHINESE, re.DOTALL)[0]


@pytest.mark.parametrize("page", [*PAGES, *DOCS])
def test_flags_are_those_of_the_scripts(page, monkeypatch):
    class Parsed(Exception):
        pass

    parse_args = Parser.parse_args

    def stop(*_):
        raise Parsed

    def parse_and_stop(self, argv):
        args = parse_args(self, argv)
        if self.prog == "python -m minicls":  # that was only the command's name
            return args
        raise Parsed

    lines = lines_of_scripts((PAGES | DOCS)[page])
    assert lines or "```bash" not in (PAGES | DOCS)[page]
    for script, argv in lines:
        if script == "-m minicls":
            with monkeypatch.context() as patched, pytest.raises(Parsed):
                patched.setattr(Parser, "parse_args", parse_and_stop)  # baseline's and evaluate's
                patched.setattr(minicls.__main__, "predict_texts", stop)
                patched.setattr(minicls.__main__, "open_runs", stop)
                minicls.__main__.main(argv)
        elif "--help" not in argv:
            if "--resume" in argv:  # reads the run, which is not there
                at = argv.index("--resume")
                del argv[at : at + 2]
            parse(SCRIPTS[script].Settings, argv)


@pytest.mark.parametrize("page", [*PAGES, *DOCS])
def test_links_and_targets_exist(page):
    text = (PAGES | DOCS)[page]
    for link in re.findall(r"\]\(([\w./-]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def files_of(tree: str) -> list[str]:
    """The paths of a tree whose folders end in a slash and whose files may be indented below them."""
    paths, folder = [], ""
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else ""
        if name.endswith("/"):
            folder = name
        paths.append(folder + name if name != folder else name)
    return paths


@pytest.mark.parametrize("page", PAGES)
def test_the_evening_path_is_short_and_narrow(page):
    """The README names the files to read first, in their order; together they are an evening's reading."""
    tree = files_of(re.search(r"\n```\n(train_bert.*?)```", PAGES[page], re.DOTALL)[1])
    models = ["bert", "decoder", "attention", "prompt", "scorer", "optim"]
    evening = ["train_bert.py", "train_qwen.py", *(f"minicls/{name}.py" for name in models)]
    assert [path for path in tree if path != "minicls/"] == [*evening, "bench.py"]
    lines = [line for path in evening for line in (ROOT / path).read_text(encoding="utf-8").splitlines()]
    assert len(lines) <= 1700 and max(map(len, lines)) <= 100
    assert len(PAGES[page].splitlines()) <= 180


def test_how_it_works_lists_every_file():
    tree = files_of(re.search(r"\n```\n(train_bert.*?)```", DOCS["docs/how-it-works.md"], re.DOTALL)[1])
    assert all((ROOT / path).exists() for path in tree)
    modules = {f"minicls/{path.name}" for path in (ROOT / "minicls").glob("*.py") if not path.name.startswith("__")}
    assert modules <= {*tree}
    for path in (ROOT / "minicls").glob("*.py"):
        assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 120, path

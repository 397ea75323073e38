"""The README's commands run, and its figures are those of the result files.   python -m pytest -m "slow or not slow" tests/test_readme.py"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from minicls.report import results_table, speed_table

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
# A trailing comment says what a command needs that a test has not; the make targets run by themselves.
SKIPPED = ("# needs", "# downloads")


def commands(block: str) -> str:
    return "\n".join(
        line for line in block.splitlines() if not any(mark in line for mark in SKIPPED) and not line.startswith("make ")
    )


def table_in_readme(name: str) -> str:
    return re.search(rf"<!-- {name}:.*?-->\n(.*?)\n<!-- /{name} -->", README, re.DOTALL).group(1)


@pytest.mark.slow
def test_commands_run_in_their_order(tmp_path):
    """All blocks in one shell, in a folder that sees the checkout through links, so that runs/ stays out of it."""
    for name in ("minicls", "train_bert.py", "train_qwen.py", "bench.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    script = "set -euxo pipefail\n" + "\n".join(f"{commands(block)}\n" for block in BLOCKS)
    assert script.count("python ") > 6  # the marks did not skip everything
    # A link to an environment's python is outside the environment: PYTHONPATH brings its packages back.
    packages = [p for p in sys.path if p.endswith("site-packages")]
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": ":".join([str(tmp_path), *packages])}
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
        line for line in recipe.replace("\\\n", " ").splitlines() if line.startswith(".venv/bin/python") and " -m pip " not in line
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
    assert printed.endswith(f"report: {tmp_path / 'report' / 'report.md'}\n") and (tmp_path / "report" / "deploy.png").is_file()
    assert len(ours) == 6 and {row["status"] for row in ours} == {"ok"}  # classify, generate, score; single and offline


def test_tables_are_those_of_the_result_files():
    benches = [json.loads(file.read_text()) for file in sorted((ROOT / "results/bench").glob("*.json"))]
    assert table_in_readme("speed") == speed_table(benches)
    runs = sorted(file.parent for file in ROOT.glob("results/*/results.json"))
    assert table_in_readme("results") == results_table(runs)


def test_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([\w-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_exist():
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    names = [line.split()[0] for line in tree.splitlines()]
    folder = Path()
    for line, name in zip(tree.splitlines(), names, strict=True):
        if not line.startswith(" "):
            folder = Path()
        assert (ROOT / folder / name).exists(), name
        if name == "minicls/":
            folder = Path(name)
    assert {p.name for p in (ROOT / "minicls").glob("*.py")} - {"__init__.py", "__main__.py"} <= set(names)
    for link in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / link).exists(), link

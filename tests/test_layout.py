"""Imports point one way, optional libraries wait until they are used, and nothing is unpickled.

    python -m pytest tests/test_layout.py

Read from the source with `ast`, and once from a process that imports everything.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the bottom to the top: a module imports only those before it. Add a new module here.
ORDER = [
    *("__init__", "config", "logger", "kernels", "attention", "bert", "decoder", "optim", "metrics", "dist", "batch"),
    *("tokenizer", "tiny", "data", "distill", "prompt", "weights", "checkpoint", "scorer", "generate"),
    *("results", "cascade", "plots", "predict", "engines", "serving", "comparison", "baseline", "__main__"),
    *("train_bert", "train_qwen", "bench"),
]
MODELS = ["bert", "decoder"]
OPTIONAL = {
    "transformers",
    "sklearn",
    "threadpoolctl",
    "vllm",
    "matplotlib",
    "tensorboard",
    "accelerate",
    "onnx",
    "onnxruntime",
}

SOURCES = {f"minicls.{path.stem}": path for path in sorted((ROOT / "minicls").rglob("*.py"))}
SOURCES |= {path.stem: path for path in sorted(ROOT.glob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def nodes(tree: ast.AST, inside_functions: bool = True) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from nodes(node, inside_functions)


def imports(name: str, inside_functions: bool = True) -> set[str]:
    """The dotted names that a module imports: `from a import b` gives a.b, where b may be a module or not."""
    found = set()
    for node in nodes(TREES[name], inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: say minicls.x rather than .x"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_modules(name: str) -> set[str]:
    """The modules and scripts of the project among them, by their short names."""
    modules = set()
    for dotted in imports(name):
        first, *rest = dotted.split(".")
        if first == "minicls":
            modules.add(rest[0] if rest and f"minicls.{rest[0]}" in SOURCES else "__init__")
        elif first in SOURCES:
            modules.add(first)
    return modules


def test_every_module_has_its_place():
    assert {name.removeprefix("minicls.") for name in SOURCES} <= set(ORDER)
    assert len(set(ORDER)) == len(ORDER)
    assert all(path.parent in (ROOT, ROOT / "minicls") for path in SOURCES.values())  # a flat package


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_one_way(name):
    assert own_modules(name) <= set(ORDER[: ORDER.index(name.removeprefix("minicls."))])


@pytest.mark.parametrize("name", [f"minicls.{model}" for model in MODELS if f"minicls.{model}" in SOURCES])
def test_a_model_needs_torch_and_attention_alone(name):
    assert own_modules(name) <= {"attention", "kernels"}
    assert {dotted.split(".")[0] for dotted in imports(name)} - sys.stdlib_module_names <= {"torch", "minicls"}


@pytest.mark.parametrize("name", SOURCES)
def test_optional_libraries_are_imported_where_they_are_used(name):
    parts = {part for dotted in imports(name, inside_functions=False) for part in dotted.split(".")}
    assert not OPTIONAL & parts


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_is_pickled(name):
    first_parts = {dotted.split(".")[0] for dotted in imports(name)}
    assert not first_parts & {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    assert not imports(name) & {"torch.load", "torch.save"}
    for node in nodes(TREES[name]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save")}, f"line {node.lineno}"
        assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle"), f"line {node.value.lineno}"


def test_importing_everything_imports_no_optional_library_and_does_nothing_else(tmp_path):
    names = [name for name in SOURCES if not name.endswith("__init__")]
    code = f"""
import sys, torch
sys.path.insert(0, {str(ROOT)!r})
before = torch.get_num_threads(), torch.initial_seed()
import {", ".join(names)}
assert before == (torch.get_num_threads(), torch.initial_seed())
print(*sorted({OPTIONAL} & {{name.split(".")[0] for name in sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
    assert not [*tmp_path.iterdir()]

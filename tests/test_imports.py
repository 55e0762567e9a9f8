"""Imports go one way: kernels -> losses -> teachers -> scripts, models -> teachers, engine -> scripts."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"common", "kernels", "losses", "models", "teachers", "engine", "benchmarks", "train_teacher", "distill"}
MAY_IMPORT = {
    "common": set(),
    "kernels": {"kernels"},
    "models": {"common", "kernels", "models"},
    "losses": {"common", "kernels", "losses"},
    "teachers": {"common", "kernels", "losses", "models", "teachers"},
    "engine": {"common", "engine"},
    "train_teacher": OURS - {"benchmarks", "train_teacher", "distill"},
    "distill": OURS - {"benchmarks", "train_teacher", "distill"},
    "benchmarks": OURS - {"train_teacher", "distill"},
}
FILES = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0].removesuffix(".py") in OURS]


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module.split(".")[0])
    return found


def test_every_part_is_there():
    assert {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES} == OURS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert imported(path) & OURS <= MAY_IMPORT[part]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_loaded_that_could_execute_code(path):
    assert imported(path).isdisjoint({"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"})
    assert not re.search(
        r"(?<!safetensors\.)torch\.load\(|yaml\.(unsafe_|full_)?load\(|\b(eval|exec)\(\s*[a-z]", code(path)
    )


def code(path: Path) -> str:
    """A file's source with method calls such as `.eval()` kept and strings removed."""
    return re.sub(r"\.eval\(", ".mode(", re.sub(r'""".*?"""|"[^"\n]*"', "", path.read_text(), flags=re.DOTALL))


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "kernels"], ids=lambda path: path.name)
def test_kernels_need_torch_and_triton_alone(path):
    assert imported(path) - set(sys.stdlib_module_names) <= {"torch", "triton", "kernels"}


def test_common_needs_the_standard_library_alone():
    assert imported(ROOT / "common.py") <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_imported_by_a_name_that_is_only_known_when_it_runs(path):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names.isdisjoint({"__import__", "import_module", "run_module", "run_path", "exec_module"})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import losses.logits as x", {"losses"}),
        ("from teachers import gtn", {"teachers"}),
        ("def f():\n    from engine.loop import run", {"engine"}),
        ("if True:\n    import os, models", {"os", "models"}),
    ],
)
def test_imports_are_found_wherever_they_stand(tmp_path, source, expected):
    (tmp_path / "x.py").write_text(source)
    assert imported(tmp_path / "x.py") == expected

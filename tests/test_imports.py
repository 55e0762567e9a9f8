"""Imports go one way: kernels -> losses -> teachers -> scripts, models -> teachers, engine -> scripts."""

import ast
import re
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

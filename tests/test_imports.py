"""Imports go one way: kernels -> losses -> teachers -> scripts, models -> teachers, engine -> scripts."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {
    "common",
    "kernels",
    "losses",
    "models",
    "teachers",
    "engine",
    "benchmarks",
    "reports",
    "train_teacher",
    "distill",
}
MAY_IMPORT = {
    "common": set(),
    "kernels": {"kernels"},
    "models": {"common", "kernels", "models"},
    "losses": {"common", "kernels", "losses"},
    "teachers": {"common", "kernels", "losses", "models", "teachers"},
    "engine": {"common", "engine"},
    "train_teacher": OURS - {"benchmarks", "train_teacher", "distill"},
    "distill": OURS - {"benchmarks", "train_teacher", "distill"},
    "reports": {"common", "models", "reports"},
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
    assert not re.search(r"yaml\.(unsafe_|full_)?load\(|\b(eval|exec)\(\s*[a-z]", code(path))


def unsafe_loads(source: str) -> list[str]:
    """Uses of torch.load other than calls that say weights_only=True."""
    nodes = list(ast.walk(ast.parse(source)))
    safe = [
        node.func
        for node in nodes
        if isinstance(node, ast.Call)
        and any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
    ]
    found = [node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"]
    found += [
        node
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").split(".")[0] == "torch"
        and any(alias.name == "load" for alias in node.names)
    ]
    return [ast.unparse(node) for node in found if node not in safe]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_loads_weights_only(path):
    assert not unsafe_loads(path.read_text())


@pytest.mark.parametrize(
    ("source", "safe"),
    [
        ("torch.load(path, weights_only=True)", True),
        ("safetensors.torch.load(data)", True),
        ("torch.load(path)", False),
        ("torch.load(path, weights_only=False)", False),
        ("torch.load(path, weights_only=flag)", False),
        ("f(torch.load, weights_only=True)", False),
        ("from torch import load", False),
        ("from torch.serialization import load as x", False),
    ],
)
def test_unsafe_loads_are_found(source, safe):
    assert bool(unsafe_loads(source)) is not safe


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_timm_is_imported_only_where_it_is_used(path):
    tree = ast.parse(path.read_text())
    inside = {node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in set(ast.walk(tree)) - inside:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.split(".")[0] == "timm" for name in names)


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
    if path == ROOT / "losses" / "__init__.py":  # --method FILE.py:CLASS: the user's own code, asked for by name
        names.discard("exec_module")
    assert names.isdisjoint({"__import__", "import_module", "run_module", "run_path", "exec_module"})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import losses.logits as x", {"losses"}),
        ("from objectives.registry import gtn", {"teachers"}),
        ("def f():\n    from engine.loop import run", {"engine"}),
        ("if True:\n    import os, models", {"os", "models"}),
    ],
)
def test_imports_are_found_wherever_they_stand(tmp_path, source, expected):
    (tmp_path / "x.py").write_text(source)
    assert imported(tmp_path / "x.py") == expected

"""The house: which package may import which, files without cycles, and what a file may hold."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {
    "common": set(),
    "kernels": {"kernels"},
    "data": {"common", "data"},
    "engine": {"common", "data", "kernels", "engine"},
    "models": {"common", "kernels", "models"},
    "losses": {"common", "data", "kernels", "losses"},
    "objectives": {"common", "data", "engine", "kernels", "losses", "models", "objectives"},
    "reports": {"common", "data", "models", "reports"},
    "exporters": {"common", "exporters", "kernels", "models", "reports"},
    "searching": {"common", "data", "exporters", "kernels", "models", "reports", "searching"},
    "recipes": {"common", "recipes"},
}
SCRIPTS = {"train_teacher", "distill", "evaluate", "export", "search"}
ABOVE = {"comparing": {*LAYERS, *SCRIPTS, "comparing"}, "compare": {*LAYERS, "comparing"}}  # they make runs of scripts
ABOVE |= {"shipping": {*LAYERS, *SCRIPTS, "comparing", "shipping"}, "fleet": {*LAYERS, "shipping"}}
MAY_IMPORT = (
    LAYERS | {script: set(LAYERS) for script in SCRIPTS} | ABOVE | {"benchmarks": {*LAYERS, "comparing", "benchmarks"}}
)
OURS = set(MAY_IMPORT)
FILES = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0].removesuffix(".py") in OURS]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> set[str]:
    """Packages and modules at the top."""
    return {name.split(".")[0] for name in imported_names(path)}


def imported_names(path: Path) -> set[str]:
    """Everything imported, wherever it stands: "package.module" and, from `from`, "package.module.name"."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def file_of(name: str, files: dict[str, Path]) -> Path | None:
    """The file of ours that importing a name reads: of `package.module.name` the module's."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return files.get(name)


def import_graph(root: Path, paths: list[Path]) -> dict[Path, set[Path]]:
    """The files that each file imports."""
    files = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    return {path: {file_of(name, files) for name in imported_names(path)} - {None, path} for path in paths}


def cycles(graph: dict[Path, set[Path]]) -> list[list[Path]]:
    """Files that import each other, by whatever way: the strongly connected components of more than one."""
    found, done = [], set()
    for start in graph:
        if start in done:
            continue
        both = reachable(graph, start) & {other for other in graph if start in reachable(graph, other)}
        done |= both
        if both:
            found.append(sorted(both))
    return found


def reachable(graph: dict[Path, set[Path]], start: Path) -> set[Path]:
    """Files that a file imports, also through others; itself only in a cycle."""
    found, rest = set(), list(graph[start])
    while rest:
        if (path := rest.pop()) not in found:
            found.add(path)
            rest += graph[path]
    return found


def test_every_part_is_there():
    assert {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES} == OURS


@each_file
def test_imports_point_downwards(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert imported(path) & OURS <= MAY_IMPORT[part]


def test_files_do_not_import_each_other_in_a_circle():
    assert cycles(import_graph(ROOT, FILES)) == []


@pytest.mark.parametrize(
    ("a", "b", "circle"),
    [
        ("import p.b", "", False),
        ("import p.b", "from p.a import x", True),
        ("from p import b", "def f():\n    import p.a", True),
        ("from p.b import y", "if TYPE_CHECKING:\n    from p import a", True),
        ("from p import b", "from p import c", False),
        ("from p import b", "import p", False),
    ],
)
def test_circles_are_found(tmp_path, a, b, circle):
    (tmp_path / "p").mkdir()
    for name, source in {"__init__": "", "a": a, "b": b, "c": ""}.items():
        (tmp_path / "p" / f"{name}.py").write_text(source)
    found = cycles(import_graph(tmp_path, sorted((tmp_path / "p").iterdir())))
    assert [[path.stem for path in each] for each in found] == ([["a", "b"]] if circle else [])


@each_file
def test_no_file_is_long(path):
    assert is_kernel(path) or len(path.read_text().splitlines()) <= MOST_LINES


@each_file
def test_no_function_is_long(path):
    functions = [node for node in ast.walk(parsed(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = {each.name: each.end_lineno - each.lineno + 1 for each in functions if not is_kernel(path)}
    assert {name: lines for name, lines in long.items() if lines > MOST_LINES_OF_A_FUNCTION} == {}


@each_file
def test_what_is_public_has_a_docstring(path):
    """Modules, their functions and classes; a script's or benchmark's `main` is described by its module."""
    public = (ast.FunctionDef, ast.ClassDef)
    found = [node for node in parsed(path).body if isinstance(node, public) and not node.name.startswith("_")]
    named = [parsed(path), *(node for node in found if node.name != "main")]
    missing = [getattr(node, "name", "the module") for node in named if not ast.get_docstring(node)]
    assert missing == [] or not path.stat().st_size


def is_kernel(path: Path) -> bool:
    return path.parent.name == "kernels" and path.stem.endswith("_triton")


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_use_nothing_private(path):
    names = {part for name in imported_names(path) for part in name.split(".")}
    assert not [name for name in names if name.startswith("_") and not name.startswith("__")]


@each_file
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


@each_file
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


@each_file
def test_timm_is_imported_only_where_it_is_used(path):
    tree = parsed(path)
    inside = {node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in set(ast.walk(tree)) - inside:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not any(name.split(".")[0] == "timm" for name in names)


def code(path: Path) -> str:
    """A file's source with method calls such as `.eval()` kept and strings removed."""
    return re.sub(r"\.eval\(", ".mode(", re.sub(r'""".*?"""|"[^"\n]*"', "", path.read_text(), flags=re.DOTALL))


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parent == ROOT / "kernels"], ids=lambda path: path.name
)
def test_kernels_need_torch_and_triton_alone(path):
    assert imported(path) - set(sys.stdlib_module_names) <= {"torch", "triton", "kernels"}


def test_common_needs_the_standard_library_alone():
    assert imported(ROOT / "common.py") <= set(sys.stdlib_module_names)


@each_file
def test_nothing_is_imported_by_a_name_that_is_only_known_when_it_runs(path):
    nodes = list(ast.walk(parsed(path)))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    if path == ROOT / "common.py":  # FILE.py:NAME: the user's own code, asked for by name
        names.discard("exec_module")
    assert names.isdisjoint({"__import__", "import_module", "run_module", "run_path", "exec_module"})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import losses.logits as x", {"losses"}),
        ("from objectives.registry import gtn", {"objectives"}),
        ("def f():\n    from engine.loop import run", {"engine"}),
        ("if True:\n    import os, models", {"os", "models"}),
    ],
)
def test_imports_are_found_wherever_they_stand(tmp_path, source, expected):
    (tmp_path / "x.py").write_text(source)
    assert imported(tmp_path / "x.py") == expected

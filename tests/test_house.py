"""Laws of the house: short functions, imports in one direction, small programs."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGES = ("ldm", "dci")


def sources(*folders):
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def imports(file):
    """Modules of this project that a file imports when it runs, anywhere in it."""
    found, tree = set(), ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def module_name(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("file", sources(*PACKAGES), ids=lambda f: str(f.relative_to(ROOT)))
def test_no_function_is_over_60_lines(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno + 1 <= 60, f"{node.name} in {file}"


def test_ldm_does_not_import_dci():
    for file in sources("ldm"):
        assert not {name for name in imports(file) if name.split(".")[0] == "dci"}, file


def test_no_circular_imports():
    modules = {module_name(file): file for file in sources(*PACKAGES)}
    graph = {name: {i for i in imports(file) if i in modules and i != name} for name, file in modules.items()}
    # Take away, again and again, modules that import nothing that is left.
    while graph:
        free = {name for name, needed in graph.items() if not needed & graph.keys()}
        assert free, f"a circle among {sorted(graph)}"
        graph = {name: needed for name, needed in graph.items() if name not in free}


def test_every_public_name_has_a_docstring():
    missing = []
    for file in sources(*PACKAGES):
        tree = ast.parse(file.read_text())
        for node in [tree, *tree.body]:
            named = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if (isinstance(node, ast.Module) or named) and not ast.get_docstring(node):
                missing.append(f"{file.relative_to(ROOT)} {getattr(node, 'name', '')}")
    assert not missing


def test_the_tiny_model_is_at_most_25_mb():
    files = list((ROOT / "data/tiny").glob("*.safetensors"))
    assert {f.name for f in files} == {"unet.safetensors", "text.safetensors", "vae.safetensors"}
    assert sum(Path(f).stat().st_size for f in files) <= 25e6

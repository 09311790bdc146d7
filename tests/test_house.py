"""Laws of the house: short functions, imports in one direction, small programs."""

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGES = ("ldm", "dci")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def sources(*folders):
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


@functools.cache
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


ARROWS = {
    "cli": {"app", "experiments", "evaluation", "samples", "finetuning", "dual_branch", "concept", "pipeline"},
    "app": {"evaluation", "samples", "finetuning", "dual_branch", "concept", "pipeline"},
    "experiments": {"evaluation", "samples", "finetuning", "dual_branch", "concept", "pipeline"},
    "evaluation": {"concept", "samples"},
    "finetuning": {"dual_branch", "concept", "samples"},
    "pipeline": {"dual_branch", "concept"},
    "diffusers": {"dual_branch", "concept"},
    "dual_branch": {"concept"},
    "samples": set(),
    "concept": set(),
}
"""Room of dci -> the rooms that it may import; what lies beside them (files, captions, version) is everybody's."""


def test_grids_start_nothing_of_the_programs_at_run_time():
    """`experiments` runs its own module in its processes; a script or a module of `cli` would be an arrow back."""
    for file in sources("dci/experiments"):
        tree = ast.parse(file.read_text())
        said = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)}
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        named = [text for text in texts if text not in said and re.search(r"scripts|dci[./]cli|\.py$", text)]
        assert not named, file


@pytest.mark.parametrize("file", sources(*PACKAGES), ids=lambda f: str(f.relative_to(ROOT)))
def test_the_library_knows_no_options_of_the_programs(file):
    """It says `name=`, which `dci.cli.arguments.as_options` translates; whole commands may hold options."""
    if file.relative_to(ROOT).parts[:2] in (("dci", "cli"), ("dci", "app")):
        return
    raised = [node.exc for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Raise) and node.exc]
    for error in raised:
        parts = [node.value for node in ast.walk(error) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        text = "".join(parts)
        assert "dci merge" in text or not re.search(r"(^|[ (])--[a-z]", text), text


@pytest.mark.parametrize("room", ARROWS)
def test_arrows_between_rooms_point_one_way(room):
    files = sources(f"dci/{room}") or [ROOT / f"dci/{room}.py"]
    for file in files:
        rooms = {name.split(".")[1] for name in imports(file) if name.startswith("dci.")} & ARROWS.keys()
        assert rooms - {room} <= ARROWS[room], file


def test_every_room_has_its_arrows():
    rooms = {path.parent.name for path in (ROOT / "dci").glob("*/__init__.py")}
    assert rooms < ARROWS.keys()


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
    for file in sources(*PACKAGES, "scripts"):
        tree = ast.parse(file.read_text())
        for node in [tree, *tree.body]:
            named = isinstance(node, FUNCTIONS | ast.ClassDef) and not node.name.startswith("_")
            if (isinstance(node, ast.Module) or named) and not ast.get_docstring(node):
                missing.append(f"{file.relative_to(ROOT)} {getattr(node, 'name', '')}")
    assert not missing


FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
UNDOCUMENTED = re.compile(r"_.*|forward|backward")
"""Methods that need no docstring: Python's own, ours that are private, and those that a network or gradient consists of."""


@pytest.mark.parametrize("package", [*PACKAGES, "scripts"])
def test_every_public_method_has_a_docstring(package):
    """Its own, or that of the base class's method that it overrides; a hook of Lightning's is such a method too."""
    missing = []
    for file in sources(package):
        for node in ast.walk(ast.parse(file.read_text())):
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if not isinstance(method, FUNCTIONS) or UNDOCUMENTED.fullmatch(method.name) or ast.get_docstring(method):
                    continue
                if [ast.unparse(decorator) for decorator in method.decorator_list] == ["overload"]:
                    continue  # a signature alone; the method itself follows
                if not overrides_a_documented_one(file, node.name, method.name):
                    missing.append(f"{file.relative_to(ROOT)} {node.name}.{method.name}")
    assert not missing


def overrides_a_documented_one(file, class_name, method):
    own = getattr(importlib.import_module(module_name(file)), class_name)
    return any(getattr(base.__dict__.get(method), "__doc__", None) for base in own.__mro__[1:])


def test_the_tiny_model_is_at_most_25_mb():
    files = list((ROOT / "data/tiny").glob("*.safetensors"))
    assert {f.name for f in files} == {"unet.safetensors", "text.safetensors", "vae.safetensors"}
    assert sum(Path(f).stat().st_size for f in files) <= 25e6


def test_the_ground_of_the_method_is_clear():
    """What lies beside the rooms is found at a glance: at most six files."""
    assert len(list((ROOT / "dci").glob("*.py"))) <= 6

"""What holds for every product file: imports run downwards, files stay short, nothing private or executed is used."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
# From top to bottom; a file imports from its own layer and from those below. Packages of one layer do not mix.
LAYERS = (("core", "uda"), ("training",), ("models",), ("data_handlers",), ("utils",))
LEVEL = {package: level for level, packages in enumerate(LAYERS, start=1) for package in packages}
SCRIPTS = sorted(REPOSITORY.glob("*.py"))
PACKAGED = sorted(path for package in LEVEL for path in (REPOSITORY / package).rglob("*.py"))
LIMIT, SCRIPT_LIMIT = 450, 60
# `os._exit` is documented; a tensor's version is what PyTorch itself compares, and has no other name.
PUBLIC = ("_exit", "_version")


def name_of(path):
    return str(path.relative_to(REPOSITORY))


def imported(tree):
    """Names of the modules that a file imports, at its top or inside of functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module


@pytest.mark.parametrize("path", [*SCRIPTS, *PACKAGED], ids=name_of)
def test_a_product_file(path):
    text = path.read_text()
    tree = ast.parse(text)
    package = path.relative_to(REPOSITORY).parts[0]
    level = LEVEL.get(package, 0)
    for module in imported(tree):
        top = module.partition(".")[0]
        assert not (REPOSITORY / f"{top}.py").exists(), f"it imports the script {top}"
        assert top not in ("tests", "benchmarks")
        if top in LEVEL and top != package:
            assert LEVEL[top] > level, f"{package} imports {module}"
    if level == 0:
        assert path.name == "make_demo.py" or len(text.splitlines()) < SCRIPT_LIMIT
    elif "toy" not in path.parts:
        assert len(text.splitlines()) <= LIMIT
    assert ast.get_docstring(tree)
    assert not list(executed(tree))
    assert not list(private(tree))


def executed(tree):
    """Calls that execute what a file says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            unsafe = any(k.arg == "weights_only" and ast.unparse(k.value) != "True" for k in node.keywords)
            unsafe |= function == "torch.load" and "weights_only" not in {k.arg for k in node.keywords}
            if unsafe or function in ("pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec"):
                yield ast.unparse(node)


def private(tree):
    """Private names of other modules and objects than the file's own."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not of_self and node.attr not in own and node.attr not in PUBLIC:
                yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from (f"from {node.module} import {name}" for name in names if name.startswith("_"))


def test_no_test_imports_another():
    for path in (REPOSITORY / "tests").glob("*.py"):
        for module in imported(ast.parse(path.read_text())):
            assert not module.startswith("test_"), f"{path.name} imports {module}"


def test_the_rules_can_fail():
    assert list(executed(ast.parse("torch.load(path)")))
    assert list(executed(ast.parse("torch.load(path, weights_only=False)")))
    assert list(executed(ast.parse("pickle.load(file)")))
    assert not list(executed(ast.parse("torch.load(path, weights_only=True)")))
    assert list(private(ast.parse("torch._dynamo.config")))
    assert list(private(ast.parse("from torch._utils import x")))
    assert not list(private(ast.parse("self._a = cls._b")))

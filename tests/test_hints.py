"""Every public function, method and constructor of the library says what types it takes and returns."""

import ast
from pathlib import Path

import pytest

LIB = Path(__file__).parents[1] / "lib" / "fortify"
MODULES = [p for p in sorted(LIB.rglob("*.py")) if p.stem == "__init__" or not p.stem.startswith("_")]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def public(body, owner=""):
    """(dotted name, node) of the public functions of a module or class, constructors among them."""
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            inside = [*node.body, *getattr(node, "orelse", []), *getattr(node, "finalbody", [])]
            inside += [statement for handler in getattr(node, "handlers", []) for statement in handler.body]
            yield from public(inside, owner)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node.body, f"{owner}{node.name}.")
        elif isinstance(node, FUNCTIONS) and (node.name == "__init__" or not node.name.startswith("_")):
            yield owner + node.name, node


def unannotated(function, *, method):
    """What of a function has no annotation: names of parameters, and "return"."""
    own = function.args
    positional = [*own.posonlyargs, *own.args]
    static = any(getattr(d, "id", "") == "staticmethod" for d in function.decorator_list)
    taken = positional[1 if method and not static else 0 :] + own.kwonlyargs
    taken += [extra for extra in (own.vararg, own.kwarg) if extra]
    lacking = [argument.arg for argument in taken if argument.annotation is None]
    return lacking + ([] if function.returns else ["return"])


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(LIB).as_posix())
def test_every_public_function_is_annotated(path):
    for name, function in public(ast.parse(path.read_text(encoding="utf-8")).body):
        lacking = unannotated(function, method="." in name)
        where = f"{path.relative_to(LIB.parent)}:{function.lineno}"
        assert not lacking, f"{where}: {name} has no annotation of {', '.join(lacking)}"


@pytest.mark.parametrize(
    ("source", "lacking"),
    [
        ("def f(a: int, *b: int, c: int = 0, **d: int) -> None: ...", []),
        ("def f(a, /, *b, c=0, **d): ...", ["a", "c", "b", "d", "return"]),
        ("class C:\n    def __init__(self, a): ...", ["a", "return"]),
        ("class C:\n    @staticmethod\n    def f(a) -> int: ...", ["a"]),
        ("if True:\n    class C:\n        @classmethod\n        def f(cls, a: int): ...", ["return"]),
        ("def f() -> int:\n    def inner(a): ...", []),
        ("def _f(a): ...\nclass _C:\n    def f(self, a): ...\nclass D:\n    def __len__(self): ...", []),
    ],
)
def test_what_counts_as_unannotated(source, lacking):
    found = [unannotated(node, method="." in name) for name, node in public(ast.parse(source).body)]
    assert sum(found, []) == lacking

"""What a notebook depends on, read from its source: the library's modules and other notebooks' parameters."""

import ast
import functools
import hashlib
import json
from collections.abc import Collection
from fnmatch import fnmatch
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def code_of(notebook: str | Path, *, without: Collection[str] = ()) -> dict[str, str]:
    """{module: digest} of the library's modules that ``notebook`` imports, directly or through others.

    ``notebook`` is the path of an .ipynb file, or a module's name, which then is among them. ``without`` are
    patterns of modules, and of functions and classes in them, that change no result of it:
    ``"fortify.files"``, ``"*.figures"``, ``"fortify.runtime.progress_bar"``. A digest is of the code alone:
    comments and docstrings are no part.
    """
    own = Path(notebook).suffix == ".ipynb"
    left, found = _imports(_source(notebook), tuple(without)) if own else {notebook}, {}
    while left:
        name = left.pop()
        found[name], imports = _module(name, _path(name).read_text("utf-8"), tuple(without))
        left |= imports - found.keys()
    return dict(sorted(found.items()))


@functools.cache  # a module is imported by many notebooks
def _module(name, source, without):
    """(digest of its code, the modules that it imports)."""
    tree = ast.parse(source)
    tree.body = [s for s in tree.body if not _is_one(f"{name}.{getattr(s, 'name', '')}", without)]
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            if isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
                node.body = body[1:] or [ast.Pass()]
    code = ast.unparse(tree)
    return hashlib.sha256(code.encode()).hexdigest()[:12], _imports(code, without)


def inherited_parameters(notebook: str | Path) -> dict[str, list[str]]:
    """{other notebook: [names]} of the parameters that ``notebook`` takes from others; [] is all of them.

    They are the arguments of its calls of :meth:`fortify.runs.Run.parameters` and
    :func:`fortify.runs.shared_parameters`. ValueError where they are no literals.
    """
    found = {}
    for node in ast.walk(ast.parse(_source(notebook))):
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called not in ("parameters", "shared_parameters"):
            continue
        given = node.args[1 if called == "shared_parameters" else 0 :]
        if not given or not all(isinstance(a, ast.Constant) and isinstance(a.value, str) for a in given):
            raise ValueError(f"{notebook}: {ast.unparse(node)} must name notebook and parameters literally")
        stem, *names = (argument.value for argument in given)
        found[stem] = [*found.get(stem, []), *names] if names and found.get(stem, names) else []
    return found


def cells_digest(notebook: str | Path) -> str:
    """12 hex digits of a notebook's code cells as they are written; its prose is no part."""
    return hashlib.sha256("\0".join(_cells(notebook)).encode()).hexdigest()[:12]


def _cells(notebook):
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def _source(notebook):
    """The code of all its cells."""
    return "\n".join(_cells(notebook))


def _imports(source, without):
    """Names of the library's modules that ``source`` imports, but for those of ``without``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            names = {name for name in names if not _is_one(name, without)}
            # A module of a package, or what a module defines; the package's __init__ runs either way.
            found |= names | ({node.module} if names else set())
    found = {name for name in found if name.split(".")[0] == PACKAGE.name}
    parents = {".".join(name.split(".")[:depth]) for name in found for depth in range(1, name.count(".") + 1)}
    return {name for name in found | parents if _path(name) and not _is_one(name, without)}


def _is_one(name, patterns):
    return any(fnmatch(name, pattern) for pattern in patterns)


def _path(module):
    """The file of a module of the library; None where the name is none."""
    folder = PACKAGE.joinpath(*module.split(".")[1:])
    found = [p for p in (folder / "__init__.py", folder.with_suffix(".py")) if p.is_file()]
    return found[0] if found and module.split(".")[0] == PACKAGE.name else None

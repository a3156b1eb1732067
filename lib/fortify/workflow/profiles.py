"""Profiles: flat YAML files of notebook parameters, checked against what the notebooks declare."""

import ast
import contextlib
from pathlib import Path

import nbformat
import yaml


class ProfileError(ValueError):
    """A profile does not fit the notebooks; the message names the file, the parameter and the remedy."""


def literals(source):
    """{name: value} of lines of ``name = literal`` and comments. ValueError names a line that is not one."""
    found = {}
    for line in ast.parse(source).body:
        try:
            found[line.targets[0].id] = ast.literal_eval(line.value)
        except (AttributeError, ValueError):
            raise ValueError(f"{ast.unparse(line)} is no `name = literal`") from None
    return found


def declared_parameters(notebook):
    """{name: default} of the cell tagged ``parameters``, which must hold plain literals, one a line."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            try:
                return literals(cell.source)
            except ValueError as error:
                raise ProfileError(f"{notebook}: {error}") from None
    raise ProfileError(f"{notebook} has no cell tagged parameters")


def load_profile(path, notebooks, *, changes=None):
    """Read a profile: {notebook stem: {name: value}}, each notebook with just the parameters it declares.

    ``notebooks`` are paths; ``changes`` {name: value} go over the file's values. A name that neither has
    keeps the notebook's default, so that the result holds every parameter. Raises ProfileError for a file
    that is missing or is no flat mapping, a name that no notebook declares, and a value of another type than
    the default.
    """
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise ProfileError(f"{path} does not exist; the profiles are: {known}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ProfileError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ProfileError(f"{path} must be lines of `name: value`, not {type(values).__name__}")
    values |= changes or {}
    declared = {Path(n).stem: declared_parameters(n) for n in notebooks}
    known = {name for parameters in declared.values() for name in parameters}
    unknown = sorted(map(str, set(values) - known))
    if unknown:
        raise ProfileError(
            f"{path}: no notebook has a parameter {', '.join(unknown)}. They have: {', '.join(sorted(known))}"
        )
    for stem, parameters in declared.items():
        for name, default in parameters.items():
            if name in values:
                parameters[name] = _typed(values[name], default, where=f"{path}: {name} (notebook {stem})")
    return declared


def _typed(value, default, *, where):
    """``value`` if it is of the default's type, each element of a list too; an integer passes for a float."""
    if isinstance(default, list):
        if not isinstance(value, list) or not value:
            raise ProfileError(f"{where} must be a list like {default}, not {value!r}")
        return [_typed(v, default[0], where=where) for v in value]
    if isinstance(default, float) and isinstance(value, str):  # YAML reads 5e-5, without a dot, as text
        with contextlib.suppress(ValueError):
            value = float(value)
    fits = type(value) is type(default) or (type(value) is int and type(default) is float)
    if not fits:
        raise ProfileError(f"{where} must be {type(default).__name__} like {default!r}, not {value!r}")
    return value

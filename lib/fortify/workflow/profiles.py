"""Profiles: flat YAML files of notebook parameters, checked against what the notebooks declare."""

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fortify.runs import checked_parameter, declared_parameters
from fortify.workflow.notebooks import inherited_parameters

# What a profile says of itself: no parameters.
ABOUT = {"title": "", "beside": False, "first": False, "seeds_of": {}}


class ProfileError(ValueError):
    """A profile does not fit the notebooks; the message names the file, the parameter and the remedy."""


def read_profile(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters, about) of a YAML file, unchecked but for its form.

    ``about`` holds its ``title``, a line for readers, ``beside``: whether it is a companion profile, whose
    Table 1 and audit stand beside another's, ``first``: whether such a Table 1 goes before the other's in
    README, and ``seeds_of`` {split: seeds}, where a split is run with fewer seeds than the others. Raises
    ProfileError for a file that is missing or no flat mapping, and where these are of another type.
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
    about = ABOUT | {k: v for k, v in values.items() if k in ABOUT}
    for name, default in ABOUT.items():
        if not isinstance(about[name], type(default)):
            raise ProfileError(f"{path}: {name} must be {type(default).__name__}, not {about[name]!r}")
    for split, seeds in about["seeds_of"].items():
        if not isinstance(seeds, list):
            raise ProfileError(f"{path}: seeds_of must give the {split} split a list of seeds, not {seeds!r}")
    return {k: v for k, v in values.items() if k not in ABOUT}, about


def companion_profiles(folder: str | Path) -> dict[str, str]:
    """{name: title} of the profiles in ``folder`` whose results stand beside another's."""
    found = {path.stem: read_profile(path)[1] for path in sorted(Path(folder).glob("*.yaml"))}
    return {name: about["title"] for name, about in found.items() if about["beside"]}


def load_profile(
    path: str | Path, notebooks: Iterable[str | Path], *, changes: dict[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Read a profile: {notebook stem: {name: value}}, each notebook with just the parameters it declares.

    ``notebooks`` are paths; ``changes`` {name: value} go over the file's values. A name that neither has
    keeps the notebook's default, so that the result holds every parameter. Raises ProfileError for a file
    that :func:`read_profile` refuses, a name that no notebook declares, and a value of another type than the
    default.
    """
    values = read_profile(path)[0] | (changes or {})
    try:
        declared = {Path(n).stem: declared_parameters(n) for n in notebooks}
    except ValueError as error:
        raise ProfileError(str(error)) from None
    known = {name for parameters in declared.values() for name in parameters}
    unknown = sorted(map(str, set(values) - known))
    if unknown:
        raise ProfileError(
            f"{path}: no notebook has a parameter {', '.join(unknown)}. They have: {', '.join(sorted(known))}"
        )
    for stem, parameters in declared.items():
        for name, default in parameters.items():
            if name in values:
                where = f"{path}: {name} (notebook {stem})"
                try:
                    parameters[name] = checked_parameter(
                        _numbers(values[name], default), default, where=where
                    )
                except ValueError as error:
                    raise ProfileError(str(error)) from None
    return declared


def with_inherited(
    parameters: Mapping[str, dict[str, Any]], notebooks: Iterable[str | Path]
) -> dict[str, dict[str, Any]]:
    """``parameters`` of :func:`load_profile` with, for each notebook, those that it takes from others too."""
    whole = {}
    for path in sorted(map(Path, notebooks)):  # in their order: what one inherits is passed on
        own = {}
        for stem, names in inherited_parameters(path).items():
            own |= {name: whole[stem][name] for name in names or parameters[stem]}
        whole[path.stem] = own | parameters[path.stem]
    return whole


def _numbers(value, default):
    """YAML reads 5e-5, without a dot, as text: where a number is expected, in a mapping too, it is one."""
    if isinstance(value, dict):
        default = default if isinstance(default, dict) else {}
        return {k: _numbers(v, default.get(k, 0.0)) for k, v in value.items()}
    if isinstance(default, float) and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value

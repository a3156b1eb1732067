"""Profiles: every name known, every value of its type, every notebook complete."""

from pathlib import Path

import nbformat
import pytest
import yaml

from fortify.workflow.profiles import ProfileError, declared_parameters, load_profile

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
PROFILES = sorted((ROOT / "notebooks" / "profiles").glob("*.yaml"))


@pytest.fixture
def notebook(tmp_path):
    cell = nbformat.v4.new_code_cell(
        'eps_255 = 4  # grey levels\nlr = 0.1\nsplits = ["random"]\nflip = True\narch = "x"',
        metadata={"tags": ["parameters"]},
    )
    path = tmp_path / "01_x.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    return path


def profile(tmp_path, text):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    return path


def test_values_override_and_defaults_stay(tmp_path, notebook):
    found = load_profile(profile(tmp_path, "eps_255: 8\nlr: 1\n"), [notebook])
    assert found == {"01_x": {"eps_255": 8, "lr": 1, "splits": ["random"], "flip": True, "arch": "x"}}


def test_changes_go_over_the_file_and_are_checked_as_it_is(tmp_path, notebook):
    path = profile(tmp_path, "eps_255: 8\nlr: 1\n")
    assert load_profile(path, [notebook], changes={"eps_255": 2})["01_x"]["eps_255"] == 2
    with pytest.raises(ProfileError, match="esp_255"):
        load_profile(path, [notebook], changes={"esp_255": 2})


def test_small_numbers_without_a_dot_are_numbers(tmp_path, notebook):
    """YAML reads 5e-5 as text."""
    assert load_profile(profile(tmp_path, "lr: 5e-5"), [notebook])["01_x"]["lr"] == 5e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("esp_255: 4", "no notebook has a parameter esp_255.*eps_255"),
        ("eps_255: four", "eps_255.*int like 4, not 'four'"),
        ("eps_255: 8/255", "int like 4"),
        ("eps_255: true", "int like 4"),
        ("eps_255: 0.5", "int like 4"),
        ("flip: 1", "bool like True"),
        ("arch: 50", "str like 'x'"),
        ("splits: random", "list"),
        ("splits: []", "list"),
        ("splits: [1]", "str"),
        ("- a", "lines of"),
        ("a: [", "not YAML"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, notebook, text, message):
    with pytest.raises(ProfileError, match=message):
        load_profile(profile(tmp_path, text), [notebook])


def test_a_missing_profile_lists_the_others(tmp_path, notebook):
    profile(tmp_path, "")
    with pytest.raises(ProfileError, match="the profiles are: p"):
        load_profile(tmp_path / "q.yaml", [notebook])


def test_parameters_must_be_literals(tmp_path):
    cell = nbformat.v4.new_code_cell("eps = 8 / 255", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "n.ipynb")
    with pytest.raises(ProfileError, match="eps = 8 / 255 is no"):
        declared_parameters(tmp_path / "n.ipynb")


def test_a_notebook_without_parameters_is_named(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(cells=[]), tmp_path / "n.ipynb")
    with pytest.raises(ProfileError, match="no cell tagged parameters"):
        declared_parameters(tmp_path / "n.ipynb")


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_the_projects_profiles_fit(path):
    found = load_profile(path, NOTEBOOKS)
    for name in ("eps_255", "cw_l2", "matrix_eps_255", "seeds", "splits"):
        values = [own[name] for own in found.values() if name in own]
        assert values and all(value == values[0] for value in values), f"the notebooks speak of one {name}"


def test_the_paper_profile_is_the_notebooks_own_values():
    paper = yaml.safe_load((ROOT / "notebooks/profiles/paper.yaml").read_text())
    for notebook in NOTEBOOKS:
        declared = declared_parameters(notebook)
        assert declared.items() >= {k: v for k, v in paper.items() if k in declared}.items()
    # and a name means the same wherever it stands
    defaults = {}
    for notebook in NOTEBOOKS:
        for name, value in declared_parameters(notebook).items():
            assert defaults.setdefault(name, value) == value, f"{name} in {notebook.stem}"

"""Profiles: every name known, every value of its type, every notebook complete."""

import json
from pathlib import Path

import nbformat
import pytest
import yaml

from fortify.augmentation import Augmentation
from fortify.runs import declared_parameters
from fortify.training import Recipe
from fortify.workflow.profiles import (
    ProfileError,
    companion_profiles,
    load_profile,
    read_profile,
    with_inherited,
)

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
PROFILES = sorted((ROOT / "notebooks" / "profiles").glob("*.yaml"))


@pytest.fixture
def notebook(tmp_path):
    cell = nbformat.v4.new_code_cell(
        'eps_255 = 4  # grey levels\nlr = 0.1\nsplits = ["random"]\nflip = True\narch = "x"\n'
        'how = {"ema": 0.5}',
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
    own = {"eps_255": 8, "lr": 1, "splits": ["random"], "flip": True, "arch": "x", "how": {"ema": 0.5}}
    assert found == {"01_x": own}


def test_a_title_and_whether_it_stands_beside_another_are_no_parameters(tmp_path, notebook):
    path = profile(tmp_path, "title: a smaller one\nbeside: true\nlr: 1\n")
    assert load_profile(path, [notebook])["01_x"].keys() == declared_parameters(notebook).keys()
    about = {"title": "a smaller one", "beside": True, "first": False, "seeds_of": {}}
    assert read_profile(path) == ({"lr": 1}, about)
    assert companion_profiles(tmp_path) == {"p": "a smaller one"}
    assert companion_profiles(profile(tmp_path, "title: a smaller one\n").parent) == {}


def test_a_split_may_have_fewer_seeds(tmp_path, notebook):
    path = profile(tmp_path, "seeds_of: {random: [0, 1]}\n")
    assert read_profile(path)[1]["seeds_of"] == {"random": [0, 1]}
    with pytest.raises(ProfileError, match="seeds_of must give the random split a list of seeds, not 3"):
        read_profile(profile(tmp_path, "seeds_of: {random: 3}\n"))


def test_changes_go_over_the_file_and_are_checked_as_it_is(tmp_path, notebook):
    path = profile(tmp_path, "eps_255: 8\nlr: 1\n")
    assert load_profile(path, [notebook], changes={"eps_255": 2})["01_x"]["eps_255"] == 2
    with pytest.raises(ProfileError, match="esp_255"):
        load_profile(path, [notebook], changes={"esp_255": 2})


def test_small_numbers_without_a_dot_are_numbers(tmp_path, notebook):
    """YAML reads 5e-5 as text."""
    found = load_profile(profile(tmp_path, "lr: 5e-5\nhow: {ema: 1e-1, lr: 2e-3}"), [notebook])["01_x"]
    assert found["lr"] == 5e-5 and found["how"] == {"ema": 0.1, "lr": 2e-3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("esp_255: 4", "no notebook has a parameter esp_255.*eps_255"),
        ("eps_255: four", "eps_255.* must be a whole number like 4, not the text 'four'"),
        ("eps_255: 8/255", "a whole number like 4, not the text '8/255'"),
        ("eps_255: true", "a whole number like 4, not True"),
        ("eps_255: 0.5", "a whole number like 4"),
        ("lr: fast", "a number like 0.1, not the text 'fast'"),
        ("flip: 1", "true or false like True, not 1"),
        ("flip: 'false'", "true or false like True, not the text 'false'"),
        ("arch: 50", "text like 'x', not 50"),
        ("splits: random", "a list like .*, not the text 'random'"),
        ("splits: []", "a list"),
        ("splits: [1]", "an element of .*splits.* must be text like 'random', not 1"),
        ("how: 3", "a mapping like"),
        ("how: {ema: much}", "ema in .*how.* must be a number like 0.5, not the text 'much'"),
        ("beside: 1", "beside must be bool"),
        ("title: [a]", "title must be str"),
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
    with pytest.raises(ValueError, match="eps = 8 / 255 is no"):
        declared_parameters(tmp_path / "n.ipynb")
    with pytest.raises(ProfileError, match="eps = 8 / 255 is no"):
        load_profile(profile(tmp_path, ""), [tmp_path / "n.ipynb"])


def test_a_notebook_without_parameters_is_named(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(cells=[]), tmp_path / "n.ipynb")
    with pytest.raises(ValueError, match="no cell tagged parameters"):
        declared_parameters(tmp_path / "n.ipynb")


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_the_projects_profiles_fit(path):
    """And each says in a line what it is; what a notebook takes from another is that one's."""
    found, about = load_profile(path, NOTEBOOKS), read_profile(path)[1]
    assert 10 < len(about["title"]) < 90 and "\n" not in about["title"]
    whole = with_inherited(found, NOTEBOOKS)
    for name in ("eps_255", "cw_l2", "matrix_eps_255", "seeds", "splits"):
        values = [own[name] for own in whole.values() if name in own]
        assert len(values) > 1 and all(value == values[0] for value in values), f"they speak of one {name}"
    assert set(found["09_claims"]["audit_splits"]) <= set(found["01_data"]["splits"])
    assert set(found["09_claims"]["published_seeds"]) <= set(found["01_data"]["seeds"]) or path.stem in (
        "demo",
        "test",
    )


def test_the_published_runs_were_trained_by_the_recipe_of_todays_profile():
    """Their manifests say each part of it; earlier ones by names of its own for what notebook 4 changes."""
    runs = sorted((ROOT / "paper/tables").glob("*/runs/*-s*/04_adversarial_training.json"))
    assert len(runs) >= 20
    for path in runs:
        ran = json.loads(path.read_text(encoding="utf-8"))
        own = ran["parameters"] | {k: v for p in ran.get("inherited", {}).values() for k, v in p.items()}
        name = path.relative_to(ROOT / "paper/tables").parts[0]
        today = with_inherited(load_profile(ROOT / f"notebooks/profiles/{name}.yaml", NOTEBOOKS), NOTEBOOKS)
        today = today["04_adversarial_training"]
        if "train_recipe" not in own:
            views = ("degrees", "zoom", "translate", "gamma", "gain", "level", "noise", "blur", "cutout")
            views = {view: own.pop(f"train_{view}") for view in views}
            parts = {k: v for k, v in own.items() if k in Recipe.__dataclass_fields__}
            made = Recipe(**parts, augmentation=Augmentation(flip=own["flip"], **views))
            shares = [own["fgsm_share"], own["pgd_share"], own["cw_share"]]
        else:
            made, shares = Recipe.from_parameters(own, **own["train_recipe"]), [*own["train_shares"].values()]
        assert made == Recipe.from_parameters(today, **today["train_recipe"]), path
        assert shares == [*today["train_shares"].values()]
        for part in ("train_eps_255", "train_pgd_steps", "arch", "weights", "eps_255"):
            assert own[part] == today[part], (path, part)


def test_the_paper_profile_is_the_notebooks_own_values():
    paper = yaml.safe_load((ROOT / "notebooks/profiles/paper.yaml").read_text())
    for notebook in NOTEBOOKS:
        declared = declared_parameters(notebook)
        assert declared.items() >= {k: v for k, v in paper.items() if k in declared}.items()

"""The README: its example runs, its results are the published tables, its links lead somewhere."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from fortify.workflow.profiles import companion_profiles
from fortify.workflow.publish import published_folders

ROOT = Path(__file__).parents[1]
COMPANIONS = companion_profiles(ROOT / "notebooks" / "profiles")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_examples_run_as_printed(phantoms, tmp_path, monkeypatch, capsys):
    for name, image in list(zip(phantoms.names, phantoms.images, strict=True))[::2]:
        path = tmp_path / "my-images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path.with_suffix(".png"))
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"<!-- example.*?-->\n```python\n(.*?)```", README, re.DOTALL)
    exec(compile("\n".join(examples), "README.md", "exec"), {})
    first, *table = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"robust accuracy \d+\.\d%", first)
    ids = {line.split("|")[1].strip() for line in table if line.startswith("|")}
    assert ids >= {"T0", "T0b", "T7", "T15"}


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_slices_that_the_readme_names_are_those_of_the_published_runs():
    """And they are the copy, whose files are all of one size."""
    profile = re.search(r"From the `(\w+)` profile", README).group(1)
    folders = [published_folders(ROOT, name)[1] for name in (profile, *COMPANIONS)]
    manifests = [path for folder in folders for path in folder.glob("runs/*-s*/[0-9]*.json")]
    named = re.search(r"`data_sha256` ([0-9a-f]{8})…", README).group(1)
    assert {json.loads(path.read_text())["data_sha256"][:8] for path in manifests} == {named}
    sizes = pd.read_csv(folders[0] / "dataset.csv").set_index("class")
    assert sizes.sizes.dropna().str.startswith("224 x 224 (").all() and sizes.duplicates["all"] == 43


@pytest.mark.parametrize("split", ["random", "grouped"])
def test_the_results_are_the_published_tables(split):
    generated = README.split("<!-- generated: results -->")[1].split("<!-- /generated: results -->")[0]
    profile = re.search(r"From the `(\w+)` profile", generated).group(1)
    tables = ROOT / "paper" / "tables" / ("" if profile == "paper" else profile)
    assert (tables / f"table1_{split}.md").read_text(encoding="utf-8") in generated


def test_the_failed_checks_of_the_audit_stand_under_the_results():
    generated = README.split("<!-- generated: results -->")[1].split("<!-- /generated: results -->")[0]
    profile = re.search(r"From the `(\w+)` profile", generated).group(1)
    folders = [published_folders(ROOT, name)[1] for name in (profile, *COMPANIONS)]
    lines = [line for line in generated.splitlines() if line.startswith("Checks of the audit")]
    said = [set(re.findall(r"\*([^*]+)\* \((\w+) split, seed \d+, (\w+) model: ", line)) for line in lines]
    found = []
    for tables in filter(Path.is_dir, folders):
        checks = [
            pd.read_csv(path).assign(split=split)
            for split in ("random", "grouped")
            for path in tables.glob(f"audit_{split}-s*.csv")
        ]
        failed = pd.concat(checks).query("verdict == 'fail'")
        found.append(set(zip(failed.check, failed.split, failed.model, strict=True)))
    assert sorted(map(sorted, said)) == sorted(map(sorted, found))


def test_the_claims_are_the_published_ledger():
    generated = README.split("<!-- generated: claims -->")[1].split("<!-- /generated: claims -->")[0]
    profile = re.search(r"From the `(\w+)` profile", README).group(1)
    tables = ROOT / "paper" / "tables" / ("" if profile == "paper" else profile)
    assert (tables / "claims.md").read_text(encoding="utf-8") in generated
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", generated)
    assert len(pictures) == 1 and (ROOT / pictures[0]).exists()

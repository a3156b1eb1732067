"""README and docs/: examples run, what is generated is the published tables, links lead somewhere."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from fortify.workflow.profiles import companion_profiles
from fortify.workflow.publish import published_folders, shown_profile, update_pages

ROOT = Path(__file__).parents[1]
COMPANIONS = companion_profiles(ROOT / "notebooks" / "profiles")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESULTS = (ROOT / "docs/results.md").read_text(encoding="utf-8")


def generated(text, section):
    """What stands between the markers of a section."""
    return text.split(f"<!-- generated: {section} -->\n")[1].split(f"<!-- /generated: {section} -->")[0]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_the_examples_run_as_printed(phantoms, tmp_path, monkeypatch, capsys):
    for name, image in list(zip(phantoms.names, phantoms.images, strict=True))[::2]:
        path = tmp_path / "my-images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path.with_suffix(".png"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORTIFY_ROOT", str(ROOT))
    library = (ROOT / "docs/library.md").read_text(encoding="utf-8")
    examples = re.findall(r"<!-- example.*?-->\n```python\n(.*?)```", README + library, re.DOTALL)
    assert len(examples) == 3
    exec(compile("\n".join(examples), "README.md", "exec"), {})
    first, *table = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"robust accuracy \d+\.\d%", first)
    assert re.fullmatch(r"fooled: \d+\.\d%", table.pop())
    ids = {line.split("|")[1].strip() for line in table if line.startswith("|")}
    assert ids >= {"T0", "T0b", "T7", "T15"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_leads_to_every_page():
    """Those on the site's menu alone: the first page, which is README itself, and the bibliography."""
    linked = set(re.findall(r"\]\(docs/(\w+)\.md", README))
    assert linked | {"index", "references"} == {path.stem for path in (ROOT / "docs").glob("*.md")}


def test_the_slices_that_the_results_name_are_those_of_the_published_runs():
    """And they are the copy, whose files are all of one size."""
    profile = re.search(r"of the `(\w+)` profile", RESULTS).group(1)
    folders = [published_folders(ROOT, name)[1] for name in (profile, *COMPANIONS)]
    manifests = [path for folder in folders for path in folder.glob("runs/*-s*/[0-9]*.json")]
    named = re.search(r"`data_sha256`; here it is ([0-9a-f]{8})…", RESULTS).group(1)
    assert {json.loads(path.read_text())["data_sha256"][:8] for path in manifests} == {named}
    sizes = pd.read_csv(folders[0] / "dataset.csv").set_index("class")
    assert sizes.sizes.dropna().str.startswith("224 x 224 (").all() and sizes.duplicates["all"] == 43


@pytest.mark.parametrize("split", ["random", "grouped"])
def test_the_results_are_the_published_tables(split):
    shown = generated(RESULTS, "results")
    profile = re.search(r"of the `(\w+)` profile", shown).group(1)
    tables = ROOT / "paper" / "tables" / ("" if profile == "paper" else profile)
    assert (tables / f"table1_{split}.md").read_text(encoding="utf-8") in shown


def test_the_failed_checks_of_the_audit_stand_under_the_results():
    shown = generated(RESULTS, "results")
    profile = re.search(r"of the `(\w+)` profile", shown).group(1)
    folders = [published_folders(ROOT, name)[1] for name in (profile, *COMPANIONS)]
    lines = [line for line in shown.splitlines() if line.startswith("Checks of the audit")]
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
    shown = generated((ROOT / "docs/claims.md").read_text(encoding="utf-8"), "claims")
    profile = re.search(r"of the `(\w+)` profile", RESULTS).group(1)
    tables = ROOT / "paper" / "tables" / ("" if profile == "paper" else profile)
    assert (tables / "claims.md").read_text(encoding="utf-8") in shown
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", shown)
    assert len(pictures) == 1 and (ROOT / "docs" / pictures[0]).exists()


def test_all_that_is_generated_is_of_the_published_tables(tmp_path, monkeypatch):
    """`make publish` would write the same again."""
    pages = ("README.md", "docs/results.md", "docs/claims.md", "docs/recipe.md")
    for page in pages:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        section = "aims" if page == "docs/recipe.md" else r"\w+"  # whose others benchmarks/ write
        pattern = rf"(<!-- generated: {section} -->\n).*?(<!-- /)"
        text = re.sub(pattern, r"\1\2", (ROOT / page).read_text(), flags=re.DOTALL)
        (tmp_path / page).write_text(text)
    for folder in ("notebooks", "figures", "paper", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    update_pages(tmp_path, shown_profile(ROOT))
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), page

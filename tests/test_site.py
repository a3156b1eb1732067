"""The static site: Table 1 first, every figure leads to its cell, nothing is fetched from elsewhere."""

import base64
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from fortify.workflow import site

ROOT = Path(__file__).parents[1]
PNG = base64.b64encode(b"not a picture, but these bytes").decode()


class Page(HTMLParser):
    """What a page refers to, and where it can be entered."""

    def __init__(self, text):
        super().__init__()
        self.refers, self.ids, self.images = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        if tag == "img":
            self.images.append(attributes)
        if tag in ("script", "link", "img", "iframe"):
            self.refers.append(attributes.get("src") or attributes.get("href") or "")
        elif tag == "a":
            self.refers.append(attributes.get("href", ""))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    index = site.published_site(tmp_path_factory.mktemp("pages") / "site")
    return {path.name: Page(path.read_text(encoding="utf-8")) for path in index.parent.glob("*.html")}, index


def test_the_index_opens_with_table_1_of_the_random_split_as_published(published):
    _, index = published
    text = index.read_text(encoding="utf-8")
    table = text.index("<h2>Table 1, random split")
    assert table < text.index("<h2>Table 1, grouped split") < text.index("<h2>Notebooks")
    below = {"paper": ""}.get(
        re.search(r"What the <b>(\w+)</b>", text)[1], re.search(r"<b>(\w+)</b>", text)[1]
    )
    rows = (ROOT / "paper/tables" / below / "table1_random.md").read_text(encoding="utf-8").splitlines()
    shown = re.findall(r"<td>(.*?)</td>", text[table : text.index("</table>", table)])
    assert shown == [c.strip() for row in rows[2:] if row.startswith("|") for c in row.strip("|").split("|")]


def test_every_link_of_the_site_leads_somewhere_in_it(published):
    pages, index = published
    assert len(pages) == len(list((ROOT / "notebooks").glob("[0-9]*.ipynb"))) + 1
    followed = 0
    for name, page in pages.items():
        for reference in page.refers:
            assert not re.match(r"(https?:)?//", reference) or reference in outside(name), (name, reference)
            if reference.startswith(("http", "data:", "#")):
                continue
            file, _, cell = reference.partition("#")
            assert (index.parent / file).is_file() if file else cell, (name, reference)
            if cell and file in pages:
                assert cell in pages[file].ids, (name, reference)
                followed += 1
    assert followed >= 15, "figures lead to cells"


def outside(name):
    """Addresses that a notebook's prose or tables name; a page may link them, not load them."""
    notebook = ROOT / "notebooks" / name.replace(".html", ".ipynb")
    return set(re.findall(r"https?://[^)\s\"\\]+", notebook.read_text(encoding="utf-8")))


def test_nothing_is_loaded_from_elsewhere(published):
    _, index = published
    for path in index.parent.glob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"(?:src=|import |url\()[\"']?(?:https?:)?//[^\"')]+", text), path.name


def test_every_picture_says_what_it_shows(published):
    pages, _ = published
    committed = {p.stem: nbformat.read(p, as_version=4) for p in (ROOT / "notebooks").glob("*.ipynb")}
    never_run = {stem for stem, nb in committed.items() if not any(c.get("outputs") for c in nb.cells)}
    for name, page in pages.items():
        assert page.images or Path(name).stem in never_run, name
        assert all(len(image.get("alt") or "") > 8 for image in page.images), name


@pytest.fixture
def build(tmp_path):
    picture = new_output("display_data", {"image/png": PNG}, metadata={"image/png": {"alt": "A <curve>"}})
    cells = [
        new_markdown_cell("# 1 · A question\n\n**Question.** Is it\nso?", id="a"),
        new_code_cell("x", id="c", outputs=[picture]),
    ]
    for folder in ("notebooks/random-s0", "tables", "figures"):
        (tmp_path / "laptop" / folder).mkdir(parents=True)
    nbformat.write(new_notebook(cells=cells), tmp_path / "laptop/notebooks/random-s0/02_a.ipynb")
    (tmp_path / "laptop/tables/table1_random.md").write_text(
        "| a | b |\n| --- | --- |\n| 1 | <2 |\n\nNote.\n"
    )
    (tmp_path / "laptop/tables/accuracy.csv").write_text("a\n1\n")
    (tmp_path / "laptop/figures/curve.png").write_bytes(base64.b64decode(PNG))
    (tmp_path / "laptop/figures/unseen.png").write_bytes(b"other")
    return tmp_path / "laptop"


def test_a_builds_pages_are_of_each_run(build, capsys):
    assert site.main([str(build)]) == 0
    assert capsys.readouterr().out.strip() == str(build / "html/index.html")
    index = (build / "html/index.html").read_text(encoding="utf-8")
    assert '<a href="random-s0_02_a.html">1 · A question (random-s0)</a><br>Is it so?' in index
    assert index.count("<h2>Table 1, random split") == 1 and "<h2>Classes" not in index
    (build / "tables/table1_random_classes.md").write_text("| c |\n| --- |\n| <9 |\n\nUnder it.\n")
    assert site.main([str(build)]) == 0
    both = (build / "html/index.html").read_text(encoding="utf-8")
    assert both.count("<h2>Table 1") == both.count("<h2>Classes, scans and baselines, random split</h2>") == 1
    assert both.index("Note.") < both.index("<h2>Classes") < both.index("<td>&lt;9</td>")
    assert "<td>&lt;2</td>" in index and "Note." in index and "not the reference run" in index
    assert (
        '<a href="random-s0_02_a.html#cell-id=c"><img src="figures/curve.png" alt="A &lt;curve&gt;"' in index
    )
    assert sorted(p.name for p in (build / "html/figures").iterdir()) == ["curve.png"]
    assert (build / "html/tables/accuracy.csv").is_file() and 'href="tables/accuracy.csv"' in index


def test_who_awaits_a_run_says_so_in_the_index_and_on_its_page(build, tmp_path, monkeypatch):
    """Of the committed notebooks; a finished profile's have just been run."""
    path = build / "notebooks/random-s0/02_a.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["fortify"] = {"profile": "laptop", "awaiting": "a run of <this>"}
    nbformat.write(notebook, path)
    assert site.main([str(build)]) == 0
    assert "wait" not in (build / "html/random-s0_02_a.html").read_text(encoding="utf-8").split("<body")[1]
    assert "Awaits" not in (build / "html/index.html").read_text(encoding="utf-8")
    (tmp_path / "notebooks").mkdir()
    shutil.copy(path, tmp_path / "notebooks/02_a.ipynb")
    shutil.copytree(build / "tables", tmp_path / "paper/tables/laptop")
    shutil.copytree(build / "figures", tmp_path / "figures/laptop")
    (tmp_path / "paper/paper.pdf").touch()
    monkeypatch.setattr(site, "find_root", lambda: tmp_path)
    index = site.published_site(tmp_path / "site")
    assert "Awaits a run of &lt;this&gt;." in index.read_text(encoding="utf-8")
    page = (tmp_path / "site/02_a.html").read_text(encoding="utf-8")
    assert "This notebook awaits\na run of &lt;this&gt;." in page


def test_seed_2_is_listed_before_10(build):
    for run in ("random-s10", "random-s2"):
        shutil.copytree(build / "notebooks/random-s0", build / "notebooks" / run)
    site.main([str(build)])
    listed = re.findall(
        r'<li><a href="random-s(\d+)_', (build / "html/index.html").read_text(encoding="utf-8")
    )
    assert listed == ["0", "2", "10"]


def test_a_second_site_leaves_nothing_of_the_first(build):
    site.main([str(build)])
    (build / "html/old.html").write_text("old")
    site.main([str(build)])
    assert not (build / "html/old.html").exists()


def test_what_cannot_be_shown_is_named(build, tmp_path, capsys, monkeypatch):
    assert site.main([str(tmp_path / "nothing")]) == 1
    assert "holds no executed notebooks and tables; run that profile first" in capsys.readouterr().err
    assert site.main(["--help"]) == 2
    monkeypatch.setattr(site, "find_root", lambda: build)
    with pytest.raises(site.PublishError, match="make publish"):
        site.published_site()

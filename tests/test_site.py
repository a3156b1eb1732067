"""The site: complete, from one host, searchable as files; and the pages of a run, which lead to cells."""

import base64
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_imports import MODULES, PLUMBING, room

from fortify.workflow import site

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
PNG = base64.b64encode(b"not a picture, but these bytes").decode()


class Page(HTMLParser):
    """What a page loads and links to, and where it can be entered."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.ids, self.images = [], [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        if tag == "img":
            self.images.append(attributes)
        if tag == "a":
            self.links.append(attributes.get("href") or "")
        elif (
            tag != "link" or "stylesheet" in attributes.get("rel", "") or "icon" in attributes.get("rel", "")
        ):
            self.loads += [attributes[name] for name in ("src", "href", "data") if attributes.get(name)]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """({path: Page}, folder) of the site; that it is built says that there was no warning."""
    folder = site.published_site(tmp_path_factory.mktemp("pages") / "site").parent
    return {path: Page(path) for path in folder.rglob("*.html") if "_static" not in path.parts}, folder


def test_every_notebook_and_page_is_there(published):
    pages, folder = published
    own = [path.relative_to(ROOT) for path in (*NOTEBOOKS, *(ROOT / "docs").rglob("*.md"))]
    assert len(own) > 25 and {folder / path.with_suffix(".html") for path in own} <= pages.keys()
    assert "url=docs/index.html" in (folder / "index.html").read_text(encoding="utf-8")


def test_every_link_leads_somewhere(published):
    pages, _ = published
    followed = 0
    for path, page in pages.items():
        for link in page.links:
            file, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link) or link in ("", "#"):
                continue
            target = (path.parent / unquote(file)).resolve() if file else path
            assert target.is_file(), (path, link)
            if anchor and target in pages:
                assert unquote(anchor) in pages[target].ids, (path, link)
                followed += 1
    assert followed > 1000


def test_nothing_is_loaded_from_another_host(published):
    pages, folder = published
    for path, page in pages.items():
        assert [load for load in page.loads if re.match(r"(https?:)?//", load)] == [], path
    styles = [path.read_text(encoding="utf-8") for path in [*folder.rglob("*.css"), *pages]]
    assert len(styles) > 30
    for text in styles:
        assert not re.findall(r"(?:@import\s+|url\()\s*[\"']?(?:https?:)?//[^\"')]+", text)


def test_every_picture_says_what_it_shows(published):
    pages, folder = published
    never_run = {p.stem for p in NOTEBOOKS if not any(c.get("outputs") for c in nbformat.read(p, 4).cells)}
    for path in NOTEBOOKS:
        page = pages[folder / "notebooks" / f"{path.stem}.html"]
        assert page.images or path.stem in never_run, path.stem
    assert all(len(image.get("alt") or "") > 8 for page in pages.values() for image in page.images)


def test_each_figure_of_the_gallery_leads_to_its_cell(published):
    pages, folder = published
    gallery = pages[folder / "docs/figures.html"]
    links = [link for link in gallery.links if link.startswith("../notebooks/") and "#" in link]
    assert len(gallery.images) >= 15 and len(links) == 2 * len(gallery.images), "picture and words"
    for link in set(links):
        name, cell = re.fullmatch(r"\.\./notebooks/(.+)\.html#(.+)", link).groups()
        (made,) = [c for c in nbformat.read(ROOT / f"notebooks/{name}.ipynb", 4).cells if c.id == cell]
        assert any("image/png" in output.get("data", {}) for output in made.outputs), link


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_imports_parameters_and_manifest_are_folded_and_nothing_else_is(published, path):
    text = (published[1] / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
    code = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    shown = re.findall(r"Show the code: (\w+)", text)
    assert shown[:3] == ["imports", "parameters", "parameters"] and shown.count("manifest") == 1
    assert len(shown) == 4 and text.count('<details class="admonition hide') == len(shown) < len(code)
    awaits = nbformat.read(path, 4).metadata["fortify"].get("awaiting")
    assert ("This notebook awaits" in text) == bool(awaits)


def test_every_module_that_people_reuse_has_its_docstrings_on_the_site(published):
    pages, folder = published
    found = {i for path, page in pages.items() if path.parent == folder / "docs/api" for i in page.ids}
    names = [".".join(filter(None, ("fortify", *room(p)))) for p in MODULES if room(p)[0] != PLUMBING]
    commands = {"fortify.leakage.__main__", "fortify.detect.__main__"}
    assert len(names) > 40 and {f"module-{name}" for name in set(names) - commands} <= found


def test_a_warning_is_an_error(tmp_path, monkeypatch, capfd):
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.md"))
    (tmp_path / "docs/index.md").write_text("# A page\n\n[a link](nowhere.md)\n")
    (tmp_path / "README.md").touch()
    (tmp_path / "paper").mkdir()
    shutil.copy(ROOT / "paper/references.bib", tmp_path / "paper")
    monkeypatch.setattr(site, "find_root", lambda: tmp_path)
    monkeypatch.setattr(site, "shown_profile", lambda root: "laptop")
    with pytest.raises(site.PublishError, match="see the warnings above"):
        site.published_site(tmp_path / "site")
    assert "nowhere.md" in capfd.readouterr().err
    assert not (tmp_path / "site/index.html").exists()


WIDTHS = {"desktop": (1400, 900), "phone": (390, 844)}


@pytest.fixture(scope="module", params=WIDTHS)
def browser(request, published):
    """(driver, width): Debian's chromium, or another, as wide as a desktop's window and as a phone."""
    programs = ("chromium", "chromium-browser", "google-chrome")
    found, driver = next(filter(None, map(shutil.which, programs)), None), shutil.which("chromedriver")
    if not found or not driver:
        pytest.skip("no chromium with its chromedriver here: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = found
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    width, height = WIDTHS[request.param]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": request.param == "phone"}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    yield chrome, width
    chrome.quit()


def soon(condition):
    """Whether it comes true within half a minute."""
    end = time.monotonic() + 30
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return held


def address(published, page):
    return (published[1] / page).as_uri()


def test_no_page_is_wider_than_the_window(browser, published):
    chrome, width = browser
    for path in published[0]:
        chrome.get(path.as_uri())
        assert chrome.execute_script("return document.documentElement.scrollWidth") <= width, path.name


def test_search_finds_a_word_from_the_file_system(browser, published):
    chrome, _ = browser
    chrome.get(address(published, "search.html"))
    chrome.get_log("browser")  # of the pages before
    fields = chrome.find_elements("css selector", "input[name=q]")
    next(field for field in fields if field.is_displayed()).send_keys("thumbnail\n")
    links = "return [...document.querySelectorAll('#search-results li a')].map((a) => a.href)"
    wanted = address(published, "notebooks/07_leakage.html")  # they are listed one after another
    assert soon(lambda: wanted in {re.split(r"[?#]", link)[0] for link in chrome.execute_script(links)})
    said = [entry["message"] for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"]
    assert said == []


def test_folded_code_opens_and_closes(browser, published):
    """By the keyboard too, whose place does not move while the page scrolls."""
    chrome, _ = browser
    chrome.get(address(published, "notebooks/03_attacks.html"))
    fold = chrome.find_element("css selector", "details.hide")
    code, summary = (fold.find_element("css selector", name) for name in (".cell_input", "summary"))
    assert not code.is_displayed()
    summary.send_keys("\n")
    assert soon(code.is_displayed) and "import numpy" in code.text  # it fades in
    summary.send_keys("\n")
    assert soon(lambda: not code.is_displayed())


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

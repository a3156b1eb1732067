"""The site, and the pages of one run.

python -m fortify.workflow.site                docs/ and the committed notebooks, by Sphinx: build/site
python -m fortify.workflow.site build/demo     a finished profile, every run of it: build/demo/html

The pages need no server and fetch nothing: they open from the file system, and GitHub Pages serves them.
"""

import base64
import html
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat

from fortify.files import find_root, write_text
from fortify.runs import run_order
from fortify.workflow.publish import PARTS1, PublishError, shown_profile

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#1f2328}
table{border-collapse:collapse;font-size:.92em}th,td{padding:.2rem .7rem;text-align:right}
th,td{border-bottom:1px solid #d0d7de}
th:first-child,td:first-child,th:nth-child(2),td:nth-child(2){text-align:left}
.scroll{overflow-x:auto}.note,figcaption{color:#57606a;font-size:.88em}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem}
figure{margin:0;border:1px solid #d0d7de;border-radius:6px;padding:.6rem}
figure img{width:100%;height:11rem;object-fit:contain}
"""
# JupyterLab's look, without the scripts from elsewhere that widgets, formulas and diagrams would want.
PAGE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block body_header -%}{{ super() }}
<p style="margin:1em 4em"><a href="index.html"><u>Table 1 and all notebooks</u></a></p>
{%- endblock -%}
"""


def published_site(target: str | Path | None = None) -> Path:
    """The site of docs/ and the committed notebooks; returns its first page. Any warning is an error."""
    root = find_root()
    shown_profile(root)  # or the error that says what to do
    target = Path(target or root / "build" / "site")
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as read:
        options = ["-q", "-E", "-W", "--keep-going", "-b", "html", "-d", read, "-c", str(root / "docs")]
        if subprocess.run([sys.executable, "-m", "sphinx", *options, str(root), str(target)]).returncode:
            raise PublishError("the site is not built: see the warnings above")
    if (explorer := root / "docs" / "explorer").is_dir():  # pages of its own
        shutil.copytree(explorer, target / "docs" / "explorer")
    index = target / "index.html"
    write_text(index, '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">\n')
    return index


def build_site(build: str | Path) -> Path:
    """The pages of a finished profile ``build``, one a run and notebook; returns the index's path."""
    build = Path(build)
    notebooks = {}
    executed = (build / "notebooks").rglob("*.ipynb")
    for path in sorted(executed, key=lambda p: (p.stem, run_order(p.parent))):
        run = "" if path.parent.name == "notebooks" else path.parent.name
        notebooks["_".join(filter(None, (run, path.stem)))] = (path, run)
    if not notebooks or not (build / "tables").is_dir():
        raise PublishError(f"{build} holds no executed notebooks and tables; run that profile first")
    target, tables, figures = build / "html", build / "tables", build / "figures"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    exporter, listed, shown = _exporter(), [], {}
    for name, (path, run) in notebooks.items():
        notebook = nbformat.read(path, as_version=4)
        page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": _title(notebook)}})
        write_text(target / f"{name}.html", re.sub(r'href="(\d\d_\w+)\.ipynb"', r'href="\1.html"', page))
        listed.append((name, run, notebook))
        for png, cell, alt in pictures(notebook):
            shown.setdefault(png, (f"{name}.html#cell-id={cell}", alt))
    (target / "figures").mkdir()
    files = {path.read_bytes(): path for path in sorted(figures.glob("[!.]*.png"))}
    cards = []
    for png in [png for png in shown if png in files]:
        shutil.copy(files[png], target / "figures")
        cards.append(_card(files[png].name, *shown[png]))
    (target / "tables").mkdir()
    for path in sorted(tables.glob("[!.]*.csv")):
        shutil.copy(path, target / "tables")
    index = target / "index.html"
    write_text(index, _index(tables, build.name, listed, cards))  # last: where it is, the pages are
    return index


def _exporter():
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter

    return HTMLExporter(extra_loaders=[DictLoader({"page.html.j2": PAGE})], template_file="page.html.j2")


def pictures(notebook: nbformat.NotebookNode) -> Iterator[tuple[bytes, str, str]]:
    """(PNG bytes, cell id, alternative text) of each picture that a notebook shows."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            png = output.get("data", {}).get("image/png")
            if png:
                alt = output.metadata.get("image/png", {}).get("alt", "")
                yield base64.b64decode(png), cell.id, alt


def _title(notebook):
    return notebook.cells[0].source.splitlines()[0].removeprefix("# ")


def _question(notebook):
    lines = notebook.cells[0].source.split("\n\n")
    found = [line.removeprefix("**Question.** ") for line in lines if line.startswith("**Question.**")]
    return found[0].replace("\n", " ").replace("*", "") if found else ""


def _card(name, link, alt):
    image = f'<img src="figures/{html.escape(name)}" alt="{html.escape(alt)}" loading="lazy">'
    return f'<figure><a href="{link}">{image}</a><figcaption>{html.escape(alt)}</figcaption></figure>'


def _index(tables, profile, listed, cards):
    parts = []
    splits = {path.stem.split("_")[1] for path in tables.glob("table1_*.md")}
    for split in sorted(splits, reverse=True):  # random, as in the paper, before grouped
        for end, title in PARTS1.items():
            if (path := tables / f"table1_{split}{end}.md").exists():
                shown = _table(path.read_text(encoding="utf-8"))
                parts.append(f"<h2>{title}, {html.escape(split)} split</h2>{shown}")
    items = []
    for name, run, notebook in listed:
        words = html.escape(f"{_title(notebook)} ({run})" if run else _title(notebook))
        items.append(f'<li><a href="{name}.html">{words}</a><br>{html.escape(_question(notebook))}</li>')
    files = ", ".join(f'<a href="tables/{p.name}">{p.stem}</a>' for p in sorted(tables.glob("[!.]*.csv")))
    warning = "" if profile == "paper" else " It is not the reference run (profile <b>paper</b>)."
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Adversarial training on lung-CT slices</title><style>{STYLE}</style>"
        "<h1>Adversarial training on lung-CT slices, reproducibly</h1>"
        f"<p>What the <b>{html.escape(profile)}</b> profile gave.{warning}</p>{''.join(parts)}"
        f"<h2>Notebooks</h2><ul>{''.join(items)}</ul>"
        f"<h2>Figures</h2><p>Each leads to the cell that made it.</p>"
        f'<div class="figures">{"".join(cards)}</div>'
        f"<h2>Tables</h2><p>{files}</p></html>\n"
    )


def _table(markdown):
    """A Markdown table of ours and the note below it, as HTML."""
    rows, note = [], []
    for line in markdown.splitlines():
        if line.startswith("|"):
            rows.append([html.escape(cell.strip()) for cell in line.strip("|").split("|")])
        elif line:
            note.append(html.escape(line))
    head = "".join(f"<th>{cell}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows[2:])
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div><p class="note">{" ".join(note)}</p>'


def main(arguments: Sequence[str]) -> int:
    """No argument, or the FOLDER of a finished profile; returns the exit code."""
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(build_site(arguments[0]) if arguments else published_site())
    except (PublishError, FileNotFoundError) as error:
        print(f"site: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A Sphinx extension: the committed notebooks, README, figures and docstrings as pages of the site.

docs/conf.py lists it. Notebooks keep their outputs: their imports, parameters and manifests are folded, their
cells get anchors, and one that awaits a run says so.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx import addnodes
from sphinx.util.typing import ExtensionMetadata

import fortify
from fortify.workflow.publish import published_folders, shown_profile
from fortify.workflow.site import pictures

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")


def folded(cell: nbformat.NotebookNode) -> str:
    """What a code cell that few readers open holds: "imports", "parameters" or "manifest"; else ""."""
    if "parameters" in cell.metadata.get("tags", []):
        return "parameters"
    if "notebook_parameters(" in cell.source:
        return "parameters"
    if "manifest(" in cell.source:
        return "manifest"
    first = next((line for line in cell.source.splitlines() if line and line[0] not in "#%"), "")
    return "imports" if first.startswith(("import ", "from ")) else ""


def prepared(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as the site shows it, in place: cells folded and named, a note where it awaits a run."""
    for cell in notebook.cells:
        cell.metadata["id"] = cell.id
        if cell.cell_type == "code" and (what := folded(cell)):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
            cell.metadata["mystnb"] = {
                "code_prompt_show": f"Show the code: {what}",
                "code_prompt_hide": f"Hide the code: {what}",
            }
    if why := notebook.metadata.get("fortify", {}).get("awaiting"):
        title, _, rest = notebook.cells[0].source.partition("\n")
        note = f"```{{note}}\nThis notebook awaits {why}.\n```"
        notebook.cells[0].source = f"{title}\n\n{note}\n{rest}"
    return notebook


def home(readme: str) -> str:
    """README's text below its title and badges, with its links as of a page in docs/. Markdown."""
    body = readme.partition("<!-- site: ")[2].partition("-->")[2]
    return _LINK.sub(lambda m: m[0] if _outside(m[2]) else f"{m[1]}(../{m[2]})", body)


def modules(package: str) -> str:
    """A section for each module of a package of this library, of its docstrings. Markdown."""
    folder = Path(fortify.__file__).parent.joinpath(*package.split(".")[1:])
    names = [f"{package}.{path.stem}" for path in sorted(folder.glob("[!_]*.py"))]
    each = "## {0}\n\n```{{eval-rst}}\n.. automodule:: {0}\n   :members:\n```\n"
    return "\n".join(each.format(name) for name in names)


def _outside(target):
    return re.match(r"[a-z]+:|#", target) is not None


def _read(app, docname, source):
    """Before a page is parsed. A link to a folder is its words alone, one to a page of its own HTML stays."""
    root = Path(app.srcdir)
    path = Path(app.env.doc2path(docname))
    if path.suffix == ".ipynb":
        source[0] = nbformat.writes(prepared(nbformat.reads(source[0], as_version=4)))
        return
    if docname == app.config.root_doc:
        text = (root / "README.md").read_text(encoding="utf-8")
        app.env.note_dependency(str(root / "README.md"))
        source[0] = source[0].replace("<!-- README -->", home(text))

    source[0] = re.sub(r"<!-- modules: (\S+) -->", lambda m: modules(m[1]), source[0])

    def link(found):
        if found[2].endswith(".html") and not _outside(found[2]):
            return f'<a href="{found[2]}">{found[1][1:-1]}</a>'
        folder = not _outside(found[2]) and (path.parent / found[2]).is_dir()
        return found[1][1:-1] if folder else found[0]

    source[0] = _LINK.sub(link, source[0])


def _name_cells(app, doctree):
    """Cells can be linked to, as ``notebooks/03_attacks.html#03-09``."""
    for node in doctree.findall(nodes.container):
        name = node.get("cell_metadata", {}).get("id")
        if node.get("nb_element") == "cell_code" and name:
            node["ids"].append(name)


class Gallery(Directive):
    """The published figures, each linked to the notebook cell that made it."""

    def run(self) -> list[nodes.Node]:
        env = self.state.document.settings.env
        root = Path(env.srcdir)
        figures = published_folders(root, shown_profile(root))[0]
        files = {path.read_bytes(): path for path in sorted(figures.glob("[!.]*.png"))}
        grid = nodes.container(classes=["gallery"])
        for path in sorted((root / "notebooks").glob("[0-9]*.ipynb")):
            env.note_dependency(str(path))
            for png, cell, alt in pictures(nbformat.read(path, as_version=4)):
                if (file := files.pop(png, None)) is None:  # shown before, or no published one
                    continue
                target = f"../notebooks/{path.stem}.html#{cell}"
                image = nodes.image(uri=f"../{file.relative_to(root)}", alt=alt)
                caption = nodes.caption("", "", nodes.reference("", alt or file.stem, refuri=target))
                linked = nodes.reference("", "", image, refuri=target)
                grid += nodes.figure("", linked, caption)
        return [grid]


class PublishedTables(Directive):
    """A list of the published tables, each a download."""

    def run(self) -> list[nodes.Node]:
        root = Path(self.state.document.settings.env.srcdir)
        folder = published_folders(root, shown_profile(root))[1]
        listed = nodes.bullet_list()
        for path in sorted(folder.glob("[!.]*.csv")):
            target = f"/{path.relative_to(root)}"
            link = addnodes.download_reference("", "", nodes.literal("", path.name), reftarget=target)
            listed += nodes.list_item("", nodes.paragraph("", "", link))
        return [listed]


def setup(app: "Sphinx") -> ExtensionMetadata:
    """What Sphinx calls."""
    app.connect("source-read", _read)
    app.connect("doctree-read", _name_cells)
    app.add_directive("gallery", Gallery)
    app.add_directive("published-tables", PublishedTables)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

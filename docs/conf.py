"""How `make html` builds the site: Sphinx reads docs/ and the committed notebooks, and executes nothing.

The sources are read where they lie, from the root of the checkout, so that a link between two of them is the
same on GitHub and on the site. Nothing is loaded from another host.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]

project = "Adversarial training on lung-CT slices"
author = copyright = "the fortify maintainers"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinxcontrib.bibtex", "fortify.workflow.pages"]

root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/*"]
exclude_patterns = [path.name for path in ROOT.iterdir() if path.name not in ("docs", "notebooks")]
exclude_patterns += ["docs/explorer/**"]  # copied as it is

nb_execution_mode = "off"
nb_ipywidgets_js = {}  # the notebooks have no widgets, whose scripts come from elsewhere
nb_mime_priority_overrides = [("html", "image/png", 0)]
myst_enable_extensions = ["colon_fence", "attrs_inline"]
myst_heading_anchors = 3
bibtex_bibfiles = [str(ROOT / "paper" / "references.bib")]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_copy_source = html_use_index = html_domain_indices = False
html_show_search_summary = False  # which pages opened from the file system cannot fetch
html_context = {"default_mode": "auto"}
html_theme_options = {
    "use_download_button": False,
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the sidebar has the search
    "logo": {"text": project},
}

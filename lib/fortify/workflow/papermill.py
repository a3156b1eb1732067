"""papermill, with its own arguments: ``python -m fortify.workflow.papermill NOTEBOOK OUTPUT ...``.

It starts in half the time. jsonschema, with which it checks notebooks, loads a check of IRIs that JupyterLab
brings, and that builds a grammar as it is loaded. Nothing in a notebook is checked to be an IRI.
"""

import sys

if __name__ == "__main__":
    sys.modules["rfc3987_syntax"] = None  # as if it were not installed

    from papermill.cli import papermill

    papermill()

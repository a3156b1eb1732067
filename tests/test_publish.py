"""Publishing: outputs travel to the committed notebook, and only from what was really executed."""

import base64
import gzip
import json
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from fortify.evaluation import accuracy_table, at_budget, paired_gain, read_rows
from fortify.workflow import publish
from fortify.workflow.profiles import companion_profiles
from fortify.workflow.publish import PublishError, source_sha256, with_outputs

ROOT = Path(__file__).parents[1]
PROFILE = nbformat.read(ROOT / "notebooks/05_results.ipynb", as_version=4).metadata.fortify.profile
BELOW = "" if PROFILE == "paper" else PROFILE


def source():
    return new_notebook(
        cells=[
            new_markdown_cell("# 1 · A question\n\ntext", id="a"),
            new_code_cell("x = 1", id="b", metadata={"tags": ["parameters"]}),
            new_code_cell("x", id="c"),
        ]
    )


def executed(value="2"):
    made = source()
    made.cells.insert(2, new_code_cell("x = 2", id="p", metadata={"tags": ["injected-parameters"]}))
    for count, cell in enumerate((c for c in made.cells if c.cell_type == "code"), 1):
        cell.execution_count = count
        cell.metadata["papermill"] = {"duration": 1.5}
    made.metadata["papermill"] = {"start_time": "now"}
    made.cells[3].outputs = [new_output("execute_result", {"text/plain": value}, execution_count=3)]
    return made


def test_outputs_travel_and_papermills_additions_stay_behind():
    made = with_outputs(source(), executed(), profile="laptop")
    assert [c.id for c in made.cells] == ["a", "b", "c"]
    assert made.cells[2].outputs[0].data["text/plain"] == "2"
    assert [c.execution_count for c in made.cells[1:]] == [1, 2]
    assert made.cells[2].outputs[0].execution_count == 2
    assert "papermill" not in str(made.metadata) + "".join(str(c.metadata) for c in made.cells)
    assert made.metadata.fortify == {"profile": "laptop", "source_sha256": source_sha256(source())}
    nbformat.validate(made)


def test_a_large_picture_is_published_small_and_nearly_the_same(checkout):
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 1), dtype=np.uint8)
    grey = np.concatenate([noise, noise, noise, np.full_like(noise, 255)], axis=2)
    Image.fromarray(grey).save(large := checkout / "build/laptop/figures/fig1_system.png")
    many = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(many).save(colourful := checkout / "build/laptop/figures/fig2_samples.png")
    ran = executed()
    encoded = base64.b64encode(large.read_bytes()).decode()
    ran.cells[3].outputs = [new_output("display_data", {"image/png": encoded, "text/plain": ""})]
    nbformat.write(ran, checkout / "build/laptop/notebooks/01_a.ipynb")
    assert large.stat().st_size >= 150_000
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 0
    published = checkout / "figures/laptop/fig1_system.png"
    assert published.stat().st_size < large.stat().st_size
    whole = published.with_stem("fig2_samples").read_bytes()
    assert whole == colourful.read_bytes(), "256 colours are too few for it"
    assert np.abs(np.asarray(Image.open(published).convert("RGB")).astype(int) - grey[..., :3]).max() <= 8
    (output,) = nbformat.read(checkout / "notebooks/01_a.ipynb", as_version=4).cells[2].outputs
    assert base64.b64decode(output.data["image/png"]) == published.read_bytes(), "one file, two places"
    repeated = checkout / "build/resnet18"
    shutil.copytree(checkout / "build/laptop", repeated)
    assert publish.main(["commit", str(repeated)]) == 0
    assert not (checkout / "figures/resnet18/fig1_system.png").exists(), "it only repeats"


def test_warnings_are_told_to_who_publishes_and_not_published(checkout, capsys):
    ran = executed()
    ran.cells[3].outputs.append(new_output("stream", name="stderr", text=f"{checkout}/a.py:1: beware\n"))
    nbformat.write(ran, checkout / "build/laptop/notebooks/01_a.ipynb")
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 0
    assert f"01_a: not published, a warning of cell c: {checkout}/a.py:1: beware" in capsys.readouterr().err
    cell = nbformat.read(checkout / "notebooks/01_a.ipynb", as_version=4).cells[2]
    assert [output.output_type for output in cell.outputs] == ["execute_result"]


def test_the_parameters_cell_shows_what_the_profile_changed():
    made = with_outputs(source(), executed(), profile="laptop")
    assert made.cells[1].source == "x = 1"
    assert (
        made.cells[1].outputs[0].data["text/markdown"] == "**Executed with the `laptop` profile**: `x = 2`."
    )
    same = executed()
    same.cells[2].source = "# Parameters\nx = 1\n"
    assert (
        "the values above"
        in with_outputs(source(), same, profile="paper").cells[1].outputs[0].data["text/plain"]
    )


def test_a_styled_tables_id_is_not_drawn_anew():
    """The ids differ by run, else a table that is the same would be a change of the whole notebook."""

    def shown(tables):
        made = executed()
        html = [
            new_output("display_data", {"text/html": table.style.to_html(), "text/plain": repr(table.style)})
            for table in tables
        ]
        made.cells[3].outputs = html
        outputs = with_outputs(source(), made, profile="laptop").cells[2].outputs
        plain = {output.data["text/plain"] for output in outputs}
        assert plain == {"<pandas.io.formats.style.Styler object>"}
        return [output.data["text/html"] for output in outputs]

    table = pd.DataFrame({"a": [1]})
    first = shown([table, table])
    assert first == shown([table, table])
    for html, name in zip(first, ("T_c-1", "T_c-2"), strict=True):  # of the cell c
        assert f'<table id="{name}">' in html and f'id="{name}_row0_col0"' in html


def test_no_two_tables_of_the_committed_notebooks_share_an_id():
    found = []
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            own = [output.get("data", {}).get("text/html", "") for output in cell.get("outputs", [])]
            names = re.findall(r'<table id="(T_.*?)"', "".join(own))
            assert names == [f"T_{cell.id}-{i}" for i in range(1, len(names) + 1)]
            found += names
    assert found and len(set(found)) == len(found)


def test_a_changed_cell_is_not_published():
    changed = source()
    changed.cells[2].source = "x + 1"
    with pytest.raises(PublishError, match="cell c changed"):
        with_outputs(changed, executed(), profile="laptop")


def test_a_removed_cell_is_not_published_without():
    with pytest.raises(PublishError, match="cell c was executed and is gone"):
        with_outputs(new_notebook(cells=source().cells[:2]), executed(), profile="laptop")


def test_a_cell_that_moved_is_not_published():
    moved = source()
    moved.cells[1:] = moved.cells[:0:-1]
    with pytest.raises(PublishError, match="cell c moved"):
        with_outputs(moved, executed(), profile="laptop")


def test_prose_is_published_as_it_reads_now():
    """It executes nothing: a word in it takes no training anew."""
    changed = source()
    changed.cells[0].source += "!"
    changed.cells.append(new_markdown_cell("More.", id="d"))
    made = with_outputs(changed, executed(), profile="laptop")
    assert [c.source for c in made.cells] == [c.source for c in changed.cells]
    assert made.metadata.fortify.source_sha256 == source_sha256(source())


def test_a_failed_cell_is_not_published():
    failed = executed()
    failed.cells[3].outputs = [new_output("error", ename="E", evalue="", traceback=[])]
    with pytest.raises(PublishError, match="cell c failed"):
        with_outputs(source(), failed, profile="laptop")


TITLES = {"laptop": "a small net", "paper": "the reference run"}
TITLES |= {"resnet18": "ResNet-18 in place of ResNet-50\nbeside: true"}
TITLES |= {"resnet50": "the paper's network\nbeside: true\nfirst: true"}


def planned(build, **parameters):
    """What notebook 1 says: the splits and seeds that the tables are of."""
    (build / "data/01_data.json").write_text(json.dumps({"parameters": parameters}))


PAGES = {  # and what is generated there
    "README.md": ("finding", "hero", "summary", "findings", "awaiting"),
    "docs/results.md": ("results",),
    "docs/claims.md": ("claims",),
    "docs/recipe.md": ("aims",),
}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "lib/fortify").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("FORTIFY_ROOT", str(tmp_path))
    nbformat.write(source(), tmp_path / "notebooks/01_a.ipynb")
    for folder in ("notebooks", "figures", "tables"):
        (tmp_path / "build/laptop" / folder).mkdir(parents=True)
    nbformat.write(executed(), tmp_path / "build/laptop/notebooks/01_a.ipynb")
    (tmp_path / "build/laptop/figures/robustness_curves.png").write_bytes(b"png")
    (tmp_path / "build/laptop/data").mkdir()
    planned(tmp_path / "build/laptop", splits=["random", "grouped"], seeds=[0])
    (tmp_path / "build/laptop/random-s0").mkdir()
    (tmp_path / "build/laptop/random-s0/02_baseline.json").write_text("{}")
    (tmp_path / "build/laptop/random-s0/normal_predictions.csv").write_text("index,label\n1,2\n")
    (tmp_path / "build/laptop/random-s0/normal.safetensors").write_bytes(b"large")
    (tmp_path / "build/laptop/tables/table1_random.md").write_text("| a |\n")
    (tmp_path / "build/laptop/tables/table1.txt").write_text("Table 1 <text>\n")
    (tmp_path / "build/laptop/tables/claims.md").write_text("| claim |\n")
    (tmp_path / "build/laptop/figures/published_protocol_random-s0.png").write_bytes(b"strip")
    (tmp_path / "notebooks/profiles").mkdir()
    for name, more in TITLES.items():
        (tmp_path / f"notebooks/profiles/{name}.yaml").write_text(f"title: {more}\n")
    (tmp_path / "docs").mkdir()
    for page, names in PAGES.items():
        sections = (f"<!-- generated: {s} -->old<!-- /generated: {s} -->" for s in names)
        (tmp_path / page).write_text("\n".join(["top", *sections, "end\n"]))
    return tmp_path


def test_commit_writes_notebooks_figures_tables_and_readme(checkout):
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 0
    notebook = nbformat.read(checkout / "notebooks/01_a.ipynb", as_version=4)
    assert notebook.cells[2].outputs[0].data["text/plain"] == "2"
    assert (checkout / "figures/laptop/robustness_curves.png").read_bytes() == b"png"
    assert not list((checkout / "figures").glob("*.png")), "only the paper profile writes there"
    runs = checkout / "paper/tables/laptop/runs/random-s0"
    assert sorted(p.name for p in runs.iterdir()) == ["02_baseline.json", "normal_predictions.csv.gz"]
    assert gzip.decompress((runs / "normal_predictions.csv.gz").read_bytes()) == b"index,label\n1,2\n"
    results = checkout / "docs/results.md"
    assert "**Classes" not in results.read_text()
    (checkout / "build/laptop/tables/table1_random_classes.md").write_text("| recall |\n")
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 0
    below = (
        "**Table 1, random split**\n\n| a |\n\n**Classes, scans and baselines, random split**\n\n| recall |\n"
    )
    assert below in results.read_text()
    assert "| claim |" in (checkout / "docs/claims.md").read_text()
    strip = "(figures/laptop/published_protocol_random-s0.png)"
    assert f"(../{strip[1:]}" in (checkout / "docs/claims.md").read_text()
    assert strip in (checkout / "README.md").read_text(), "until there is a figure of its own"
    for page in PAGES:
        text = (checkout / page).read_text()
        assert text.startswith("top\n") and text.endswith("\nend\n") and ">old<" not in text
    (checkout / "build/laptop/figures/hero.png").write_bytes(b"hero")
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 0
    readme = (checkout / "README.md").read_text()
    assert "(figures/laptop/hero.png)" in readme and strip not in readme


def test_what_the_notebooks_took_is_published(checkout):
    timed = checkout / "build/laptop/benchmarks/random-s0/02_baseline.tsv"
    timed.parent.mkdir(parents=True)
    timed.write_text("s\th:m:s\tcpu_time\n90.0\t0:01:30\t120.5\n")
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 0
    table = pd.read_csv(checkout / "paper/tables/laptop/run_times.csv")
    assert table.to_dict("records") == [
        {"notebook": "02_baseline", "run": "random-s0", "seconds": 90.0, "cpu_seconds": 120.5}
    ]


def test_the_attack_explorer_is_shown_what_was_run_and_nothing_older(checkout):
    shown, made = checkout / "docs/explorer/data.js", checkout / "build/laptop/explorer/data.js"
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 0 and not shown.exists()
    made.parent.mkdir()
    made.write_text("new")
    shutil.copytree(checkout / "build/laptop", checkout / "build/resnet18")
    assert shown in publish.commit(checkout / "build/laptop") and shown.read_text() == "new"
    (checkout / "build/resnet18/explorer/data.js").write_text("a companion's")
    publish.commit(checkout / "build/resnet18")
    assert shown.read_text() == "new"
    made.unlink()
    publish.commit(checkout / "build/laptop")
    assert not shown.exists(), "it would be of other networks than the tables"


@pytest.mark.parametrize(("page", "section"), [(p, s) for p, own in PAGES.items() for s in own])
def test_a_page_without_its_markers_is_refused_before_any_is_written(checkout, capsys, page, section):
    path = checkout / page
    path.write_text(path.read_text().replace(f"<!-- /generated: {section} -->", ""))
    before = {name: (checkout / name).read_text() for name in PAGES}
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 1
    assert f"{path.name} must hold <!-- generated: {section} -->" in capsys.readouterr().err
    assert {name: (checkout / name).read_text() for name in PAGES} == before


def test_a_profile_without_its_ledger_is_not_published(checkout, capsys):
    before = (checkout / "notebooks/01_a.ipynb").read_text()
    (checkout / "build/laptop/tables/claims.md").unlink()
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 1
    assert "no ledger of claims" in capsys.readouterr().err
    assert (checkout / "notebooks/01_a.ipynb").read_text() == before


def test_the_paper_profile_writes_the_figures_themselves(checkout):
    (checkout / "build/laptop").rename(checkout / "build/paper")
    assert publish.main(["commit", str(checkout / "build/paper")]) == 0
    assert (checkout / "figures/robustness_curves.png").exists()


def test_another_network_stands_beside_what_is_shown(checkout, capsys):
    """Its figures and tables have their own place; notebooks and the first table of the results stay.

    It has no ledger of claims, nor what else is of the paper and of whole slices.
    """
    assert len(companion_profiles(ROOT / "notebooks/profiles")) == 4
    shutil.copytree(checkout / "build/laptop", checkout / "build/resnet18")
    (checkout / "build/resnet18/tables/claims.md").unlink()
    (checkout / "build/resnet18/figures/robustness_curves.png").write_bytes(b"its own")
    for profile in ("laptop", "resnet18"):
        (checkout / "build" / profile / "figures/fig1_system.png").write_bytes(b"the system")
    for folder, made in (("notebooks", source()), ("build/laptop/notebooks", executed())):
        nbformat.write(made, checkout / folder / "09_claims.ipynb")
    audit = "check,model,verdict,measured,note\ngradients,normal,fail,1 of 2,\n"
    audit += "Square,normal,fail,a word,the note\n"
    audit += "mutants are caught,normal,fail,1 of 2,survive: one\n"
    (checkout / "build/resnet18/tables/audit_random-s0.csv").write_text(audit)
    (checkout / "build/resnet18/tables/table1_random.md").write_text("| b |\n")
    assert publish.main(["commit", str(checkout / "build/resnet18")]) == 1
    assert "not all of one profile's run" in capsys.readouterr().err, "nothing is shown yet"
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 0
    shown = (checkout / "notebooks/01_a.ipynb").read_text()
    assert publish.main(["commit", str(checkout / "build/resnet18")]) == 0
    assert (checkout / "notebooks/01_a.ipynb").read_text() == shown
    for profile in ("laptop", "resnet18"):
        assert (checkout / "figures" / profile / "robustness_curves.png").is_file()
        assert (checkout / "figures" / profile / "fig1_system.png").is_file() is (profile == "laptop"), (
            "the same picture is published once"
        )
        assert (checkout / "paper/tables" / profile / "runs/random-s0/normal_predictions.csv.gz").is_file()
    results = (checkout / "docs/results.md").read_text()
    assert "(../figures/laptop/robustness_curves.png)" in results and "figures/resnet18" not in results
    assert results.index("| a |") < results.index("**Table 1, random split, ResNet-18 in place of ResNet-50")
    assert results.index("ResNet-18 in place of") < results.index("| b |")
    assert "\nNotebook 08, the audit, has not been run.\n" in results  # of the first
    assert results.count("(notebook 08, random split alone) that fail: ") == 1
    assert results.count("the true accuracy may be lower.\n") == 1
    where = "(random split, seed 0, normal model:"
    failed = f"*gradients* {where} 1 of 2). *Square* {where} the note)."
    assert results.index("| b |") < results.index(failed)
    meant = (
        f"*mutants are caught* {where} survive: one). Attacks and defences broken on purpose fail a check."
    )
    assert meant in results
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 0
    assert (checkout / "docs/results.md").read_text() == results, "the next publish of the other keeps it"


def test_the_papers_network_leads_once_three_seeds_of_each_split_are_there(checkout):
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 0
    shutil.copytree(checkout / "build/laptop", checkout / "build/resnet50")
    tables = checkout / "build/resnet50/tables"
    for seeds, leads in (((5, 2), False), ((3, 5), True)):
        for split, n in zip(("random", "grouped"), seeds, strict=True):
            (tables / f"table1_{split}.csv").write_text(f"model,seeds\nnormal,{n}\n")
            (tables / f"table1_{split}.md").write_text("| b |\n")
        assert publish.main(["commit", str(checkout / "build/resnet50")]) == 0
        results = (checkout / "docs/results.md").read_text()
        assert (results.index("| b |") < results.index("| a |")) == leads


def test_a_companion_profile_without_its_table_1_is_not_published(checkout, capsys):
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 0
    shutil.copytree(checkout / "build/laptop", checkout / "build/resnet18")
    (checkout / "build/resnet18/tables/table1.txt").unlink()
    assert publish.main(["commit", str(checkout / "build/resnet18")]) == 1
    assert "holds no Table 1" in capsys.readouterr().err
    assert not (checkout / "paper/tables/resnet18").exists()


def test_of_several_seeds_the_first_ones_figures_are_published(checkout):
    """The first as a number, and of the seeds that the tables are of: s0 is of an earlier call."""
    planned(checkout / "build/laptop", splits=["random", "grouped"], seeds=[10, 2])
    for run in ("random-s10", "random-s2", "grouped-s2"):
        shutil.copytree(checkout / "build/laptop/random-s0", checkout / "build/laptop" / run)
    figures = checkout / "build/laptop/figures"
    for name in (
        "curve_random-s10",
        "curve_random-s2",
        "curve_grouped-s2",
        "curve_grouped-s0",
        "confusion_random",
    ):
        (figures / f"{name}.png").write_bytes(b"png")
    (figures / "published_protocol_random-s0.png").rename(figures / "published_protocol_random-s2.png")
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 0
    published = {path.stem for path in (checkout / "figures/laptop").iterdir()}
    assert published == {
        "curve_random-s2", "curve_grouped-s2", "confusion_random", "published_protocol_random-s2",
        "robustness_curves",
    }  # fmt: skip


@pytest.mark.parametrize("profile", ["laptop", "paper"])
def test_a_run_that_is_no_longer_there_is_not_counted(checkout, profile):
    """The paper profile's folders hold the others', which stay; what else an earlier publish left goes."""
    build = checkout / "build" / profile
    if profile != "laptop":
        shutil.copytree(checkout / "build/laptop", build)
    planned(build, splits=["random"], seeds=[0, 1])
    shutil.copytree(build / "random-s0", build / "random-s1")
    (build / "tables/old.csv").write_text("a\n")
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 0
    assert publish.main(["commit", str(build)]) == 0
    tables = publish.published_folders(checkout, profile)[1]
    assert sorted(p.name for p in (tables / "runs").glob("*-s*")) == ["random-s0", "random-s1"]
    # Of the second seed the rows lie in the build, and the tables are no longer of it.
    (build / "tables/old.csv").unlink()
    planned(build, splits=["random"], seeds=[0])
    assert publish.main(["commit", str(build)]) == 0
    assert sorted(p.name for p in (tables / "runs").glob("*-s*")) == ["random-s0"]
    assert not (tables / "old.csv").exists() and (tables / "table1_random.md").is_file()
    for name in ("laptop", profile):
        figures, tables = publish.published_folders(checkout, name)
        assert (figures / "robustness_curves.png").is_file() and (tables / "runs/random-s0").is_dir()


def test_that_the_reference_run_has_yet_to_be_published_is_said_until_it_is(checkout):
    results = checkout / "docs/results.md"
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 0
    assert (
        "(a small net). **Not** the reference run (`make paper`), which has yet to be" in results.read_text()
    )
    shutil.copytree(checkout / "build/laptop", checkout / "build/paper")
    assert publish.main(["commit", str(checkout / "build/paper")]) == 0
    assert "of the `paper` profile (the reference run). The intervals" in results.read_text()
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 0
    assert "which is in [paper/tables](../paper/tables)." in results.read_text()
    assert "has yet to be" not in results.read_text()


def test_who_awaits_a_run_is_named_until_it_is_published(checkout):
    path, readme = checkout / "notebooks/01_a.ipynb", checkout / "README.md"
    waiting = source()
    waiting.metadata["fortify"] = {"profile": "laptop", "awaiting": "another run"}
    nbformat.write(waiting, path)
    assert publish.awaiting(checkout) == {"01_a": "another run"}
    assert publish.awaiting_line(checkout) == "Notebook 01 awaits another run.\n"
    other = checkout / "notebooks/02_b.ipynb"
    nbformat.write(waiting, other)
    assert publish.awaiting_line(checkout) == "All notebooks await another run.\n"
    waiting.metadata["fortify"]["awaiting"] = "its first run"
    nbformat.write(waiting, other)
    nbformat.write(waiting, other.with_stem("03_c"))
    words = "Notebook 01 awaits another run. Notebooks 02 and 03 await its first run.\n"
    assert publish.awaiting_line(checkout) == words
    other.with_stem("03_c").unlink()
    nbformat.write(source(), other)
    assert publish.awaiting_line(checkout) == "Notebook 01 awaits another run.\n"
    other.unlink()
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 0
    assert publish.awaiting(checkout) == {} and "await another" not in readme.read_text()


def test_one_that_awaits_a_run_may_be_missing_and_goes_on_awaiting_it(checkout, capsys):
    other = checkout / "notebooks/02_b.ipynb"
    waiting = source()
    waiting.metadata["fortify"] = {"profile": "laptop"}
    nbformat.write(waiting, other)
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 1, "it was not executed"
    assert "no executed 02_b" in capsys.readouterr().err
    waiting.metadata["fortify"]["awaiting"] = "its first run"
    nbformat.write(waiting, other)
    before = other.read_bytes()
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 0
    assert other.read_bytes() == before and publish.awaiting(checkout) == {"02_b": "its first run"}
    assert "Notebook 02 awaits its first run." in (checkout / "README.md").read_text()


def test_a_path_of_the_machine_stops_it_before_anything_is_written(checkout, capsys):
    before = (checkout / "notebooks/01_a.ipynb").read_text()
    nbformat.write(executed(f"{checkout}/secret"), checkout / "build/laptop/notebooks/01_a.ipynb")
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 1
    assert "path of this machine" in capsys.readouterr().err
    assert (checkout / "notebooks/01_a.ipynb").read_text() == before


def test_a_user_who_lives_in_the_root_folder_can_publish(checkout, monkeypatch):
    """As in a container; "//" is in every address."""
    monkeypatch.setenv("HOME", "/")
    nbformat.write(executed("https://doi.org/1"), checkout / "build/laptop/notebooks/01_a.ipynb")
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 0


def test_an_unfinished_profile_is_named(checkout, capsys):
    (checkout / "build/laptop/notebooks/01_a.ipynb").unlink()
    assert publish.main(["commit", str(checkout / "build/laptop")]) == 1
    assert "no executed 01_a" in capsys.readouterr().err


def test_of_several_runs_the_random_splits_first_seed_is_shown(tmp_path):
    """Seed 2 before 10, and not a run of an earlier call."""
    (tmp_path / "data").mkdir()
    planned(tmp_path, splits=["grouped", "random"], seeds=[10, 2])
    for run in ("grouped-s2", "random-s10", "random-s2", "random-s1"):
        for folder in (tmp_path / "notebooks" / run, tmp_path / run):
            folder.mkdir(parents=True)
        (tmp_path / "notebooks" / run / "02_b.ipynb").touch()
        (tmp_path / run / "02_baseline.json").touch()
    assert publish.executed_notebooks(tmp_path, ["02_b"])["02_b"].parent.name == "random-s2"
    assert publish.published_runs(tmp_path) == ["grouped-s2", "random-s2", "random-s10"]


@pytest.mark.parametrize("arguments", [["what"], [], ["commit"], ["pdf", "laptop", "more"]])
def test_usage_is_printed(capsys, arguments):
    assert publish.main(arguments) == 2
    assert "commit" in capsys.readouterr().err


@pytest.fixture
def papers(tmp_path, monkeypatch):
    """A checkout with the paper and what it reads."""
    for folder in ("paper", "figures", "benchmarks", "notebooks"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setattr(publish, "find_root", lambda: tmp_path)
    return tmp_path


def test_the_committed_pdf_is_made_of_the_published_tables(papers):
    committed = (ROOT / "paper/paper.pdf").read_bytes()
    assert publish.pdf(PROFILE, papers / "again.pdf").read_bytes() == committed


def test_the_published_table_1_is_what_the_published_rows_say():
    """From the committed rows by image to the committed table, as notebook 5 goes."""
    tables = ROOT / "paper/tables" / BELOW
    files = sorted((tables / "runs").glob("*/*_predictions.csv.gz"))
    assert files and sum(p.stat().st_size for p in tables.rglob("*") if p.is_file()) < 5e6
    rows = pd.concat(
        [read_rows(path) for path in files if not path.name.startswith(("published", "baselines"))]
    )
    budget = json.loads(next(iter((tables / "runs").glob("*/03_attacks.json"))).read_text())["parameters"]
    counted = accuracy_table(
        at_budget(rows, eps_255=budget["eps_255"], cw_l2=budget["cw_l2"]),
        class_names=("benign", "malignant", "normal"),
    )
    counted = counted[counted.protocol == "adaptive"].set_index(["split", "model", "attack"])
    compared = 0
    for split in ("random", "grouped"):
        for row in pd.read_csv(tables / f"table1_{split}.csv").itertuples():
            own = counted.loc[(split, row.model, row.attack)]
            assert (own.k, own.n) == (row.k, row.n), (split, row.model, row.attack)
            compared += 1
    assert compared == 20
    groups = pd.read_csv(next((tables / "runs/data/splits").glob("*.csv.gz"))).group
    gain = paired_gain(at_budget(rows, eps_255=budget["eps_255"], cw_l2=budget["cw_l2"]), groups)
    pd.testing.assert_frame_equal(gain.round(1), pd.read_csv(tables / "gain.csv"), check_dtype=False)


def test_what_is_published_has_names_that_every_system_takes():
    names = [p.name for folder in ("figures", "paper/tables") for p in (ROOT / folder).rglob("*")]
    assert [name for name in names if not re.fullmatch(r"[\w.-]+", name)] == []


def test_what_the_page_says_of_speed():
    table = pd.read_csv(ROOT / "benchmarks/speed_cpu.csv").set_index(["task", "library"])
    faster = table.fortify_is_faster.unstack()
    assert faster.foolbox[["crafting", "training"]].between(1.4, 1.6).all()
    assert faster.torchattacks.between(0.9, 1.15).all()
    assert table.bfloat16_is_faster["crafting", "torchattacks"] == pytest.approx(2, abs=0.1)


def test_what_the_page_says_of_groups():
    """A third of the accuracy goes; groups hold one patient each, but not all of a patient."""
    rows = pd.read_csv(ROOT / "benchmarks/grouping_cpu.csv").groupby("groups")
    found = rows[["clean", "pgd_4", "n"]].sum()
    shares = found.div(found.n, axis=0)
    near, exact = shares[found.index < 165], shares.loc[shares.index.max()]
    lost = 1 - near / exact
    assert lost.clean.between(0.28, 0.4).all() and lost.pgd_4.between(0.28, 0.45).all()
    assert near.clean.idxmax() == 100 and 0.09 < near.clean.max() - near.clean.min() < 0.11
    agreement = pd.read_csv(ROOT / "paper/tables/laptop/nodules_groups_grouped-s0.csv").set_index("folds")
    groups = agreement.loc["near-duplicate groups"]
    assert groups.precision > 0.95 and groups.recall < 0.5 and groups.patient_in_training > 0.3


def test_what_the_page_says_of_other_objectives():
    """TRADES alone is ahead of the mix on unseen groups, and behind on the random split."""
    folder = ROOT / "paper/tables/laptop"
    gains = pd.read_csv(folder / "comparison_gains.csv").query("kind == 'attacked'")
    gains = gains.set_index(["split", "contender"])
    objectives = ["PGD alone", "TRADES", "MART", "AWP", "N-FGSM"]
    low, high = (gains[f"{end}_percent"].unstack("contender")[objectives] for end in ("low", "high"))
    assert low.columns[low.loc["grouped"] > 0].tolist() == ["TRADES"]
    assert gains.gain_percent["grouped", "TRADES"] < 10 and high.loc["random", "TRADES"] < 0
    assert not gains.differs.unstack("contender")["N-FGSM"].any()
    costs = pd.read_csv(folder / "comparison_costs.csv").groupby("contender")
    assert (costs.epochs.min() == costs.epochs.max()).all() and costs.epochs.first().eq(10).all()
    table = pd.read_csv(folder / "comparison.csv").set_index(["contender", "split"])
    lite, own = (table.loc[name] for name in ("efficientnet_lite0, ImageNet", "the paper's mix"))
    assert (lite.correct > own.correct).all() and (lite.attacked < 0.05).all()
    assert table.balanced_correct.loc["squeezenet1_1"].between(0.33, 0.34).all()
    cost = costs.forwards.first()
    assert 0.4 < cost["N-FGSM"] / cost["the paper's mix"] < 0.6


def test_what_the_page_says_of_cropped_slices():
    """More of unseen groups, the more so under attack, fewer of the random split; on the same splits."""
    apart = pd.read_csv(ROOT / "benchmarks/cropped.csv").query("model == 'adversarial'").set_index("split")
    assert (apart.high_percent["random"] < 0).all() and (apart.low_percent["grouped"] < 0).all()
    assert (apart.high_percent["grouped"] > 0).all(), "no change is established"
    plain = pd.read_csv(ROOT / "benchmarks/cropped.csv").query("model == 'normal' and eps_255 == 0")
    plain = plain.set_index("split")
    assert plain.high_percent["random"] < 0 < plain.low_percent["grouped"]
    tables = {name: ROOT / "paper/tables" / name for name in ("laptop", "lungs")}
    read = {}
    for name, folder in tables.items():
        curve = pd.read_csv(folder / "curve.csv").query(
            "model == 'adversarial' and protocol == 'adaptive' and attack == 'pgd'"
        )
        read[name] = curve.set_index(["split", "eps_255"])[["k", "n"]]
    assert read["lungs"].n.equals(read["laptop"].n)
    more = read["lungs"].k - read["laptop"].k
    assert 0 < more["grouped", 0] < more["grouped", 4] < more["grouped", 8]
    assert (more.loc["random"].loc[[0, 4, 8]] < 0).all()
    kept = pd.read_csv(tables["lungs"] / "kept_epochs.csv")
    kept = kept.query("model == 'adversarial' and split == 'grouped'")
    assert len(kept) == 5 and (kept.epoch > kept.epochs / 2).sum() == 4
    for path in (tables["laptop"] / "runs/data/splits").glob("*.csv*"):
        assert path.read_bytes() == (tables["lungs"] / "runs/data/splits" / path.name).read_bytes()
    seen = pd.read_csv(tables["laptop"] / "lungs_or_scanner.csv").query("model == 'adversarial'")
    seen = seen.set_index(["view", "split"]).k
    assert (seen["lungs blanked"] >= seen["whole image"]).all()


def test_the_published_audits_bear_out_notebook_8s_answer():
    """No check fails of adversarial training, and of the normal model the one that misses a planted fault."""
    published = sorted((ROOT / "paper/tables" / BELOW).glob("audit_[rg]*.csv"))
    assert len(published) >= 2
    failed = pd.concat([pd.read_csv(path) for path in published]).query("verdict == 'fail'")
    assert set(failed.model) <= {"normal"} and set(failed.id) == {"T10"}
    assert failed.note.tolist() == ["survive: one step of eps"]
    mutants = [
        pd.read_csv(path.with_name(path.name.replace("audit_", "audit_mutants_"))) for path in published
    ]
    survivors = [name for own in mutants for name in own.name[~own.caught]]
    assert survivors == ["one step of eps"], "the check says which"


def test_a_number_that_is_missing_is_an_error(papers, capsys):
    table = papers / "paper/tables" / BELOW / "table1_random.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(line for line in lines if not line.startswith("normal,pgd")))
    before = (papers / "paper/paper.pdf").read_bytes()
    assert publish.main(["pdf", PROFILE]) == 1
    assert "table1_random.csv has 0 rows" in capsys.readouterr().err
    assert (papers / "paper/paper.pdf").read_bytes() == before


def test_a_profile_that_is_no_longer_what_was_run_is_an_error(papers):
    profile = papers / "notebooks/profiles" / f"{PROFILE}.yaml"
    profile.write_text(re.sub(r"(?m)^lr: .*$", "lr: 0.5", profile.read_text()))
    with pytest.raises(PublishError, match=r"02_baseline.json is of lr = \S+, the \w+ profile has 0.5"):
        publish.pdf(PROFILE)


def test_the_paper_counts_the_seeds_that_are_published(papers):
    """A run that is published with a part of its seeds is said to be of these."""
    for folder in (papers / "paper/tables" / BELOW / "runs").glob("*-s[1-9]"):
        shutil.rmtree(folder)
    parameters = publish.published_parameters(papers, PROFILE)
    assert parameters["01_data"]["seeds"] == [0] == parameters["09_claims"]["published_seeds"]
    assert parameters["09_claims"]["audit_splits"] == ["random", "grouped"]
    assert publish.pdf(PROFILE).read_bytes() != (ROOT / "paper/paper.pdf").read_bytes()


def test_a_sentence_that_is_no_longer_true_is_an_error(papers):
    table = papers / "paper/tables" / BELOW / "published_matrix.csv"
    table.write_text(re.sub(r"(random,published,PGD 4/255,\d+,\d+),[\d.]+", r"\1,0.9", table.read_text()))
    with pytest.raises(PublishError, match="no longer true of the tables"):
        publish.pdf(PROFILE)


def test_without_a_profile_it_is_the_notebooks_own(papers, capsys):
    (papers / "paper/paper.pdf").unlink()
    assert publish.main(["pdf"]) == 0 and capsys.readouterr().out == "paper/paper.pdf\n"
    assert (papers / "paper/paper.pdf").read_bytes() == publish.pdf(PROFILE, papers / "b.pdf").read_bytes()


def test_an_unknown_profile_is_named(papers, capsys):
    assert publish.main(["pdf", "lapdog"]) == 1
    assert "lapdog.yaml does not exist; the profiles are: demo, laptop" in capsys.readouterr().err


def test_no_number_of_ours_is_typed_in_the_paper():
    tables = ROOT / "paper/tables" / BELOW
    matrix = pd.read_csv(tables / "published_matrix.csv")
    ours = {f"{100 * share:.1f}" for share in matrix.accuracy} | set(
        matrix.k.astype(str) + "/" + matrix.n.astype(str)
    )
    printed = set(pd.read_csv(tables / "printed_arithmetic.csv").printed.astype(str))
    text = (ROOT / "paper/paper.typ").read_text(encoding="utf-8")
    typed = set(re.findall(r"[\d.]+(?=[~ ]?%)|\d+/\d+", text))
    assert {"43.29", "4/255"} <= typed  # so the search finds what the paper prints and our budgets
    assert len(ours) > 100 and not (ours - printed) & typed


def test_a_notebook_whose_finding_is_about_unseen_groups_is_shown_on_them(tmp_path):
    stems = ["02_baseline", *publish.SHOWN_ON]
    for run in ("grouped-s0", "random-s0"):
        (tmp_path / "notebooks" / run).mkdir(parents=True)
        (tmp_path / run).mkdir()
        (tmp_path / run / "02_baseline.json").write_text("{}")
        for stem in stems:
            (tmp_path / "notebooks" / run / f"{stem}.ipynb").write_text("{}")
    (tmp_path / "data").mkdir()
    own = {"parameters": {"splits": ["random", "grouped"], "seeds": [0]}}
    (tmp_path / "data" / "01_data.json").write_text(json.dumps(own))
    found = publish.executed_notebooks(tmp_path, stems)
    assert {stem: path.parent.name for stem, path in found.items()} == {
        "02_baseline": "random-s0",
        "12_explanations": "grouped-s0",
        "13_detection": "grouped-s0",
    }
    (tmp_path / "notebooks" / "grouped-s0" / "13_detection.ipynb").unlink()
    found = publish.executed_notebooks(tmp_path, stems)
    assert found["13_detection"].parent.name == "random-s0", "where there is no other"


def test_hours_are_of_the_trainings_that_a_later_run_of_notebook_10_reads(tmp_path):
    times = {"notebook": ["02_baseline", "10_robust_optimisation"], "run": ["random-s0", ""]}
    pd.DataFrame(times | {"seconds": [3600, 12], "cpu_seconds": [1, 1]}).to_csv(tmp_path / "run_times.csv")
    assert publish._provenance(tmp_path)["hours"] == pytest.approx(1 + 12 / 3600)
    pd.DataFrame({"contender": ["a", "b"], "seconds": [1800, 5400]}).to_csv(
        tmp_path / "comparison_seconds.csv"
    )
    assert publish._provenance(tmp_path)["hours"] == 3

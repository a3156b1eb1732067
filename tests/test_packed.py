"""Results of another machine in one small file: what is in it, and what of it comes back into build/."""

import base64
import json
import lzma
import shutil
import tarfile

import numpy as np
import pytest
from workflow import BUILD, ROOT, snakemake

from fortify.data import Slices
from fortify.evaluation import read_rows
from fortify.figures import pick_example, pick_failures
from fortify.workflow import packed
from fortify.workflow.away import BundleError, Plan, planned
from fortify.workflow.bundle import main
from fortify.workflow.packed import finished_files, pack, unpack

SEED = {"step": ["seed", "test", "0"], "status": 0, "commit": "0" * 40, "profile": "test"}


def archive(folder, members, about=SEED):
    path = folder / "results.tar.gz"
    pack(path, {name: data.encode() for name, data in members.items()}, about)
    return path


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("FORTIFY_ROOT", str(tmp_path))
    return tmp_path


def test_a_finished_seed_comes_back_to_where_tables_are_made(finished, root):
    """As `make tables` reads it, in a checkout that has never run anything."""
    plan = planned(["seed", "test", "0"], ROOT)
    members = finished_files(ROOT, plan, {})
    assert pack(root / "r.tar.gz", members, SEED) == []
    kinds = {name.rpartition(".")[2] for name in members}
    assert kinds == {"csv", "json", "md", "tex", "txt", "tsv", "png", "pdf", "ipynb", "log", "npz", "js"}
    made_there = {name.removeprefix("made-there/test/") for name in members if name.startswith("made-there")}
    back = {name.removeprefix("build/test/") for name in members if name.startswith("build")}
    assert made_there >= {"tables/table1.txt", "tables/claims.csv", "notebooks/05_results.ipynb"}
    assert back >= {"tables/leak_meter.csv", "tables/audit_random-s0.csv", "notebooks/07_leakage.ipynb"}
    assert back >= {"random-s0/06_published_protocol.json", "notebooks/random-s0/02_baseline.ipynb"}
    assert not any("html" in name.split("/") for name in back | made_there)
    for name in ("notebooks", "paper", "profiles"):
        shutil.copytree(ROOT / name, root / name)
    shutil.copy(ROOT / "Snakefile", root)
    written, _ = unpack(root / "r.tar.gz")
    assert {path.relative_to(root / "build/test").as_posix() for path in written} == back
    allowed = ("--allowed-rules", "results", "claims", "html", "tables", "data")
    dry = snakemake("tables", "--dry-run", *allowed, config=("profile=test", "finished=true"), cwd=root)
    for rule in ("data", "results", "claims", "html"):
        assert f"\n{rule} " in dry.stdout, dry.stdout + dry.stderr
    assert unpack(root / "r.tar.gz")[0] == [], "again: nothing is new"
    # Notebook 5's figures show the same images; no other is there to be taken for one.
    slices = Slices.load(BUILD / "data/slices.npz")
    for model in ("normal", "adversarial"):
        rows = read_rows(BUILD / f"random-s0/{model}_predictions.csv")
        whole, thinned = (
            np.load(folder / f"random-s0/{model}_attacked.npz")["pgd"]
            for folder in (BUILD, root / "build/test")
        )
        kept = set()
        for label in range(3):
            about = {"label": label, "eps_255": 4}
            pairs = [
                (
                    pick_example(rows, slices, attack="pgd", attacked=images, **about),
                    pick_failures(rows, slices, attacked=images, **about)["pgd"][0],
                )
                for images in (whole, thinned)
            ]
            for own, other in zip(*pairs, strict=True):
                assert (own is None) is (other is None)
                if own is not None:
                    assert np.array_equal(own.attacked, other.attacked)
                if own is not None and not np.array_equal(own.attacked, own.clean):
                    kept.add(own.attacked.tobytes())
        assert kept and np.isnan(thinned).all(axis=(1, 2, 3)).sum() == len(whole) - len(kept)


def test_what_has_not_ended_is_not_put_back(root):
    """A notebook is whole with its manifest, and what is of another seed stays out."""
    build = root / "build/test"
    for name in ("random-s0/02_baseline.json", "notebooks/random-s0/02_baseline.ipynb", "random-s1/a.csv"):
        (build / name).parent.mkdir(parents=True, exist_ok=True)
        (build / name).touch()
    for name in ("notebooks/random-s0/03_attacks.ipynb", "random-s0/.half.csv", "random-s0/w.safetensors"):
        (build / name).touch()
    rules = {f"random-s0/{stem}.json": stem[3:] for stem in ("02_baseline", "03_attacks")}
    assert set(finished_files(root, Plan([], "test", rules), {})) == {
        "build/test/random-s0/02_baseline.json",
        "build/test/notebooks/random-s0/02_baseline.ipynb",
        "made-there/test/notebooks/random-s0/03_attacks.ipynb",
    }


def test_the_largest_are_left_out_of_what_would_be_too_large(tmp_path):
    noise = np.random.default_rng(0)
    members = {f"build/test/{n}.csv": noise.bytes(n * 1000) for n in (1, 2, 3, 10, 20)}
    left_out = pack(tmp_path / "r.tar.gz", members, SEED, limit=12_000)
    assert left_out == ["build/test/20.csv", "build/test/10.csv"]
    assert (tmp_path / "r.tar.gz").stat().st_size < 12_000
    with tarfile.open(tmp_path / "r.tar.gz") as tar:
        assert tar.getnames() == ["results.json", *(f"build/test/{n}.csv" for n in (1, 2, 3))]
        assert json.load(tar.extractfile("results.json")) == SEED | {"left_out": left_out}
    assert pack(tmp_path / "r.tar.gz", members, SEED, limit=40_000) == []


@pytest.mark.parametrize(
    "name",
    [
        "../a.csv",
        "/tmp/a.csv",
        "build/../../a.csv",
        "build/test/../../../a.csv",
        "build/a.csv",
        "lib/fortify/a.csv",
        "build/test/a.py",
        "build/test/random-s0/normal.safetensors",
        "build/test/.lock",
        "build/test/.hidden/a.csv",
    ],
)
def test_a_path_that_is_no_result_is_refused(root, name):
    path = archive(root, {"build/test/random-s0/a.csv": "fine", name: "not"})
    with pytest.raises(BundleError, match="which is no result. Nothing was written"):
        unpack(path)
    assert [p.name for p in root.iterdir()] == ["results.tar.gz"]


def test_links_and_damaged_files_are_refused(root, monkeypatch):
    with tarfile.open(root / "link.tar.gz", "w:gz") as tar:
        entry = tarfile.TarInfo("build/test/a.csv")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry)
    with pytest.raises(BundleError, match="'build/test/a.csv', which is no result"):
        unpack(root / "link.tar.gz")
    noise = base64.b64encode(np.random.default_rng(0).bytes(9000)).decode()
    path = archive(root, {"build/test/a.csv": noise})
    (root / "half.tar.gz").write_bytes(path.read_bytes()[:4000])
    (root / "no.tar.gz").write_bytes(lzma.compress(b"other"))
    for name in ("half", "no", "none"):
        with pytest.raises(BundleError, match="is no whole file of results"):
            unpack(root / f"{name}.tar.gz")
    (root / "elsewhere").mkdir()
    (root / "build").mkdir()
    (root / "build/test").symlink_to(root / "elsewhere")
    with pytest.raises(BundleError, match="leads out of .*remove the link"):
        unpack(path)
    monkeypatch.setattr(packed, "UNPACKED", 2**12)
    with pytest.raises(BundleError, match="swells beyond"):
        unpack(path)
    assert list((root / "elsewhere").iterdir()) == []


def test_a_run_that_differs_stays_unless_it_is_replaced_whole(root, capsys):
    run = root / "build/test/random-s0"
    members = {"build/test/random-s0/a.csv": "1", "build/test/figures/of_all.png": "x"}
    unpack(archive(root, members))
    (run / "normal.safetensors").touch()
    assert unpack(archive(root, members))[0] == []
    later = {"build/test/random-s0/a.csv": "2", "build/test/random-s0/b.csv": "2"}
    later |= {"build/test/figures/of_all.png": "y"}
    path = archive(root, later)
    assert main(["unbundle", str(path)]) == 1
    said = capsys.readouterr().err
    assert "1 results are there already and differ, like test/random-s0/a.csv." in said and "FORCE=1" in said
    assert (run / "a.csv").read_text() == "1" and not (run / "b.csv").exists()
    assert main(["unbundle", ""]) == 1 and "Which results?" in capsys.readouterr().err
    assert main(["unbundle", str(path), "--force"]) == 0
    assert "replaced: test/random-s0\n" in capsys.readouterr().out
    assert sorted(p.name for p in run.iterdir()) == ["a.csv", "b.csv"], "no weights of another training"
    assert (root / "build/test/figures/of_all.png").read_text() == "y"


def test_seeds_of_several_machines_come_together(root, capsys):
    """A figure that is of no one run is of the first that came; `make tables` draws it again."""
    for seed in (0, 1):
        of_run = {f"build/test/random-s{seed}/a.csv": str(seed), "build/test/figures/of_all.png": str(seed)}
        about = SEED | {"step": ["seed", "test", str(seed)], "status": 124}
        assert main(["unbundle", str(archive(root, of_run, about))]) == 0
        assert f"seed test {seed}: exit status 124\n" in capsys.readouterr().out
    assert [(root / f"build/test/random-s{n}/a.csv").read_text() for n in (0, 1)] == ["0", "1"]
    assert (root / "build/test/figures/of_all.png").read_text() == "0"

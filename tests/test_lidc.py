"""The LIDC-IDRI nodules: loaded only as the committed tables have them, and fetched to just that."""

import functools
import hashlib
import io
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fortify import lidc
from fortify.images import DataError
from fortify.lidc import load_lidc_masks, load_lidc_nodules, nodule_table
from fortify.workflow.lidc import consensus, fetch_lidc, main

SIDE = lidc.SIDE
NODULES = [("LIDC-IDRI-0007", 0, "malignant", 4), ("LIDC-IDRI-0007", 2, "benign", 3)]
NODULES += [("LIDC-IDRI-0011", 1, "benign", 4), ("LIDC-IDRI-0012", 0, "malignant", 3)]


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def disc(radius, shift=0):
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE // 2
    return np.hypot(x - shift, y) <= radius


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A source of four nodules of three patients, two slices each, and the tables that describe them.

    Rater k drew a disc moved by k pixels, so that no two agree; of three raters the fourth folder is empty.
    """
    rng, rows = np.random.default_rng(0), []
    for patient, nodule, kind, raters in NODULES:
        for number in (3, 4):
            image = rng.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
            drawn = [disc(9, 3 * k) if k < raters else disc(-1) for k in range(4)]
            below = f"LIDC-IDRI-slices/{patient}/nodule-{nodule}"
            named = {f"{below}/images/slice-{number}.png": png(image)}
            for k, mask in enumerate(drawn):
                named[f"{below}/mask-{k}/slice-{number}.png"] = png(np.where(mask, 255, 0).astype(np.uint8))
            for name, data in named.items():
                (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "source" / name).write_bytes(data)
            votes = sum(mask.astype(int) for mask in drawn)
            mask = np.where(votes >= raters / 2, 255, 0).astype(np.uint8)  # not by `consensus`
            file = f"{patient}_n{nodule}_s{number:02d}.png"
            row = {"file": f"{kind}/{file}", "mask": f"masks/{file}", "class": kind, "patient": patient}
            row |= {"nodule": nodule, "slice": number, "mask_pixels": int((mask > 0).sum())}
            data = next(iter(named.values()))
            row |= {"sha256": hashlib.sha256(data).hexdigest()}
            rows.append(row | {"mask_sha256": hashlib.sha256(mask.tobytes()).hexdigest()})
    table = pd.DataFrame(rows).sort_values("file", ignore_index=True)
    rated = pd.DataFrame(NODULES, columns=["patient", "nodule", "class", "raters_with_mask"])
    rated = rated.drop(columns="class").assign(diameter_mm=[10.0, 20, 30, 40], pixel_spacing_mm=0.5)
    monkeypatch.setattr(lidc, "slice_table", lambda: table)
    monkeypatch.setattr(lidc, "rating_table", lambda: rated)
    return tmp_path / "source"


@pytest.fixture
def served(source):
    """The source over HTTP: (URL, the paths that were asked for, those that fail once)."""
    asked, failing = [], set()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path in failing:
                failing.discard(self.path)
                return self.send_error(503)
            return super().do_GET()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(source)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked, failing
    server.shutdown()
    server.server_close()


def test_what_is_fetched_is_loaded_with_classes_patients_masks_and_diameters(served, tmp_path):
    url, asked, _ = served
    folder = fetch_lidc(tmp_path / "made", source=url)
    assert len(asked) == 5 * 8, "an image and four masks of each slice"
    slices = load_lidc_nodules(folder, size=64)
    assert slices.class_names == ("benign", "malignant") and slices.images.shape == (8, 64, 64)
    assert slices.patient_names == ("LIDC-IDRI-0007", "LIDC-IDRI-0011", "LIDC-IDRI-0012")
    assert slices.labels.tolist() == [0] * 4 + [1] * 4
    assert slices.patients.tolist() == [0, 0, 1, 1, 0, 0, 2, 2] == slices.groups.tolist()
    assert slices.source == "LIDC-IDRI nodules, 8 slices of 3 patients at 64 px"
    known = nodule_table(slices.subset([0, 6]))
    assert known.nodule.tolist() == ["LIDC-IDRI-0007_n2", "LIDC-IDRI-0012_n0"]
    assert known.diameter_mm.tolist() == [20, 40]
    assert known.area_mm2.tolist() == [area * 0.25 for area in known.area_px]
    masks = load_lidc_masks(slices, folder, size=SIDE)
    # Of four raters two make a half, of three two as well: what both of any neighbours drew.
    three, four = disc(9, 3), disc(9, 3) & disc(9, 6) | disc(9, 0) & disc(9, 3) | disc(9, 6) & disc(9, 9)
    assert np.array_equal(masks[0], three & disc(9, 6) | disc(9, 0) & three | disc(9, 0) & disc(9, 6))
    assert np.array_equal(
        masks[2], four | disc(9) & disc(9, 6) | disc(9, 3) & disc(9, 9) | disc(9) & disc(9, 9)
    )
    small = load_lidc_masks(slices, folder, size=32)
    assert small.shape == (8, 32, 32) and small.mean() == pytest.approx(masks.mean(), rel=0.15)


def test_a_call_goes_on_where_another_was_cut_off_and_repairs_what_is_damaged(served, source, tmp_path):
    url, asked, failing = served
    late = "LIDC-IDRI-slices/LIDC-IDRI-0012/nodule-0/images/slice-4.png"
    hidden = (source / late).rename(source / "hidden.png")
    with pytest.raises(OSError, match=r"slice-4.png cannot be had.*make lidc` again: it goes on"):
        fetch_lidc(tmp_path / "made", source=url, pause=0)
    hidden.rename(source / late)
    there = {p for p in (tmp_path / "made").rglob("*.png")}
    before = {path: path.stat().st_mtime_ns for path in there}
    asked.clear()
    failing.add(f"/{late}")  # once: asked for again
    fetch_lidc(tmp_path / "made", source=url, pause=0)
    assert asked.count(f"/{late}") == 2 and 2 <= len(asked) < 40
    assert before == {path: path.stat().st_mtime_ns for path in there}, "what was there stays"
    assert not [p for p in (tmp_path / "made").rglob(".*")], "nothing half written"
    victims = [tmp_path / "made/malignant/LIDC-IDRI-0012_n0_s03.png", tmp_path / "made" / "masks"]
    victims[1] /= "LIDC-IDRI-0011_n1_s04.png"
    for path in victims:
        path.write_bytes(path.read_bytes()[:60])
    asked.clear()
    fetch_lidc(tmp_path / "made", source=url)
    assert len(asked) == 1 + 4
    load_lidc_masks(load_lidc_nodules(tmp_path / "made", size=64), tmp_path / "made", size=64)
    lines = (tmp_path / "made/SHA256SUMS").read_text().splitlines()
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "made" / name).read_bytes()).hexdigest() == digest
    assert {"README.md", "slices.csv", "nodules.csv"} <= {line.split("  ")[1] for line in lines}


def test_other_files_than_those_of_the_tables_are_refused(source, tmp_path, monkeypatch):
    mask = source / "LIDC-IDRI-slices/LIDC-IDRI-0011/nodule-1/mask-2/slice-3.png"
    kept = mask.read_bytes()
    mask.write_bytes(png(np.zeros((SIDE, SIDE), np.uint8)))
    with pytest.raises(DataError, match="LIDC-IDRI-0011_n1_s03.png .* do not make its consensus mask"):
        fetch_lidc(tmp_path / "made", source=source)
    mask.write_bytes(kept)
    image = source / "LIDC-IDRI-slices/LIDC-IDRI-0007/nodule-0/images/slice-3.png"
    image.write_bytes(kept)
    monkeypatch.setenv("FORTIFY_LIDC", str(tmp_path / "other"))
    with pytest.raises(SystemExit, match=r"^error: .*nodule-0/images/slice-3.png .* SHA-256 differs"):
        main(["--source", str(source)])
    assert not (tmp_path / "other/malignant/LIDC-IDRI-0007_n0_s03.png").exists()


@pytest.mark.parametrize(
    ("masks", "raters", "expected"),
    [
        ([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]], 2, [255, 255, 255, 0]),
        ([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], 3, [255, 0, 0, 0]),
        ([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]], 4, [255, 255, 0, 0]),
    ],
)
def test_a_consensus_is_half_of_the_raters_that_drew_the_nodule_at_all(masks, raters, expected):
    drawn = [np.array([mask], bool) for mask in masks]
    assert consensus(drawn, raters=raters).tolist() == [expected]


def test_what_is_missing_or_damaged_is_named_with_its_remedy(source, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"not in .*nowhere. `make lidc` fetches it; or set FORTIFY_"):
        load_lidc_nodules(tmp_path / "nowhere", size=64)
    monkeypatch.setenv("FORTIFY_LIDC", str(tmp_path / "made"))
    assert not lidc.is_there()
    with monkeypatch.context() as elsewhere:
        elsewhere.delenv("FORTIFY_LIDC")
        elsewhere.delenv("FORTIFY_ROOT", raising=False)
        elsewhere.chdir(tmp_path)
        assert not lidc.is_there(), "outside a checkout"
    folder = fetch_lidc(source=source)
    assert folder == tmp_path / "made" and lidc.is_there()
    slices = load_lidc_nodules(size=64)
    image = folder / slices.names[5]
    kept = image.read_bytes()
    image.write_bytes(kept[:-1] + b"x")
    with pytest.raises(DataError, match=f"1 of 8 files in .*damaged: {slices.names[5]}. `make lidc`"):
        load_lidc_nodules(size=64)
    image.unlink()
    with pytest.raises(DataError, match=f"1 of 8 files in .*missing: {slices.names[5]}"):
        load_lidc_nodules(size=64)
    image.write_bytes(kept)
    mask = folder / "masks" / Path(slices.names[2]).name
    mask.write_bytes(png(np.full((SIDE, SIDE), 255, np.uint8)))
    with pytest.raises(DataError, match=f"1 of 8 files .*damaged: masks/{mask.name}"):
        load_lidc_masks(slices, size=64)
    assert load_lidc_masks(slices.subset([0]), size=64).shape == (1, 64, 64), "the others are there"
    (folder / "masks").rename(folder / "others")
    with pytest.raises(FileNotFoundError, match="Masks of the LIDC-IDRI nodules are not in .*make lidc"):
        load_lidc_masks(slices, size=64)


def test_slices_of_another_dataset_have_no_nodule():
    from fortify.phantom import phantom_slices

    with pytest.raises(DataError, match="27 slices are not of the LIDC-IDRI nodules"):
        nodule_table(phantom_slices(patients=9, slices_per_patient=3, size=32))


def test_the_committed_tables_are_what_the_readme_counts():
    """Of the tables alone, which need no data."""
    table = lidc.slice_table()
    both = table.merge(lidc.rating_table(), on=["patient", "nodule"], validate="many_to_one")
    assert len(both) == len(table) == table.file.nunique() == table.sha256.nunique() == 4000
    assert table["class"].value_counts().to_dict() == {"malignant": 2157, "benign": 1843}
    nodules = both.drop_duplicates(["patient", "nodule"])
    assert len(nodules) == 796 and table.patient.nunique() == 501
    assert nodules.class_x.eq(nodules.class_y).all()
    benign = nodules.class_x.eq("benign")
    assert (nodules.malignancy_median < 3).equals(benign) and (nodules.malignancy_median != 3).all()
    assert table.mask_pixels.min() > 0, "no empty mask"
    text = (lidc.TABLES / "README.md").read_text()
    assert "CC BY 3.0" in text and "10.7937/K9/TCIA.2015.LO9QL9SK" in text

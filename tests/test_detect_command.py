"""The command on real files: a verdict each, bad ones a line, a folder watched, and what is missing said."""

import csv
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fortify.data import to_tensor
from fortify.detect.command import DEFAULT, Reader, arriving, beside, main
from fortify.detect.detectors import load_detectors
from fortify.images import fit_square
from fortify.models import load_model, predict, save_model

FITTED = ["max softmax", "autoencoder"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory, model, phantoms):
    """A model's file, with detectors beside it that the command calibrated on 60 slices in folders."""
    folder = tmp_path_factory.mktemp("model")
    path = folder / "mine.safetensors"
    save_model(path, model, info={"class_names": list(phantoms.class_names)})
    for i in range(60):
        patient = folder / f"clean/{phantoms.patients[i]}"
        patient.mkdir(parents=True, exist_ok=True)
        Image.fromarray(phantoms.images[i]).save(patient / f"{i}.png")
    (folder / "clean/0/broken.png").write_bytes(b"no image")
    options = ["--model", str(path), "--size", "32", "--groups", "folders", "--false-alarms", "0.1"]
    assert main(["calibrate", str(folder / "clean"), *options, "--detectors", *FITTED]) == 0
    return path


@pytest.fixture
def slices(tmp_path, phantoms):
    """A folder: two PNG, a JPEG of another size below it, and files that are no slices."""
    folder = tmp_path / "slices"
    (folder / "more").mkdir(parents=True)
    for i in (70, 71):
        Image.fromarray(phantoms.images[i]).save(folder / f"{i}.png")
    Image.fromarray(phantoms.images[72]).resize((80, 60)).save(folder / "more/72.jpg")
    (folder / "notes.txt").write_text("no slice")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def run(capsys, *arguments):
    """(exit status, lines on stdout, stderr)."""
    capsys.readouterr()
    status = main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return status, out.splitlines(), err


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_each_slice_is_a_line_and_a_row_with_what_the_network_says(capsys, weights, slices, tmp_path):
    status, lines, err = run(capsys, slices, "--model", weights, "--csv", tmp_path / "verdicts.csv")
    assert status == 0 and [line.split()[0] for line in lines] == ["70.png", "71.png", "more/72.jpg"]
    assert "not a medical device" in err and "3 files: " in err and "threads" in err
    found, model = rows(tmp_path / "verdicts.csv"), load_model(weights)
    detectors, about = load_detectors(beside(weights), model)
    assert about["size"] == 32 and [*detectors] == FITTED
    for row, line in zip(found, lines, strict=True):
        with Image.open(slices / row["file"]) as image:
            pixels = np.asarray(fit_square(image.convert("L"), size=32, aspect="pad"))
        probability, label = predict(model, to_tensor(pixels[None]))[0].max(0)
        score = detectors["max softmax"].score(to_tensor(pixels[None])).item()
        assert row["prediction"] == model.info["class_names"][label]
        assert float(row["confidence"]) == pytest.approx(probability.item(), abs=1e-5)
        assert float(row["score"]) == pytest.approx(score, abs=1e-4) and float(row["milliseconds"]) > 0
        assert row["alarm"] == str(score > detectors["max softmax"].threshold) and row["error"] == ""
        assert f"{probability:.1%}" in line and row["prediction"] in line and line.endswith(" ms")


def test_an_alarm_is_shown_and_counted(capsys, weights, slices, tmp_path):
    """A slice of noise is like none of the clean ones; the detector is named, and its threshold counts."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(noise).save(slices / "noise.png")
    options = ("--model", weights, "--detector", "autoencoder")
    status, lines, err = run(capsys, slices, *options)
    shown = {line.split()[0]: "ALARM" in line for line in lines}
    assert status == 0 and shown["noise.png"] and f"{sum(shown.values())} alarms" in err
    assert "Detector: autoencoder, 10% false alarms" in err
    assert run(capsys, slices, "--model", weights, "--detector", "none such")[0] == 2


def test_bad_files_are_a_line_and_not_a_stop(capsys, weights, slices, tmp_path, phantoms):
    image = phantoms.images[73]
    Image.fromarray(image.astype(np.uint16) * 256).save(slices / "deep.png")
    colour = np.stack([image, np.roll(image, 9, 1), 255 - image], 2)
    Image.fromarray(colour).save(slices / "colour.png")
    (slices / "empty.jpg").touch()
    (slices / "torn.png").write_bytes((slices / "70.png").read_bytes()[:200])
    (slices / "no.dcm").write_bytes(b"x" * 300)
    status, lines, err = run(capsys, slices, "--model", weights, "--csv", tmp_path / "v.csv")
    found = {row["file"]: row for row in rows(tmp_path / "v.csv")}
    assert status == 1 and len(lines) == len(found) == 8 and ", 5 not read" in err
    wanted = {"deep.png": "8-bit", "colour.png": "coloured", "empty.jpg": "empty", "torn.png": "damaged"}
    for name, word in (wanted | {"no.dcm": "DICOM"}).items():
        assert word in found[name]["error"] and found[name]["prediction"] == found[name]["alarm"] == ""
        (line,) = (line for line in lines if line.startswith(name))
        assert "error: " in line and word in line
    assert found["70.png"]["prediction"] and not found["70.png"]["error"]


def test_a_dicom_file_is_read_with_the_window_it_is_given(capsys, weights, tmp_path):
    pytest.importorskip("pydicom")
    from test_dicom import write

    path = write(tmp_path / "slice.dcm")
    status, lines, _ = run(capsys, path, "--model", weights, "--window", "-600", "1500")
    assert status == 0 and lines[0].startswith("slice.dcm ") and "error" not in lines[0]
    one, other = (Reader(32, window=window).pixels(path) for window in ((-600, 1500), (40, 400)))
    assert one.shape == (32, 32) and not np.array_equal(one, other)
    assert run(capsys, path, "--model", weights, "--window", "0", "0")[0] == 2


def test_a_watched_folder_is_classified_as_slices_come(capsys, weights, slices, tmp_path):
    """Those that are there, one that is still being written once it is whole, and one that changes again."""
    whole = (slices / "70.png").read_bytes()

    def arrive():
        with open(slices / "late.png", "wb") as file:
            for part in np.array_split(np.frombuffer(whole, np.uint8), 4):
                file.write(part.tobytes())
                file.flush()
                time.sleep(0.12)
        (slices / "70.png").write_bytes((slices / "71.png").read_bytes())

    writer = threading.Timer(0.6, arrive)
    writer.start()
    options = ("--model", weights, "--watch", "--interval", 0.25, "--idle", 2, "--csv", tmp_path / "v.csv")
    status, lines, _ = run(capsys, slices, *options)
    writer.join()
    names = [line.split()[0] for line in lines]
    assert status == 0 and names[:3] == ["70.png", "71.png", "more/72.jpg"]
    assert sorted(names[3:]) == ["70.png", "late.png"]
    found = rows(tmp_path / "v.csv")
    assert [row["file"] for row in found] == names
    first = next(row for row in found if row["file"] == "late.png")
    assert first["error"] == "" and first["confidence"] == found[0]["confidence"]


def test_a_file_that_goes_is_no_error(slices):
    there = arriving(slices, interval=0.01, idle=0.05)
    assert next(there).name == "70.png"
    shutil.rmtree(slices / "more")
    assert [path.name for path in there] == ["71.png", "72.jpg"]  # it was there when it was listed


def test_without_detectors_alarms_are_off_and_the_size_must_be_given(capsys, weights, slices, tmp_path):
    alone = shutil.copy(weights, tmp_path / "alone.safetensors")
    status, lines, err = run(capsys, slices, "--model", alone)
    assert status == 2 and lines == [] and "give --size" in err and "Alarms are off" in err
    status, lines, err = run(capsys, slices, "--model", alone, "--size", 32)
    assert status == 0 and len(lines) == 3 and all(" off " in line for line in lines)
    assert "calibrate FOLDER" in err
    assert "of slices of 32 px" in run(capsys, slices, "--model", weights, "--size", 64)[2]
    assert "does not exist" in run(capsys, slices, "--model", alone, "--detectors", tmp_path / "none")[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere.png",), "nowhere.png does not exist"),
        (("{slices}/70.png", "--watch"), "is no folder"),
        (("{slices}", "--threads", "0"), "--threads must be at least 1"),
        (("{slices}", "--csv", "{slices}/none/v.csv"), "v.csv"),
        (("{empty}",), "holds no image"),
    ],
)
def test_what_cannot_be_done_is_one_line(capsys, weights, slices, tmp_path, arguments, said):
    (tmp_path / "empty").mkdir()
    given = [text.format(slices=slices, empty=tmp_path / "empty") for text in arguments]
    status, lines, err = run(capsys, *given, "--model", weights)
    assert (
        status == 2 and not lines and said in err.splitlines()[-1] and err.splitlines()[-1][:7] == "error: "
    )


def test_missing_weights_say_how_to_get_some(capsys, slices, tmp_path, monkeypatch):
    """Nothing is published in this checkout."""
    (tmp_path / "lib/fortify").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("FORTIFY_ROOT", str(tmp_path))
    status, _, err = run(capsys, slices)
    assert status == 2 and len(err.splitlines()) == 1
    assert "no weights have been published" in err and "make laptop" in err and "--model FILE" in err
    assert "does not exist" in run(capsys, slices, "--model", tmp_path / "none.safetensors")[2]


def test_published_weights_are_the_default_and_their_detectors_lie_beside_them(
    capsys, weights, slices, tmp_path, monkeypatch
):
    import hashlib

    (tmp_path / "lib/fortify").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("FORTIFY_ROOT", str(tmp_path))
    path = tmp_path / f"paper/models/{DEFAULT}.safetensors"
    path.parent.mkdir(parents=True)
    shutil.copy(weights, path)
    shutil.copy(beside(weights), beside(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "paper/models/SHA256SUMS").write_text(f"{digest}  {DEFAULT}.safetensors\n")
    status, lines, err = run(capsys, slices)
    assert status == 0 and len(lines) == 3 and "Detector: max softmax" in err
    assert run(capsys, slices, "--model", "laptop/none/normal")[0] == 2


def test_it_is_a_command(weights, slices):
    """As it is printed, with the processor's threads as asked for."""
    command = [sys.executable, "-m", "fortify.detect", str(slices / "70.png"), "--model", str(weights)]
    done = subprocess.run([*command, "--threads", "1"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("70.png ") and "(1 threads, " in done.stderr
    assert "--watch" in subprocess.run([*command[:3], "--help"], capture_output=True, text=True).stdout


def test_calibrating_says_what_it_left_out_and_groups_alike_slices(capsys, weights, tmp_path):
    out = tmp_path / "own.safetensors"
    options = ("--model", weights, "--size", 32, "--detectors", "max softmax", "--out", out)
    status, lines, err = run(capsys, "calibrate", weights.parent / "clean", *options)
    assert status == 0 and "broken.png: left out" in err
    assert lines == [line for line in lines if "1 detectors, calibrated on 60 slices in " in line]
    assert [*load_detectors(out, load_model(weights))[0]] == ["max softmax"]
    (tmp_path / "empty").mkdir()
    assert run(capsys, "calibrate", tmp_path / "empty", *options)[0] == 2
    assert torch.get_num_threads() >= 1

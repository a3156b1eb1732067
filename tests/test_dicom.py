"""DICOM files: intensities as computed by hand from the stored values, and what is refused by name."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from fortify import dicom
from fortify.data import DataError, load_folder

pydicom = pytest.importorskip("pydicom")  # an optional extra

from pydicom import encaps, uid  # noqa: E402 (after the skip)

SIZE = 40


def stored(seed=0):
    """Stored values int16 of a slice whose HU, less 1024, span air to bone."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return smooth.astype(np.int16) * 8


def write(path, values=None, *, syntax=uid.ExplicitVRLittleEndian, encapsulated=None, without=(), **elements):
    """A CT file of ``values`` int16 (H, W), or (frames, H, W), with these data elements more or less."""
    values = stored() if values is None else values
    path.parent.mkdir(parents=True, exist_ok=True)
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = syntax
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = uid.CTImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = uid.generate_uid()
    file.Rows, file.Columns = values.shape[-2:]
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 16, 15
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, "MONOCHROME2", 1
    file.RescaleSlope, file.RescaleIntercept = 1, -1024
    file.WindowCenter, file.WindowWidth = -600, 1500
    file.PatientID = "P 7"
    file.PixelData = values.astype("<i2").tobytes() if encapsulated is None else encapsulated
    file["PixelData"].VR = "OW" if encapsulated is None else "OB"
    file["PixelData"].is_undefined_length = encapsulated is not None
    for name, value in elements.items():
        setattr(file, name, value)
    for name in without:
        delattr(file, name)
    file.save_as(path, enforce_file_format=True)
    return path


def linear(hu, centre, width):
    """PS3.3 C.11.2.1.2.1, value by value as the standard writes it, for 0..255."""
    out = np.empty(hu.shape)
    for at, x in np.ndenumerate(hu):
        if x <= centre - 0.5 - (width - 1) / 2:
            out[at] = 0
        elif x > centre - 0.5 + (width - 1) / 2:
            out[at] = 255
        else:
            out[at] = ((x - (centre - 0.5)) / (width - 1) + 0.5) * 255
    return np.rint(out).astype(np.uint8)


def pixels(path, **options):
    return np.asarray(dicom.read_dicom(path, **options))


def test_values_are_rescaled_and_windowed_as_the_standard_says(tmp_path):
    hu = stored() - 1024.0
    assert hu.min() < -900 and hu.max() > 700
    assert np.array_equal(pixels(write(tmp_path / "a.dcm")), linear(hu, -600, 1500))
    assert np.array_equal(pixels(tmp_path / "a.dcm", window=(40, 400)), linear(hu, 40, 400))
    path = write(tmp_path / "b.dcm", RescaleSlope="0.5", RescaleIntercept="-100")
    assert np.array_equal(pixels(path), linear(stored() * 0.5 - 100, -600, 1500))
    path = write(tmp_path / "c.dcm", without=["RescaleSlope", "RescaleIntercept"])
    assert np.array_equal(pixels(path, window=(900, 1800)), linear(stored().astype(float), 900, 1800))


def test_five_values_by_hand(tmp_path):
    """Window 0, 201: -100.5 and below are 0, 99.5 and above 255, and -0.5 is the middle."""
    values = np.zeros((SIZE, SIZE), np.int16)
    values[0, :5] = (923, 924, 1024, 1123, 1200)  # HU -101, -100, 0, 99, 176
    image = pixels(write(tmp_path / "a.dcm", values, WindowCenter=0, WindowWidth=201))
    assert image[0, :5].tolist() == [0, 1, 128, 254, 255]  # 0.64, 128.1, 254.4
    assert image[1:].max() == 0


def test_of_several_windows_the_first_is_taken(tmp_path):
    path = write(tmp_path / "a.dcm", WindowCenter=[40, -600], WindowWidth=[400, 1500])
    assert np.array_equal(pixels(path), linear(stored() - 1024.0, 40, 400))


def test_other_functions_of_the_window(tmp_path):
    hu = stored() - 1024.0
    path = write(tmp_path / "a.dcm", VOILUTFunction="LINEAR_EXACT")
    assert np.array_equal(pixels(path), np.rint(((hu + 600) / 1500 + 0.5).clip(0, 1) * 255))
    assert np.array_equal(pixels(path, window=(-600, 1500)), linear(hu, -600, 1500)), "the file's is its own"
    path = write(tmp_path / "b.dcm", VOILUTFunction="SIGMOID")
    assert np.array_equal(pixels(path), np.rint(255 / (1 + np.exp(-4 * (hu + 600) / 1500))))


def test_monochrome1_is_inverted(tmp_path):
    path = write(tmp_path / "a.dcm", PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(pixels(path), 255 - linear(stored() - 1024.0, -600, 1500))


def test_unsigned_values_and_packed_pixels_are_read(tmp_path):
    path = write(tmp_path / "a.dcm", (stored() + 30_000).astype(np.int16), RescaleIntercept=-31_024)
    assert np.array_equal(pixels(path), linear(stored() - 1024.0, -600, 1500))
    high = (stored().astype(np.uint16) * 30).astype(
        "<u2"
    )  # up to 61,200: negative where it is read as signed
    path = write(tmp_path / "b.dcm", PixelRepresentation=0, RescaleSlope=1 / 30, PixelData=high.tobytes())
    assert np.abs(pixels(path).astype(int) - linear(stored() - 1024.0, -600, 1500)).max() <= 1
    file = pydicom.dcmread(write(tmp_path / "c.dcm"))
    file.compress(uid.RLELossless)  # which pydicom itself decodes
    file.save_as(tmp_path / "c.dcm")
    assert np.array_equal(pixels(tmp_path / "c.dcm"), linear(stored() - 1024.0, -600, 1500))


ENHANCED = pydicom.Sequence([pydicom.Dataset()])
REFUSED = {
    "empty": (lambda p: p.write_bytes(b""), r"is empty \(0 bytes\)"),
    "no DICOM": (lambda p: p.write_bytes(b"hello" * 99), "is damaged or no DICOM file"),
    "truncated": (lambda p: p.write_bytes(write(p).read_bytes()[:-999]), "has pixels that cannot be decoded"),
    "multi-frame": (
        lambda p: write(p, np.stack([stored()] * 3), NumberOfFrames=3),
        r"is a multi-frame DICOM file \(3 frames\)",
    ),
    "enhanced": (
        lambda p: write(p, PerFrameFunctionalGroupsSequence=ENHANCED),
        r"is a multi-frame DICOM file \(1 frames\)",
    ),
    "colour": (
        lambda p: write(p, PhotometricInterpretation="RGB", SamplesPerPixel=3),
        r"is not MONOCHROME1 or MONOCHROME2 \(RGB\)",
    ),
    "a report": (lambda p: write(p, without=["PixelData"]), "is a DICOM file without pixels"),
    "a table of values": (
        lambda p: write(p, ModalityLUTSequence=ENHANCED),
        "has a ModalityLUTSequence in place of slope and intercept",
    ),
    "no window": (
        lambda p: write(p, without=["WindowCenter", "WindowWidth"]),
        r"has no window \(WindowCenter, WindowWidth\): pass window=\(centre, width\) in HU",
    ),
    "empty window": (lambda p: write(p, WindowCenter=None), "has no window"),
    "no width": (
        lambda p: write(p, WindowWidth=1),
        r"has a window that cannot be used \(LINEAR, centre -600",
    ),
    "unknown function": (
        lambda p: write(p, VOILUTFunction="CUBIC"),
        r"has a window that cannot be used \(CUBIC",
    ),
    "compressed": (
        lambda p: write(p, syntax=uid.JPEGLSLossless, encapsulated=encaps.encapsulate([b"\xff\xd8" * 40])),
        r"is compressed \(JPEG-LS Lossless Image Compression\) and was not decoded: install a decoder",
    ),
    "constant": (lambda p: write(p, np.full((SIZE, SIZE), 900, np.int16)), "is constant"),
    "outside the window": (lambda p: write(p, WindowCenter=9000, WindowWidth=100), "is constant"),
    "too small": (lambda p: write(p, stored()[:20]), r"is smaller than 32 px a side \(40 x 20\)"),
    "too large": (lambda p: write(p, Rows=5000, Columns=5000), "is larger than 4096 px a side"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_what_cannot_be_read_is_refused_by_name(tmp_path, kind):
    make, message = REFUSED[kind]
    write(tmp_path / "ct" / "good.dcm")
    make(tmp_path / "ct" / "x.dcm")
    with pytest.raises(DataError, match=rf"^1 of 2 files in .* cannot be used: ct/x.dcm {message}"):
        load_folder(tmp_path, size=SIZE)


def test_a_folder_of_dicom_files_is_a_folder_of_images(tmp_path):
    for k in range(3):
        write(tmp_path / "lung" / "ab"[k % 2] / f"{k}.dcm", stored(k), PatientID=f"P{k // 2}")
    write(tmp_path / "lung" / "b" / "1.2.840.9", stored(7), PatientID="P1")  # named by its UID
    write(tmp_path / "lung" / "b" / "IM0002", stored(8), PatientID="P0")
    write(tmp_path / "lung" / "b" / "DICOMDIR")
    with pytest.warns(UserWarning, match="1 files or folders beside the images are not read"):
        slices = load_folder(tmp_path / "lung", size=SIZE, patients="PatientID")
    assert slices.names == ("a/0.dcm", "a/2.dcm", "b/1.2.840.9", "b/1.dcm", "b/IM0002")
    assert np.array_equal(slices.images[1], linear(stored(2) - 1024.0, -600, 1500))
    assert [slices.patient_names[p] for p in slices.groups] == ["P0", "P1", "P1", "P0", "P0"]


def test_the_window_is_part_of_what_is_cached(tmp_path):
    write(tmp_path / "lung" / "a" / "0.dcm")
    options = {"size": SIZE, "cache": tmp_path / "cache"}
    for _ in range(2):
        own = load_folder(tmp_path / "lung", **options)
        soft = load_folder(tmp_path / "lung", window=(40, 400), **options)
        assert np.array_equal(own.images[0], linear(stored() - 1024.0, -600, 1500))
        assert np.array_equal(soft.images[0], linear(stored() - 1024.0, 40, 400))
    colour = load_folder(tmp_path / "lung", ct=False, colour=True, **options)
    assert np.array_equal(colour.images[0], np.stack([own.images[0]] * 3, axis=2))


@pytest.mark.parametrize("window", [(0, 0), (0, 1), (0, -5), (float("nan"), 9), (0, float("inf"))])
def test_a_window_without_a_width_is_refused(tmp_path, window):
    write(tmp_path / "a" / "0.dcm")
    with pytest.raises(ValueError, match="window must be"):
        load_folder(tmp_path, size=SIZE, window=window)


def test_a_window_or_an_id_of_files_that_are_no_dicom_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.uint8(stored() // 8)).save(tmp_path / "a" / "0.png")
    with pytest.raises(ValueError, match="window is for DICOM files, and .* has none"):
        load_folder(tmp_path, size=SIZE, window=(40, 400))
    with pytest.raises(DataError, match="no PatientID: a/0.png is damaged or no DICOM file"):
        load_folder(tmp_path, size=SIZE, patients="PatientID")


def test_a_file_without_a_patient_is_named(tmp_path):
    write(tmp_path / "a" / "0.dcm", PatientID="")
    write(tmp_path / "a" / "1.dcm", without=["PatientID"])
    write(tmp_path / "a" / "2.dcm")
    with pytest.raises(DataError, match="2 of 3 images have no patient in the files: a/0.dcm; a/1.dcm"):
        load_folder(tmp_path, size=SIZE, patients="PatientID")


def test_without_pydicom_the_message_names_the_extra(tmp_path, monkeypatch):
    write(tmp_path / "a" / "0.dcm")
    monkeypatch.setitem(sys.modules, "pydicom", None)  # what an import then raises: ImportError
    with pytest.raises(ImportError, match=r"pip install '\.\[dicom\]'"):
        load_folder(tmp_path, size=SIZE)


def test_pydicom_is_loaded_only_where_there_are_dicom_files(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.uint8(stored() // 8)).save(tmp_path / "a" / "0.png")
    code = f"import sys; from fortify.data import load_folder; load_folder({str(tmp_path)!r}, size=40)"
    done = subprocess.run([sys.executable, "-c", f"{code}; sys.exit('pydicom' in sys.modules)"], timeout=60)
    assert done.returncode == 0


def test_reading_says_nothing(tmp_path):
    with warnings.catch_warnings(action="error"):
        pixels(write(tmp_path / "a.dcm"))

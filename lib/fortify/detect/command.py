"""The command ``python -m fortify.detect``: a verdict on each slice of a file or folder, as they come."""

import argparse
import csv
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fortify import dicom
from fortify.data import Slices, to_tensor
from fortify.detect.detectors import DETECTORS, Detector, calibrate, load_detectors, save_detectors
from fortify.detect.measures import processor
from fortify.files import find_root
from fortify.images import DataError, fit_square, read_image
from fortify.models import load_model, predict
from fortify.published import MODELS, load_published
from fortify.regions import crop_to_lungs
from fortify.runtime import pick_device
from fortify.splits import near_duplicate_groups

DEFAULT = "laptop/grouped-s0/normal"  # of the published models
_IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"}
_OFF = (
    "Alarms are off: there is no {} beside the weights. "
    "`python -m fortify.detect calibrate FOLDER --model ... --size ...` makes one from clean slices."
)
_UNREADABLE = (ValueError, OSError, ImportError)  # a DataError is a ValueError


@dataclass(frozen=True)
class Verdict:
    """A line of the command and of its CSV; empty where the file could not be read, which ``error`` says."""

    file: str
    prediction: str = ""
    confidence: float | str = ""  # probability of the predicted class
    score: float | str = ""  # of the detector; higher is more suspicious
    alarm: bool | str = ""  # "" where there is no calibrated detector
    milliseconds: float | str = ""  # from the file to the verdict
    error: str = ""

    def line(self) -> str:
        """What the terminal shows."""
        name = self.file if len(self.file) <= 40 else f"...{self.file[-37:]}"
        if self.error:
            return f"{name:<40}  error: {self.error}"
        alarm = {True: "ALARM", False: "-", "": "off"}[self.alarm]
        shown = f"{name:<40}  {self.prediction:<12} {self.confidence:>6.1%}  {alarm:<6}"
        return f"{shown} {self.milliseconds:>8.1f} ms"


@dataclass(frozen=True)
class Reader:
    """How files become what the network takes: (1, channels, size, size) float in [0, 1]."""

    size: int
    channels: int = 1
    crop: str = "none"  # or "lungs"; this and the next as in notebook 1
    aspect: str = "pad"  # or "squash"
    window: tuple[float, float] | None = None  # centre and width in HU, for DICOM; None: the file's own

    def pixels(self, path: Path) -> np.ndarray:
        """uint8 (size, size). DataError says what is wrong with a file, ImportError what is not installed."""
        image = dicom.read_dicom(path, window=self.window) if dicom.is_dicom(path) else read_image(path)
        lungs = self.crop == "lungs"
        pixels = np.asarray(fit_square(image, size=2 * self.size if lungs else self.size, aspect=self.aspect))
        return crop_to_lungs(pixels[None], size=self.size)[0][0] if lungs else pixels

    def tensor(self, pixels: np.ndarray) -> Tensor:
        """Of pixels uint8 (N, size, size)."""
        return to_tensor(pixels).expand(-1, self.channels, -1, -1)


def classify(path: Path, name: str, model: nn.Module, reader: Reader, detector: Detector | None) -> Verdict:
    """The verdict on one file, which is called ``name``; what is wrong with it is part of the verdict."""
    started = time.perf_counter()
    try:
        x = reader.tensor(reader.pixels(path)[None])
    except _UNREADABLE as error:
        return Verdict(name, error=" ".join(str(error).split()))
    score, alarm = "", ""
    if detector is None:
        probabilities = predict(model, x)[0]
    else:
        scores, found = detector.judge(x)
        probabilities, score = found[0], float(scores[0])
        alarm = score > detector.threshold
    confidence, label = probabilities.max(0)
    names = model.info.get("class_names") or range(len(probabilities))
    taken = 1000 * (time.perf_counter() - started)
    return Verdict(name, str(names[int(label)]), float(confidence), score, alarm, round(taken, 2))


def found_images(path: Path) -> list[Path]:
    """The image and DICOM files below a folder, sorted, hidden ones left out; a file itself, whatever it is.

    FileNotFoundError where there is nothing at ``path``.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist")
    return [p for p in sorted(path.rglob("*")) if not p.name.startswith(".") and _is_image(p)]


def _is_image(path):
    try:
        return path.is_file() and (path.suffix.lower() in _IMAGES or dicom.is_dicom(path))
    except OSError:  # it went while we looked
        return False


def arriving(folder: Path, *, interval: float = 1.0, idle: float | None = None) -> Iterator[Path]:
    """Files of a watched folder, each once it has stopped growing, and again when it changes.

    Looks every ``interval`` seconds, without end, or until nothing came for ``idle`` seconds.
    """
    done, before, last = {}, {}, time.monotonic()
    while True:
        now = {}
        for path in found_images(folder):
            try:
                about = path.stat()
            except OSError:
                continue
            now[path] = (about.st_size, about.st_mtime_ns)
        for path, stamp in now.items():
            if before.get(path) == stamp != done.get(path):
                done[path] = stamp
                yield path
                last = time.monotonic()
        before = now
        if idle is not None and time.monotonic() - last > idle:
            return
        time.sleep(interval)


def _model(name: str, device: str) -> tuple[nn.Module, Path]:
    """(model, path of its detectors) of a file, or of the name of a published model."""
    path = Path(name)
    if path.suffix == ".safetensors":
        return load_model(path, device=pick_device(device)), beside(path)
    try:
        model = load_published(name, device=pick_device(device))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. Or give weights of your own: --model FILE.safetensors") from None
    try:
        root = find_root()
    except FileNotFoundError:
        root = find_root(Path(__file__).parent)
    return model, beside(root / MODELS / f"{name}.safetensors")


def beside(weights: Path) -> Path:
    """Where the calibrated detectors of a file of weights lie."""
    return weights.with_name(f"{weights.stem}_detectors.safetensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. 0: all slices were read; 1: some were not; 2 and one line on stderr: nothing could be."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    own = arguments[:1] == ["calibrate"]
    try:
        return _calibrate(arguments[1:]) if own else _classify(arguments)
    except _UNREADABLE as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser(prog, description):
    parser = argparse.ArgumentParser(prog=f"python -m fortify.detect{prog}", description=description)
    parser.add_argument(
        "--model", default=DEFAULT, help="a .safetensors file, or the name of a published model"
    )
    parser.add_argument("--window", type=float, nargs=2, help="centre and width in HU, for DICOM files")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--threads", type=int, help="of the processor (default: torch's)")
    return parser


def _classify(arguments):
    parser = _parser(
        "", "Class, confidence, alarm and milliseconds of each slice. `calibrate` fits detectors."
    )
    parser.add_argument("path", type=Path, help="a PNG, JPEG or DICOM file, or a folder of them")
    parser.add_argument("--detectors", type=Path, help="a file of `calibrate` (default: beside the model)")
    parser.add_argument("--detector", help="which of them raises the alarm (default: as the file says)")
    parser.add_argument("--size", type=int, help="side in pixels; needed where there are no detectors")
    parser.add_argument("--csv", type=Path, help="write the verdicts to this file, each as it is made")
    parser.add_argument("--watch", action="store_true", help="go on with slices that come into the folder")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two looks (--watch)")
    parser.add_argument("--idle", type=float, help="stop after so many seconds without a slice (--watch)")
    options = parser.parse_args(arguments)
    _threads(options.threads)
    if not options.path.exists():
        raise FileNotFoundError(f"{options.path} does not exist")
    if options.watch and not options.path.is_dir():
        raise DataError(f"{options.path} is no folder, which --watch needs")
    model, calibrated = _model(options.model, options.device)
    detector, about = _detector(model, options.detectors, calibrated, options.detector)
    size = about.get("size", options.size)
    if size is None:
        raise ValueError("give --size, the side in pixels that the network was trained at: its card says it")
    if options.size not in (None, size):
        raise ValueError(f"the detectors are of slices of {size} px: leave --size {options.size} out")
    window = options.window and tuple(options.window)
    if window:
        dicom.check_window(window)
    shown = {key: about["about"][key] for key in ("crop", "aspect") if key in about.get("about", {})}
    reader = Reader(size, getattr(model, "channels", 1), window=window, **shown)
    print("Research software, not a medical device: no diagnosis.", file=sys.stderr)
    files = (
        arriving(options.path, interval=options.interval, idle=options.idle)
        if options.watch
        else found_images(options.path)
    )
    return _report(files, options, model, reader, detector)


def _detector(model, given, default, name):
    """(detector or None, what its file says)."""
    path = given or default
    if not path.is_file():
        if given or name:
            raise FileNotFoundError(f"{path} does not exist: `python -m fortify.detect calibrate --help`")
        print(_OFF.format(path.name), file=sys.stderr)
        return None, {}
    found, about = load_detectors(path, model)
    name = name or about["about"].get("default") or next(iter(found))
    if name not in found:
        raise ValueError(f"{path} has no detector {name!r}; it has {', '.join(found)}")
    share = about["about"].get("false_alarms", 0)
    print(f"Detector: {name}, {share:.0%} false alarms where it was calibrated.", file=sys.stderr)
    return found[name], about


def _report(files, options, model, reader, detector):
    """Print a line for each of ``files``, and write it; returns the exit status."""
    columns, times, alarms, bad, total = [field.name for field in fields(Verdict)], [], 0, 0, 0
    file = open(options.csv, "w", newline="", encoding="utf-8") if options.csv else None
    try:
        writer = csv.DictWriter(file, columns) if file else None
        if writer:
            writer.writeheader()
        predict(model, reader.tensor(np.zeros((1, reader.size, reader.size), np.uint8)))  # the first is slow
        for path in files:
            inside = options.path.is_dir() and path.is_relative_to(options.path)
            name = path.relative_to(options.path).as_posix() if inside else path.name
            verdict = classify(path, name, model, reader, detector)
            print(verdict.line(), flush=True)
            if writer:
                writer.writerow(asdict(verdict))
                file.flush()
            total, bad, alarms = total + 1, bad + bool(verdict.error), alarms + (verdict.alarm is True)
            times += [verdict.milliseconds] if not verdict.error else []
    except KeyboardInterrupt:
        print(file=sys.stderr)
    finally:
        if file:
            file.close()
    if not total:
        raise DataError(f"{options.path} holds no image ({', '.join(sorted(_IMAGES))}, DICOM)")
    said = f"{total} files: {alarms} alarms, {bad} not read"
    if times:
        p50, p99 = np.quantile(times, [0.5, 0.99])
        said += f"; half within {p50:.1f} ms, 99 % within {p99:.1f} ms"
        said += f" ({torch.get_num_threads()} threads, {processor(model)})"
    print(said, file=sys.stderr)
    return int(bad > 0)


def _calibrate(arguments):
    what = "Fit detectors on clean slices that the network was not trained on, and set their thresholds."
    parser = _parser(" calibrate", what)
    parser.add_argument("folder", type=Path, help="clean slices: PNG, JPEG, DICOM")
    parser.add_argument("--size", type=int, required=True, help="side in pixels that the network takes")
    parser.add_argument("--crop", choices=("none", "lungs"), default="none", help="as notebook 1 crops")
    parser.add_argument("--aspect", choices=("pad", "squash"), default="pad", help="of what is not square")
    parser.add_argument(
        "--false-alarms", type=float, default=0.05, help="share of clean slices with an alarm"
    )
    parser.add_argument(
        "--detectors", nargs="+", default=[*DETECTORS], choices=[*DETECTORS], help="which to fit"
    )
    kinds, what = ("near-duplicates", "folders"), "what stands for a patient: alike slices, or a subfolder"
    parser.add_argument("--groups", choices=kinds, default=kinds[0], help=what)
    parser.add_argument("--out", type=Path, help="file to write (default: beside the weights)")
    options = parser.parse_args(arguments)
    _threads(options.threads)
    model, default = _model(options.model, options.device)
    window = options.window and tuple(options.window)
    shown = {"crop": options.crop, "aspect": options.aspect}
    reader = Reader(options.size, getattr(model, "channels", 1), window=window, **shown)
    kept, images = [], []
    for path in found_images(options.folder):
        try:
            images.append(reader.pixels(path))
            kept.append(path)
        except _UNREADABLE as error:
            print(f"{path.name}: left out, {error}", file=sys.stderr)
    if not kept:
        raise DataError(f"{options.folder} holds no image that can be read")
    groups = _groups(
        options.groups, np.stack(images), [p.relative_to(options.folder).as_posix() for p in kept]
    )
    x, share, found = reader.tensor(np.stack(images)), options.false_alarms, {}
    for name in options.detectors:
        found[name] = calibrate(DETECTORS[name](), model, x, groups, false_alarms=share)
    out = options.out or default
    save_detectors(out, found, size=options.size, false_alarms=share, **shown)
    print(
        f"{len(found)} detectors, calibrated on {len(kept)} slices in {len(np.unique(groups))} groups: {out}"
    )
    return 0


def _groups(kind, images, names):
    if kind == "folders":
        return np.array([name.rpartition("/")[0] for name in names])
    labels = np.zeros(len(names), dtype=np.int64)
    return near_duplicate_groups(Slices(images, labels, tuple(names), ("slices",), "", ""))


def _threads(count):
    if count is not None:
        if count < 1:
            raise ValueError(f"--threads must be at least 1, not {count}")
        torch.set_num_threads(count)

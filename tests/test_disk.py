"""A full disk and a folder that may not be written to: every writer says so, and what was there stays."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fortify import files

# First whole files are written, then larger ones where there is no room, or no right, in a process for each:
# forks of one that has imported everything, which takes longer, and has used none of it.
CHILD = """
import json, os, resource, signal, sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt

from fortify import files
from fortify.data import Slices
from fortify.figures import save
from fortify.models import build_model, save_model
from fortify.checkpoint import TrainingState

for how in sys.argv[2:]:
    if not (child := os.fork()):
        break
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{how} failed")
else:
    sys.exit()
folder = Path(sys.argv[1]) / how


def slices(count):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 64, 64), dtype=np.uint8)
    names = [f"{i}.png" for i in range(count)]
    return Slices(pixels, np.arange(count) % 2, names, ("a", "b"), "drawn", "0" * 64)


def figure(count):
    made, axes = plt.subplots()
    axes.imshow(np.random.default_rng(0).random((count, count)), interpolation="nearest")
    return made


model = build_model("resnet_small", num_classes=3, seed=0)
state = TrainingState(model, torch.optim.SGD(model.parameters()))
noise = np.random.default_rng(0).random
writers = {
    "a.json": lambda n: files.write_json(folder / "a.json", list(range(n))),
    "a.csv": lambda n: files.write_csv(folder / "a.csv", pd.DataFrame({"x": noise(n)})),
    "a.txt": lambda n: files.write_text(folder / "a.txt", "line\\n" * n),
    "a.npz": lambda n: files.write_arrays(folder / "a.npz", x=noise(n)),
    "slices.npz": lambda n: slices(n // 100 + 1).save(folder / "slices.npz"),
    "figure.png": lambda n: save(figure(n // 100 + 2), folder, "figure"),
    "model.safetensors": lambda n: save_model(folder / "model.safetensors", model if n > 10 else tiny),
    "state.safetensors": lambda n: (state if n > 10 else little).save(folder / "state.safetensors"),
}
tiny = torch.nn.Linear(2, 2)
tiny.arch, tiny.num_classes = "linear", 2
little = TrainingState(tiny, torch.optim.SGD(tiny.parameters()))
for write in writers.values():
    write(10)
before = {p.name: p.read_bytes() for p in folder.iterdir()}
if how == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the kernel kills the writer: no error to see
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
else:
    os.chmod(folder, 0o555)
    if os.geteuid() == 0:
        os.setuid(65534)
said = {}
for name, write in writers.items():
    try:
        write(30_000)
        said[name] = "written"
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
after = {p.name: p.read_bytes() for p in folder.iterdir()}
same = {name: after.get(name) == content for name, content in before.items()}
found = {"how": how, "said": said, "same": same, "litter": sorted(set(after) - set(before))}
os.write(1, json.dumps(found).encode() + b"\\n")
"""


WORDS = {"full": "File too large|os error 27", "read-only": "Permission denied|Read-only"}


@pytest.fixture(scope="module")
def tried():
    """{"full" or "read-only": what its process found}."""
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        for how in WORDS:
            (Path(parent) / how).mkdir()
        env = os.environ | {"MPLCONFIGDIR": parent}
        command = [sys.executable, "-c", CHILD, parent, *WORDS]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        for how in WORDS:
            os.chmod(Path(parent) / how, 0o755)
        assert done.returncode == 0, done.stderr[-3000:]
    return {found["how"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("how", WORDS)
def test_every_writer_says_so_and_the_old_file_stays(tried, how):
    found, words = tried[how], WORDS[how]
    assert len(found["said"]) == 8
    for name, said in found["said"].items():
        assert any(word in said for word in words.split("|")), (name, said)
        if not said.startswith("SafetensorError"):
            assert "what was there is as it was" in said and name.split(".")[0] in said
    assert all(found["same"].values()), found["same"]
    assert found["litter"] == []


def test_an_error_of_another_file_is_not_put_on_the_one_that_is_written(tmp_path):
    written, missing = tmp_path / "copy.txt", tmp_path / "source.txt"
    written.write_text("old")
    with pytest.raises(FileNotFoundError) as caught, files.atomic_path(written) as temporary:
        temporary.write_bytes(missing.read_bytes())
    assert caught.value.filename == str(missing) and "cannot be written" not in str(caught.value)
    assert written.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["copy.txt"]

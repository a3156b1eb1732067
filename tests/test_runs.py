"""Files of a run: written whole or not at all, found where they should be, named when they are not."""

import fcntl
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import termios
import time

import numpy as np
import pandas as pd
import pytest
import torch

from fortify import files, runs, runtime
from fortify.workflow.locks import wait_for_profile


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "lib" / "fortify").mkdir(parents=True)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.delenv("FORTIFY_ROOT", raising=False)
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path


def finished(folder, name="normal.safetensors", age=0):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(str(folder))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_root_is_found_from_a_subfolder(checkout):
    assert files.find_root() == checkout


def test_outside_a_checkout_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORTIFY_ROOT", raising=False)
    with pytest.raises(FileNotFoundError, match="FORTIFY_ROOT"):
        files.find_root()


def test_a_named_run_reads_and_writes_its_own_folder(checkout):
    path = finished(checkout / "build/demo/random-s0")
    run = runs.open_run("build/demo/random-s0", needs=["normal.safetensors"])
    assert run.read("normal.safetensors") == path
    assert run.write("x.csv") == checkout / "build/demo/random-s0/x.csv"
    assert run.write("data/slices.npz") == checkout / "build/demo/data/slices.npz"
    assert run.write("figures") == checkout / "build/demo/figures"
    assert run.profile == "demo"


def test_by_hand_reads_the_newest_run_and_writes_beside_it(checkout):
    finished(checkout / "build/demo/random-s0", age=60)
    newest = finished(checkout / "build/laptop/grouped-s0", age=30)
    finished(checkout / "build/paper/random-s0", name="other.csv", age=0)
    finished(checkout / "build/test/random-s0", age=0)  # tiny phantoms of the test suite
    run = runs.open_run(needs=["normal.safetensors"])
    assert run.read("normal.safetensors") == newest
    assert run.write("x.csv") == checkout / "build/by-hand/x.csv"
    assert run.profile == "laptop"


def stamped(folder, manifest, *, sha="abc", split=None, seed=0):
    parameters = {"split": split, "seed": seed} if split else {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / manifest).write_text(json.dumps({"data_sha256": sha, "parameters": parameters}))


NEEDS = ["data/slices.npz", "data/splits/random-s0.csv", "normal.safetensors"]


def profile_run(build, run, **facts):
    finished(build / "data", "slices.npz")
    for name in ("random-s0", "grouped-s0"):
        finished(build / "data/splits", f"{name}.csv")
    stamped(build / "data", "01_data.json")
    stamped(build / run, "02_baseline.json", split=run.split("-")[0])
    return finished(build / run, **facts)


def test_by_hand_never_takes_another_splits_model(checkout):
    """The model of the grouped split was trained on slices that the random split tests."""
    own = profile_run(checkout / "build/laptop", "random-s0", age=60)
    profile_run(checkout / "build/laptop", "grouped-s0", age=0)
    assert runs.open_run(needs=NEEDS).read("normal.safetensors") == own
    with pytest.raises(FileNotFoundError, match="No run of random-s3"):
        runs.open_run(needs=[NEEDS[0], "data/splits/random-s3.csv", NEEDS[2]])
    with pytest.raises(FileNotFoundError, match="01_data writes it where .* `seeds`"):
        runs.open_run(needs=["data/splits/random-s3.csv", "normal.safetensors"])


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1", torch.device("cuda")):
        with pytest.raises(ValueError, match='no GPU here; use "auto" or "cpu"'):
            runtime.pick_device(name)


def test_by_hand_prefers_what_was_made_by_hand_of_the_same_split(checkout):
    base = profile_run(checkout / "build/laptop", "random-s0")
    own = finished(checkout / "build/by-hand", age=60)
    stamped(checkout / "build/by-hand", "02_baseline.json", split="random")
    mixed = runs.open_run(needs=NEEDS)
    assert mixed.profile == "laptop", "nothing was read yet"
    assert mixed.read("normal.safetensors") == own
    assert mixed.profile == "laptop with normal.safetensors made by hand"
    for other in (
        {"split": "grouped"},
        {"split": "random", "seed": 1},
        {"split": "random", "sha": "other data"},
    ):
        stamped(checkout / "build/by-hand", "02_baseline.json", **other)
        assert runs.open_run(needs=NEEDS).read("normal.safetensors") == base


def test_a_whole_run_made_by_hand_is_taken_if_it_belongs_together(checkout):
    base = profile_run(checkout / "build/laptop", "random-s0")
    by_hand = checkout / "build/by-hand"
    for name in NEEDS:
        own = finished((by_hand / name).parent, (by_hand / name).name)
    stamped(by_hand / "data", "01_data.json")
    stamped(by_hand, "02_baseline.json", split="random")
    run = runs.open_run(needs=NEEDS)
    assert run.read("normal.safetensors") == own and run.profile == "by hand"
    stamped(by_hand, "02_baseline.json", split="grouped")
    assert runs.open_run(needs=NEEDS).read("normal.safetensors") == base


def test_a_cell_may_be_run_twice(checkout):
    finished(checkout / "build/demo/random-s0")
    run = runs.open_run("build/demo/random-s0")
    assert runs.open_run(run) is run


@pytest.mark.parametrize("run", ["", "build/demo/random-s0"])
def test_a_missing_file_names_the_notebook_that_writes_it(checkout, run):
    with pytest.raises(FileNotFoundError, match="02_baseline.*make demo"):
        runs.open_run(run, needs=["normal.safetensors"])


def test_siblings_are_the_finished_runs_of_the_profile_by_split_and_seed(checkout):
    for name in ("random-s10", "random-s2", "grouped-s0"):
        finished(checkout / "build/demo" / name)
    finished(checkout / "build/demo/random-s1", name="half.csv")
    finished(checkout / "build/laptop/random-s0")
    run = runs.open_run("build/demo/results")

    def found(**of):
        return [r.source.name for r in run.siblings(["normal.safetensors"], **of)]

    assert found() == ["grouped-s0", "random-s2", "random-s10"]
    assert found(splits=["random"], seeds=[0, 10]) == ["random-s10"], "not what an earlier call left"


def test_a_run_says_whether_it_holds_files(checkout):
    folder = checkout / "build/demo/random-s0"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nodules_normal.safetensors").touch()
    run = runs.open_run("build/demo/random-s0")
    assert run.holds("nodules_normal.safetensors")
    assert not run.holds("nodules_normal.safetensors", "nodules_adversarial.safetensors")
    with pytest.raises(FileNotFoundError, match="Notebook 11_transfer writes it"):
        run.read("nodules_adversarial.safetensors")


def test_siblings_by_hand_are_of_the_split_that_the_manifest_says(checkout):
    finished(checkout / "build/by-hand")
    stamped(checkout / "build/by-hand", "02_baseline.json", split="random", seed=3)
    run = runs.open_run(needs=["normal.safetensors"])
    assert len(run.siblings(["normal.safetensors"], splits=["random"], seeds=[3])) == 1
    assert run.siblings(["normal.safetensors"], splits=["grouped"], seeds=[3]) == []


def with_parameters(folder, notebook, **own):
    folder.mkdir(parents=True, exist_ok=True)
    made = {"data_sha256": "abc", "parameters": own}
    (folder / f"{notebook}.json").write_text(json.dumps(made))


def test_an_earlier_notebooks_parameters_are_read_from_its_manifest(checkout):
    build = checkout / "build/demo"
    with_parameters(build / "random-s0", "02_baseline", epochs=3, lr=0.1)
    with_parameters(build / "data", "01_data", splits=["random"], seeds=[0, 1])
    run = runs.open_run("build/demo/random-s0")
    assert run.parameters("02_baseline", "lr") == {"lr": 0.1}
    assert run.parameters("02_baseline") == {"epochs": 3, "lr": 0.1}
    assert list(run.parameters("01_data", "seeds", "splits").values()) == [[0, 1], ["random"]]
    # and what was read is there for the manifest of the one that reads it
    assert run.inherited["02_baseline"] == {"epochs": 3, "lr": 0.1}
    assert run.inherited["01_data"] == {"seeds": [0, 1], "splits": ["random"]}
    with pytest.raises(
        FileNotFoundError, match="03_attacks.json does not exist. Notebook 03_attacks writes it"
    ):
        run.parameters("03_attacks")
    with pytest.raises(ValueError, match="has no ema: run notebook 02_baseline again"):
        run.parameters("02_baseline", "lr", "ema")


def test_by_hand_the_parameters_are_those_of_the_model_that_is_read(checkout):
    build = checkout / "build/laptop"
    profile_run(build, "random-s0")
    hand = checkout / "build/by-hand"
    finished(hand)
    for folder, epochs in ((build / "random-s0", 36), (hand, 2)):
        with_parameters(folder, "02_baseline", split="random", seed=0, epochs=epochs)
    run = runs.open_run(needs=NEEDS)
    assert run.read("normal.safetensors") == hand / "normal.safetensors"
    assert run.parameters("02_baseline", "epochs") == {"epochs": 2}
    with_parameters(hand, "02_baseline", split="grouped", seed=0, epochs=2)
    assert runs.open_run(needs=NEEDS).parameters("02_baseline", "epochs") == {"epochs": 36}


def test_runs_in_one_table_must_agree(checkout):
    for name, eps in (("random-s0", 4), ("random-s1", 4), ("random-s2", 8)):
        with_parameters(checkout / "build/demo" / name, "03_attacks", eps_255=eps, cw_l2=1)
        finished(checkout / "build/demo" / name, "a.csv")
    run = runs.open_run("build/demo/results")
    same = run.siblings(["a.csv"], splits=["random"], seeds=[0, 1])
    assert runs.shared_parameters(same, "03_attacks", "eps_255", "cw_l2") == {"eps_255": 4, "cw_l2": 1}
    assert run.inherited == {"03_attacks": {"eps_255": 4, "cw_l2": 1}}
    with pytest.raises(
        ValueError, match="random-s0 is of eps_255 = 4 and random-s2 of 8: run notebook 03_att"
    ):
        runs.shared_parameters(run.siblings(["a.csv"]), "03_attacks", "eps_255")
    with pytest.raises(ValueError, match="no finished run"):
        runs.shared_parameters([], "03_attacks", "eps_255")


def test_a_failed_write_keeps_the_old_file_and_leaves_no_litter(tmp_path):
    path = tmp_path / "table.csv"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]


def test_a_killed_write_never_shows_half_a_file(tmp_path):
    path = tmp_path / "table.csv"
    files.write_text(path, "old")
    code = (
        "import os, signal; from fortify.files import atomic_path\n"
        f"with atomic_path({str(path)!r}) as t:\n"
        " t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert path.read_text() == "old"


def test_written_tables_have_the_same_bytes_and_numbers(tmp_path):
    table = pd.DataFrame({"a": [1, 2], "b": [0.1, 1 / 3], "c": ["x", "y"]})
    files.write_csv(tmp_path / "1.csv", table)
    files.write_csv(tmp_path / "2.csv", table)
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "1.csv"), table, rtol=1e-8)


def test_arrays_round_trip(tmp_path):
    x = np.random.default_rng(0).random((3, 1, 4, 4), dtype=np.float32)
    files.write_arrays(tmp_path / "a.npz", fgsm=x)
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["fgsm"], x) and file.files == ["fgsm"]


@pytest.fixture
def declaring(checkout):
    """A checkout whose notebook 02_x declares parameters of every kind."""
    source = 'run = ""\neps_255 = 4.0\nsteps = 7\nflip = True\nseeds = [0, 1]\nhow = {"ema": 0.5}\n'
    cells = [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source.splitlines(True)}]
    (checkout / "notebooks/02_x.ipynb").write_text(json.dumps({"cells": cells}))
    return dict(run="", eps_255=4.0, steps=7, flip=True, seeds=[0, 1], how={"ema": 0.5})


def test_parameters_are_what_the_cell_declares_and_nothing_else(declaring):
    space = declaring | {"eps_255": 2, "left_over": 3, "np": np, "In": [], "seed": 1}
    assert runs.notebook_parameters("02_x", space) == declaring | {"eps_255": 2}


def test_a_set_up_cell_may_be_run_twice(declaring, checkout):
    """It has made a Run of the parameter ``run``, and later cells have left names behind."""
    space = dict(declaring, run="build/demo/random-s0")
    space["parameters"] = first = runs.notebook_parameters("02_x", space)
    space |= {"run": runs.open_run("build/demo/random-s0"), "best": 0.9, "text": "words"}
    assert runs.notebook_parameters("02_x", space) == first


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("flip", "false", "flip must be true or false like True, not the text 'false'"),
        ("eps_255", "8/255", "eps_255 must be a number like 4.0, not the text '8/255'"),
        ("seeds", 0, r"seeds must be a list like \[0, 1\], not 0"),
        ("seeds", ["0"], "an element of seeds must be a whole number like 0, not the text '0'"),
        ("steps", 7.5, "steps must be a whole number like 7, not 7.5"),
        ("eps_255", True, "eps_255 must be a number like 4.0, not True"),
        ("run", 3, "run must be text like '', not 3"),
        ("how", {"ema": "a lot"}, "ema in how must be a number like 0.5, not the text 'a lot'"),
        ("how", None, "how must be a mapping like"),
    ],
)
def test_a_parameter_of_a_wrong_type_is_named_in_a_sentence(declaring, name, value, message):
    """As papermill gives it: ``-p flip false`` and ``-p eps_255 8/255`` are text, ``-p seeds 0`` no list."""
    with pytest.raises(ValueError, match=message) as error:
        runs.notebook_parameters("02_x", declaring | {name: value})
    assert f"-y '{{{name}: ...}}'" in str(error.value) and "\n" not in str(error.value)


def test_manifest_says_what_made_a_result(tmp_path):
    made = runs.manifest(parameters={"seed": 0}, data_sha256="abc", device="cpu")
    files.write_json(tmp_path / "m.json", made)
    read = json.loads((tmp_path / "m.json").read_text())
    assert read["parameters"] == {"seed": 0} and read["data_sha256"] == "abc" and read["inherited"] == {}
    assert read["versions"]["torch"] and len(read["code"]["lib_sha256"]) == 64
    assert read["device"].startswith("CPU")


def test_only_the_paper_profile_passes_for_the_reference_run(checkout):
    finished(checkout / "build/paper/random-s0"), finished(checkout / "build/laptop/random-s0")
    lines = [
        runs.banner(runs.open_run(f"build/{p}/random-s0"), "slices", seed=0) for p in ("paper", "laptop")
    ]
    assert "not" not in lines[0] and "**not** the reference run" in lines[1]
    assert all("seed 0" in line for line in lines)


def test_import_of_the_package_loads_no_torch():
    light = "fortify, fortify.runs, fortify.data, fortify.evaluation, fortify.tables, fortify.figures"
    code = f"import sys, {light}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_notebook_that_goes_on_alone_is_waited_for(tmp_path):
    """Two notebooks hold the lock together; a workflow has it when both are done, also if one was killed."""
    lock = tmp_path / "lock"
    at_work = [
        sys.executable,
        "-m",
        "fortify.workflow.locks",
        str(lock),
        sys.executable,
        "-c",
        "print(1, flush=True); input()",
    ]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    notebooks = [subprocess.Popen(at_work, **pipes) for _ in range(2)]
    assert [notebook.stdout.readline() for notebook in notebooks] == ["1\n", "1\n"]
    wait = "from fortify.workflow.locks import wait_for_lock\n"
    wait += "held = wait_for_lock({!r}, what='a notebook'); print('mine')"
    workflow = subprocess.Popen(
        [sys.executable, "-c", wait.format(str(lock))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "waiting for a notebook to end" in workflow.stderr.readline()
    notebooks[0].kill()
    notebooks[0].communicate()
    assert workflow.poll() is None
    notebooks[1].communicate("done\n")
    assert notebooks[1].returncode == 0 and workflow.communicate()[0] == "mine\n"


WAIT = "from fortify.workflow.locks import wait_for_profile\nheld = wait_for_profile({!r}); print('mine')"


def test_profiles_do_not_wait_for_each_other(tmp_path):
    """And two runs of one do."""
    with wait_for_profile(tmp_path / "build/paper"):
        done = subprocess.run(
            [sys.executable, "-c", WAIT.format(str(tmp_path / "build/test"))], capture_output=True, timeout=60
        )
        assert (done.stdout, done.stderr) == (b"mine\n", b"")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        own = [sys.executable, "-c", WAIT.format(str(tmp_path / "build/paper"))]
        second = subprocess.Popen(own, **pipes)
        assert "waiting for another run in this checkout to end" in second.stderr.readline()
        assert second.poll() is None
    assert second.communicate()[0] == "mine\n"


def test_a_lock_whose_folder_was_removed_is_made_anew(tmp_path):
    """`make clean` while two runs wait: the second must not hold a file that nobody else can find."""
    build = tmp_path / "build/test"
    first = wait_for_profile(build)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    second = subprocess.Popen([sys.executable, "-c", WAIT.format(str(build))], **pipes)
    assert "waiting" in second.stderr.readline()
    shutil.rmtree(build)
    with wait_for_profile(build):
        first.close()
        assert "waiting" in second.stderr.readline(), "it looked again, and found the new one held"
    assert second.communicate()[0] == "mine\n"


def test_who_waits_says_so_on_the_terminal_though_a_test_runner_catches_its_output(tmp_path):
    """The other end of a pseudo-terminal is the controlling one of a process with its output in a pipe."""
    lock, (ours, theirs) = wait_for_profile(tmp_path / "build"), pty.openpty()
    own = [sys.executable, "-c", WAIT.format(str(tmp_path / "build"))]

    def on_terminal():
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    waiting = subprocess.Popen(own, **pipes, preexec_fn=on_terminal)
    try:
        assert select.select([ours], [], [], 60)[0], "nothing was written to the terminal"
        assert b"waiting for another run" in os.read(ours, 1000)
    finally:
        lock.close()
        waiting.communicate()
        os.close(ours), os.close(theirs)


def test_the_first_run_of_a_split_is_of_its_lowest_seed(tmp_path):
    found = [runs.Run(tmp_path / name, tmp_path) for name in ("grouped-s2", "random-s1", "random-s10")]
    assert runs.first_run(found, "random").source.name == "random-s1"
    assert runs.first_run(found, "grouped").source.name == "grouped-s2"
    alone = runs.Run(tmp_path / "by-hand", tmp_path)
    assert runs.first_run([alone], "random") is alone

"""Kernels that start on a busy machine wait without spinning long; on a quiet one nothing is set."""

import subprocess
import sys

import pytest

from fortify.workflow import load


def test_cores_in_use_are_what_is_not_idle():
    # 100 ticks went by on each of two cores: 150 idle ones are half a core in use.
    assert load.used_cores((1000, 5000, 2), (1150, 5200, 2)) == pytest.approx(0.5)
    assert load.used_cores((0, 0, 2), (0, 200, 2)) == 2 and load.used_cores((5, 9, 2), (5, 9, 2)) == 0


def test_a_reading_is_of_all_processors(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu  10 0 5 80 5 0 0 0 0 0\ncpu0 5 0 3 40 2 0 0 0 0 0\ncpu1 5 0 2 40 3 0 0 0 0 0\nctxt 1\n"
    )
    assert load._times(stat) == (85, 100, 2)
    assert load.cores_in_use(0, stat=tmp_path / "none") == 0, "as on macOS"


@pytest.mark.skipif(not load._STAT.exists(), reason="only Linux says what is in use")
def test_a_busy_process_is_seen():
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert load.cores_in_use(1.0) > load.BUSY_CORES
    finally:
        busy.kill()
        busy.wait()


def test_only_a_busy_machine_and_no_wish_of_the_user_set_the_spins(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert load.waiting(0.1) == {} and load.waiting(1.0) == {"GOMP_SPINCOUNT": load.SPINS}
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert load.waiting(1.0) == {}


def test_a_notebook_starts_with_it(tmp_path):
    code = "import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    patched = (
        "import sys; from fortify.workflow import locks; locks.cores_in_use = lambda: float(sys.argv[1]); "
        f"locks.run_locked({str(tmp_path / 'lock')!r}, [sys.executable, '-c', {code!r}])"
    )
    for in_use, expected in (("1.0", load.SPINS), ("0.0", "None")):
        clean = {"PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            [sys.executable, "-c", patched, in_use], capture_output=True, text=True, env=clean
        )
        assert done.stdout.strip() == expected, done.stderr

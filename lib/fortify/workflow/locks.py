"""Locks of the workflow: one run of a profile at a time, and no notebook that outlives its workflow.

python -m fortify.workflow.locks LOCK COMMAND...   runs a command that holds the lock to its end
"""

import contextlib
import fcntl
import os
import sys
import uuid
from pathlib import Path
from typing import NoReturn, TextIO

from fortify.workflow.load import cores_in_use, waiting

CALL = "FORTIFY_CALL"  # names a call of the workflow to its jobs, which inherit its environment


def wait_for_lock(path: str | Path, *, what: str, shared: bool = False) -> TextIO:
    """Hold the lock file ``path`` until the returned file is closed or the process ends, however it ends.

    While another process holds it this waits, and says so: ``what`` is at work. Any number of processes hold
    it together if it is ``shared`` to each. OSError where the file system has no locks, as on some clusters.
    """
    path, kind = Path(path), fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # NFS refuses a shared lock on a file that is not open for reading
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for {what} to end (it holds {path})")
            fcntl.flock(file, kind)
        except OSError as error:
            why = f"no lock ({error.strerror}): put the checkout on a file system that has them (flock)"
            raise OSError(error.errno, why, str(path)) from None
        # Somebody may have removed the folder meanwhile: a file that is gone locks nobody out.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


def _say(message):
    """On stderr, and where that is caught (by a test runner, into a log) on the terminal too."""
    print(message, file=sys.stderr, flush=True)
    if not os.isatty(2):
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            print(message, file=terminal, flush=True)


def wait_for_profile(build: str | Path) -> TextIO:
    """Hold the lock of a profile's folder, once no notebook of an earlier workflow is at work in it.

    Jobs of an earlier workflow that wait in a cluster's queue are refused from now on: see :func:`join_call`.
    """
    lock = wait_for_lock(Path(build) / ".lock", what="another run in this checkout")
    with wait_for_lock(Path(build) / ".notebook-lock", what="a notebook whose run was killed") as notebooks:
        os.environ[CALL] = uuid.uuid4().hex
        notebooks.truncate(0)
        notebooks.write(os.environ[CALL])
    return lock


def join_call(path: str | Path) -> TextIO:
    """Hold the lock file ``path``, shared, as a job of the workflow that :func:`wait_for_profile` began.

    Raises RuntimeError in a job of an earlier one, which began before the one that is at work now.
    """
    lock = wait_for_lock(path, what="a workflow", shared=True)
    lock.seek(0)
    if os.environ.get(CALL, "") not in ("", lock.read()):
        lock.close()
        raise RuntimeError(
            f"the workflow that asked for this job was killed, and called again since ({path})"
        )
    return lock


def run_locked(path: str | Path, command: list[str]) -> NoReturn:
    """Become ``command`` (a list), which holds the lock file ``path``, shared, to its end: does not return.

    So a notebook that goes on after its workflow was killed is waited for by the next, not raced.
    """
    lock = join_call(path)
    os.set_inheritable(lock.fileno(), True)
    os.environ |= waiting(cores_in_use())
    os.execvp(command[0], command)


if __name__ == "__main__":
    run_locked(sys.argv[1], sys.argv[2:])

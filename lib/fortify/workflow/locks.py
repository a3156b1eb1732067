"""Locks of the workflow: one run of a profile at a time, and no notebook that outlives its workflow.

python -m fortify.workflow.locks LOCK COMMAND...   runs a command that holds the lock to its end
"""

import fcntl
import os
import sys
from pathlib import Path


def wait_for_lock(path, *, what, shared=False):
    """Hold the lock file ``path`` until the returned file is closed or the process ends, however it ends.

    While another process holds it this waits, and says so on stderr: ``what`` is at work. Any number of
    processes hold it together if it is ``shared`` to each.
    """
    path, kind = Path(path), fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a")
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for {what} to end (it holds {path})", file=sys.stderr, flush=True)
        fcntl.flock(file, kind)
    return file


def run_locked(path, command):
    """Become ``command`` (a list), which holds the lock file ``path``, shared, to its end: does not return.

    So a notebook that goes on after its workflow was killed is waited for by the next, not raced.
    """
    lock = wait_for_lock(path, what="a workflow", shared=True)
    os.set_inheritable(lock.fileno(), True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    run_locked(sys.argv[1], sys.argv[2:])

"""Install requirements.lock, then this project, into the environment whose Python runs this.

uv does it in a fraction of pip's time. Where uv cannot be had, or fails, pip takes the same list and hashes.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent
PIP = [sys.executable, "-m", "pip"]
LOCKED = ["--quiet", "--require-hashes", "--requirement"]
# uv reads no pip.conf and no PIP_ variable: where packages are found, under the names that uv knows.
UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}


def uv_settings(pip_config):
    """{environment variable: value} for uv of what ``pip config list`` printed, other settings left out."""
    found = {}
    for section in ("global", "install", ":env:"):  # with pip too, the later wins
        for line in pip_config.splitlines():
            key, _, value = line.partition("=")
            where, _, name = key.rpartition(".")
            if where == section and name in UV_NAMES:
                words = ast.literal_eval(value).split()  # a file may hold one a line
                found[UV_NAMES[name]] = ("," if name == "find-links" else " ").join(words)
    return found


def run(*command, **options):
    """True if the command succeeds."""
    return subprocess.run(command, cwd=ROOT, **options).returncode == 0


def install_by_uv():
    """True if uv was there, or could be had, and installed everything."""
    if not run(*PIP, "install", "--only-binary", ":all:", *LOCKED, "requirements-uv.lock"):
        return False
    config = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True).stdout
    own = {"UV_PYTHON_DOWNLOADS": "never"} | uv_settings(config)
    # As pip does: every index is asked, not the first that knows a name. The hashes say which file is meant.
    uv = [sys.executable, "-m", "uv", "pip", "install", "--index-strategy", "unsafe-best-match"]
    return run(*uv, "--python", sys.executable, *LOCKED, "requirements.lock", env=own | os.environ)


def main():
    if not install_by_uv():
        print("uv cannot be had here, or failed: pip installs the same list", file=sys.stderr, flush=True)
        if not run(*PIP, "install", *LOCKED, "requirements.lock"):
            return 1
    return not run(*PIP, "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", ".")


if __name__ == "__main__":
    sys.exit(main())

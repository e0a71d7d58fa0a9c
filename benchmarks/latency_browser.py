"""Models in a browser: onnxruntime-web (WebAssembly, one thread) in a headless Chromium, for `latency.py`.

A server on localhost hands out one page, the runtime and the models; the page runs the models in turns on one input and
posts back their outputs and times.
"""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_LONGEST = 300  # seconds that a page may take
_TYPES = {".html": "text/html", ".mjs": "text/javascript", ".wasm": "application/wasm"}

_PAGE = """<!doctype html><script type="module">
import * as ort from "/ort/ort.wasm.min.mjs";
const post = (body) => fetch("/result", {method: "POST", body: JSON.stringify(body)});
try {
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = "/ort/";
  const {name, shape, count, seconds} = await (await fetch("/task")).json();
  const data = new Float32Array(await (await fetch("/input")).arrayBuffer());
  const feeds = {[name]: new ort.Tensor("float32", data, shape)};
  const sessions = [], outputs = [], times = [];
  for (let k = 0; k < count; k++) {
    sessions.push(await ort.InferenceSession.create(`/model/${k}`, {executionProviders: ["wasm"]}));
    for (let run = 0; run < 3; run++) await sessions[k].run(feeds);
    const found = await sessions[k].run(feeds);
    outputs.push(Array.from(found[sessions[k].outputNames[0]].data));
    times.push([]);
  }
  const start = performance.now();
  for (let round = 0; round < 200 && (round < 10 || performance.now() - start < 1000 * seconds); round++) {
    for (let k = 0; k < count; k++) {
      const j = round % 2 ? count - 1 - k : k, before = performance.now();
      await sessions[j].run(feeds);
      times[j].push(performance.now() - before);
    }
  }
  await post({outputs, times, version: ort.env.versions.web, agent: navigator.userAgent});
} catch (error) { await post({error: String(error)}); }
</script>"""


def missing(modules: Path | None) -> str:
    """Why nothing can be run in a browser here; empty where it can."""
    if modules is None or not (modules / "onnxruntime-web/dist/ort.wasm.min.mjs").is_file():
        return "no onnxruntime-web: give --web the node_modules of a folder in which `npm install onnxruntime-web` ran"
    if not any(map(shutil.which, BROWSERS)):
        return f"no browser: none of {', '.join(BROWSERS)} is installed"
    return ""


def in_browser(models: Sequence[Path], name: str, x: np.ndarray, modules: Path, seconds: float = 10.0) -> list[dict]:
    """Per model its time in milliseconds, its output's largest relative difference to onnxruntime's, and versions.

    Args:
        models: files with one input and one output.
        name: of the input.
        x: the input.
        modules: folder that holds onnxruntime-web.
        seconds: to measure for.
    """
    task = {"name": name, "shape": x.shape, "count": len(models), "seconds": seconds}
    files = {"/": _PAGE.encode(), "/task": json.dumps(task).encode(), "/input": x.astype(np.float32).tobytes()}
    files |= {f"/model/{k}": path.read_bytes() for k, path in enumerate(models)}
    found = _visit(files, modules / "onnxruntime-web/dist")
    if "error" in found:
        raise SystemExit(f"in the browser: {found['error']}")
    rows = []
    for path, output, times in zip(models, found["outputs"], found["times"], strict=True):
        ours = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {name: x})[0].ravel()
        gap = float(np.abs(ours - np.array(output)).max() / np.abs(ours).max())
        # the lower quartile: other processes only ever add
        row = {"ms": float(np.percentile(times, 25)), "largest relative difference": gap}
        chrome = next((word for word in found["agent"].split() if "Chrome/" in word), "")
        rows.append(row | {"onnxruntime-web": found["version"], "browser": chrome})
    return rows


def _visit(files: Mapping[str, bytes], runtime: Path) -> dict[str, Any]:
    """What the page posts back."""
    posted: dict[str, Any] = {}
    done = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = files.get(self.path)
            if self.path.startswith("/ort/") and (runtime / Path(self.path).name).is_file():
                body = (runtime / Path(self.path).name).read_bytes()
            self.send_response(200 if body is not None else 404)
            default = "text/html" if self.path == "/" else "application/octet-stream"
            self.send_header("Content-Type", _TYPES.get(Path(self.path).suffix, default))
            self.send_header("Content-Length", str(len(body or b"")))
            # a page that is isolated from all others has a clock of 5 us instead of 100
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
            self.end_headers()
            self.wfile.write(body or b"")

        def do_POST(self) -> None:
            posted.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            done.set()

        def log_message(self, *_: Any) -> None:
            pass

    browser = next(path for path in map(shutil.which, BROWSERS) if path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, tempfile.TemporaryDirectory() as profile:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        address = f"http://127.0.0.1:{server.server_port}/"
        process = subprocess.Popen([browser, *flags, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        finished = done.wait(_LONGEST)
        process.terminate()
        process.wait()
        server.shutdown()
    return posted if finished else {"error": f"no answer within {_LONGEST} s"}

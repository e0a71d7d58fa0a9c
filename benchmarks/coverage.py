"""What share of exported architectures is pruned, exactly: one table from a folder of ONNX files.

    python benchmarks/coverage_export.py MODELS                  # in an environment with torch
    python benchmarks/coverage.py MODELS --judge check_surgery.py [--output benchmarks/coverage]
    python benchmarks/coverage.py MODELS --fit [--output benchmarks/coverage]
    python benchmarks/coverage.py MODELS --others PYTHON [--output benchmarks/coverage]

Every file is pruned by the public call to 1.5x (or as far as the model goes) at random channels and without
reconstruction, proven, and, with ``--judge``, compared by the outside script with the original in which the removed
channels are silenced, at every size it was probed at; functions and fused layers are taken apart for it before. A file
that onnxruntime does not run as it came is listed as refused. Seed 0, one thread, a process per file. ``--fit`` prunes
every file once more as a user would: channels chosen by activations, weights fitted again, on a few random samples;
that says what runs, and nothing of what is left of a trained network (`accuracy.py` does). ``--others`` names a Python
that has what `coverage_others` needs. The answers stand beside one another in one table.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from coverage_plain import plain, rounding
from coverage_table import LATE, OTHER_NAMES, SAMPLES, TARGET, markdown, verdict

OTHERS = Path(__file__).with_name("coverage_others.py")
ALLOWED = 1e-4  # by the outside judge, of a tensor's largest value
ONNXSIM = ("onnxsim", "onnxsim_simplified")


def prune_one(path: Path, judge: Path | None) -> dict[str, Any]:
    """Prune one file at random channels without reconstruction, by the public call, and have it judged."""
    import onnx

    import onnxprune
    from onnxprune.graph import Graph, read_model
    from onnxprune.probe import probe
    from onnxprune.runtime import Runtime

    try:
        Runtime("cpu", 1).suited(read_model(path))
    except onnxprune.InputError as error:  # the exporter's fault, or the runtime's
        return {"refused": str(error).replace("onnxruntime refuses the model: ", "")[:300]}
    start = time.perf_counter()
    try:
        done = onnxprune.prune(
            path, speedup=TARGET, select="random", reconstruct=False, best_effort=True, samples=2, threads=1, seed=0
        )
    except onnxprune.UnreachableTarget as error:  # nothing can go, and the error says what holds it
        seconds = round(time.perf_counter() - start, 2)
        reason = str(error).partition("most is held back by: ")[2].partition(" (see")[0]
        return {"prunable": 0.0, "speedup": 1.0, "proof": 0.0, "seconds": seconds, "frozen": [reason]}
    seconds = time.perf_counter() - start
    report = done.report
    inside = {name for group in report.groups for name in (*group.producers, *group.consumers)}
    held = [f for f in report.frozen if set(f.layers) - inside]
    result: dict[str, Any] = {
        "prunable": round(report.prunable_macs, 4),
        "removed": len(report.removed),
        "speedup": round(report.achieved.macs, 3),
        "proof": report.proof.max_relative_difference if report.proof else None,
        "groups_seconds": round(report.timings["groups"], 2),
        "seconds": round(seconds, 2),
        "frozen": [f"{f.reason} ({f.op} {f.node})"[:160] for f in sorted(held, key=lambda f: -f.macs)[:3]],
    }
    graph = Graph(read_model(path), path.parent)
    result["nodes"] = len(graph.nodes)
    with tempfile.TemporaryDirectory() as folder:
        done.save(f"{folder}/pruned.onnx")
        Runtime("cpu", 1).session(read_model(Path(f"{folder}/pruned.onnx")))
        if judge is None:
            return result
        whole = onnx.load(path)
        onnx.save(plain(whole), f"{folder}/plain.onnx")
        onnx.save(plain(onnx.load(f"{folder}/pruned.onnx")), f"{folder}/plain_pruned.onnx")
        (Path(folder) / "report.json").write_text(report.to_json())
        # where the proof found more than the judge lets pass, rounding moves a tensor (a saturated softmax) as far
        allowed = max(rounding(whole), 2 * proof if (proof := result["proof"] or 0.0) > ALLOWED else 0.0)
        if allowed:
            result["tolerance"] = allowed
        worst = 0
        for found in probe(graph, Runtime("cpu", 1)).probes:  # at both sizes, where they are dynamic
            given = [f"--shape={n}:{','.join(map(str, a.shape))}" for n, a in found.feeds.items() if a.ndim]
            files = [f"{folder}/{name}" for name in ("plain.onnx", "plain_pruned.onnx", "report.json")]
            given += [f"--tolerance={allowed}"] if allowed else []
            said = subprocess.run(
                [sys.executable, str(judge), *files, "--draws=1", *given], capture_output=True, text=True, check=False
            )
            worst = max(worst, said.returncode)
            result["judged"] = said.stdout.strip()[-200:]
    result["judge"] = {0: "same", 1: "differs", 2: "no answer"}.get(worst, str(worst))
    return result


def fit_one(path: Path) -> dict[str, Any]:
    """Prune one file as a user would, and say what processor time that took and how far the outputs went."""
    import onnxprune

    start = time.process_time()
    try:
        done = onnxprune.prune(path, speedup=TARGET, samples=SAMPLES, best_effort=True, threads=1, seed=0)
    except onnxprune.UnreachableTarget:
        return {"seconds": round(time.process_time() - start, 1)}
    timings = done.report.timings
    errors = done.report.fidelity.relative_error.values() if done.report.fidelity else ()
    return {
        "seconds": round(time.process_time() - start, 1),
        "longest": max(timings, key=lambda stage: timings[stage]),
        "speedup": round(done.report.achieved.macs, 3),
        "difference": round(max(errors, default=0.0), 4),
        "finite": all(map(math.isfinite, errors)),
    }


def _child(command: list[str], seconds: float) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"{LATE} {seconds:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:300]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=Path)
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--others", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--again", default="", help="verdicts to compute anew, of the rows that the output has")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--fit", action="store_true", help="prune every file as a user would, besides")
    parser.add_argument("--one", choices=["own", "fit"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(fit_one(options.models) if options.one == "fit" else prune_one(options.models, options.judge)))
        return
    target = options.output.with_suffix(".json") if options.output else None
    known: dict[str, Any] = {"rows": []}
    if target and target.exists():
        known = json.loads(target.read_text())
    rows = {row["file"]: row for row in known["rows"]}
    refused = {path.stem: path.read_text() for path in options.models.glob("*.failed")}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    for path in sorted(options.models.glob("*.onnx"), key=lambda path: path.stat().st_size):
        row = rows.get(path.stem, {})
        again = options.again.split(",")
        own = not row or verdict(row) in again
        fitted = (
            options.fit and "refused" not in row and ("fit" not in row or ("crash" in again and "error" in row["fit"]))
        )
        others = options.others and not set(row) & set(OTHER_NAMES)
        if not re.search(options.only, path.stem) or not (own or fitted or others):
            continue
        command = [sys.executable, __file__, str(path), "--one"]
        if own:
            judge = ["--judge", str(options.judge)] if options.judge else []
            answers = {key: value for key, value in row.items() if key in (*OTHER_NAMES, "fit")}
            row = {"file": path.stem} | _child([*command, "own", *judge], options.seconds) | answers
        if fitted:
            row["fit"] = _child([*command, "fit"], options.seconds)
        if others:
            found = _child([str(options.others), str(OTHERS), str(path)], options.seconds)
            row |= found if "error" not in found else dict.fromkeys(ONNXSIM, f"failed: {found['error']}")
        rows[path.stem] = row
        said = (
            row.get("refused")
            or row.get("error")
            or f"{row['prunable']:.2f} {row['speedup']:.2f}x {row['seconds']} s {row['frozen'][:1]}"
        )
        print(f"{path.stem}: {verdict(row)} {said} {row.get('fit', '')}", file=sys.stderr, flush=True)
        if target:
            known["rows"] = [rows[name] for name in sorted(rows)]
            target.write_text(json.dumps(known, indent=1))
            target.with_suffix(".md").write_text(markdown(known["rows"], machine, refused, known.get("note", "")))
    if not target:
        print(markdown([rows[name] for name in sorted(rows)], machine, refused))


if __name__ == "__main__":
    main()

"""What share of exported architectures is pruned, exactly: one table from a folder of ONNX files.

    python benchmarks/coverage_export.py MODELS                  # in an environment with torch
    python benchmarks/coverage.py MODELS --judge check_surgery.py [--others PYTHON] [--output benchmarks/coverage]

Every file is pruned by the public call to 1.5x (or as far as the model goes) at random channels and without
reconstruction, proven, and, with ``--judge``, compared by the outside script with the original in which the removed
channels are silenced, at every size it was probed at. Seed 0, one thread, a process per file. ``--others`` names a
Python that has what `coverage_others` needs, and its answers stand beside.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TARGET = 1.5
OTHERS = Path(__file__).with_name("coverage_others.py")
ONNXSIM = ("onnxsim", "onnxsim_simplified")
OTHER_NAMES = {
    "onnxsim": "onnxsim's `apply_structured_pruning` of the files",
    "onnxsim_simplified": "the same after `simplify`",
    "torch_pruning": "Torch-Pruning's documented call on the architectures (it runs; not checked further)",
}


def prune_one(path: Path, judge: Path | None) -> dict[str, Any]:
    """Prune one file at random channels without reconstruction, by the public call, and have it judged."""
    import onnxruntime as ort

    import onnxprune
    from onnxprune.graph import Graph, read_model
    from onnxprune.probe import probe
    from onnxprune.runtime import Runtime

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
    ort.InferenceSession(done.model.SerializeToString(), providers=["CPUExecutionProvider"])
    if judge is None:
        return result
    graph = Graph(read_model(path), path.parent)
    result["nodes"] = len(graph.nodes)
    with tempfile.TemporaryDirectory() as folder:
        done.save(f"{folder}/pruned.onnx")
        (Path(folder) / "report.json").write_text(report.to_json())
        worst = 0
        for found in probe(graph, Runtime("cpu", 1)).probes:  # at both sizes, where they are dynamic
            given = [f"--shape={n}:{','.join(map(str, a.shape))}" for n, a in found.feeds.items() if a.ndim]
            files = [str(path), f"{folder}/pruned.onnx", f"{folder}/report.json"]
            said = subprocess.run(
                [sys.executable, str(judge), *files, "--draws=1", *given], capture_output=True, text=True, check=False
            )
            worst = max(worst, said.returncode)
            result["judged"] = said.stdout.strip()[-200:]
    result["judge"] = {0: "same", 1: "differs", 2: "no answer"}.get(worst, str(worst))
    return result


def _child(command: list[str], seconds: float) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {seconds:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1][:300]}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def verdict(row: dict[str, Any]) -> str:
    """In a word: pruned, unchanged, wrong or crashed."""
    if "error" in row:
        return "wrong" if "the proof failed" in row["error"] else "crash"
    if row.get("judge") == "differs":
        return "wrong"
    # the multiply-accumulates of a detector go by how much it finds, so that their ratio alone says little
    return "pruned" if row["speedup"] > 1.001 or row.get("removed") else "unchanged"


def _held_by(reasons: list[str]) -> str:
    """The reason that tells most: a place without channels (tokens, rows of an image) holds nothing by itself."""
    telling = [reason for reason in reasons if "gives no rule for this axis" not in reason]
    return next(iter(telling or reasons), "")


def markdown(rows: list[dict[str, Any]], machine: str, refused: dict[str, str]) -> str:
    """The table, with its summary first; ``refused`` says what an exporter could not write, and why."""
    verdicts = [verdict(row) for row in rows]
    count = {v: verdicts.count(v) for v in ("pruned", "unchanged", "wrong", "crash")}
    prunable = [row["prunable"] for row in rows if "prunable" in row]
    most = sum(p >= 0.9 for p in prunable)
    lines = [
        "# Coverage",
        "",
        f"{len(rows)} files, {datetime.date.today()}, {machine}. Made by `benchmarks/coverage.py`; random weights,"
        " seed 0, one thread; seconds are those of a busy machine.",
        "",
        f"Pruned exactly {count['pruned']}, unchanged {count['unchanged']}, wrong {count['wrong']}, crashed"
        f" {count['crash']}. Share of multiply-accumulates in prunable layers at least 0.9 in {most} of"
        f" {len(prunable)} files; {TARGET}x reached in {sum(row.get('speedup', 0) >= TARGET for row in rows)}.",
        "",
    ]
    others = [key for key in OTHER_NAMES if any(key in row for row in rows)]
    for key in others:
        said = [str(row[key]).split(":")[0] for row in rows if key in row]
        words = [f"{w} {said.count(w)}" for w in ("pruned", "approximate", "unchanged", "failed") if w in said]
        lines += [f"Beside it, {OTHER_NAMES[key]}: {', '.join(words)}, of {len(said)}.", ""]
    head = [
        "model",
        "exporter",
        "batch",
        "nodes",
        "prunable",
        "speed-up",
        "difference",
        "seconds",
        *others,
        "held back by",
    ]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        parts = row["file"].split("__")
        name, exporter, batch = ("/".join(parts[:-2]), *parts[-2:]) if len(parts) > 2 else (row["file"], "", "")
        if "error" in row:
            cells = [name, exporter, batch, "", "", "", "", "", *(str(row.get(k, "")).split(":")[0] for k in others)]
            cells.append(f"**{verdict(row)}**: {row['error'][:120]}")
        else:
            why = _held_by(row["frozen"]) if row["prunable"] < 0.9 else ""
            if verdict(row) == "wrong":
                why = f"**wrong**: {row['judged']}"
            cells = [name, exporter, batch, row.get("nodes", ""), f"{row['prunable']:.2f}", f"{row['speedup']:.2f}"]
            cells += [f"{row['proof']:.0e}", f"{row['seconds']:.1f}"]
            cells += [*(str(row.get(k, "")).split(":")[0] for k in others), why]
        lines.append(f"| {' | '.join(str(c).replace('|', '/') for c in cells)} |")
    if refused:
        lines += ["", f"Not exported ({len(refused)}; not counted above):", ""]
        lines += [
            f"- {name.replace('__', '/')}: {' '.join(why.split())[:140]}" for name, why in sorted(refused.items())
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=Path)
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--others", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--again", default="", help="verdicts to compute anew, of the rows that the output has")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--one", choices=["own"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(prune_one(options.models, options.judge)))
        return
    target = options.output.with_suffix(".json") if options.output else None
    known = {}
    if target and target.exists():
        known = {row["file"]: row for row in json.loads(target.read_text())["rows"]}
    refused = {path.stem: path.read_text() for path in options.models.glob("*.failed")}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    paths = sorted(options.models.glob("*.onnx"))
    rows = {path.stem: known[path.stem] for path in paths if path.stem in known}
    for path in paths:
        row = rows.get(path.stem, {})
        own = not row or verdict(row) in options.again.split(",")
        others = options.others and not set(row) & set(OTHER_NAMES)
        if not re.search(options.only, path.stem) or not (own or others):
            continue
        if own:
            judge = ["--judge", str(options.judge)] if options.judge else []
            answers = {key: value for key, value in row.items() if key in OTHER_NAMES}
            command = [sys.executable, __file__, str(path), "--one", "own", *judge]
            row = {"file": path.stem} | _child(command, options.seconds) | answers
        if others:
            found = _child([str(options.others), str(OTHERS), str(path)], options.seconds)
            row |= found if "error" not in found else dict.fromkeys(ONNXSIM, f"failed: {found['error']}")
        rows[path.stem] = row
        said = row.get("error") or f"{row['prunable']:.2f} {row['speedup']:.2f}x {row['seconds']} s {row['frozen'][:1]}"
        print(f"{path.stem}: {verdict(row)} {said}", file=sys.stderr, flush=True)
        if target:
            done = [rows[name] for name in sorted(rows)]
            target.write_text(json.dumps({"rows": done}, indent=1))
            target.with_suffix(".md").write_text(markdown(done, machine, refused))
    if not target:
        print(markdown([rows[name] for name in sorted(rows)], machine, refused))


if __name__ == "__main__":
    main()

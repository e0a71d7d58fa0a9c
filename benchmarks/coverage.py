"""What share of exported architectures is pruned, exactly: one table from a folder of ONNX files.

    python benchmarks/coverage_export.py MODELS                  # in an environment with torch
    python benchmarks/coverage.py MODELS --judge check_surgery.py [--others PYTHON] [--output benchmarks/coverage]

Every file is analysed, cut at a random plan that reaches 1.5x (or as far as the model goes), rewritten without
reconstruction, proven, and, with ``--judge``, compared by the outside script with the original in which the removed
channels are silenced. Seed 0, one thread, a process per file. ``--others`` names a Python that has onnxsim (and torch
and Torch-Pruning, for the architectures of `coverage_export`), run on the same models.
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


def prune_one(path: Path, judge: Path | None) -> dict[str, Any]:
    """Analyse, plan, rewrite, prove and judge one file."""
    import numpy as np
    import onnx
    import onnxruntime as ort

    from onnxprune.analysis import analyse
    from onnxprune.costs import CostModel
    from onnxprune.graph import Graph, read_model
    from onnxprune.groups import Seed
    from onnxprune.normalise import normalise
    from onnxprune.plan import Plan, removed_positions
    from onnxprune.probe import probe
    from onnxprune.rewrite import CannotRepair, rewrite
    from onnxprune.runtime import Runtime
    from onnxprune.verify import prove

    runtime = Runtime("cpu", 1)
    start = time.perf_counter()
    model = read_model(path)
    plain, copies = normalise(Graph(model, path.parent), runtime)
    graph = Graph(plain, path.parent)
    shapes = probe(graph, runtime)
    probed = time.perf_counter()
    seeds: tuple[Seed, ...] = ()
    while True:  # a size that cannot be repaired freezes its axes
        analysis = analyse(graph, shapes, extra_seeds=seeds)
        half = {g.name: tuple(range(max(g.units // 2, 1))) for g in analysis.groups}
        try:
            rewrite(analysis, Plan("", half))
            break
        except CannotRepair as error:
            seeds += tuple(Seed(str(error), "", "", error.tensor, axis) for axis in error.axes)
    result: dict[str, Any] = {
        "nodes": len(graph.nodes),
        "groups": len(analysis.groups),
        "prunable": round(analysis.prunable_macs, 4),
        "repaired": not seeds,
        "probe_seconds": round(probed - start, 2),
        "analysis_seconds": round(time.perf_counter() - probed, 2),
        "frozen": [f"{f.reason} ({f.op} {f.node})"[:160] for f in sorted(analysis.frozen, key=lambda f: -f.macs)[:3]],
    }
    units = np.array([g.units for g in analysis.groups])
    cost = CostModel(analysis)

    def counts(share: float) -> np.ndarray:
        return np.maximum(1, np.round(units * share)).astype(int)

    best, shares = 1.0, np.linspace(0.95, 0.0, 96)
    share = 0.0
    for share in shares:
        best = analysis.macs / cost.total(counts(share)) if len(units) else 1.0
        if best >= TARGET:
            break
    rng = np.random.default_rng(0)
    kept = {
        g.name: tuple(sorted(rng.choice(g.units, n, replace=False).tolist()))
        for g, n in zip(analysis.groups, counts(float(share)) if len(units) else [], strict=True)
    }
    plan = Plan("", kept)
    new = rewrite(analysis, plan, copies=copies)
    proof = prove(analysis, plan, new, [p.feeds for p in shapes.probes], runtime)
    result |= {"speedup": round(float(best), 3), "proof": proof.max_relative_difference}
    ort.InferenceSession(new.SerializeToString(), providers=["CPUExecutionProvider"])
    known = set(Graph(model).stored_names()) | Graph(model).computed_from_constants
    removed: dict[str, dict[str, list[int]]] = {}
    for (tensor, axis), gone in removed_positions(analysis, plan).items():
        if tensor in known and graph.is_stored(tensor):
            removed.setdefault(copies.get(tensor, tensor), {})[str(axis)] = gone.tolist()
    if judge:
        with tempfile.TemporaryDirectory() as folder:
            onnx.save(new, Path(folder) / "pruned.onnx")
            (Path(folder) / "report.json").write_text(json.dumps({"removed": removed}))
            worst = 0
            for found in shapes.probes:
                given = [f"--shape={n}:{','.join(map(str, a.shape))}" for n, a in found.feeds.items() if a.ndim]
                files = [str(path), f"{folder}/pruned.onnx", f"{folder}/report.json"]
                done = subprocess.run(
                    [sys.executable, str(judge), *files, *given], capture_output=True, text=True, check=False
                )
                worst = max(worst, done.returncode)
                result["judged"] = (done.stdout + done.stderr).strip()[-200:]
        result["judge"] = {0: "same", 1: "differs", 2: "no answer"}.get(worst, str(worst))
    result["seconds"] = round(time.perf_counter() - start, 2)
    return result


def prune_by_others(path: Path) -> dict[str, Any]:
    """What onnxsim makes of the same file at the same share of channels, and Torch-Pruning of its architecture."""
    import numpy as np
    import onnx
    import onnxruntime as ort
    import onnxsim

    result: dict[str, Any] = {}
    model = onnx.load(path)
    size = sum(int(np.prod(t.dims)) for t in model.graph.initializer)
    try:
        made = onnxsim.apply_structured_pruning(model, 0.25)
        made = made[0] if isinstance(made, tuple) else made
        now = sum(int(np.prod(t.dims)) for t in made.graph.initializer)
        session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
        rng = np.random.default_rng(0)
        feeds = {
            i.name: rng.standard_normal([d if isinstance(d, int) else 2 for d in i.shape]).astype(np.float32)
            if "float" in i.type
            else np.ones([d if isinstance(d, int) else 2 for d in i.shape], np.int64)
            for i in session.get_inputs()
        }
        session.run(None, feeds)
        result["onnxsim"] = "pruned" if now < 0.999 * size else "unchanged"
    except Exception as error:
        result["onnxsim"] = f"failed: {str(error).splitlines()[0][:100] if str(error) else type(error).__name__}"
    try:
        import torch
        import torch_pruning as tp
        from coverage_export import MODELS

        torch.manual_seed(0)
        torch.set_num_threads(1)
        family = "__".join(path.stem.split("__")[:-2]).replace("__", "/", 1)
        network, inputs = MODELS[family]()
        network.eval()
        before = sum(p.numel() for p in network.parameters())
        last = [m for m in network.modules() if isinstance(m, torch.nn.Linear)][-1:]
        example = inputs if len(inputs) > 1 else inputs[0]
        tp.pruner.MagnitudePruner(
            network, example, tp.importance.MagnitudeImportance(), pruning_ratio=0.25, ignored_layers=last
        ).step()
        with torch.no_grad():
            network(*inputs)
        after = sum(p.numel() for p in network.parameters())
        result["torch_pruning"] = "pruned" if after < 0.999 * before else "unchanged"
    except Exception as error:
        result["torch_pruning"] = f"failed: {str(error).splitlines()[0][:100] if str(error) else type(error).__name__}"
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
    return "pruned" if row["speedup"] > 1.001 else "unchanged"


def markdown(rows: list[dict[str, Any]], machine: str) -> str:
    """The table, with its summary first."""
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
    others = [key for key in ("onnxsim", "torch_pruning") if any(key in row for row in rows)]
    for key in others:
        said = [str(row.get(key, "failed")).split(":")[0] for row in rows]
        lines += [
            f"{key}: " + ", ".join(f"{w} {said.count(w)}" for w in ("pruned", "unchanged", "failed")) + ".",
            "",
        ]
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
        name, exporter, batch = "/".join(parts[:-2]), *parts[-2:]
        if "error" in row:
            cells = [name, exporter, batch, "", "", "", "", "", *(str(row.get(k, "")).split(":")[0] for k in others)]
            cells.append(f"**{verdict(row)}**: {row['error'][:120]}")
        else:
            why = row["frozen"][0] if row["frozen"] and row["prunable"] < 0.9 else ""
            if verdict(row) == "wrong":
                why = f"**wrong**: {row['judged']}"
            cells = [name, exporter, batch, row["nodes"], f"{row['prunable']:.2f}", f"{row['speedup']:.2f}"]
            cells += [f"{row['proof']:.0e}", f"{row['seconds']:.1f}"]
            cells += [*(str(row.get(k, "")).split(":")[0] for k in others), why]
        lines.append(f"| {' | '.join(str(c).replace('|', '/') for c in cells)} |")
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
    parser.add_argument("--one", choices=["own", "others"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        found = prune_one(options.models, options.judge) if options.one == "own" else prune_by_others(options.models)
        print(json.dumps(found))
        return
    target = options.output.with_suffix(".json") if options.output else None
    known = {}
    if target and target.exists():
        known = {row["file"]: row for row in json.loads(target.read_text())["rows"]}
    rows = []
    for path in sorted(options.models.glob("*.onnx")):
        row = known.get(path.stem)
        if not re.search(options.only, path.stem) or (row and verdict(row) not in options.again.split(",")):
            rows += [row] if row else []
            continue
        judge = ["--judge", str(options.judge)] if options.judge else []
        row = {"file": path.stem}
        row |= _child([sys.executable, __file__, str(path), "--one", "own", *judge], options.seconds)
        if options.others:
            found = _child([str(options.others), __file__, str(path), "--one", "others"], options.seconds)
            found["onnxsim"] = found.get("onnxsim", f"failed: {found.pop('error', '')}")
            row |= found
        rows.append(row)
        said = (
            row.get("error")
            or f"{row['prunable']:.2f} {row['speedup']:.2f}x {row['analysis_seconds']} s {row['frozen'][:1]}"
        )
        print(f"{path.stem}: {verdict(row)} {said}", file=sys.stderr, flush=True)
        if target:
            machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
            target.write_text(json.dumps({"rows": rows}, indent=1))
            target.with_suffix(".md").write_text(markdown(rows, machine))
    if not target:
        print(markdown(rows, platform.machine()))


if __name__ == "__main__":
    main()

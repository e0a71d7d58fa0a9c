"""Published models from other exporters: analysed, pruned at a random plan, proven, and judged by an outside check."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from builder import RUNTIME, analysed, random_plan

from onnxprune.graph import read_model
from onnxprune.plan import removed_positions
from onnxprune.rewrite import rewrite
from onnxprune.verify import prove

SHARED = Path(__file__).parents[2] / "shared"
MODELS = sorted((SHARED / "models" / "wild").glob("*.onnx"))
JUDGE = SHARED / "tools" / "check_surgery.py"


@pytest.mark.skipif(not MODELS, reason=f"no models beside the checkout ({SHARED.name}/models/wild)")
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_published_model_is_pruned_exactly(path: Path, tmp_path: Path) -> None:
    model = read_model(path)
    analysis, copies = analysed(model)
    plan = random_plan(analysis)
    new = rewrite(analysis, plan, copies=copies)
    prove(analysis, plan, new, [p.feeds for p in analysis.shapes.probes], RUNTIME)

    removed: dict[str, dict[str, list[int]]] = {}
    for (tensor, axis), gone in removed_positions(analysis, plan).items():
        if analysis.graph.is_stored(tensor):
            removed.setdefault(copies.get(tensor, tensor), {})[str(axis)] = gone.tolist()
    assert bool(removed) == bool(analysis.groups)
    onnx.save(new, tmp_path / "pruned.onnx")
    (tmp_path / "report.json").write_text(json.dumps({"removed": removed}))
    if not JUDGE.exists():
        return
    files = [str(path), str(tmp_path / "pruned.onnx"), str(tmp_path / "report.json")]
    for probe in analysis.shapes.probes:
        shapes = [
            f"--shape={name}:{','.join(map(str, array.shape))}" for name, array in probe.feeds.items() if array.ndim
        ]
        done = subprocess.run(
            [sys.executable, str(JUDGE), *files, *shapes], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

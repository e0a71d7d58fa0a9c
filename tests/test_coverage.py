"""The coverage benchmark, on a few small graphs: every one is pruned, proven, judged, and told in one row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from test_rewrite import GRAPHS

ROOT = Path(__file__).parents[1]
JUDGE = ROOT.parent / "shared" / "tools" / "check_surgery.py"
SOME = ("residual", "unet", "response_normalisation", "heads_beside_the_batch")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of some graphs, without its suffix."""
    folder = tmp_path_factory.mktemp("models")
    for name in SOME:
        onnx.save(GRAPHS[name](), folder / f"own__{name}__builder__any.onnx")
    (folder / "own__odd__builder__any.failed").write_text("no such operator")
    judge = ["--judge", str(JUDGE)] if JUDGE.exists() else []
    output = folder / "table"
    command = [sys.executable, ROOT / "benchmarks" / "coverage.py", folder, "--output", output, "--fit", *judge]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return output


def test_every_graph_is_pruned(table: Path) -> None:
    rows = json.loads(table.with_suffix(".json").read_text())["rows"]
    assert [row["file"].split("__")[1] for row in rows] == sorted(SOME)
    for row in rows:
        assert row["speedup"] >= 1.5, row
        assert row["prunable"] == 1, row
        assert row["proof"] < 1e-5, row
        assert row.get("judge", "same") == "same", row
        assert row["fit"]["finite"], row
        assert row["fit"]["speedup"] >= 1.5, row


def test_the_table_says_so(table: Path) -> None:
    text = table.with_suffix(".md").read_text()
    assert f"Pruned exactly {len(SOME)}, unchanged 0, wrong 0, crashed 0" in text
    assert all(f"| own/{name} | builder | any |" in text for name in SOME)
    assert f"{len(SOME)} files, of which 0 failed, 0 took longer than they were given, and 0 give outputs" in text
    assert "- own/odd/builder/any: no such operator" in text

"""The benchmark of calibration runs, on a small network and few images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "calibration.py"


@pytest.mark.parametrize("part", ["stages", "datafree"])
def test_a_slice_of_the_benchmark(part: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--part", part, "--images", "20", "--repeats", "1", "--threads", "1"]
    command += ["--shared", str(tmp_path), "--output", str(tmp_path / "found")]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads((tmp_path / "found.json").read_text())[part]["rows"]
    first = rows[0]
    assert first["network"] == "digits_cnn" and "note" not in first
    assert "prove" in first["stages"]  # the proof is part of what is measured
    if part == "stages":
        assert first["ratio"] == pytest.approx(first["all of it, s"] / first["plain pass, s"])
    text = (tmp_path / "found.md").read_text()
    assert f"## {part}" in text and "digits_cnn" in text

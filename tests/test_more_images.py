"""The benchmark of errors against the number of samples runs, on the networks of the repository and few samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "more_images.py"


def test_a_slice_of_the_benchmark(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--counts", "10,40", "--draws", "2", "--threads", "1"]
    subprocess.run([*command, "--shared", str(tmp_path), "--output", str(tmp_path / "found")], check=True)
    rows = json.loads((tmp_path / "found.json").read_text())
    assert set(rows) == {"digits_cnn", "digits_resnet"}
    for few, more in rows.values():
        assert (few["samples"], more["samples"]) == (10, 40)
        for draw in range(2):
            assert few["fitted"][draw] < few["silenced"][draw]
            assert more["fitted"][draw] < min(few["fitted"][draw], more["silenced"][draw])
    assert "Of 8 networks 0 are worse" in (tmp_path / "found.md").read_text()

"""The page of operators says what the table says."""

from __future__ import annotations

from pathlib import Path

from onnxprune.rules.document import page


def test_the_page_of_operators_is_current() -> None:
    written = (Path(__file__).parents[1] / "docs" / "operators.md").read_text()
    assert written == page(), "run: python -m onnxprune.rules.document > docs/operators.md"

"""The report as Markdown, for an issue or a README."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from onnxprune.report import Report
from onnxprune.report.text import clean, cost_rows, error, fidelity_lines
from onnxprune.targets import UNITS


def render(report: Report) -> str:
    """Costs, fidelity and groups as Markdown."""
    by, asked = report.target.by, f"(asked for: {report.target.speedup:g}x)"
    what = "fewer MACs" if by == "macs" else f"less in {UNITS[by]}"
    parts = [
        f"## Pruned to {report.achieved.of_unit(by) or math.nan:.2f}x {what} {asked}",
        _table(("", "before", "after", "ratio"), cost_rows(report)),
        "MACs are counted; latency is measured on one machine.",
    ]
    if report.fidelity:
        parts.append("\n".join(f"- {_escape(line)}" for line in fidelity_lines(report.fidelity)))
    if report.groups:
        rows = [(clean(g.name), f"{g.kept}/{g.units}", error(g.error)) for g in report.groups]
        parts.append(_table(("group", "kept/total", "error"), rows))
    if report.warnings:
        parts.append("\n".join(f"- warning: {_escape(clean(text))}" for text in report.warnings))
    return "\n\n".join(parts) + "\n"


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
    for mark in "\\|*_`<[":
        text = text.replace(mark, f"\\{mark}")
    return text

"""The reports as Markdown, for an issue or a README."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from onnxprune.report import FrozenEntry, Report
from onnxprune.report.overview import Overview
from onnxprune.report.text import (
    approximate_line,
    clean,
    cost_rows,
    data_lines,
    error,
    fidelity_lines,
    percent,
    place,
    quantity,
    some,
)
from onnxprune.targets import UNITS, rounded_down


def render(report: Report) -> str:
    """Costs, fidelity and groups as Markdown."""
    by, asked = report.target.by, f"(asked for: {report.target.speedup:g}x)"
    what = "fewer MACs" if by == "macs" else f"less in {UNITS[by]}"
    parts = [
        f"## Pruned to {report.achieved.of_unit(by) or math.nan:.2f}x {what} {asked}",
        _table(("", "before", "after", "ratio"), cost_rows(report)),
        "MACs are counted; latency is measured on one machine.",
    ]
    if report.approximate:
        parts.append(_escape(approximate_line(report.approximate)))
    lines = [*data_lines(report), *(fidelity_lines(report.fidelity) if report.fidelity else ())]
    if lines:
        parts.append("\n".join(f"- {_escape(line)}" for line in lines))
    if report.groups:
        rows = [(clean(g.name), f"{g.kept}/{g.units}", error(g.error)) for g in report.groups]
        parts.append(_table(("group", "kept/total", "error"), rows))
    parts += _frozen(report.frozen, report.before.macs)
    if report.warnings:
        parts.append("\n".join(f"- warning: {_escape(clean(text))}" for text in report.warnings))
    return "\n\n".join(parts) + "\n"


def render_overview(found: Overview) -> str:
    """What may be pruned, what not, why, and what would free it, as Markdown."""
    able = f"{percent(found.prunable_macs)} in layers that may shrink"
    parts = [
        f"## {quantity(found.macs)} MACs, of which {able}",
        f"Largest reachable speed-up, in MACs: {rounded_down(found.reachable)}x."
        if found.groups
        else "Nothing to prune.",
    ]
    if found.groups:
        rows = [
            (clean(g.name), str(g.units), percent(g.macs), some(g.producers), some(g.consumers)) for g in found.groups
        ]
        parts.append(_table(("group", "channels", "MACs share", "made by", "read by"), rows))
    return "\n\n".join([*parts, *_frozen(found.frozen, found.macs)]) + "\n"


def _frozen(entries: Sequence[FrozenEntry], macs: int) -> list[str]:
    """A table of what stays; nothing where nothing does."""
    heading = ("frozen because", "channels", "MACs share", "where", "rule", "holds back", "freed by")
    rows = [
        (
            clean(e.reason),
            str(e.channels),
            percent(e.macs / macs) if macs else "",
            place(e),
            clean(e.rule),
            some(e.layers),
            clean(e.remedy),
        )
        for e in entries
    ]
    return [_table(heading, rows)] if rows else []


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escape(text: str) -> str:
    for mark in "\\|*_`<[":
        text = text.replace(mark, f"\\{mark}")
    return text

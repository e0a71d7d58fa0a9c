"""Tables for a terminal or a pipe, and the progress bars."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from onnxprune.comparison import Comparison, Fidelity
from onnxprune.cost import Latency
from onnxprune.progress import Progress
from onnxprune.report import FrozenEntry, GroupEntry, Measures, Report
from onnxprune.report.overview import Overview
from onnxprune.targets import rounded_down

_PIPE_WIDTH = 120  # columns, where there is no terminal to ask
_MOST_ROWS = 40
_DIFFERENT = "MACs are counted and latency is measured on this machine: two different things, and two different ratios."


def console(stream: TextIO) -> Console:
    """A console for a stream; names in tables are shown as they are, never taken for markup."""
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


# ---------------------------------------------------------------------------------------- formatting


def clean(text: str) -> str:
    """A text in one line and without control characters: a name in a model must not steer the terminal."""
    return "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))


def quantity(number: float) -> str:
    """A count with three digits or so and a prefix: 125 M.

    >>> quantity(125_485_706), quantity(64), quantity(1_500)
    ('125.5 M', '64', '1.5 k')
    """
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f} {prefix}"
    return f"{number:.0f}"


def percent(share: float, digits: int = 1) -> str:
    """A share in percent."""
    return f"{100 * share:.{digits}f} %"


def latency(found: Latency | None) -> str:
    """Median with the 10th and 90th percentile."""
    if found is None:
        return "not measured"
    return f"{found.median:.3g} ms ({found.p10:.3g} to {found.p90:.3g})"


def error(value: float | None) -> str:
    """A relative error."""
    return "" if value is None else f"{value:.2g}"


def fidelity_lines(found: Fidelity) -> list[str]:
    """How alike two models are, in words."""
    on = f"{found.samples} {'random inputs' if found.is_random else 'samples'}"
    lines = []
    if found.agreement is not None and found.agreement_low is not None and found.agreement_high is not None:
        interval = f"{percent(found.agreement_low)} to {percent(found.agreement_high)}"
        lines.append(f"same top-1 class on {on}: {percent(found.agreement)} (95 % interval {interval})")
    errors = ", ".join(f"{clean(name)} {value:.3g}" for name, value in found.relative_error.items())
    if errors:
        lines.append(f"relative output error on {on}: {errors}")
    if equal := ", ".join(f"{clean(name)} {percent(share)}" for name, share in found.equal.items()):
        lines.append(f"same output on {on}: {equal}")
    if found.is_random:
        lines.append("random inputs say nothing about real data: give some with --data")
    return lines


def latency_lines(report: Report) -> list[str]:
    """The promise about time, in words; none where nothing was promised."""
    found = report.latency
    if found is None:
        return []
    seen, threads = found.measured, f"{found.threads} thread{'s' if found.threads > 1 else ''}"
    sizes = ", ".join(f"{clean(name)} {'x'.join(map(str, shape))}" for name, shape in found.shapes.items())
    most = max(found.stays, key=lambda name: found.stays[name], default="")
    return [
        f"asked for {report.target.speedup:g}x the speed, measured {seen.ratio:.2f}x (95 % interval {seen.low:.2f} to"
        f" {seen.high:.2f}) on {found.provider}, {threads}, {sizes}; in MACs {report.achieved.macs:.2f}x;"
        f" {len(found.rounds)} measurements of cut networks before",
        f"{percent(found.fixed)} of the time stays however narrow the layers, most of it at {clean(most)};"
        f" largest measured {found.reachable:.2f}x; table of {found.models_measured + found.models_remembered} times,"
        f" {found.models_remembered} from the cache",
    ]


def slower_line(report: Report) -> str:
    """That a cut model is not faster, and what to do then; empty where it is, nobody knows, or time was the aim."""
    before, after = report.before.latency_ms, report.after.latency_ms
    if before is None or after is None or after.median < before.median or report.latency is not None:
        return ""
    return (
        "on this machine the cut model is not faster: --by latency spends the budget on time instead, and --target or"
        " --round-to keeps widths that suit where it will run"
    )


def data_lines(report: Report) -> list[str]:
    """What else the data were made into, in words."""
    if report.data is None or not report.data.mirrored:
        return []
    return ["mirror images of the samples were looked at as well: the model answers both alike (--no-mirror: without)"]


def approximate_line(nodes: Sequence[str]) -> str:
    """That, and where, the cut changes what the model computes."""
    return (
        f"approximate: {len(nodes)} node{'s' if len(nodes) > 1 else ''} now take their statistics of fewer channels:"
        f" {some(nodes)}"
    )


def ratio(before: float, after: float) -> str:
    """How many times less."""
    return f"{before / after:.2f}x" if after else ""


def _cost_rows(a: Measures, b: Measures, faster: float | None = None) -> list[tuple[str, str, str, str]]:
    rows = [
        ("MACs", quantity(a.macs), quantity(b.macs), ratio(a.macs, b.macs)),
        ("parameters", quantity(a.params), quantity(b.params), ratio(a.params, b.params)),
        ("file size", f"{quantity(a.bytes)}B", f"{quantity(b.bytes)}B", ratio(a.bytes, b.bytes)),
    ]
    if a.memory is not None and b.memory is not None:
        rows.append(("peak memory", f"{quantity(a.memory)}B", f"{quantity(b.memory)}B", ratio(a.memory, b.memory)))
    if a.latency_ms and b.latency_ms:
        times = f"{faster:.2f}x" if faster else ratio(a.latency_ms.median, b.latency_ms.median)
        rows.append(("latency", latency(a.latency_ms), latency(b.latency_ms), times))
    return rows


def cost_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """Before, after and ratio of everything that a run makes smaller; that of the time as it was measured in turns."""
    return _cost_rows(report.before, report.after, report.achieved.latency)


def shown_groups(groups: Sequence[GroupEntry], most: int | None) -> tuple[list[GroupEntry], str]:
    """The groups to show, in the model's order, and a line for those left out, which have the smallest errors."""
    if most is None or len(groups) <= most:
        return list(groups), ""
    ranked = sorted(range(len(groups)), key=lambda k: -(groups[k].error or 0.0))
    chosen = set(ranked[:most])
    rest = [group for k, group in enumerate(groups) if k not in chosen]
    kept, units = sum(g.kept for g in rest), sum(g.units for g in rest)
    line = f"and {len(rest)} more groups with smaller errors, {kept}/{units} kept (all: --verbose or --report)"
    return [groups[k] for k in sorted(chosen)], line


# -------------------------------------------------------------------------------------------- tables


def show_report(report: Report, out: Console, *, verbose: bool = False) -> None:
    """The end of a run: groups, costs, fidelity."""
    groups, rest = shown_groups(report.groups, None if verbose else _MOST_ROWS)
    if groups:
        table = _table("group", ">kept/total", ">error")
        for group in groups:
            table.add_row(clean(group.name), f"{group.kept}/{group.units}", error(group.error))
        out.print(table)
    if rest:
        _line(out, rest)
    table = _table("", ">before", ">after", ">ratio")
    for row in cost_rows(report):
        table.add_row(*row)
    out.print(table)
    _line(out, _DIFFERENT)
    if slower := slower_line(report):
        _line(out, slower)
    if report.approximate:
        _line(out, approximate_line(report.approximate))
    for line in (*data_lines(report), *latency_lines(report)):
        _line(out, line)
    for line in fidelity_lines(report.fidelity) if report.fidelity else ():
        _line(out, line)
    if verbose:
        if report.proof is not None:
            gap = report.proof.max_relative_difference
            _line(out, f"proof: cut and silenced model differ by at most {gap:.1e} ({clean(report.proof.inputs)})")
        table = _table("stage", ">seconds")
        for name, seconds in report.timings.items():
            table.add_row(name, f"{seconds:.2f}")
        out.print(table)


def show_family(reports: Sequence[Report], out: Console, *, verbose: bool = False) -> None:
    """What every speed-up costs and keeps, beside the original."""
    for report in reports if verbose else ():
        _line(out, f"asked for {report.target.speedup:g}x in {report.target.by}:")
        show_report(report, out, verbose=True)
    by, before = reports[0].target.by, reports[0].before
    table = _table("asked", f">{by}", ">MACs", ">parameters", ">latency", ">ratio", ">alike")
    table.add_row("original", "", quantity(before.macs), quantity(before.params), latency(before.latency_ms), "", "")
    for report in reports:
        after, got = report.after, report.achieved
        table.add_row(
            f"{report.target.speedup:g}x",
            _times(got.of_unit(by)),
            quantity(after.macs),
            quantity(after.params),
            latency(after.latency_ms),
            _times(got.latency),
            alike(report.fidelity),
        )
    out.print(table)
    _line(out, "alike: samples with the same top-1 class as the original, else the relative error of the first output.")
    _line(out, _DIFFERENT)


def alike(found: Fidelity | None) -> str:
    """How alike two models are, in one word."""
    if found is None:
        return "not measured"
    if found.agreement is not None:
        return percent(found.agreement)
    words = [f"error {value:.2g}" for value in found.relative_error.values()]
    words += [f"{percent(share)} equal" for share in found.equal.values()]
    return next(iter(words), "")


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def show_overview(found: Overview, out: Console, *, verbose: bool = False) -> None:
    """What may be pruned, what not, and why."""
    if found.groups:
        table = _table("group", ">channels", ">MACs share", "made by", "read by")
        rows = found.groups if verbose else found.groups[:_MOST_ROWS]
        for group in rows:
            table.add_row(
                clean(group.name), str(group.units), percent(group.macs), some(group.producers), some(group.consumers)
            )
        out.print(table)
        if len(rows) < len(found.groups):
            _line(out, f"and {len(found.groups) - len(rows)} more groups (all: --verbose)")
    if found.frozen:
        table = _table("frozen because", "where", ">channels", ">MACs share", "holds back")
        stays = found.frozen if verbose else found.frozen[:_MOST_ROWS]
        for entry in stays:
            why, *rest = frozen_row(entry, found.macs)
            table.add_row(f"{why}\nrule: {clean(entry.rule)}" if verbose and entry.rule else why, *rest)
        out.print(table)
        if len(stays) < len(found.frozen):
            _line(out, f"and {len(found.frozen) - len(stays)} more places (all: --verbose)")
    _line(out, f"MACs: {quantity(found.macs)}, of which {percent(found.prunable_macs)} in layers that may shrink")
    if found.groups:
        _line(out, f"largest reachable speed-up, in MACs: {rounded_down(found.reachable)}x")
    else:
        _line(out, "nothing to prune")


def frozen_row(entry: FrozenEntry, macs: int) -> tuple[str, str, str, str, str]:
    """Why and what would free them, where, channels, share of the model's MACs, layers."""
    why = f"{clean(entry.reason)}\nfreed by: {clean(entry.remedy)}" if entry.remedy else clean(entry.reason)
    share = percent(entry.macs / macs) if macs else ""
    return why, place(entry), str(entry.channels), share, some(entry.layers)


def show_comparison(found: Comparison, out: Console) -> None:
    """Two models side by side."""
    names = [side.name for side in (found.a, found.b)]
    short = [Path(name).name for name in names]
    table = _table("", *(f">{clean(name)}" for name in (names if short[0] == short[1] else short)), ">ratio")
    first, second = (Measures(side.macs, side.params, side.bytes, side.latency_ms) for side in (found.a, found.b))
    for row in _cost_rows(first, second):
        table.add_row(*row)
    out.print(table)
    batch = f"{found.batch} sample{'s' if found.batch > 1 else ''}"
    _line(out, f"latency of {batch}, runs of both interleaved. {_DIFFERENT}")
    _line(out, f"data: {clean(found.data)}")
    for line in fidelity_lines(found.fidelity):
        _line(out, line)


def _line(out: Console, text: str) -> None:
    out.print(text, soft_wrap=True)  # never broken: a pipe may be searched


def _table(*columns: str) -> Table:
    """A table; a heading that begins with > is of a column of numbers."""
    table = Table()
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(Text(column.removeprefix(">")), justify=justify, overflow="fold")
    return table


def some(names: Sequence[str], most: int = 2) -> str:
    """The first names, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(clean(name) for name in names[:most]) + more


def place(entry: FrozenEntry) -> str:
    """Node and axis that hold channels back."""
    node = f"{entry.op} {clean(entry.node)}, " if entry.node else ""
    return f"{node}axis {entry.axis} of {clean(entry.tensor)}"


# ------------------------------------------------------------------------------------------ progress


class TerminalProgress(Progress):
    """One bar per stage."""

    def __init__(self, out: Console) -> None:
        """Draw on this console."""
        super().__init__()
        columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bars = Bars(*columns, console=out, transient=True)
        self.running: list[tuple[str, TaskID, int | None]] = []

    def __enter__(self) -> TerminalProgress:
        """Begin to draw."""
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bars away: the table says the rest."""
        self.bars.stop()

    def started(self, name: str, total: int | None) -> None:
        """A stage begins."""
        self.running.append((name, self.bars.add_task(name, total=total), total))

    def advance(self, steps: int = 1) -> None:
        """Some steps of the current stage are done."""
        if self.running:
            self.bars.advance(self.running[-1][1], steps)

    def finished(self, name: str) -> None:
        """A stage is over."""
        if self.running:
            _, task, total = self.running.pop()
            self.bars.update(task, total=total or 1, completed=total or 1)

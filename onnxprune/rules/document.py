"""The table of operators as a page: ``python -m onnxprune.rules.document > docs/operators.md``."""

from __future__ import annotations

import inspect

from onnxprune.axes import Refusal
from onnxprune.rules import TABLE
from onnxprune.rules.base import Row

_HEAD = """# Operators

Generated from the table of rules by `python -m onnxprune.rules.document`; not to be edited.

A relation says how the axes of an operator's inputs and outputs belong together. A letter is an axis, or a factor of
one; parentheses hold a product of factors, outermost first; `*` is the remaining axes, which no rule claims and which
therefore stay; `1` is an axis that is broadcast or stays; `!` marks values that are mixed together, so that a part
cannot be taken out exactly; `~` values that are summed over, of which a part can go where it is zero. Where the
relation depends on attributes and shapes it is told in words. An operator that is left alone freezes the channels that
reach it, and the report says so with the reason given here. Operators of other domains are kept untouched.

Where what is mixed or summed is a *statistic* (a mean, a variance), the axis may shrink with `--approximate`: the
operator then goes by the channels that are left, and a repair makes up for the others as if they were zero.
"""


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0].rstrip(".") if text else ""


def _relation(row: Row) -> str:
    if isinstance(row.describe, Refusal):
        return f"left alone: {row.describe.reason}"
    more = "; a statistic, see above" if row.approximable else ""
    if isinstance(row.describe, str):
        return f"`{row.describe}`{more}"
    said = _first_line(inspect.getdoc(row.describe))
    said = said or f"by shape and attributes ({row.describe.__name__.strip('_').replace('_', ' ')})"
    return f"{said}{more}"


def _repair(row: Row) -> str:
    if row.repair is None:
        return ""
    name = row.repair.__name__
    return _first_line(inspect.getdoc(row.repair)) or name.strip("_").removeprefix("mend_").replace("_", " ")


def page() -> str:
    """The page, in Markdown."""
    lines = [
        _HEAD,
        "| operator | domain | since | relation, or why it is left alone | repaired |",
        "|---|---|---|---|---|",
    ]
    for (domain, name), rows in sorted(TABLE.items(), key=lambda item: (item[0][0], item[0][1].lower())):
        for row in rows:
            since = str(row.since) if row.since > 1 else ""
            lines.append(f"| {name} | {domain} | {since} | {_relation(row)} | {_repair(row)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")

"""The table that `coverage.py` writes: its summary, and a line for every file."""

from __future__ import annotations

import datetime
from typing import Any

TARGET = 1.5
SAMPLES = 12  # that the fitted networks are fitted to, and judged by
LATE = "no answer in"  # so begins what is said of a process that was stopped
OTHER_NAMES = {
    "onnxsim": "onnxsim's `apply_structured_pruning` of the files",
    "onnxsim_simplified": "the same after `simplify`",
    "torch_pruning": "Torch-Pruning's documented call on the architectures (it runs; not checked further)",
}


def verdict(row: dict[str, Any]) -> str:
    """In a word: pruned, unchanged, wrong, crashed, or refused by the runtime as it came."""
    if "refused" in row:
        return "refused"
    if "error" in row:
        return "wrong" if "the proof failed" in row["error"] else "crash"
    if row.get("judge") == "differs":
        return "wrong"
    # the multiply-accumulates of a detector go by how much it finds, so that their ratio alone says little
    return "pruned" if row["speedup"] > 1.001 or row.get("removed") else "unchanged"


def _word(said: str) -> str:
    """Of what another pruner did: what it was stopped for is told apart from where it failed."""
    return "late" if LATE in said else said.split(":")[0]


def _fit_cells(row: dict[str, Any]) -> list[str]:
    """How far the outputs of the fitted network went, and its seconds; what went wrong, where something did."""
    found = row.get("fit", {})
    if "error" in found:
        return [f"**{found['error'][:80]}**", ""]
    if found and not found.get("finite", True):
        return ["**not finite**", f"{found['seconds']:.0f}"]
    return [f"{found['difference']:.3f}" if "difference" in found else "", f"{found['seconds']:.0f}" if found else ""]


def _fit_line(rows: list[dict[str, Any]]) -> str:
    """What came of the fitted networks, in a sentence."""
    found = [row["fit"] for row in rows if "fit" in row]
    late = sum(f.get("error", "").startswith(LATE) for f in found)
    failed = sum("error" in f for f in found) - late
    seconds = sorted(f["seconds"] for f in found if "seconds" in f)
    return (
        f"Fitted with the defaults to {SAMPLES} random samples: {len(found)} files, of which {failed} failed, {late}"
        f" took longer than they were given, and {sum(not f.get('finite', True) for f in found)} give outputs that are"
        f" not finite; {seconds[len(seconds) // 2]:.0f} s of processor time in the"
        f" median, {seconds[-1]:.0f} s at most."
    )


def _held_by(reasons: list[str]) -> str:
    """The reason that tells most: a place without channels (tokens, rows of an image) holds nothing by itself."""
    telling = [reason for reason in reasons if "gives no rule for this axis" not in reason]
    return next(iter(telling or reasons), "")


def _refused(count: int) -> str:
    return f"; {count} do not run in onnxruntime as the exporter wrote them" if count else ""


def markdown(rows: list[dict[str, Any]], machine: str, refused: dict[str, str], note: str = "") -> str:
    """The table, with its summary first.

    ``refused`` says what an exporter could not write, and why; ``note`` is what a person has to say about the table.
    """
    verdicts = [verdict(row) for row in rows]
    count = {v: verdicts.count(v) for v in ("pruned", "unchanged", "wrong", "crash", "refused")}
    prunable = [row["prunable"] for row in rows if "prunable" in row]
    most = sum(p >= 0.9 for p in prunable)
    reached = sum(row.get("speedup", 0) >= TARGET for row in rows)
    lines = [
        "# Coverage",
        "",
        *([note, ""] if note else []),
        f"{len(rows)} files, {datetime.date.today()}, {machine}. Made by `benchmarks/coverage.py`; random weights,"
        " seed 0, one thread; seconds are those of a busy machine.",
        "",
        f"Pruned exactly {count['pruned']}, unchanged {count['unchanged']}, wrong {count['wrong']}, crashed"
        f" {count['crash']}{_refused(count['refused'])}. Share of multiply-accumulates in prunable layers at least 0.9"
        f" in {most} of {len(prunable)} files; {TARGET}x reached in {reached}.",
        "",
    ]
    others = [key for key in OTHER_NAMES if any(key in row for row in rows)]
    for key in others:
        said = [_word(row[key]) for row in rows if key in row]
        words = [f"{w} {said.count(w)}" for w in ("pruned", "approximate", "unchanged", "failed", "late") if w in said]
        lines += [f"Beside it, {OTHER_NAMES[key]}: {', '.join(words)}, of {len(said)}.", ""]
    fitted = any("fit" in row for row in rows)
    if fitted:
        lines += [_fit_line(rows), ""]
    head = ["model", "exporter", "batch", "nodes", "prunable", "speed-up", "difference", "seconds"]
    head += [*(["fitted: error", "fitted: seconds"] if fitted else []), *others, "held back by"]
    lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        parts = row["file"].split("__")
        name, exporter, batch = ("/".join(parts[:-2]), *parts[-2:]) if len(parts) > 2 else (row["file"], "", "")
        cells = [name, exporter, batch, row.get("nodes", "")]
        if "refused" in row:
            cells += [""] * 4
            why = f"does not run as it came: {row['refused'][:120]}"
        elif "error" in row:
            cells += [""] * 4
            why = f"**{verdict(row)}**: {row['error'][:120]}"
        else:
            cells += [f"{row['prunable']:.2f}", f"{row['speedup']:.2f}", f"{row['proof']:.0e}", f"{row['seconds']:.1f}"]
            why = _held_by(row["frozen"]) if row["prunable"] < 0.9 else ""
            if verdict(row) == "wrong":
                why = f"**wrong**: {row['judged']}"
        cells += [*(_fit_cells(row) if fitted else []), *(_word(row.get(k, "")) for k in others), why]
        lines.append(f"| {' | '.join(str(c).replace('|', '/') for c in cells)} |")
    if refused:
        lines += ["", f"Not exported ({len(refused)}; not counted above):", ""]
        lines += [
            f"- {name.replace('__', '/')}: {' '.join(why.split())[:140]}" for name, why in sorted(refused.items())
        ]
    return "\n".join(lines) + "\n"

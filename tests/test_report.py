"""The report: promised keys, a round trip through JSON, and tables that can be read."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import numpy as np
import pytest

from onnxprune.comparison import Comparison, Side
from onnxprune.errors import InputError
from onnxprune.report import (
    Achieved,
    DataEntry,
    Fidelity,
    FrozenEntry,
    GroupEntry,
    Latency,
    Measures,
    Proof,
    Report,
    Target,
    plain,
    to_json,
)
from onnxprune.report.markdown import render, render_overview
from onnxprune.report.overview import GroupOverview, Overview
from onnxprune.report.text import (
    TerminalProgress,
    clean,
    console,
    fidelity_lines,
    show_comparison,
    show_overview,
    show_report,
    shown_groups,
)

BEFORE = Measures(125_485_706, 855_770, 3_500_000, Latency(8.0, 7.5, 9.25, 100))
AFTER = Measures(61_000_000, 410_000, 1_700_000, Latency(5.0, 4.75, 6.0, 100))
REPORT = Report(
    target=Target(2.0),
    before=BEFORE,
    after=AFTER,
    achieved=Achieved.of(BEFORE, AFTER),
    groups=(
        GroupEntry("conv1", 16, 7, ("conv1",), ("conv2", "conv3"), 0.125),
        GroupEntry("[red]conv|2[/red]", 32, 32, ("conv2",), ("fc",), None),
    ),
    frozen=(FrozenEntry("an output of the graph", "", "", "y", 1, 10, ("fc",), 640.0),),
    prunable_macs=0.98,
    removed={"conv1.weight": {0: (1, 5, 9)}, "conv2.weight": {1: (1, 5, 9)}},
    proof=Proof(1.5e-7, "y", 40, "2 batches"),
    fidelity=Fidelity(200, 0.95, 0.91, 0.97, {"y": 0.25}, False),
    data=DataEntry("calib.npz, 200 samples", 200, "ab" * 32, False),
    seed=3,
    timings={"load": 0.5, "groups": 0.25},
    versions={"onnxprune": "0.1"},
    hashes={"model": "cd" * 32},
    warnings=("a thing to know",),
    options={"select": "greedy", "reconstruct": True, "only": None},
)
BARE = dataclasses.replace(
    REPORT,
    before=dataclasses.replace(BEFORE, latency_ms=None),
    after=dataclasses.replace(AFTER, latency_ms=None),
    achieved=Achieved(2.0, 2.0),
    groups=(),
    removed={},
    proof=None,
    fidelity=None,
    data=None,
    warnings=(),
)
PROMISED = {
    "schema_version": str,
    "target": dict,
    "before": dict,
    "after": dict,
    "achieved": dict,
    "groups": list,
    "frozen": list,
    "prunable_macs": float,
    "removed": dict,
    "proof": dict,
    "fidelity": dict,
    "timings": dict,
    "versions": dict,
    "seed": int,
    "hashes": dict,
    "warnings": list,
    "data": dict,
}


def shown(show, value, **options) -> str:
    stream = io.StringIO()
    show(value, console(stream), **options)
    return stream.getvalue()


# ----------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("report", [REPORT, BARE], ids=["full", "bare"])
def test_round_trip(report):
    again = Report.from_json(report.to_json())
    assert again == report
    assert again.to_json() == report.to_json()


def test_promised_keys():
    found = json.loads(REPORT.to_json())
    assert next(iter(found)) == "schema_version" and found["schema_version"] == "1"
    for key, kind in PROMISED.items():
        assert isinstance(found[key], kind), key
    assert found["target"] == {"speedup": 2.0, "by": "macs"}
    assert set(found["before"]) == {"macs", "params", "bytes", "latency_ms", "memory"}
    assert found["before"]["latency_ms"] == {"median": 8.0, "p10": 7.5, "p90": 9.25, "runs": 100}
    assert found["achieved"]["latency"] == 1.6
    assert set(found["groups"][0]) == {"name", "units", "kept", "producers", "consumers", "error"}
    assert {"reason", "node", "op", "tensor", "axis", "channels"} <= set(found["frozen"][0])
    assert found["removed"]["conv1.weight"] == {"0": [1, 5, 9]}
    assert {"max_relative_difference", "inputs"} <= set(found["proof"])
    assert json.loads(BARE.to_json())["before"]["latency_ms"] is None


def test_json_has_no_words_for_infinity():
    text = dataclasses.replace(REPORT, achieved=Achieved(math.inf, math.nan)).to_json()
    found = json.loads(text, parse_constant=pytest.fail)
    assert found["achieved"]["macs"] is None
    assert math.isnan(Report.from_json(text).achieved.macs)


def test_numpy_numbers_become_plain():
    assert plain({"a": np.float32(0.5), 3: np.arange(2), "c": (np.bool_(True), np.int64(7))}) == {
        "a": 0.5,
        "3": [0, 1],
        "c": [True, 7],
    }


def test_more_keys_come_first_and_unknown_ones_are_passed_over():
    text = to_json(REPORT, output="model.pruned.onnx")
    assert next(iter(json.loads(text))) == "output"
    assert Report.from_json(text) == REPORT


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda d: "{", "expected JSON"),
        (lambda d: "[]", "expected schema_version '1', found None"),
        (lambda d: d | {"schema_version": "9"}, "found '9'"),
        (lambda d: {k: v for k, v in d.items() if k != "before"}, "expected the key report.before, found none"),
        (lambda d: d | {"seed": "three"}, "expected int as report.seed, found 'three'"),
        (lambda d: d | {"groups": [{"name": "a"}]}, "expected the key report.groups[0].units"),
        (lambda d: d | {"removed": {"w": {"0": "all"}}}, "as report.removed.w.0, found 'all'"),
    ],
)
def test_what_is_no_report(change, fragment):
    changed = change(json.loads(REPORT.to_json()))
    with pytest.raises(InputError) as caught:
        Report.from_json(changed if isinstance(changed, str) else json.dumps(changed))
    assert fragment in str(caught.value)


# ---------------------------------------------------------------------------------------------- text


def test_the_final_tables():
    text = shown(show_report, REPORT)
    for word in (
        "conv1",
        "7/16",
        "0.12",
        "32/32",
        "125.5 M",
        "61.0 M",
        "2.06x",
        "3.5 MB",
        "8 ms (7.5 to 9.25)",
        "1.60x",
    ):
        assert word in text
    assert "two different things" in text
    assert "same top-1 class on 200 samples: 95.0 % (95 % interval 91.0 % to 97.0 %)" in text
    assert "[red]conv|2[/red]" in text  # no markup
    assert "\x1b" not in text  # no colours in a pipe
    assert "stage" not in text and "stage" in shown(show_report, REPORT, verbose=True)
    assert "latency" in shown(show_report, BARE)


def test_a_cut_model_that_is_not_faster_is_said_to_be_so():
    slower = dataclasses.replace(REPORT, after=dataclasses.replace(AFTER, latency_ms=Latency(8.5, 8.0, 9.0, 100)))
    assert "is not faster: --by latency" in shown(show_report, slower)
    assert not any("not faster" in shown(show_report, report) for report in (REPORT, BARE))


def test_many_groups_stay_readable():
    groups = tuple(GroupEntry(f"conv{k}", 10, 5, (), (), k / 1000) for k in range(300))
    report = dataclasses.replace(REPORT, groups=groups)
    text = shown(show_report, report)
    assert len(text.splitlines()) < 70
    assert "and 260 more groups with smaller errors, 1300/2600 kept" in text
    assert "conv299 " in text and "conv0 " not in text
    assert "conv0 " in shown(show_report, report, verbose=True)
    assert [group.name for group in shown_groups(groups, 3)[0]] == ["conv297", "conv298", "conv299"]


@pytest.mark.parametrize(
    ("found", "count", "fragment"),
    [
        (Fidelity(9, None, None, None, {"y": 0.5}, False), 1, "relative output error on 9 samples: y 0.5"),
        (Fidelity(9, 1.0, 0.7, 1.0, {}, False), 1, "100.0 % (95 % interval 70.0 % to 100.0 %)"),
        (Fidelity(9, 1.0, 0.7, 1.0, {"y": 0.0}, True), 3, "random inputs say nothing"),
        (Fidelity(9, None, None, None, {}, False), 0, ""),
        (Fidelity(9, None, None, None, {}, False, {"k": 0.5}), 1, "same output on 9 samples: k 50.0 %"),
    ],
)
def test_fidelity_in_words(found, count, fragment):
    lines = fidelity_lines(found)
    assert len(lines) == count
    assert fragment in "\n".join(lines)


STAYS = FrozenEntry("no row", "n7", "Erf", "t", 1, 64, ("fc",), 1e6, rule="a !b -> a", remedy="a row")


def test_overview():
    groups = tuple(GroupOverview(f"conv{k}", 8, ("a", "b", "c"), ("d",), 0.5) for k in range(50))
    found = Overview(2_000_000, 0.9, 3.5, groups, (STAYS,))
    text = shown(show_overview, found)
    words = ("conv0", "a, b and 1 more", "50.0 %", "no row", "Erf n7, axis 1 of t", "64", "90.0 %", "3.5x", "a row")
    for word in words:
        assert word in text
    assert "a !b -> a" not in text and "rule: a !b -> a" in shown(show_overview, found, verbose=True)
    lines = render_overview(found).splitlines()
    assert lines[0] == "## 2.0 M MACs, of which 90.0 % in layers that may shrink"
    assert "Largest reachable speed-up, in MACs: 3.5x." in lines
    assert "| no row | 64 | 50.0 % | Erf n7, axis 1 of t | a !b -> a | fc | a row |" in lines
    assert sum(line.startswith("| conv") for line in lines) == 50
    assert "and 10 more groups" in text
    assert "conv49" in shown(show_overview, found, verbose=True)
    assert "nothing to prune" in shown(show_overview, dataclasses.replace(found, groups=(), frozen=()))


@pytest.mark.parametrize("names", [("x/a.onnx", "y/b.onnx"), ("x/a.onnx", "y/a.onnx")])
def test_comparison_names_both(names):
    a, b = (Side(name, 100, 10, 1000, Latency(1.0, 0.9, 1.1, 10)) for name in names)
    text = shown(show_comparison, Comparison(a, b, REPORT.fidelity, "data.npz", 1, ()))
    assert ("x/a.onnx" in text) == (names[1] == "y/a.onnx")
    assert names[1].split("/")[1] in text
    assert "latency of 1 sample, runs of both interleaved" in text


def test_names_cannot_steer_the_terminal():
    assert clean("a\x1b[2Jb\nc") == "a�[2Jb c"


def test_streams_without_unicode():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    show_report(BARE, console(stream))
    stream.flush()
    assert b"MACs" in stream.buffer.getvalue()


def test_bars_count_the_stages():
    stream = io.StringIO()
    with TerminalProgress(console(stream)) as bars:
        with bars.stage("load"), bars.stage("inner", 3):
            bars.advance(2)
        with bars.stage("load"):
            pass
        bars.advance()  # between stages nothing counts
    assert set(bars.timings) == {"load", "inner"}


def test_markdown():
    text = render(REPORT)
    assert text.startswith("## Pruned to 2.06x fewer MACs (asked for: 2x)")
    assert "| MACs | 125.5 M | 61.0 M | 2.06x |" in text
    assert "\\[red]conv\\|2\\[/red]" in text
    assert "- warning: a thing to know" in text
    assert "| an output of the graph | 10 | 0.0 % | axis 1 of y |  | fc |  |" in text
    assert "latency" in render(BARE)

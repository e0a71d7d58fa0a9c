"""The promise about time, where the times are given: no test here looks at a clock to pass or fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builder import Builder, analysed
from timed import DIGITS, US, Pretended, chain, conv_time, known

from onnxprune import promise
from onnxprune.api import prune
from onnxprune.cli import main
from onnxprune.cost import Ratio
from onnxprune.errors import UnreachableTarget
from onnxprune.report.text import cost_rows
from onnxprune.targets import Limit


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    table: Callable[[int, int], float],
    true: Callable[[int, int], float],
    doubt: float = 0.0,
) -> None:
    """Let parts take what ``table`` says, and whole networks what is ``true``, with 50 us for what never shrinks."""
    monkeypatch.setattr(promise, "Stopwatch", lambda runtime, cache: Pretended(table, doubt))

    def ratio(before: onnx.ModelProto, after: onnx.ModelProto, *_: Any, **__: Any) -> Ratio:
        first, second = (50 * US + conv_time(model, true) for model in (before, after))
        return Ratio.of([first / second] * 2, first, 20, "wall")

    monkeypatch.setattr(promise, "measure_ratio", ratio)


def blocks(factor: float = 1.0, odd: float = 0.0) -> Callable[[int, int], float]:
    return lambda out, inner: factor * -(-out // 16) * inner * US + (odd * US if out % 4 else 0)


QUICK: dict[str, Any] = {"samples": 40, "threads": 1, "reconstruct": False}


@pytest.mark.parametrize(
    ("speedup", "true"),
    [(1.3, blocks()), (2.0, blocks(0.6)), (3.0, blocks(1.7)), (2.0, blocks(1.0, 3.0))],
    ids=["right", "less", "more", "odd"],
)
def test_the_promise_is_kept_where_the_table_errs(
    monkeypatch: pytest.MonkeyPatch, speedup: float, true: Callable[[int, int], float]
) -> None:
    pretend(monkeypatch, blocks(), true)
    report = prune(DIGITS, speedup=speedup, by="latency", **QUICK).report
    assert report.latency is not None
    assert report.latency.measured.ratio == pytest.approx(speedup, rel=0.05)
    assert report.achieved.latency == report.latency.measured.ratio
    assert cost_rows(report)[-1][3] == f"{report.latency.measured.ratio:.2f}x"  # one ratio, not two
    assert len(report.latency.stays) == 5
    assert list(report.latency.stays.values()) == sorted(report.latency.stays.values(), reverse=True)
    assert not [text for text in report.warnings if "asked for" in text]
    assert len(report.latency.rounds) <= 9
    again = type(report).from_json(report.to_json())
    assert again.latency is not None
    assert again.latency.table[0].widths == report.latency.table[0].widths
    assert json.loads(report.to_json())["target"] == {"speedup": speedup, "by": "latency"}


def test_steps_in_doubt_are_taken_where_those_beyond_it_lie_too_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    choices: list[list[int]] = []
    believe = promise.Timing._believe_all

    def noted(self: promise.Timing) -> bool:
        choices.append([len(c) for c in self.choices])
        found = believe(self)
        choices.append([len(c) for c in self.choices])
        return found

    monkeypatch.setattr(promise.Timing, "_believe_all", noted)
    pretend(monkeypatch, blocks(), blocks(), doubt=0.3)
    report = prune(DIGITS, speedup=1.4, by="latency", **QUICK).report
    assert report.latency is not None
    assert report.latency.measured.ratio == pytest.approx(1.4, rel=0.05)
    assert sum(choices[1]) > sum(choices[0])


def test_noise_is_not_chased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements that scatter by 3 %, on a table that errs: few rounds, and what is written was seen twice."""
    for seed in range(2):
        rng = np.random.default_rng(seed)
        pretend(monkeypatch, blocks(), blocks(0.7))
        exact = promise.measure_ratio

        def noisy(*models: Any, _exact: Any = exact, _rng: Any = rng, **options: Any) -> Ratio:
            found = _exact(*models, **options)
            starts = np.full(6, found.ratio) * np.exp(0.03 * _rng.standard_normal(6))
            return Ratio.of(starts.tolist(), found.seconds, 20, "wall")

        monkeypatch.setattr(promise, "measure_ratio", noisy)
        solved: list[tuple[promise.Timing, np.ndarray]] = []
        solve = promise.Timing.solve

        def kept(self: promise.Timing, *args: Any, _solve: Any = solve, _solved: Any = solved) -> np.ndarray:
            _solved.append((self, _solve(self, *args)))
            return _solved[-1][1]

        with monkeypatch.context() as patched:
            patched.setattr(promise.Timing, "solve", kept)
            report = prune(DIGITS, speedup=1.6, by="latency", **QUICK).report
        assert report.latency is not None
        assert report.latency.measured.ratio == pytest.approx(1.6, rel=0.05)
        assert not [text for text in report.warnings if "only known to lie between" in text]
        assert len(report.latency.rounds) <= 9
        timing, counts = solved[0]
        assert timing.tried[counts.tobytes()].looks >= 2
        plain = [(s.seen, s.low, s.high) for s in report.latency.rounds]
        assert all(low < seen < high for seen, low, high in plain)


def test_a_network_is_measured_again_only_where_that_says_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise only the one that is written is seen twice, however far off the table is."""
    pretend(monkeypatch, blocks(), blocks(1.0, 4.0))
    looks: list[dict[bytes, promise.Tried]] = []
    keeps = promise.Timing.keeps_promise

    def note(self: promise.Timing, *args: Any) -> bool:
        looks.append(self.tried)
        return keeps(self, *args)

    monkeypatch.setattr(promise.Timing, "keeps_promise", note)
    prune(DIGITS, speedup=2.0, by="latency", **QUICK)
    assert sorted(each.looks for each in looks[0].values())[-2:] == [1, 2]


def test_an_interval_that_is_too_wide_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, blocks(), blocks())
    exact = promise.measure_ratio

    def loose(*models: Any, **options: Any) -> Ratio:
        found = exact(*models, **options)
        return Ratio.of([0.9 * found.ratio, found.ratio, found.ratio, found.ratio / 0.9], found.seconds, 20, "wall")

    monkeypatch.setattr(promise, "measure_ratio", loose)
    report = prune(DIGITS, speedup=1.5, by="latency", **QUICK).report
    assert report.latency is not None
    assert [text for text in report.warnings if "only known to lie between" in text]
    assert len(report.latency.rounds) <= 9


def test_what_turns_out_too_slow_when_measured_again_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest network seemed to be near enough; measured again, it is not."""
    pretend(monkeypatch, blocks(), blocks())
    exact, flattered = promise.measure_ratio, [1.15]

    def flattering(before: onnx.ModelProto, after: onnx.ModelProto, *rest: Any, **options: Any) -> Ratio:
        found = exact(before, after, *rest, **options)
        factor = 1.0 if before is after or not flattered else flattered.pop()
        return Ratio.of([factor * found.ratio] * 20, found.seconds, 20, "wall")

    monkeypatch.setattr(promise, "measure_ratio", exact)
    with pytest.raises(UnreachableTarget) as caught:
        prune(DIGITS, speedup=500, by="latency", **QUICK)
    largest = float(str(caught.value).split("for this model is ")[1].split()[0])
    monkeypatch.setattr(promise, "measure_ratio", flattering)
    with pytest.raises(UnreachableTarget, match=r"95 % interval"):
        prune(DIGITS, speedup=1.12 * largest, by="latency", **QUICK)
    assert not flattered


def test_what_cannot_be_reached_is_said_with_the_largest_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, blocks(), blocks())
    with pytest.raises(
        UnreachableTarget, match=r"a speed-up of 500 in latency cannot be reached; the largest"
    ) as caught:
        prune(DIGITS, speedup=500, by="latency", **QUICK)
    assert "% of the time does not follow the widths, most of it at nodes that no width touches" in str(caught.value)
    out = tmp_path / "out.onnx"
    arguments = [
        str(DIGITS),
        "--speedup",
        "500",
        "--by",
        "latency",
        "--samples",
        "40",
        "--threads",
        "1",
        "-o",
        str(out),
    ]
    assert main(arguments) == 3
    assert not out.exists()
    capsys.readouterr()
    assert main([*arguments, "--best-effort"]) == 0
    printed = capsys.readouterr()
    assert "asked for 500x the speed, measured" in printed.out
    assert "warning: asked for 500x in latency" in printed.err


def test_what_nothing_makes_faster_is_not_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a channel that may go, two measurements of one network differ by chance, and are not a speed-up."""
    pretend(monkeypatch, blocks(), blocks())
    g = Builder()
    onnx.save(g.model(g.gemm(g.input("x", [1, 16]), 4)), tmp_path / "model.onnx")

    def lucky(*_: Any, **__: Any) -> Ratio:
        return Ratio.of([0.99, 1.01, 1.02], 1e-4, 20, "wall")

    monkeypatch.setattr(promise, "measure_ratio", lucky)
    with pytest.raises(UnreachableTarget, match=r"the largest for this model is 1 \(measured") as caught:
        prune(tmp_path / "model.onnx", speedup=1.5, by="latency", best_effort=True, **QUICK)
    assert "--best-effort" not in str(caught.value)


def test_time_and_parameters_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, blocks(), blocks())
    report = prune(DIGITS, speedup=1.5, by="latency", max_params=40_000, **QUICK).report
    assert report.latency is not None
    assert report.latency.measured.ratio >= 1.5 * 0.95
    assert report.after.params <= 40_000


def test_the_best_of_the_rounds_counts() -> None:
    analysis = analysed(chain(64, 64, 8))[0]
    cost, choices = known(analysis, blocks())
    cost.correct(cost.won(np.array([32, 32, 8])), cost.whole / 1.1)
    assert cost.whole / cost.total(np.array([32, 32, 8])) == pytest.approx(1.1)
    fastest = cost.fastest(choices)
    assert cost.total(fastest) == min(
        cost.total(np.array([a, b, c])) for a in choices[0] for b in choices[1] for c in choices[2]
    )
    assert Limit("latency", cost, 1.0).cost is cost

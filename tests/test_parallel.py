import threading

import numpy as np
import pytest

from onnxprune.parallel import workers


@pytest.mark.parametrize("count", [1, 2, 4])
def test_results_come_in_order(count: int) -> None:
    with workers(count) as spread:
        assert spread(lambda a, b: a * b, range(20), range(1, 21)) == [k * (k + 1) for k in range(20)]


def test_several_things_are_worked_on_at_a_time() -> None:
    meeting = threading.Barrier(2, timeout=30)
    with workers(2) as spread:  # one at a time, nobody would ever come to the second
        assert sorted(spread(lambda _: meeting.wait(), range(2))) == [0, 1]


@pytest.mark.parametrize("count", [1, 2])
def test_what_goes_wrong_is_raised(count: int) -> None:
    def fail(k: int) -> int:
        raise ValueError(f"number {k}")

    with workers(count) as spread, pytest.raises(ValueError, match="number 0"):
        spread(fail, range(3))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.filterwarnings("error")
def test_numpy_complains_as_where_the_work_comes_from(count: int) -> None:
    with np.errstate(over="ignore"), workers(count) as spread:
        assert spread(lambda x: np.float32(x) * np.float32(1e38), [1e38, 1.0])[0] == np.inf
    with np.errstate(over="raise"), workers(count) as spread, pytest.raises(FloatingPointError):
        spread(lambda x: np.float32(x) * np.float32(1e38), [1e38])

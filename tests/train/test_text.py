import pytest

from sieve.train.text import duration, short_count


@pytest.mark.parametrize("value, text", [
    (0, "0"), (0.5, "0.5"), (999, "999"), (999.9, "1k"), (1234, "1.23k"), (16_000, "16k"), (999_600, "1M"),
    (2.7e10, "27B"),
])
def test_short_count(value: float, text: str) -> None:
    assert short_count(value) == text


@pytest.mark.parametrize("seconds, text", [(0, "0s"), (59.6, "1m00s"), (75, "1m15s"), (3725, "1h02m")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text

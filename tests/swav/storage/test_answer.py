import pytest

from swav.storage.answer import Fault, byte_range, span


def test_ranges_are_written_and_read_with_the_last_byte_included() -> None:
    assert (byte_range(5, 9), byte_range(5, None)) == ("bytes=5-8", "bytes=5-")
    assert span("bytes 5-8/100", 4) == (5, 100)
    assert span(None, 7) == (0, 7)


@pytest.mark.parametrize(
    ("content_range", "num_bytes"),
    [("bytes 5-8/100", 5), ("bytes 8-5/100", 4), ("bytes 5-8/8", 4), ("bytes 5-8/*", 4), ("bytes */100", 0), ("", 0)],
)
def test_a_range_that_contradicts_itself_is_a_fault(content_range: str, num_bytes: int) -> None:
    with pytest.raises(Fault, match="Content-Range"):
        span(content_range, num_bytes)

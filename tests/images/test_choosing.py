"""In which order images are gone through."""

from __future__ import annotations

from itertools import islice

from sinder_cli.images.loading import cycled, spread


def test_passes_in_order_begin_where_an_earlier_process_ended() -> None:
    whole = list(islice(cycled(5), 23))
    assert whole[:6] == [0, 1, 2, 3, 4, 0]
    assert list(islice(cycled(5, 7), 16)) == whole[7:]


def test_a_spread_is_even_and_no_larger_than_asked_for() -> None:
    assert spread(range(6), 3) == [0, 2, 4]
    assert spread([7, 8], 3) == [7, 8]

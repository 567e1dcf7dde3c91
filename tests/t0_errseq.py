"""Errors are told once to each reader, as Linux' errseq_t has it."""

from __future__ import annotations

import errno

from hypothesis import given
from hypothesis import strategies as st

from cachefsd.core.errseq import ErrorSequence, Reader


def test_nothing_happened() -> None:
    assert ErrorSequence().reader().take() == 0


def test_everybody_who_was_there_is_told_once() -> None:
    errors = ErrorSequence()
    first, second = errors.reader(), errors.reader()
    errors.record(errno.EIO)
    assert [first.take(), first.take()] == [errno.EIO, 0]
    assert [second.take(), second.take()] == [errno.EIO, 0]


def test_an_old_error_is_news_to_a_later_reader_only_if_nobody_was_told() -> None:
    errors = ErrorSequence()
    early = errors.reader()
    errors.record(errno.EIO)
    late = errors.reader()
    assert late.take() == errno.EIO
    assert errors.reader().take() == 0
    assert early.take() == errno.EIO


def test_looking_is_not_being_told() -> None:
    errors = ErrorSequence()
    reader = errors.reader()
    assert reader.peek() == 0
    errors.record(errno.EIO)
    assert [reader.peek(), reader.peek()] == [errno.EIO, errno.EIO]
    assert errors.reader().take() == errno.EIO
    assert [reader.take(), reader.peek()] == [errno.EIO, 0]


def test_an_older_error_that_was_told_does_not_hide_a_newer_one_that_was_not() -> None:
    errors = ErrorSequence()
    early = errors.reader()
    errors.record(errno.EIO)
    early.take()
    errors.record(errno.ENOSPC)
    assert errors.reader().take() == errno.ENOSPC
    assert [early.take(), early.take()] == [errno.ENOSPC, 0]


def test_several_errors_that_nobody_asked_about_are_one() -> None:
    errors = ErrorSequence()
    reader = errors.reader()
    errors.record(errno.EIO)
    errors.record(errno.ENOSPC)
    assert [reader.take(), reader.take()] == [errno.ENOSPC, 0]


def test_the_same_error_again_is_news() -> None:
    errors = ErrorSequence()
    reader = errors.reader()
    errors.record(errno.EIO)
    assert reader.take() == errno.EIO
    errors.record(errno.EIO)
    assert reader.take() == errno.EIO


def test_what_has_healed_is_told_only_to_those_who_were_there() -> None:
    errors = ErrorSequence()
    early = errors.reader()
    errors.record(errno.EIO)
    errors.healed()
    assert errors.reader().take() == 0
    assert early.take() == errno.EIO


@given(st.lists(st.sampled_from(["record", "open", "take"]), max_size=30), st.data())
def test_it_tells_what_linux_tells(steps: list[str], data: st.DataObject) -> None:
    """Against errseq_set, errseq_sample and errseq_check_and_advance as they are in lib/errseq.c."""
    seen_bit, errno_mask = 1 << 12, (1 << 12) - 1
    errors, value = ErrorSequence(), 0
    readers: list[Reader] = []
    since: list[int] = []
    for step in steps:
        if step == "record":
            number = data.draw(st.sampled_from([errno.EIO, errno.ENOSPC]))
            errors.record(number)
            carry = seen_bit << 1 if value & seen_bit else 0
            value = (value & ~(errno_mask | seen_bit) | number) + carry
        elif step == "open":
            readers.append(errors.reader())
            since.append(value if value & seen_bit else 0)
        elif readers:
            index = data.draw(st.integers(0, len(readers) - 1))
            told = 0
            if value != since[index]:
                value |= seen_bit
                since[index] = value
                told = value & errno_mask
            assert readers[index].take() == told

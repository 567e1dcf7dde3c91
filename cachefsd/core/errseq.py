"""Who has yet to be told of an error: once per open file, however many there are (Linux' lib/errseq.c).

A file's :class:`ErrorSequence` numbers its errors; each open file keeps a :class:`Reader` with the number of the last
one that it knows of. An error that nobody has been told of is news to those who open the file later, too.
"""

from __future__ import annotations


class ErrorSequence:
    """The errors of one file. Several that nobody has asked about in between count as one: the last."""

    __slots__ = ("_errno", "_number", "_seen")

    def __init__(self) -> None:
        self._errno = 0
        self._number = 0
        self._seen = True

    def record(self, number: int) -> None:
        """Note an error, an errno."""
        if self._seen:
            self._number += 1
        self._errno, self._seen = number, False

    def healed(self) -> None:
        """What failed has been done after all: who opens the file from now on need not be told.

        Those who had it open meanwhile still are told.
        """
        self._seen = True

    @property
    def untold(self) -> bool:
        """Whether somebody who opens the file later has to be told of an error."""
        return not self._seen

    def reader(self) -> Reader:
        """For a new open file."""
        return Reader(self, self._number if self._seen else self._number - 1)

    def peek(self, number: int) -> int:
        """The errno of what came after error ``number``, or 0."""
        return 0 if number == self._number else self._errno

    def tell(self) -> int:
        """Somebody is told of the last error; its number."""
        self._seen = True
        return self._number


class Reader:
    """What one open file has been told."""

    __slots__ = ("_sequence", "_since")

    def __init__(self, sequence: ErrorSequence, since: int) -> None:
        self._sequence = sequence
        self._since = since

    def peek(self) -> int:
        """The errno of an error that this open file has not been told of, or 0."""
        return self._sequence.peek(self._since)

    def take(self) -> int:
        """The same, and it counts as told."""
        number = self._sequence.peek(self._since)
        if number:
            self._since = self._sequence.tell()
        return number

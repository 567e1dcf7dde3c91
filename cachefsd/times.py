"""Time stamps: nanoseconds since the epoch as int, and the one rule for what cannot be kept.

A time is kept as a 64-bit word, in headers, records and intents. The word is the time modulo 2**64. It is read as lying
in the 584 years from :data:`FIRST_NS` on, which are all that ext4 (to 2446) and XFS (to 2486) can hold. Other times
are brought into the range where they enter, by :func:`clamp`: in what ``stat`` says and in what users set.
"""

from __future__ import annotations

NS = 10**9
FIRST_NS = -(1 << 31) * NS
"""1901-12-13 20:45:52 UTC, the first second of ext4 and XFS"""
LAST_NS = FIRST_NS + (1 << 64) - 1
"""in July 2486"""
_MASK64 = (1 << 64) - 1

_SAFE_FIRST_NS = 315_619_200 * NS
"""1980-01-02: any file system that is in use holds the times from here on"""
_SAFE_LAST_NS = ((1 << 31) - 86400) * NS
"""2038-01-18: and those up to here"""
_GRANULARITIES = (2 * NS, NS, 10**6, 10**3, 100, 1)
PROBE_NS = 1_234_567_891_123_456_789
"""It shows which granularity a file system has: an odd second, and no zeros."""


def clamp(ns: int) -> int:
    """The nearest time that can be kept."""
    if FIRST_NS <= ns <= LAST_NS:
        return ns
    return FIRST_NS if ns < FIRST_NS else LAST_NS


def to_word(ns: int) -> int:
    """A time as the 64-bit word that is stored."""
    return ns & _MASK64


def from_word(word: int) -> int:
    """The inverse of :func:`to_word`; any word is some time."""
    return FIRST_NS + (word - FIRST_NS & _MASK64)


class KeptTimes:
    """What a file system makes of the times that it is given: it has a first and a last one, and a granularity.

    At first nothing is known. :meth:`probed` says all of it, :meth:`learn` only the granularity; then :meth:`of` knows
    about the times that every file system holds.
    """

    __slots__ = ("_first_ns", "_last_ns", "_limited", "granularity")

    def __init__(self) -> None:
        self.granularity = 0
        """in nanoseconds; 0: not known"""
        self._first_ns, self._last_ns = _SAFE_FIRST_NS, _SAFE_LAST_NS
        self._limited = False

    def of(self, ns: int) -> int | None:
        """What becomes of a time; None if only setting it can tell."""
        granularity = self.granularity
        if granularity and self._first_ns <= ns < self._last_ns:
            return ns - ns % granularity
        if granularity and self._limited:
            if ns < self._first_ns - NS:
                return self._first_ns - NS
            if ns >= self._last_ns + NS:
                return self._last_ns
        return None

    def learn(self, asked_ns: int, kept_ns: int) -> None:
        """``asked_ns`` was set, and the file has ``kept_ns`` since."""
        tells = _SAFE_FIRST_NS <= asked_ns < _SAFE_LAST_NS and asked_ns % 100 and asked_ns // NS % 2
        if tells and not self.granularity:
            self.granularity = _granularity(asked_ns, kept_ns)

    def probed(self, first_ns: int, last_ns: int, probe_ns: int) -> None:
        """What a file has had after :data:`FIRST_NS`, :data:`LAST_NS` and :data:`PROBE_NS` were set.

        Some file systems drop the fraction in their first and in their last second. So what happens there is for them
        to say.
        """
        self.granularity = _granularity(PROBE_NS, probe_ns)
        whole = first_ns % NS == 0 and FIRST_NS <= first_ns <= _SAFE_FIRST_NS and _SAFE_LAST_NS <= last_ns <= LAST_NS
        if self.granularity and whole:
            self._limited = True
            self._first_ns = first_ns + NS
            self._last_ns = last_ns - last_ns % NS

    @classmethod
    def exact(cls) -> KeptTimes:
        """Of a file system that keeps all of them."""
        times = cls()
        times.probed(FIRST_NS, LAST_NS, PROBE_NS)
        return times


def _granularity(asked_ns: int, kept_ns: int) -> int:
    """The one that makes this of a time; 0 if none does."""
    for granularity in _GRANULARITIES:
        if asked_ns - asked_ns % granularity == kept_ns:
            return granularity
    return 0

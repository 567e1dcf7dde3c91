"""What Hypothesis draws for tests: times, names, paths and sizes, those near limits more often than by chance.

A test that needs one of these takes it from here, so that a value that was once a problem is tried everywhere.
"""

from __future__ import annotations

from hypothesis import strategies as st

from cachefsd.times import FIRST_NS, LAST_NS, NS

YEAR_1850, YEAR_2500 = -3_786_825_600, 16_725_225_600
"""Seconds since 1970: before the first time that ext4 keeps (1901), and after its last one (2446)."""
EXT4_FIRST_S, EXT4_LAST_S = -(1 << 31), 15_032_385_535
NAME_MAX, PATH_MAX = 255, 4096
"""Bytes, the second with the zero at the end."""

U64 = st.integers(0, (1 << 64) - 1)
U63 = st.integers(0, (1 << 63) - 1)
"""What a file can have as its size, and numbers of files and versions."""
U32 = st.integers(0, (1 << 32) - 1)

# ---- times, in ns since 1970

KEPT_TIMES = st.integers(FIRST_NS, LAST_NS) | st.sampled_from([FIRST_NS, LAST_NS, -1, 0, 1, EXT4_LAST_S * NS + 1])
"""Those that fit into a word of the media."""
TIMES = (
    st.integers(YEAR_1850 * NS, YEAR_2500 * NS)
    | st.integers(YEAR_1850, YEAR_2500).map(lambda s: s * NS)
    | st.sampled_from([FIRST_NS, FIRST_NS - 1, LAST_NS, LAST_NS + 1, 0, -1, (1 << 63) - 1, 1 << 63])
    | st.sampled_from([EXT4_FIRST_S * NS, EXT4_FIRST_S * NS - 1, EXT4_LAST_S * NS, EXT4_LAST_S * NS + NS - 1])
)
"""Those that users set: 1850 to 2500, with and without a fraction of a second."""
ANY_TIMES = TIMES | st.integers(-(1 << 63) * NS, (1 << 63) * NS) | st.integers(FIRST_NS - 3 * NS, FIRST_NS + 3 * NS)
"""Whatever a system call can take."""


# ---- names and paths, in bytes


def _is_name(name: bytes) -> bool:
    return name not in (b"", b".", b"..") and not set(name) & set(b"/\0")


NAMES = st.sampled_from(
    [b"a", b".git", b" ", b"-", b"\n", b"...", b"\xff", b"\xe4\xf6", b"\xed\xa0\x80", "ä".encode()]
) | st.binary(min_size=1, max_size=NAME_MAX).filter(_is_name)
"""Any bytes but a slash and a zero: many are no UTF-8."""
LONG_NAMES = st.sampled_from([b"n" * NAME_MAX, b"n" * (NAME_MAX - 1), b"\xfe" * NAME_MAX])
ANY_NAMES = NAMES | LONG_NAMES
_DEEP = st.integers(PATH_MAX // 2 - 40, PATH_MAX // 2 - 1).map(lambda count: b"/".join([b"d"] * count))
_LONG = st.integers(1, PATH_MAX // (NAME_MAX + 1) - 1).map(lambda count: b"/".join([b"n" * NAME_MAX] * count))
PATHS = st.lists(NAMES, max_size=6).map(b"/".join) | _DEEP | _LONG
"""Relative ones, "" too, that a system call takes: as deep as can be, and as long as can be."""


# ---- sizes and offsets


def sizes(block: int, most: int) -> st.SearchStrategy[int]:
    """Bytes, up to ``most``, and more often near the ends of blocks."""
    edges = [edge for end in (0, block, 2 * block, most // block * block) for edge in (end - 1, end, end + 1)]
    return st.sampled_from(sorted({edge for edge in edges if 0 <= edge <= most} | {most})) | st.integers(0, most)

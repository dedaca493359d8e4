"""State as one pointer: what compiled code sees of a NamedTuple of arrays."""

from typing import NamedTuple

import numba
import numpy as np
import pytest

from offload.jit import JIT_DISABLED, jit, jit_entry
from offload.table import first_rows, make_unpack, pack

ROW = np.dtype([("pfn", np.int64), ("order", np.uint8)], align=True)


class State(NamedTuple):
    rows: np.ndarray
    words: np.ndarray
    small: np.ndarray
    counted: np.ndarray


unpack = make_unpack("State", State(ROW, np.int64, np.uint8, np.int32), as_arrays=("counted",))


def state():
    rows = np.zeros(3, ROW).view(np.recarray)
    rows.pfn, rows.order = (5, 6, 7), (0, 9, 10)
    return State(rows, np.arange(4) * 10, np.array([255, 1], np.uint8), np.array([4, 5, 6], np.int32))


@jit
def double_first(values):
    values[0] *= 2
    return len(values)


@jit_entry
def use(table, i):
    st = unpack(table)
    row = st.rows[i]
    row.pfn += 100                                  # a record is a view, as NumPy's
    st.words[i] |= 1
    st.words[i + 1] = st.small[0] + np.int64(1)     # no wrapping around at 256
    st.small[1] = 300 & 255
    return row.pfn + row.order + len(st.counted) + st.counted[2] + double_first(first_rows(st.words, i + 1))


def test_columns_are_read_and_written_where_the_arrays_lie():
    st = state()
    assert use(pack(st), 1) == 106 + 9 + 3 + 6 + 2
    assert st.rows.pfn.tolist() == [5, 106, 7]
    assert st.words.tolist() == [0, 11, 256, 30]
    assert st.small.tolist() == [255, 44]


@pytest.mark.skipif(JIT_DISABLED, reason="with the JIT disabled a column is a NumPy array")
@pytest.mark.parametrize("body", ["return len(st.words)", "return st.words[:2]", "return st.words.sum()", "return st.other"])
def test_a_column_is_indexed_and_nothing_else(body):
    # A length of it would be wrong, so it has none.
    scope = {"unpack": unpack}
    exec(f"def wrong(table):\n    st = unpack(table)\n    {body}", scope)
    with pytest.raises(numba.TypingError):
        numba.njit(scope["wrong"])(pack(state()))


@pytest.mark.skipif(JIT_DISABLED, reason="with the JIT disabled the arrays are used as they are")
def test_only_plain_arrays_can_be_packed():
    with pytest.raises(AssertionError, match="State.words"):
        pack(state()._replace(words=np.arange(8)[::2]))

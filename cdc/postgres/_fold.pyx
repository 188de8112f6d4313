# cython: language_level=3, boundscheck=False, wraparound=False
"""`cdc.postgres.fold.Fold.add` for packed changes, compiled, where they are new rows and no more.

Built where a C compiler is there when the package is installed; without it everything works the same, but slower.
"""

from libc.stdint cimport uint32_t

from cdc._integers cimport be32, u32
from cdc.errors import DecodeError
from cdc.postgres.fold import FoldError

cdef enum:
    # see cdc.packed_rows
    TRANSACTION_BYTES = 37
    COUNT_AT = 32
    CHANGE_BYTES = 4
    LENGTH_BYTES = 4
    AFTER = 4
    INSERT = 0
    UPDATE = 1


def add_plain(bytes data, Py_ssize_t at, uint32_t left, list slots):
    """Add the changes that begin at a byte, `left` of them in that transaction, up to the first that is not plain.

    slots: of each table's fold; `None` where every change is to be looked at. Returns where the first change begins that
    was not added, and how many are left in its transaction; none are left at the end.
    """
    cdef const unsigned char *d = data
    cdef Py_ssize_t length = len(data), start, end
    cdef int table, known = -1
    cdef tuple slot = None
    cdef dict inserts = None, updates = None, deletes = None, earlier = None, rows
    cdef object key_of = None
    while at < length:
        if left == 0:
            if length - at < TRANSACTION_BYTES:
                raise DecodeError(f"packed transactions truncated at byte {length}")
            left = u32(d + at + COUNT_AT)
            at += TRANSACTION_BYTES
            continue
        start = at + CHANGE_BYTES + LENGTH_BYTES
        if start > length or d[at] > UPDATE or d[at + 3] != AFTER:
            return at, left
        table = d[at + 1] | d[at + 2] << 8
        if table != known:
            slot = slots[table]
            if slot is None:
                return at, left
            inserts, updates, deletes, earlier, key_of = slot
            known = table
        end = start + <Py_ssize_t> u32(d + start - LENGTH_BYTES)
        if end > length:
            raise DecodeError(f"packed transactions truncated at byte {length}")
        image = data[start:end]
        key = first_text(d, start, end, data) if key_of is None else key_of(image)
        if key is None:
            return at, left
        if d[at] == INSERT:
            if key in inserts or key in updates:
                raise FoldError
            inserts[key] = image
        else:
            rows = inserts if key in inserts else updates
            if key in rows:
                if is_whole(d, start, end):
                    earlier.pop(key, None)  # it says all that they said: a hot row does not pile up
                else:
                    earlier.setdefault(key, []).append(rows[key])
            elif key in deletes:
                raise FoldError
            rows[key] = image
        at = end
        left -= 1
    return at, 0


cdef bint is_whole(const unsigned char *d, Py_ssize_t at, Py_ssize_t end) noexcept nogil:
    """Whether all columns of a row travelled."""
    cdef int columns
    if end - at < 2:
        return False
    columns = d[at] << 8 | d[at + 1]
    at += 2
    while columns > 0:
        columns -= 1
        if end - at < 1 or d[at] == c'u':
            return False
        if d[at] != c't':
            at += 1
            continue
        if end - at < 5:
            return False
        at += 5 + <Py_ssize_t> be32(d + at + 1)
    return at == end


cdef object first_text(const unsigned char *d, Py_ssize_t start, Py_ssize_t end, bytes data):
    """The first value of a row, if that is a text; else `None`."""
    cdef Py_ssize_t size
    if end - start < 7 or d[start + 2] != c't':
        return None
    size = <Py_ssize_t> be32(d + start + 3)
    return data[start + 7 : start + 7 + size] if end - start - 7 >= size else None

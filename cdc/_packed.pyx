# cython: language_level=3, boundscheck=False, wraparound=False
"""What takes `cdc.packed` apart, compiled.

Built where a C compiler is there when the package is installed; without it everything works the same, but slower.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from cdc.change import Change, Transaction
from cdc.errors import DecodeError

cdef enum:
    SUMMARY_BYTES = 45
    TRANSACTION_BYTES = 37
    CHANGE_BYTES = 4
    LENGTH_BYTES = 4


def unpack(bytes data):
    """See `cdc.packed.unpack_in_python`."""
    cdef const unsigned char *d = data
    cdef Py_ssize_t length = len(data), at = SUMMARY_BYTES, part
    cdef uint32_t count, size
    cdef const unsigned char *head
    cdef list found = [], changes, images
    while at < length:
        if length - at < TRANSACTION_BYTES:
            raise truncated(length)
        head = d + at
        at += TRANSACTION_BYTES
        changes = []
        for count in range(u32(head + 32)):
            if length - at < CHANGE_BYTES:
                raise truncated(length)
            operation, table, parts = d[at], d[at + 1] | d[at + 2] << 8, d[at + 3]
            at += CHANGE_BYTES
            images = [None, None, None]
            for part in range(3):
                if parts >> part & 1:
                    if length - at < LENGTH_BYTES:
                        raise truncated(length)
                    size = u32(d + at)
                    at += LENGTH_BYTES
                    if length - at < <Py_ssize_t> size:
                        raise truncated(length)
                    images[part] = data[at : at + <Py_ssize_t> size]
                    at += size
            changes.append(Change(operation, table, *images))
        found.append(
            Transaction(
                u64(head), u64(head + 8), <int64_t> u64(head + 16), u32(head + 24), u32(head + 28), head[36] != 0, changes
            )
        )
    return found


def transactions_at(bytes data, list places):
    """See `cdc.packed.transactions_at_in_python`."""
    cdef const unsigned char *d = data
    cdef Py_ssize_t length = len(data), at = SUMMARY_BYTES, start, place
    cdef list found = []
    for place in places:
        while at <= place:
            start, at = at, end_of(d, at, length)
            if at < 0:
                raise truncated(length)
            if place < at:
                found.append((start, at))
    return found


cdef Py_ssize_t end_of(const unsigned char *d, Py_ssize_t at, Py_ssize_t length) noexcept nogil:
    """Where the transaction ends that begins at a byte; -1 if it does not."""
    cdef uint32_t left
    cdef int parts
    if length - at < TRANSACTION_BYTES:
        return -1
    left = u32(d + at + 32)
    at += TRANSACTION_BYTES
    while left > 0:
        left -= 1
        if length - at < CHANGE_BYTES:
            return -1
        parts = d[at + 3] & 7
        at += CHANGE_BYTES
        while parts:
            if parts & 1:
                if length - at < LENGTH_BYTES:
                    return -1
                at += LENGTH_BYTES + <Py_ssize_t> u32(d + at)
                if at > length:
                    return -1
            parts >>= 1
    return at


cdef object truncated(Py_ssize_t length):
    return DecodeError(f"packed transactions truncated at byte {length}")


cdef inline uint32_t u32(const unsigned char *data) noexcept nogil:
    return <uint32_t> data[0] | <uint32_t> data[1] << 8 | <uint32_t> data[2] << 16 | <uint32_t> data[3] << 24


cdef inline uint64_t u64(const unsigned char *data) noexcept nogil:
    return <uint64_t> u32(data) | <uint64_t> u32(data + 4) << 32

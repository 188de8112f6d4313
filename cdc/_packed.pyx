# cython: language_level=3, boundscheck=False, wraparound=False
"""What takes `cdc.packed_rows` and `cdc.packed_documents` apart, compiled.

Built where a C compiler is there when the package is installed; without it everything works the same, but slower.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint32_t

from cdc cimport _documents
from cdc._documents cimport Document, read_document
from cdc._integers cimport u32, u64
from cdc.change import Change, Delta, Transaction
from cdc.errors import DecodeError

cdef enum:
    SUMMARY_BYTES = 45
    TRANSACTION_BYTES = 37
    CHANGE_BYTES = 4
    LENGTH_BYTES = 4


def unpack_rows(bytes data):
    """See `cdc.packed_rows.unpack_in_python`."""
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


def rows_at(bytes data, list places):
    """See `cdc.packed_rows.transactions_at_in_python`."""
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


def unpack_documents(bytes data):
    """See `cdc.packed_documents.unpack_in_python`."""
    cdef const unsigned char *d = data
    cdef Py_ssize_t length = len(data), at = _documents.SUMMARY_BYTES
    cdef Document found
    cdef list transactions = []
    cdef object commit_time
    while at < length:
        at = read_document(d, length, at, &found)
        if at < 0:
            raise truncated(length)
        token = document(d, found.token)
        after = document(d, found.after) if found.after else None
        delta = Delta(document(d, found.delta)) if found.delta else None
        change = Change(found.operation, found.table, document(d, found.key), None, after, delta)
        commit_time = found.milliseconds  # a Python number before it grows: a hostile one must not wrap around
        transactions.append(Transaction(token, token, commit_time * 1000, 0, 0, True, [change]))
    return transactions


cdef inline bytes document(const unsigned char *d, Py_ssize_t at):
    return PyBytes_FromStringAndSize(<const char *> d + at, u32(d + at))


cdef object truncated(Py_ssize_t length):
    return DecodeError(f"packed transactions truncated at byte {length}")

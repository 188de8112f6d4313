# cython: language_level=3
"""How changes lie in `cdc.packed_documents`, for what is compiled."""

from libc.stdint cimport int64_t, uint32_t

from cdc._integers cimport u32, u64

cdef enum:
    SUMMARY_BYTES = 16
    HEAD_BYTES = 12
    AFTER = 1
    DELTA = 2
    SMALLEST = 5  # bytes of an empty document


cdef struct Document:
    int operation
    Py_ssize_t table
    int64_t milliseconds
    Py_ssize_t token, key, after, delta  # where they begin; after, delta: 0 where there is none


cdef inline Py_ssize_t document_end(const unsigned char *d, Py_ssize_t length, Py_ssize_t at) noexcept nogil:
    """Where the document ends that begins at a byte; -1 if none can, or `at` is below zero."""
    cdef uint32_t size
    if at < 0 or length - at < SMALLEST:
        return -1
    size = u32(d + at)
    return at + <Py_ssize_t> size if SMALLEST <= size and <Py_ssize_t> size <= length - at else -1


cdef inline Py_ssize_t read_document(
    const unsigned char *d, Py_ssize_t length, Py_ssize_t at, Document *found
) noexcept nogil:
    """Read the change that begins at a byte; returns where it ends, -1 where it does not."""
    cdef int parts
    if length - at < HEAD_BYTES:
        return -1
    found.operation, parts = d[at], d[at + 1]
    found.table = d[at + 2] | d[at + 3] << 8
    found.milliseconds = <int64_t> u64(d + at + 4)
    found.token = at + HEAD_BYTES
    found.key = document_end(d, length, found.token)
    at = document_end(d, length, found.key)
    found.after = found.delta = 0
    if parts & AFTER:
        found.after, at = at, document_end(d, length, at)
    if parts & DELTA:
        found.delta, at = at, document_end(d, length, at)
    return at

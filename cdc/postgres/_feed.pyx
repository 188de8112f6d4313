# cython: language_level=3, boundscheck=False, wraparound=False
"""What a feed does with every row, compiled: `JsonObject` of `cdc.postgres.json_object`, and what makes columns of
`cdc.postgres.copy_fields`.

Built where a C compiler is there when the package is installed; without it everything works the same, but slower. What
is rare, or malformed, is left to Python.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy

from cdc.postgres import json_values, row

cdef enum:
    OTHER = 0
    TEXT = 1
    NUMBER = 2


cdef struct Piece:
    const char *prefix
    Py_ssize_t prefix_size
    const char *value
    Py_ssize_t size
    bint quoted


cdef object UNCHANGED = row.UNCHANGED


cdef class JsonObject:
    """See `cdc.postgres.json_object.JsonObjectInPython`."""

    cdef list columns, kinds

    def __init__(self, columns):
        self.columns = [tuple(column) for column in columns]
        self.kinds = [kind_of(show) for _, _, show in self.columns]

    def of(self, tuple values):
        """See there."""
        cdef Py_ssize_t count = len(self.columns), n, used = 0, size = 2
        cdef Piece *pieces = <Piece *> PyMem_Malloc((count + 1) * sizeof(Piece))
        cdef list kept = []
        cdef bytes prefix, value, made
        cdef char *at
        cdef int kind
        if pieces is NULL:
            raise MemoryError
        try:
            for n in range(count):
                index, prefix, show = self.columns[n]
                found = values[index]
                if found is UNCHANGED:
                    continue
                value, kind = b"null", OTHER
                if found is not None:
                    value, kind = found, self.kinds[n]
                    if not is_plain(value, kind):
                        value, kind = show(value), OTHER
                        kept.append(value)
                pieces[used].prefix, pieces[used].prefix_size = PyBytes_AS_STRING(prefix), PyBytes_GET_SIZE(prefix)
                pieces[used].value, pieces[used].size = PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value)
                pieces[used].quoted = kind == TEXT
                size += pieces[used].prefix_size + pieces[used].size + 2 * pieces[used].quoted + (used > 0)
                used += 1
            made = PyBytes_FromStringAndSize(NULL, size)
            at = PyBytes_AS_STRING(made)
            at[0] = b"{"
            at += 1
            for n in range(used):
                if n:
                    at[0] = b","
                    at += 1
                at = put(at, pieces[n].prefix, pieces[n].prefix_size)
                if pieces[n].quoted:
                    at[0] = b'"'
                    at += 1
                at = put(at, pieces[n].value, pieces[n].size)
                if pieces[n].quoted:
                    at[0] = b'"'
                    at += 1
            at[0] = b"}"
        finally:
            PyMem_Free(pieces)
        return made


def texts(values):
    """See `cdc.postgres.copy_fields`."""
    cdef const char *utf8
    cdef Py_ssize_t size
    cdef list found = []
    for value in values:
        if value is None:
            found.append(NULL_FIELD)
            continue
        utf8 = PyUnicode_AsUTF8AndSize(value, &size)
        found.append(with_nul(value) if memchr(utf8, 0, size) else sized_field(utf8, size))
    return found


def blobs(values):
    """See `cdc.postgres.copy_fields`."""
    cdef bytes data
    cdef list found = []
    for value in values:
        if value is None:
            found.append(NULL_FIELD)
        else:
            data = value
            found.append(sized_field(PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data)))
    return found


def numbers(values):
    """See `cdc.postgres.copy_fields`."""
    cdef char field[12]
    cdef uint64_t number
    cdef int n
    cdef list found = []
    put_size(field, 8)
    for value in values:
        if value is None:
            found.append(NULL_FIELD)
            continue
        number = <uint64_t> <int64_t> value
        for n in range(8):
            field[4 + n] = <char> (number >> 8 * (7 - n) & 0xFF)
        found.append(PyBytes_FromStringAndSize(field, 12))
    return found


cdef bytes with_nul(value):
    from cdc.postgres import copy_fields  # which imports this module

    return copy_fields.text_field(value)


cdef bytes NULL_FIELD = b"\xff\xff\xff\xff"


cdef inline bytes sized_field(const char *data, Py_ssize_t size):
    cdef bytes made = PyBytes_FromStringAndSize(NULL, 4 + size)
    cdef char *at = PyBytes_AS_STRING(made)
    if size > 0x7FFFFFFF:
        raise OverflowError(size)
    put_size(at, <uint32_t> size)
    memcpy(at + 4, data, size)
    return made


cdef inline void put_size(char *at, uint32_t size) noexcept nogil:
    cdef int n
    for n in range(4):
        at[n] = <char> (size >> 8 * (3 - n) & 0xFF)


cdef int kind_of(show):
    if show is json_values.text:
        return TEXT
    if show is json_values.number:
        return NUMBER
    return OTHER


cdef bint is_plain(bytes value, int kind) noexcept:
    """Whether it is a text that is its own JSON between quotes, or a number in JSON's form."""
    cdef const unsigned char *d = value
    cdef Py_ssize_t size = len(value), at = 0, n
    if kind == TEXT:
        for n in range(size):
            if d[n] < 0x20 or d[n] > 0x7E or d[n] == b'"' or d[n] == b"\\":
                return False
        return True
    if kind != NUMBER:
        return False
    if at < size and d[at] == b"-":
        at += 1
    if at >= size or not is_digit(d[at]) or (d[at] == b"0" and at + 1 < size and is_digit(d[at + 1])):
        return False
    at = behind_digits(d, at, size)
    if at < size and d[at] == b".":
        if at + 1 >= size or not is_digit(d[at + 1]):
            return False
        at = behind_digits(d, at + 1, size)
    return at == size  # with an exponent it is left to Python


cdef inline bint is_digit(unsigned char byte) noexcept nogil:
    return b"0" <= byte <= b"9"


cdef inline Py_ssize_t behind_digits(const unsigned char *d, Py_ssize_t at, Py_ssize_t size) noexcept nogil:
    while at < size and is_digit(d[at]):
        at += 1
    return at


cdef inline char *put(char *at, const char *data, Py_ssize_t size) noexcept nogil:
    memcpy(at, data, size)
    return at + size

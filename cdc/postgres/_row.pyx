# cython: language_level=3, boundscheck=False, wraparound=False
"""`decode_row` of `cdc.postgres.row`, compiled.

Built where a C compiler is there when the package is installed; without it everything works the same, but slower. What
is malformed is left to Python.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.ref cimport Py_INCREF
from cpython.tuple cimport PyTuple_New, PyTuple_SET_ITEM

from cdc._integers cimport be32

cdef object UNCHANGED = False  # as it is there


def decode_row(bytes image):
    """See `cdc.postgres.row.decode_row_in_python`."""
    cdef const unsigned char *d = image
    cdef Py_ssize_t length = len(image), at = 2, size, n, count
    cdef tuple values
    cdef object value
    if length < 2:
        return malformed(image)
    count = d[0] << 8 | d[1]
    if count > length - 2:
        return malformed(image)
    values = PyTuple_New(count)
    for n in range(count):
        value = None
        if at >= length:
            at = length + 1
        elif d[at] == b"t":
            size = <Py_ssize_t> be32(d + at + 1) if length - at >= 5 else length
            if size > length - at - 5:
                at = length + 1
            else:
                value = PyBytes_FromStringAndSize(<const char *> d + at + 5, size)
                at += 5 + size
        elif d[at] == b"u":
            value = UNCHANGED
            at += 1
        elif d[at] == b"n":
            at += 1
        else:
            at = length + 1
        Py_INCREF(value)
        PyTuple_SET_ITEM(values, n, value)
    return values if at == length else malformed(image)


cdef malformed(bytes image):
    from cdc.postgres import row  # which imports this module

    return row.decode_row_in_python(image)

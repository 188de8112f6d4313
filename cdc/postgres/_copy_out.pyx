# cython: language_level=3, boundscheck=False, wraparound=False
"""What is done for every row of a copy: it is taken from libpq, and put behind the one before.

Built where a C compiler is there when the package is installed; `cdc.postgres.copy_out` does the same without it.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy

ctypedef int (*GetCopyData)(void *, char **, int) noexcept nogil
ctypedef void (*FreeMemory)(void *) noexcept nogil


def take(uintptr_t connection, uintptr_t get_copy_data, uintptr_t free_memory, Py_ssize_t max_bytes):
    """Take what libpq holds, up to about so many bytes.

    Returns the rows behind each other, and what PQgetCopyData said last: 0 if it holds no more now, below if the copy
    has ended. Other threads run meanwhile.
    """
    cdef GetCopyData get = <GetCopyData> get_copy_data
    cdef FreeMemory release = <FreeMemory> free_memory
    cdef Py_ssize_t size = 0, capacity = max_bytes + (max_bytes >> 2)
    cdef char *data = <char *> malloc(capacity)
    cdef char *larger
    cdef char *row = NULL
    cdef int length = 0
    cdef bint fits = data is not NULL
    try:
        with nogil:
            while fits and size < max_bytes:
                length = get(<void *> connection, &row, 1)
                if length <= 0:
                    break
                if size + length > capacity:
                    capacity = size + length
                    larger = <char *> realloc(data, capacity)
                    fits = larger is not NULL
                    if fits:
                        data = larger
                if fits:
                    memcpy(data + size, row, length)
                    size += length
                release(row)
        if not fits:
            raise MemoryError
        return PyBytes_FromStringAndSize(data, size), length
    finally:
        free(data)

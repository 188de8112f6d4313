# cython: language_level=3, boundscheck=False, wraparound=False
"""`array_items` and `Items` of `cdc.mongodb.walk` and `PlainEvents` of `cdc.mongodb.plain_events`, compiled.

Built where a C compiler is there when the package is installed; without it everything works the same, but slower.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy

from cdc._documents cimport AFTER, DELTA, HEAD_BYTES, SMALLEST, SUMMARY_BYTES
from cdc._integers cimport u32
from cdc.errors import DecodeError
from cdc.packed_documents import PackedDocuments

cdef enum:
    REPLACE = -1
    INSERT = 0
    UPDATE = 1
    DELETE = 2
    MOST_TABLES = 0xFFFF
    FIRST_BYTES = 65536  # of the buffer


cdef struct Part:
    Py_ssize_t start
    Py_ssize_t end


cdef struct Plain:
    int operation
    int64_t milliseconds  # of the commit, since 1970
    Part token, after, namespace, key, description  # start is 0 where there is none


cdef class Items:
    """See `cdc.mongodb.walk.array_items_in_python`: an item becomes an object when it is asked for."""

    cdef bytes data
    cdef Part *parts
    cdef Py_ssize_t count

    def __cinit__(self, bytes data not None, Py_ssize_t at):
        cdef const unsigned char *d = data
        cdef Py_ssize_t length = len(data), last, start, capacity = 0
        cdef const void *found
        cdef uint32_t size
        self.data = data
        if at < 0 or length - at < SMALLEST or at + <Py_ssize_t> u32(d + at) > length or u32(d + at) < SMALLEST:
            raise DecodeError(f"BSON array truncated at byte {at}")
        last = at + <Py_ssize_t> u32(d + at) - 1
        if d[last] != 0:
            raise DecodeError(f"BSON array at byte {at} is not ended by a zero")
        at += 4
        while at < last:
            if d[at] != 3:
                raise DecodeError(f"array item at byte {at} is no document but of type 0x{d[at]:02x}")
            found = memchr(d + at + 1, 0, last - at - 1)
            if found is NULL:
                raise DecodeError(f"BSON array truncated at byte {at}")
            start = <const unsigned char *> found - d + 1
            if last - start < SMALLEST:
                raise DecodeError(f"BSON array truncated at byte {at}")
            size = u32(d + start)
            at = start + <Py_ssize_t> size
            if size < SMALLEST or at > last:
                raise DecodeError(f"BSON document at byte {start}: its length is said to be {size}")
            if self.count == capacity:
                capacity = self._grow(capacity)
            self.parts[self.count].start = start
            self.parts[self.count].end = at
            self.count += 1

    cdef Py_ssize_t _grow(self, Py_ssize_t capacity) except -1:
        capacity = 2 * capacity + 64
        cdef Part *larger = <Part *> PyMem_Realloc(self.parts, capacity * sizeof(Part))
        if larger is NULL:
            raise MemoryError
        self.parts = larger
        return capacity

    def __dealloc__(self):
        PyMem_Free(self.parts)

    def __len__(self):
        return self.count

    def __getitem__(self, Py_ssize_t index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        return part_of(<const unsigned char *> PyBytes_AS_STRING(self.data), &self.parts[index])


def array_items(bytes data, Py_ssize_t at=0):
    """See `cdc.mongodb.walk.array_items`."""
    return list(Items(data, at))


cdef class PlainEvents:
    """See `cdc.mongodb.plain_events.PlainEventsInPython`: what is taken is packed at once."""

    cdef char *packed
    cdef Py_ssize_t size, capacity, last
    cdef uint32_t counts[3]

    def __dealloc__(self):
        PyMem_Free(self.packed)

    def __bool__(self):
        return self.size > 0

    def take(self, events, Py_ssize_t at, Py_ssize_t room, dict table_of):
        """See there."""
        cdef Py_ssize_t count = len(events), size = 0, namespace_size = -1, length
        cdef const unsigned char *d
        cdef const unsigned char *known = NULL
        cdef const unsigned char *passed = NULL
        cdef Items items = events if type(events) is Items else None
        cdef Plain plain
        cdef Part token
        cdef bytes raw = None, held = None, namespace = b""
        cdef object table = None
        token.start = 0
        while at < count and size < room:
            if items is not None:
                d = <const unsigned char *> PyBytes_AS_STRING(items.data) + items.parts[at].start
                length = items.parts[at].end - items.parts[at].start
            else:
                raw = events[at]
                d, length = raw, len(raw)
            if not read(d, length, &plain):
                break
            if plain.namespace.end - plain.namespace.start != namespace_size or memcmp(
                d + plain.namespace.start, known, namespace_size
            ):
                namespace = part_of(d, &plain.namespace)
                known, namespace_size = namespace, len(namespace)
                table = table_of.get(namespace)
            if table is None or table > MOST_TABLES:
                break
            at += 1
            passed, token, held = d, plain.token, raw
            if table < 0:
                continue
            size += length
            self._add(d, &plain, table)
        return at, size, part_of(passed, &token) if token.start else None

    def drain(self):
        """See there."""
        cdef bytes data
        if not self.size:
            return []
        put_u32(self.packed, self.counts[INSERT])
        put_u32(self.packed + 4, self.counts[UPDATE])
        put_u32(self.packed + 8, self.counts[DELETE])
        put_u32(self.packed + 12, <uint32_t> self.last)
        data = PyBytes_FromStringAndSize(self.packed, self.size)
        self.size = 0
        return PackedDocuments(data)

    cdef int _add(self, const unsigned char *d, const Plain *plain, int table) except -1:
        cdef Py_ssize_t needed = HEAD_BYTES
        cdef int operation = UPDATE if plain.operation == REPLACE else plain.operation
        cdef char *at
        if not self.size:
            self.size = SUMMARY_BYTES
            self.counts[INSERT] = self.counts[UPDATE] = self.counts[DELETE] = 0
        needed += length_of(&plain.token) + length_of(&plain.key) + length_of(&plain.after)
        needed += length_of(&plain.description)
        if self.capacity - self.size < needed:
            self._grow(needed)
        at = self.packed + self.size
        self.last = self.size
        self.size += needed
        self.counts[operation] += 1
        at[0] = operation
        at[1] = (AFTER if plain.after.start else 0) | (DELTA if plain.description.start else 0)
        at[2], at[3] = <char> (table & 0xFF), <char> (table >> 8)
        put_u32(at + 4, <uint32_t> <uint64_t> plain.milliseconds)
        put_u32(at + 8, <uint32_t> (<uint64_t> plain.milliseconds >> 32))
        at = put(at + HEAD_BYTES, d, &plain.token)
        at = put(at, d, &plain.key)
        at = put(at, d, &plain.after)
        put(at, d, &plain.description)
        return 0

    cdef int _grow(self, Py_ssize_t needed) except -1:
        cdef Py_ssize_t capacity = 2 * self.capacity + needed + FIRST_BYTES
        cdef char *larger = <char *> PyMem_Realloc(self.packed, capacity)
        if larger is NULL:
            raise MemoryError
        self.packed, self.capacity = larger, capacity
        return 0


cdef inline Py_ssize_t length_of(const Part *part) noexcept nogil:
    return part.end - part.start if part.start else 0


cdef inline char *put(char *at, const unsigned char *d, const Part *part) noexcept nogil:
    cdef Py_ssize_t size = length_of(part)
    memcpy(at, d + part.start, size)
    return at + size


cdef inline void put_u32(char *at, uint32_t value) noexcept nogil:
    cdef int n
    for n in range(4):
        at[n] = <char> (value >> 8 * n & 0xFF)


cdef inline bytes part_of(const unsigned char *d, const Part *part):
    return PyBytes_FromStringAndSize(<const char *> d + part.start, part.end - part.start)


cdef bint read(const unsigned char *d, Py_ssize_t length, Plain *plain) noexcept nogil:
    """Read an event whose fields come in the order in which servers write them; false if it is any other."""
    cdef Py_ssize_t at = 4, seconds_at
    plain.after.start = plain.description.start = 0
    if not document(d, length, &at, b"\x03_id\x00", 5, &plain.token):
        return False
    if not has(d, length, at, b"\x02operationType\x00", 15) or length - at < 15 + 4 + 8 + 13 + 8:
        return False
    at += 15
    if u32(d + at) == 7:
        if not memcmp(d + at + 4, b"insert\x00", 7):
            plain.operation = INSERT
        elif not memcmp(d + at + 4, b"update\x00", 7):
            plain.operation = UPDATE
        elif not memcmp(d + at + 4, b"delete\x00", 7):
            plain.operation = DELETE
        else:
            return False
        at += 11
    elif u32(d + at) == 8 and not memcmp(d + at + 4, b"replace\x00", 8):
        plain.operation = REPLACE
        at += 12
    else:
        return False
    if memcmp(d + at, b"\x11clusterTime\x00", 13):
        return False
    seconds_at = at + 13 + 4
    at += 13 + 8
    if has(d, length, at, b"\x05collectionUUID\x00", 16):  # with showExpandedEvents
        if length - at < 21:
            return False
        at += 21 + <Py_ssize_t> u32(d + at + 16)
    if has(d, length, at, b"\x09wallTime\x00", 10) and length - at >= 18:
        plain.milliseconds = <int64_t> (<uint64_t> u32(d + at + 14) << 32 | u32(d + at + 10))
        at += 18
    else:
        plain.milliseconds = <int64_t> u32(d + seconds_at) * 1000
    if has(d, length, at, b"\x0afullDocument\x00", 14):
        at += 14
    elif has(d, length, at, b"\x03fullDocument\x00", 14) and not document(
        d, length, &at, b"\x03fullDocument\x00", 14, &plain.after
    ):
        return False
    if not document(d, length, &at, b"\x03ns\x00", 4, &plain.namespace):
        return False
    if not document(d, length, &at, b"\x03documentKey\x00", 13, &plain.key):
        return False
    if plain.operation == UPDATE:
        if not document(d, length, &at, b"\x03updateDescription\x00", 19, &plain.description):
            return False
    elif plain.operation != DELETE and not plain.after.start:
        return False
    return at == length - 1


cdef inline bint document(
    const unsigned char *d, Py_ssize_t length, Py_ssize_t *at, const char *name, Py_ssize_t name_size, Part *part
) noexcept nogil:
    """Step over a document of this name (with its type), and note where it is; false if there is none."""
    cdef Py_ssize_t start = at[0] + name_size
    cdef uint32_t size
    if not has(d, length, at[0], name, name_size) or length - start < SMALLEST:
        return False
    size = u32(d + start)
    if size < SMALLEST or <Py_ssize_t> size > length - start:
        return False
    part.start = start
    part.end = at[0] = start + <Py_ssize_t> size
    return True


cdef inline bint has(
    const unsigned char *d, Py_ssize_t length, Py_ssize_t at, const char *name, Py_ssize_t name_size
) noexcept nogil:
    """Whether these bytes are there."""
    return at <= length - name_size and not memcmp(d + at, name, name_size)

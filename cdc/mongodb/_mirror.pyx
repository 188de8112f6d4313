# cython: language_level=3, boundscheck=False, wraparound=False
"""What a mirror does with every change, compiled: `Fold` and `add_all` of `cdc.mongodb.fold`, `replacements` and
`is_insertable` of `cdc.mongodb.delta`.

Built where a C compiler is there when the package is installed; without it everything works the same, but slower. What
is rare, or no BSON, is left to Python.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int32_t, int64_t
from libc.string cimport memchr, memcmp, memcpy

from cdc import packed
from cdc._documents cimport SMALLEST, SUMMARY_BYTES, Document, read_document
from cdc._integers cimport u32, u64
from cdc.change import Change, Delta
from cdc.mongodb import equality
from cdc.mongodb.folded import Folded
from cdc.packed_documents import PackedDocuments

cdef enum:
    INSERT = 0
    DELETE = 2
    MESSAGE = 4
    STATEMENT = 20  # bytes of a replacement's statement beside the key and the document

cdef enum:  # what is to be known of a document
    ZERO_TIMESTAMP = 1
    DOLLAR = 2
    UNKNOWN = 4


cdef class Fold:
    """See `cdc.mongodb.fold.FoldInPython`."""

    cdef dict last, deltas
    cdef set born, died

    def __init__(self):
        self.last, self.deltas = {}, {}
        self.born, self.died = set(), set()

    def __bool__(self):
        return bool(self.last or self.deltas)

    def add(self, change):
        """Take a change."""
        self.take(change, change.operation)

    cdef take(self, change, int operation):
        cdef bytes document_key = change.key
        if operation != DELETE and change.after is None:
            self.deltas.setdefault(key_of(document_key), []).append(change)
        else:
            self.put(operation, document_key, change.after)

    cdef take_packed(self, const unsigned char *d, const Document *found):
        cdef bytes document_key = part_of(d, found.key)
        if found.operation != DELETE and not found.after:
            self.deltas.setdefault(key_of(document_key), []).append(change_of(d, found))
        else:
            self.put(found.operation, document_key, part_of(d, found.after) if found.after else None)

    cdef put(self, int operation, bytes document_key, after):
        cdef object key = key_of(document_key)
        if operation == INSERT:
            if key not in self.last and not (self.deltas and key in self.deltas):
                self.born.add(key)
        elif operation == DELETE:
            self.died.add(key)
        self.last[key] = (document_key, after)
        if self.deltas:
            self.deltas.pop(key, None)

    def folded(self):
        """The effect of all that was added."""
        cdef list deletes = [], replaces = [], inserts = [], deltas = [], changes
        cdef Py_ssize_t expected_deletes = 0
        cdef tuple document
        cdef bytes document_key, after
        cdef bint born
        for key, document in self.last.items():
            document_key, after = document
            born = key in self.born
            if after is None:
                deletes.append(document_key)
                expected_deletes += not born
            elif (self.died and key in self.died) or not (
                type(key) is bytes or begins_with(after, document_key) or equality.same_bytes(document_key, after)
            ):
                deletes.append(document_key)
                expected_deletes += not born
                inserts.append(document)
            elif born:
                inserts.append(document)
            else:
                replaces.append(document)
        for changes in self.deltas.values():
            deltas += changes
        return Folded(deletes, replaces, inserts, deltas, expected_deletes)


def add_all(transactions, list takers):
    """See `cdc.mongodb.fold.add_all_in_python`."""
    cdef Py_ssize_t table
    cdef int operation
    if type(transactions) is PackedDocuments:
        add_packed(transactions.data, takers)
        return
    for transaction in transactions:
        for change in transaction.changes:
            operation = change.operation
            if operation == MESSAGE:
                continue
            table = change.table
            if not 0 <= table < len(takers):
                raise IndexError(table)
            taker = takers[table]
            if type(taker) is Fold:
                (<Fold> taker).take(change, operation)
            else:
                taker.append(change)


cdef add_packed(bytes data, list takers):
    """The same of `cdc.packed_documents`, whose changes become objects only where they are kept as such."""
    cdef const unsigned char *d = data
    cdef Py_ssize_t length = len(data), at = SUMMARY_BYTES
    cdef Document found
    while at < length:
        at = read_document(d, length, at, &found)
        if at < 0:
            raise packed.truncated(data)
        if found.table >= len(takers):
            raise IndexError(found.table)
        taker = takers[found.table]
        if type(taker) is Fold:
            (<Fold> taker).take_packed(d, &found)
        else:
            taker.append(change_of(d, &found))


cdef change_of(const unsigned char *d, const Document *found):
    return Change(
        found.operation,
        found.table,
        part_of(d, found.key),
        None,
        part_of(d, found.after) if found.after else None,
        Delta(part_of(d, found.delta)) if found.delta else None,
    )


cdef inline bytes part_of(const unsigned char *d, Py_ssize_t at):
    return PyBytes_FromStringAndSize(<const char *> d + at, u32(d + at))


def replacements(documents):
    """See `cdc.mongodb.delta.replacements_in_python`."""
    cdef list statements = []
    cdef bytes key, image
    for key, image in documents:
        if look_at(image) == 0 and is_only_id(key):
            statements.append(statement(key, image))
        else:
            from cdc.mongodb import delta  # which imports this module

            statements += delta.replacement(equality.id_only(key), image)
    return statements


def is_insertable(bytes image):
    """See `cdc.mongodb.delta.is_insertable_in_python`."""
    cdef int found = look_at(image)
    if not found & UNKNOWN:
        return not found & ZERO_TIMESTAMP
    from cdc.mongodb import delta

    return delta.is_insertable_in_python(image)


cdef object key_of(bytes document_key):
    """See `cdc.mongodb.equality.key_of`."""
    cdef const unsigned char *d = document_key
    if not is_only_id(document_key):
        return equality.key_of(document_key)
    if d[4] == 0x10:
        return <int32_t> u32(d + 9)
    if d[4] == 0x12:
        return <int64_t> u64(d + 9)
    return document_key


cdef bint is_only_id(bytes document_key):
    """Whether it is of one of the usual types, and all of the key."""
    cdef const unsigned char *d = document_key
    cdef Py_ssize_t size = len(document_key)
    return size >= 14 and not memcmp(d + 5, b"_id\x00", 4) and (
        (d[4] == 0x07 and size == 22)
        or (d[4] == 0x10 and size == 14)
        or (d[4] == 0x12 and size == 18)
        or (d[4] == 0x02 and size == 14 + <Py_ssize_t> u32(d + 9))
    )


cdef bint begins_with(bytes image, bytes document_key):
    """Whether a document begins with all that is in a key."""
    cdef Py_ssize_t size = len(document_key) - 5
    return size >= 0 and len(image) >= size + 4 and not memcmp(
        PyBytes_AS_STRING(image) + 4, PyBytes_AS_STRING(document_key) + 4, size
    )


cdef bytes statement(bytes key, bytes image):
    """`{q: key, u: image, upsert: true}`."""
    cdef Py_ssize_t key_size = len(key), image_size = len(image), size = STATEMENT + key_size + image_size
    cdef bytes made = PyBytes_FromStringAndSize(NULL, size)
    cdef char *at = PyBytes_AS_STRING(made)
    cdef Py_ssize_t n
    for n in range(4):
        at[n] = <char> (size >> 8 * n & 0xFF)
    memcpy(at + 4, b"\x03q\x00", 3)
    memcpy(at + 7, PyBytes_AS_STRING(key), key_size)
    at += 7 + key_size
    memcpy(at, b"\x03u\x00", 3)
    memcpy(at + 3, PyBytes_AS_STRING(image), image_size)
    memcpy(at + 3 + image_size, b"\x08upsert\x00\x01\x00", 10)
    return made


cdef int look_at(bytes image) noexcept:
    """Whether a field's name begins with a dollar, or a field other than `_id` is a timestamp of zero; or `UNKNOWN`."""
    cdef const unsigned char *d = image
    cdef Py_ssize_t at = 4, last = len(image) - 1, name
    cdef const void *end
    cdef int kind, found = 0
    if last < SMALLEST - 1 or <Py_ssize_t> u32(d) != last + 1 or d[last] != 0:
        return UNKNOWN
    while at < last:
        kind = d[at]
        name = at + 1
        end = memchr(d + name, 0, last - name)
        if end is NULL:
            return UNKNOWN
        at = <const unsigned char *> end - d + 1
        if d[name] == b"$":
            found |= DOLLAR
        if kind == 0x11 and last - at >= 8 and not memcmp(d + at, b"\0\0\0\0\0\0\0\0", 8) and not (
            at - name == 4 and not memcmp(d + name, b"_id", 3)
        ):
            found |= ZERO_TIMESTAMP
        at = value_end(d, kind, at, last)
        if at < 0:
            return UNKNOWN
    return found


cdef Py_ssize_t value_end(const unsigned char *d, int kind, Py_ssize_t start, Py_ssize_t limit) noexcept nogil:
    """Where a value ends that must not pass `limit`; below zero where it does, or is of a rare type."""
    cdef Py_ssize_t size
    if kind == 0x10:
        size = 4
    elif kind == 0x01 or kind == 0x09 or kind == 0x11 or kind == 0x12:
        size = 8
    elif kind == 0x08:
        size = 1
    elif kind == 0x0A or kind == 0x06 or kind == 0x7F or kind == 0xFF:
        size = 0
    elif kind == 0x07:
        size = 12
    elif kind == 0x13:
        size = 16
    elif limit - start < 4:
        return -1
    elif kind == 0x02 or kind == 0x0D or kind == 0x0E:
        size = <Py_ssize_t> u32(d + start) + 4
        if size == 4:  # not even the zero at its end
            return -1
    elif kind == 0x03 or kind == 0x04:
        size = u32(d + start)
        if size < SMALLEST:
            return -1
    elif kind == 0x05:
        size = <Py_ssize_t> u32(d + start) + 5
    else:
        return -1
    return start + size if size <= limit - start else -1

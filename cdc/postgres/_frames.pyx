# cython: language_level=3, boundscheck=False, wraparound=False
"""What is done for every message of the stream: it is taken from libpq, and packed where it is a plain row.

Built where a C compiler is there when the package is installed. Without it messages are Python's objects, one by one,
and `cdc.postgres.assembly` puts them together; it does so too with all that is not plain.
"""

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy

from cdc._integers cimport be32, be64, u32

cdef enum:
    DATA_AT = 25  # size of XLogData's header
    BEGIN_BYTES = 21
    COMMIT_BYTES = 26
    ROW_AT = 6  # of a change: behind its kind, its relation and what kind of row comes
    LENGTH_BYTES = 4

    # see cdc.packed_rows
    SUMMARY_BYTES = 45
    TRANSACTION_BYTES = 37
    CHANGE_BYTES = 4
    KEY = 1
    BEFORE = 2
    AFTER = 4
    INSERT = 0
    UPDATE = 1
    DELETE = 2

cdef int64_t POSTGRES_EPOCH_MICROSECONDS = 946_684_800_000_000

ctypedef int (*GetCopyData)(void *, char **, int) noexcept nogil
ctypedef void (*Free)(void *) noexcept nogil


cdef struct Buffer:
    char *data
    Py_ssize_t size
    Py_ssize_t capacity


# reading


def take(uintptr_t connection, uintptr_t get_copy_data, uintptr_t free_memory, Py_ssize_t max_bytes):
    """Take what libpq holds already, up to about so many bytes.

    Returns their number, the XLogData messages as `Frames.data`, where the last one starts in the log, the other messages,
    and whether the stream has ended.
    """
    cdef GetCopyData get = <GetCopyData> get_copy_data
    cdef Free release = <Free> free_memory
    cdef Buffer frames = Buffer(NULL, 0, 0)
    cdef char *message = NULL
    cdef Py_ssize_t size = 0
    cdef uint64_t received = 0
    cdef int length = 0
    cdef bint fits = True
    cdef list others = []
    try:
        with nogil:
            while size < max_bytes and fits:
                length = get(<void *> connection, &message, 1)
                if length <= 0:
                    break
                size += length
                if length > DATA_AT and message[0] == c'w':
                    received = be64(<const unsigned char *> message + 1)
                    fits = add_frame(&frames, message + DATA_AT, length - DATA_AT)
                else:
                    with gil:
                        others.append(message[:length])
                release(message)
        if not fits:
            raise MemoryError
        return size, frames.data[: frames.size] if frames.size else b"", received, others, length < 0
    finally:
        free(frames.data)


cdef bint add_frame(Buffer *frames, const char *message, uint32_t length) noexcept nogil:
    """False where there is no memory."""
    if not make_room(frames, LENGTH_BYTES + <Py_ssize_t> length):
        return False
    put32(frames, length)
    put(frames, message, length)
    return True


# cutting


def first_commit(bytes data, Py_ssize_t at):
    """Where the first Commit begins at or behind `at`; the end of all where there is none."""
    cdef const unsigned char *d = data
    cdef Py_ssize_t length = len(data)
    while at < length and d[at + LENGTH_BYTES] != c'C':
        at += LENGTH_BYTES + <Py_ssize_t> u32(d + at)
    return at


def last_commit(bytes data, Py_ssize_t at):
    """Where the last Commit ends that comes behind `at`; `at` where there is none."""
    cdef const unsigned char *d = data
    cdef Py_ssize_t length = len(data), found = at
    while at < length:
        kind = d[at + LENGTH_BYTES]
        at += LENGTH_BYTES + <Py_ssize_t> u32(d + at)
        if kind == c'C':
            found = at
    return found


# packing


cdef struct Counts:
    uint32_t transactions
    uint32_t changes[3]
    uint64_t first
    uint64_t last
    int64_t commit_time


def pack(bytes data, Py_ssize_t at, Py_ssize_t to, uint64_t end, dict known):
    """Pack whole transactions of nothing but rows, from one place in `Frames.data` up to another.

    Stops before the first one in which there is anything else: one that commits below `end` and so came before, rows of
    relations that are not `known`, all that is no whole row. Returns where it stopped, `PackedRows.data` (empty if no
    transaction with changes was among them), the relations by index of their tables, the end of the last transaction,
    and the size of all messages.
    """
    cdef const unsigned char *d = data
    cdef Buffer packed = Buffer(NULL, 0, 0)
    cdef Counts counts = Counts(0, [0, 0, 0], 0, 0, 0)
    cdef Py_ssize_t size = 0, own = 0, next_at, before, known_before
    cdef uint64_t moved
    cdef list relations = []
    try:
        packed.size = SUMMARY_BYTES
        if not make_room(&packed, 2 * (to - at)):
            raise MemoryError
        while at < to:
            before, known_before = packed.size, len(relations)
            next_at = pack_transaction(d, at, to, end, known, relations, &packed, &counts, &moved, &own)
            if next_at < 0:
                packed.size = before
                del relations[known_before:]
                break
            size += own
            at = next_at
            end = max(end, moved)
        if not counts.transactions:
            return at, b"", relations, end, size
        put_summary(&packed, &counts)
        return at, packed.data[: packed.size], relations, end, size
    finally:
        free(packed.data)


cdef Py_ssize_t pack_transaction(
    const unsigned char *d, Py_ssize_t at, Py_ssize_t to, uint64_t end, dict known, list relations, Buffer *packed,
    Counts *counts, uint64_t *moved, Py_ssize_t *total,
) except -2:
    """Returns where the next one begins; -1 if this one cannot be packed, or is not whole."""
    cdef uint32_t size
    cdef uint32_t changes[3]
    cdef Py_ssize_t start = packed.size
    cdef const unsigned char *begin
    cdef const unsigned char *message
    changes[:] = [0, 0, 0]
    size = u32(d + at)
    begin = d + at + LENGTH_BYTES
    if size != BEGIN_BYTES or begin[0] != c'B' or be64(begin + 1) < end:
        return -1
    at += LENGTH_BYTES + size
    total[0] = size + COMMIT_BYTES
    if not make_room(packed, TRANSACTION_BYTES):
        raise MemoryError
    packed.size += TRANSACTION_BYTES
    at = add_rows(d, at, to, known, relations, packed, changes, total)
    if at >= to or u32(d + at) != COMMIT_BYTES:
        return -1
    message = d + at + LENGTH_BYTES
    if message[0] != c'C':
        return -1
    moved[0] = be64(message + 10)
    if changes[INSERT] or changes[UPDATE] or changes[DELETE]:
        put_transaction(packed, start, begin, moved[0], changes[INSERT] + changes[UPDATE] + changes[DELETE])
        note(counts, begin, changes)
    else:
        packed.size = start
    return at + LENGTH_BYTES + COMMIT_BYTES


def pack_rows(bytes data, Py_ssize_t at, Py_ssize_t to, dict known):
    """Pack the rows that begin at a place in `Frames.data`, inside a transaction, up to what is none, or another place.

    Returns where that is, the changes as they stand in `PackedRows.data`, the relations by index of their tables, the
    numbers of inserts, updates and deletes, and the size of all messages.
    """
    cdef Buffer packed = Buffer(NULL, 0, 0)
    cdef uint32_t changes[3]
    cdef Py_ssize_t size = 0
    cdef list relations = []
    changes[:] = [0, 0, 0]
    try:
        if not make_room(&packed, 2 * (to - at)):
            raise MemoryError
        at = add_rows(data, at, to, known, relations, &packed, changes, &size)
        counts = (changes[INSERT], changes[UPDATE], changes[DELETE])
        return at, packed.data[: packed.size], relations, counts, size
    finally:
        free(packed.data)


cdef Py_ssize_t add_rows(
    const unsigned char *d, Py_ssize_t at, Py_ssize_t to, dict known, list relations, Buffer *packed,
    uint32_t *changes, Py_ssize_t *total,
) except -2:
    """Returns where the first message begins that is no row that can be taken as it is, of a known relation."""
    cdef uint32_t size, relation, cached = 0
    cdef uint16_t index = 0
    cdef bint is_cached = False
    cdef const unsigned char *message
    cdef int operation
    while at < to:
        size = u32(d + at)
        message = d + at + LENGTH_BYTES
        if message[0] == c'C':
            return at
        if message[0] != c'O' and message[0] != c'Y':  # an origin, the name of a type: they say nothing of rows
            if size <= ROW_AT:
                return at
            relation = be32(message + 1)
            if not is_cached or relation != cached:
                if relation not in known:
                    return at
                if relation not in relations:
                    relations.append(relation)
                index = relations.index(relation)
                cached, is_cached = relation, True
            if not make_room(packed, CHANGE_BYTES + 2 * LENGTH_BYTES + <Py_ssize_t> size):
                raise MemoryError
            operation = put_change(packed, message, size, index)
            if operation < 0:
                return at
            changes[operation] += 1
        at += LENGTH_BYTES + size
        total[0] += size
    return at


cdef int put_change(Buffer *packed, const unsigned char *message, Py_ssize_t size, uint16_t index) noexcept nogil:
    """Returns the operation; -1 where this is no change of a row that can be taken as it is."""
    cdef unsigned char kind = message[0], row = message[ROW_AT - 1]
    cdef Py_ssize_t middle
    if kind == c'I' and row == c'N':
        put_head(packed, INSERT, index, AFTER)
        put_part(packed, message + ROW_AT, size - ROW_AT)
        return INSERT
    if kind == c'U' and row == c'N':
        put_head(packed, UPDATE, index, AFTER)
        put_part(packed, message + ROW_AT, size - ROW_AT)
        return UPDATE
    if kind == c'U' and (row == c'K' or row == c'O'):
        middle = row_end(message, ROW_AT, size)
        if middle < 0 or middle + 1 >= size or message[middle] != c'N':
            return -1
        if row == c'O' and leaves_something_out(message, middle + 1, size):
            return -1
        put_head(packed, UPDATE, index, AFTER | (KEY if row == c'K' else BEFORE))
        put_part(packed, message + ROW_AT, middle - ROW_AT)
        put_part(packed, message + middle + 1, size - middle - 1)
        return UPDATE
    if kind == c'D' and (row == c'K' or row == c'O'):
        put_head(packed, DELETE, index, KEY if row == c'K' else BEFORE)
        put_part(packed, message + ROW_AT, size - ROW_AT)
        return DELETE
    return -1


cdef Py_ssize_t row_end(const unsigned char *message, Py_ssize_t at, Py_ssize_t size) noexcept nogil:
    """Where the row ends that begins at `at`; -1 where it does not end."""
    cdef int columns
    if size - at < 2:
        return -1
    columns = message[at] << 8 | message[at + 1]
    at += 2
    while columns > 0:
        columns -= 1
        if at >= size:
            return -1
        if message[at] == c't':
            if size - at < 5:
                return -1
            at += 5 + <Py_ssize_t> be32(message + at + 1)
        elif message[at] == c'n' or message[at] == c'u':
            at += 1
        else:
            return -1
    return at if at <= size else -1


cdef bint leaves_something_out(const unsigned char *message, Py_ssize_t at, Py_ssize_t size) noexcept nogil:
    """Whether a column of the row did not travel, or it is not whole."""
    cdef int columns
    if row_end(message, at, size) != size:
        return True
    columns = message[at] << 8 | message[at + 1]
    at += 2
    while columns > 0:
        columns -= 1
        if message[at] == c'u':
            return True
        at += 5 + <Py_ssize_t> be32(message + at + 1) if message[at] == c't' else 1
    return False


cdef void note(Counts *counts, const unsigned char *begin, const uint32_t *changes) noexcept nogil:
    cdef uint64_t position = be64(begin + 1)
    cdef int operation
    if not counts.transactions:
        counts.first = position
    counts.last = position
    counts.commit_time = <int64_t> be64(begin + 9) + POSTGRES_EPOCH_MICROSECONDS
    counts.transactions += 1
    for operation in range(3):
        counts.changes[operation] += changes[operation]


# writing: there is room


cdef void put_summary(Buffer *packed, const Counts *counts) noexcept nogil:
    cdef Buffer head = Buffer(packed.data, 0, SUMMARY_BYTES)
    cdef int operation
    put32(&head, counts.transactions)
    put32(&head, counts.transactions)
    for operation in range(3):
        put32(&head, counts.changes[operation])
    put64(&head, counts.first)
    put64(&head, counts.last)
    put64(&head, <uint64_t> counts.commit_time)
    head.data[head.size] = 1


cdef void put_transaction(
    Buffer *packed, Py_ssize_t start, const unsigned char *begin, uint64_t end, uint32_t count
) noexcept nogil:
    cdef Buffer head = Buffer(packed.data, start, start + TRANSACTION_BYTES)
    put64(&head, be64(begin + 1))
    put64(&head, end)
    put64(&head, <uint64_t> (<int64_t> be64(begin + 9) + POSTGRES_EPOCH_MICROSECONDS))
    put32(&head, be32(begin + 17))
    put32(&head, 0)
    put32(&head, count)
    head.data[head.size] = 1


cdef inline void put_head(Buffer *packed, int operation, uint16_t index, int parts) noexcept nogil:
    cdef char *head = packed.data + packed.size
    head[0] = operation
    head[1] = index & 255
    head[2] = index >> 8
    head[3] = parts
    packed.size += CHANGE_BYTES


cdef inline void put_part(Buffer *packed, const unsigned char *part, Py_ssize_t length) noexcept nogil:
    put32(packed, <uint32_t> length)
    put(packed, <const char *> part, length)


cdef inline void put(Buffer *buffer, const char *data, Py_ssize_t length) noexcept nogil:
    memcpy(buffer.data + buffer.size, data, length)
    buffer.size += length


cdef inline void put32(Buffer *buffer, uint32_t number) noexcept nogil:
    cdef unsigned char *at = <unsigned char *> buffer.data + buffer.size
    at[0] = number & 255
    at[1] = number >> 8 & 255
    at[2] = number >> 16 & 255
    at[3] = number >> 24
    buffer.size += 4


cdef inline void put64(Buffer *buffer, uint64_t number) noexcept nogil:
    put32(buffer, <uint32_t> number)
    put32(buffer, <uint32_t> (number >> 32))


cdef bint make_room(Buffer *buffer, Py_ssize_t length) noexcept nogil:
    """False where there is no memory."""
    cdef Py_ssize_t capacity = buffer.capacity
    cdef char *data
    if capacity - buffer.size >= length:
        return True
    capacity = 2 * capacity + length + (1 << 16)
    data = <char *> realloc(buffer.data, capacity)
    if data is NULL:
        return False
    buffer.data, buffer.capacity = data, capacity
    return True

-- The retry queue. A row counts once its sink's target has passed `place`; until then the change comes again.
CREATE TABLE parked (
    sink TEXT NOT NULL,
    place INTEGER NOT NULL,         -- its transaction's position if that is a number, else its batch's seq
    ordinal INTEGER NOT NULL,       -- of the change in that transaction, or in that batch
    position NOT NULL,              -- its transaction's
    tables TEXT NOT NULL,           -- JSON: names of what it is about; an empty name stands for a whole schema
    keys BLOB,                      -- msgpack: later changes with one of them wait behind it; NULL: all of its tables
    size INTEGER NOT NULL,          -- of the payload
    created_at REAL NOT NULL,       -- unix seconds, as all times here
    crc INTEGER NOT NULL,           -- of all columns above and the payload
    state TEXT NOT NULL CHECK (state IN ('retrying', 'dead')),
    attempts INTEGER NOT NULL,      -- 0: it only waits behind another one
    next_attempt_at REAL NOT NULL,
    error TEXT NOT NULL,
    payload BLOB NOT NULL,          -- msgpack of a Batch with this change alone
    UNIQUE (sink, place, ordinal)
);

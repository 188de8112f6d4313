-- One file a source. Its format is the number in PRAGMA user_version: any change here, or in queue_parked.sql, needs a new one.
-- Columns without a type keep a position as it is given: an integer (LSN) or a blob (resume token).

CREATE TABLE state (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    queue_id TEXT NOT NULL,
    position,                       -- where the source goes on after a restart; NULL before it ever began
    complete_seq INTEGER NOT NULL,  -- the last batch that ends a transaction; rows above it are dropped at start
    pruned_seq INTEGER NOT NULL,    -- batches up to here are gone, or about to be
    pruned_position,                -- a target older than this cannot be served
    crc INTEGER NOT NULL
);

-- AUTOINCREMENT: a plain rowid would start again at 1 after everything was pruned.
-- The payload stands last: headers are read without it, and SQLite never visits its overflow pages for them.
CREATE TABLE batch (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    prior INTEGER NOT NULL,         -- the predecessor's seq: a missing row is noticed
    position NOT NULL,
    complete INTEGER NOT NULL,
    changes INTEGER NOT NULL,
    size INTEGER NOT NULL,
    created_at REAL NOT NULL,       -- unix seconds, for people and `keep_seconds`; never for order
    crc INTEGER NOT NULL,           -- of all columns above and the payload
    payload BLOB NOT NULL           -- msgpack of the Batch
);

CREATE TABLE cursor (
    sink TEXT PRIMARY KEY,
    seq INTEGER NOT NULL,
    position
) WITHOUT ROWID;

CREATE TABLE fact (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

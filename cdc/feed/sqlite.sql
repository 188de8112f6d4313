-- A feed in a file of its own. {main} and its like stand for the configured name.
-- The format's number is in {state}: any change here needs a new one (cdc.feed.tables).
-- {begins}: ids are larger. Of that the rows in {state} and {pruned} tell: nothing of an earlier feed is here.

CREATE TABLE {state} (
    format INTEGER NOT NULL,
    last_id INTEGER NOT NULL,     -- ids are counted here: they never come back, whatever is removed
    recorded_at INTEGER NOT NULL  -- of that id, in microseconds since 1970
);
INSERT INTO {state} VALUES (1, {begins}, 0);

-- what was recorded later has the larger id: so there is no index by time
-- times are ISO 8601 in UTC; before, after, changed, delta and the scopes are JSON
CREATE TABLE {main} (
    id INTEGER PRIMARY KEY,
    entity_type TEXT NOT NULL,
    entity_id TEXT NOT NULL,
    change_type TEXT NOT NULL,
    location_id TEXT,
    user_id TEXT,
    changed_at TEXT NOT NULL,
    recorded_at TEXT NOT NULL,
    source TEXT NOT NULL,
    position TEXT NOT NULL,
    version INTEGER NOT NULL,
    changed TEXT,
    channel TEXT NOT NULL,
    event TEXT,
    lookup INTEGER NOT NULL,
    truncated INTEGER NOT NULL,
    scope_before TEXT,
    scope_after TEXT,
    delta TEXT,
    before TEXT,                  -- the large ones last: others are read without visiting their overflow pages
    after TEXT
);
CREATE UNIQUE INDEX {main}_source ON {main} (source, position);
CREATE INDEX {main}_history ON {main} (entity_type, entity_id, id);
CREATE INDEX {main}_types ON {main} (entity_type, id);

CREATE TABLE {entities} (
    source TEXT NOT NULL,
    entity_type TEXT NOT NULL,
    key TEXT NOT NULL,
    version INTEGER NOT NULL,
    location_id TEXT,
    scope TEXT,
    known BLOB,
    PRIMARY KEY (source, entity_type, key)
) WITHOUT ROWID;

CREATE TABLE {positions} (
    source TEXT PRIMARY KEY,
    queue_id TEXT NOT NULL,
    seq INTEGER NOT NULL,
    position TEXT NOT NULL
);

CREATE TABLE {pruned} (
    entity_type TEXT NOT NULL,
    channel TEXT NOT NULL,
    through_id INTEGER NOT NULL,
    through_recorded_at INTEGER NOT NULL,
    rows INTEGER NOT NULL,
    PRIMARY KEY (entity_type, channel)
);
INSERT INTO {pruned} VALUES ('', '', {begins}, 0, 0);

-- A feed. {main} and its like stand for the configured name, with its schema.
-- The format's number is in {state}: any change here needs a new one (cdc.feed.tables).

CREATE TABLE {state} (
    format integer NOT NULL,
    last_id bigint NOT NULL,  -- ids are counted here: they never come back, whatever is removed
    recorded_at timestamptz NOT NULL
);
INSERT INTO {state} VALUES (1, 0, 'epoch');

-- json, not jsonb: it stays as it was written, the digits of numbers and \u0000 included
CREATE TABLE {main} (
    id bigint PRIMARY KEY,
    entity_type text NOT NULL,
    entity_id text NOT NULL,
    change_type text NOT NULL,
    location_id text,
    user_id text,
    changed_at timestamptz NOT NULL,
    recorded_at timestamptz NOT NULL,
    source text NOT NULL,
    position text NOT NULL,
    version bigint NOT NULL,
    before json,
    after json,
    changed text[],
    delta json,
    channel text NOT NULL,
    event text,
    lookup boolean NOT NULL,
    truncated boolean NOT NULL,
    scope_before json,
    scope_after json
);
CREATE UNIQUE INDEX {main_source} ON {main} (source, position);
CREATE INDEX {main_history} ON {main} (entity_type, entity_id, id);
CREATE INDEX {main_types} ON {main} (entity_type, id);
-- for queries of applications: what was recorded later has the larger id, by which it is found here
CREATE INDEX {main_recorded} ON {main} USING brin (recorded_at);

-- rows are updated far more often than inserted: room for new versions on the same page
CREATE TABLE {entities} (
    source text NOT NULL,
    entity_type text NOT NULL,
    key bytea NOT NULL,       -- UTF-8: text could not hold every key
    version bigint NOT NULL,
    location_id text,
    scope text,
    known bytea,
    PRIMARY KEY (source, entity_type, key)
) WITH (fillfactor = 80);

CREATE TABLE {positions} (
    source text PRIMARY KEY,
    queue_id text NOT NULL,
    seq bigint NOT NULL,
    position text NOT NULL
);

CREATE TABLE {pruned} (
    entity_type text NOT NULL,
    channel text NOT NULL,
    through_id bigint NOT NULL,
    through_recorded_at timestamptz NOT NULL,
    rows bigint NOT NULL,
    PRIMARY KEY (entity_type, channel)
);

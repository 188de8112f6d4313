"""A stand-in for a MongoDB server: a test tool, for machines on which no `mongod` can be installed.

It speaks the wire protocol over a real socket, so that PyMongo connects to it as to a one-node replica set, and keeps
everything in memory. Tests get a server through the fixtures in `fixture.py`, which prefer a real one. By hand:
`python -m tests.mongod --port 27017 --version 6.0` (see `--help`).

Documents keep the bytes they were written with. Filters (but for `_id`) and most aggregation stages are mongomock's;
the order and equality of `_id`, updates, the oplog, change streams, sessions and fail points are its own.

Where it differs from a real server:

- Filters on fields other than a top-level `_id` follow Python's comparison: True equals 1, Decimal128 is no number,
  strings ignore the collection's collation. `$jsonSchema` knows `required` and top-level `bsonType` only.
- A transaction reads what is committed now, not a snapshot; `atClusterTime` is ignored. It is refused when it writes
  what was changed since it began. A collection that it creates is visible at once. Its events have one clusterTime,
  however many they are (servers split transactions over 16 MB into several oplog entries). Unique indexes are not
  checked again at commit. A drop or rename aborts the open transactions that wrote to the collection instead of
  waiting for them.
- Indexes other than unique ones speed up nothing; `hint`, `min` and `max` are only for `_id`.
- Collations: only strength 1 and 2, by case folding and removal of accents; a query's own collation is ignored.
- Views answer with the whole collection they are on, time series keep what is written as it is; neither has events.
- `collMod`, `create` and `createIndexes` keep options that they do not understand instead of refusing them.
- A change stream delivers the events before one that fails, and fails on the next getMore. There are no shards, and so
  no chunks that move and no changed shard keys. Large transactions and batched inserts are never split or grouped.
- Documents expire only on `cdcTestExpire`. Nothing is journaled, write concerns are accepted and ignored.
- `replSetStepDown` leads back to the same primary after the time asked for; no other node exists, nothing rolls back.
- `cdcTestHoldMajority` holds back change streams only: writes are acknowledged all the same.
- No bulkWrite command (8.0), authentication, compression, explain, sharding, `$out`, `$merge`, `$where`, text or
  geo search.
- Resume tokens have the form of real ones, but doubles that are no whole numbers and Decimal128 in `_id` are written in
  another way than the server's. A token's document key is not looked at when a stream is resumed.
- Error messages are shortened; the codes and labels are those documented.
"""

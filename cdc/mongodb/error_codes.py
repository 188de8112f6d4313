"""What a server's error codes mean for us (MongoDB's `error_codes.yml`, the drivers' change stream specification)."""

from __future__ import annotations

from typing import Final

from cdc.errors import CdcError, FatalError, HistoryLost, PermanentError, ResyncRequired, TransientError

Meaning = tuple[type[CdcError], str]
"""The class of an error, and the hint."""

TRANSIENT_LABELS: Final = frozenset({
    "TransientTransactionError", "RetryableWriteError", "ResumableChangeStreamError", "SystemOverloadedError",
    "RetryableError",
})  # fmt: skip

_AGAIN: Final = "nothing: it is tried again"
_RESYNC: Final = "a larger oplog (`replSetResizeOplog`, or --oplogMinRetentionHours) keeps this from coming back"
_OTHER_STREAM: Final = "the url may lead to another deployment than before"
_LOGIN: Final = "check user, password and authSource in the url; `cdc resume NAME` takes a new password"
_GRANT: Final = "grant the missing privilege; `cdc check` lists what is needed"
REPLICA_SET_HINT: Final = (
    "make it a one-node replica set: start mongod with --replSet rs0 (or replication.replSetName in mongod.conf), "
    "run rs.initiate() once in mongosh, and add ?replicaSet=rs0 to the url"
)
_TOO_LARGE: Final = (
    "an event holds more than 16 MB: use a server that can split it (6.0.9, 7.0 or later), or set full_document "
    "and full_document_before_change to 'off', or exclude the collection"
)
_IMAGES: Final = (
    "the collection does not record the images that the configuration requires, or they have expired: db.runCommand("
    "{collMod: NAME, changeStreamPreAndPostImages: {enabled: true}}); or set 'whenAvailable'"
)
_DOCUMENT: Final = "correct the document, the collection's validator or its indexes"

_TRANSIENT: Final = (
    6, 7, 24, 43, 46, 50, 63, 64, 82, 89, 91, 112, 117, 133, 134, 150, 175, 189, 202, 211, 216, 225, 234, 237, 239,
    246, 251, 262, 267, 290, 314, 317, 384, 9001, 10058, 10107, 11600, 11601, 11602, 12586, 12587, 13388, 13435, 13436,
)  # fmt: skip
"""HostUnreachable, HostNotFound, LockTimeout, CursorNotFound, LockBusy, MaxTimeMSExpired, StaleShardVersion,
WriteConcernTimeout, NoProgressMade, NetworkTimeout, ShutdownInProgress, WriteConflict, ConflictingOperationInProgress,
FailedToSatisfyReadPreference, ReadConcernMajorityNotAvailableYet, StaleEpoch, QueryPlanKilled, PrimarySteppedDown,
NetworkInterfaceExceededTimeLimit, KeyNotFound, ElectionInProgress, TransactionTooOld, RetryChangeStream, CursorKilled,
SnapshotTooOld, SnapshotUnavailable, NoSuchTransaction, ExceededTimeLimit, PreparedTransactionInProgress,
TransactionExceededLifetimeLimitSeconds, ObjectIsBusy, PooledConnectionsDropped, ConnectionError, SocketException,
LegacyNotPrimary, NotWritablePrimary, InterruptedAtShutdown, Interrupted, InterruptedDueToReplStateChange,
BackgroundOperationInProgress..., StaleConfig, NotPrimaryNoSecondaryOk, NotPrimaryOrSecondary."""

_PERMANENT: Final = (
    2, 14, 26, 27, 28, 40, 48, 52, 54, 55, 56, 57, 66, 67, 72, 73, 85, 86, 121, 166, 238, 10334, 11000, 11001, 12582,
    17280, 17419,
)  # fmt: skip
"""BadValue, TypeMismatch, NamespaceNotFound, IndexNotFound, PathNotViable, ConflictingUpdateOperators, NamespaceExists,
DollarPrefixedFieldName, NotSingleValueField, InvalidDBRef, EmptyFieldName, DottedFieldName, ImmutableField,
CannotCreateIndex, InvalidOptions, InvalidNamespace, IndexOptionsConflict, IndexKeySpecsConflict,
DocumentValidationFailure, CommandNotSupportedOnView, NotImplemented, BSONObjectTooLarge, DuplicateKey (three times),
KeyTooLong, the document too large after an update."""

CODES: Final[dict[int, Meaning]] = {
    **dict.fromkeys(_TRANSIENT, (TransientError, _AGAIN)),
    **dict.fromkeys(_PERMANENT, (PermanentError, _DOCUMENT)),
    14031: (TransientError, "the server's disk is full: make room there"),
    11: (FatalError, _LOGIN),
    18: (FatalError, _LOGIN),
    8000: (FatalError, _LOGIN),
    13: (FatalError, _GRANT),
    20: (FatalError, REPLICA_SET_HINT),
    40573: (FatalError, REPLICA_SET_HINT),
    286: (HistoryLost, _RESYNC),
}
"""Everywhere."""

CHANGE_STREAM_CODES: Final[dict[int, Meaning]] = {
    # IllegalOperation, BSONObjectTooLarge, NoMatchingDocument (an image that is required), ChangeStreamFatalError
    10334: (FatalError, _TOO_LARGE),
    17419: (FatalError, _TOO_LARGE),
    47: (ResyncRequired, _IMAGES),
    280: (ResyncRequired, "the server cannot go on from here"),
    # the oplog has gone on: ChangeStreamHistoryLost (286), and what servers before 4.4 said
    136: (HistoryLost, _RESYNC),
    40576: (HistoryLost, _RESYNC),
    40585: (HistoryLost, _RESYNC),
    40615: (HistoryLost, _RESYNC),
    # a token that the server does not take: FailedToParse, Overflow, CloseChangeStream, InvalidResumeToken and others
    9: (ResyncRequired, _OTHER_STREAM),
    15: (ResyncRequired, _OTHER_STREAM),
    222: (ResyncRequired, _OTHER_STREAM),
    260: (ResyncRequired, _OTHER_STREAM),
    40647: (ResyncRequired, _OTHER_STREAM),
    40648: (ResyncRequired, _OTHER_STREAM),
    40649: (ResyncRequired, _OTHER_STREAM),
    50811: (ResyncRequired, _OTHER_STREAM),
    # the collection or database is no longer what it was: what follows is a matter of the next attempt
    26: (TransientError, "the database does not exist yet; it is tried again"),
    166: (FatalError, "views have no changes: exclude them"),
}
"""While a change stream is opened or read."""

"""Errors as commands answer them: MongoDB's error codes and their names."""

from __future__ import annotations

from typing import Any, Final

NAMES: Final = {
    2: "BadValue",
    4: "NoSuchKey",
    6: "HostUnreachable",
    7: "HostNotFound",
    9: "FailedToParse",
    11: "UserNotFound",
    13: "Unauthorized",
    14: "TypeMismatch",
    15: "Overflow",
    16: "InvalidLength",
    18: "AuthenticationFailed",
    20: "IllegalOperation",
    22: "InvalidBSON",
    23: "AlreadyInitialized",
    26: "NamespaceNotFound",
    27: "IndexNotFound",
    28: "PathNotViable",
    40: "ConflictingUpdateOperators",
    43: "CursorNotFound",
    46: "LockBusy",
    47: "NoMatchingDocument",
    48: "NamespaceExists",
    50: "MaxTimeMSExpired",
    52: "DollarPrefixedFieldName",
    53: "InvalidIdField",
    56: "EmptyFieldName",
    59: "CommandNotFound",
    63: "StaleShardVersion",
    64: "WriteConcernTimeout",
    66: "ImmutableField",
    67: "CannotCreateIndex",
    72: "InvalidOptions",
    73: "InvalidNamespace",
    76: "NoReplicationEnabled",
    79: "UnknownReplWriteConcern",
    85: "IndexOptionsConflict",
    86: "IndexKeySpecsConflict",
    89: "NetworkTimeout",
    91: "ShutdownInProgress",
    100: "CannotSatisfyWriteConcern",
    112: "WriteConflict",
    115: "CommandNotSupported",
    121: "DocumentValidationFailure",
    133: "FailedToSatisfyReadPreference",
    134: "ReadConcernMajorityNotAvailableYet",
    136: "CappedPositionLost",
    150: "StaleEpoch",
    166: "CommandNotSupportedOnView",
    189: "PrimarySteppedDown",
    197: "InvalidIndexSpecificationOption",
    202: "NetworkInterfaceExceededTimeLimit",
    211: "KeyNotFound",
    222: "CloseChangeStream",
    225: "TransactionTooOld",
    234: "RetryChangeStream",
    237: "CursorKilled",
    246: "SnapshotUnavailable",
    251: "NoSuchTransaction",
    256: "TransactionCommitted",
    260: "InvalidResumeToken",
    262: "ExceededTimeLimit",
    263: "OperationNotSupportedInTransaction",
    280: "ChangeStreamFatalError",
    286: "ChangeStreamHistoryLost",
    317: "ConnectionPoolExpired",
    9001: "SocketException",
    10003: "CannotGrowDocumentInCappedNamespace",
    10107: "NotWritablePrimary",
    10334: "BSONObjectTooLarge",
    11000: "DuplicateKey",
    11600: "InterruptedAtShutdown",
    11601: "Interrupted",
    11602: "InterruptedDueToReplStateChange",
    13388: "StaleConfig",
    13435: "NotPrimaryNoSecondaryOk",
    13436: "NotPrimaryOrSecondary",
    20019: "InvalidBSONType",
}

RETRIABLE: Final = frozenset((6, 7, 89, 91, 134, 189, 262, 317, 9001, 10107, 11600, 11602, 13435, 13436))
"""Codes that the server itself calls retriable: they get the label RetryableWriteError on retryable writes."""

RESUMABLE: Final = frozenset(
    (6, 7, 63, 89, 91, 133, 150, 189, 234, 262, 9001, 10107, 11600, 11602, 13388, 13435, 13436)
)
"""Codes that get the label ResumableChangeStreamError (drivers' change streams specification)."""

TRANSIENT: Final = RETRIABLE | {112, 24, 246, 251}


class CommandError(Exception):
    """A command fails with this code; `labels` and `extra` go into the reply."""

    def __init__(self, code: int, errmsg: str, *, labels: tuple[str, ...] = (), extra: dict[str, Any] | None = None):
        super().__init__(errmsg)
        self.code = code
        self.errmsg = errmsg
        self.labels = labels
        self.extra = extra or {}


class CloseConnection(Exception):
    """The connection is closed without an answer."""


def code_name(code: int) -> str:
    """The name that a reply carries beside the code."""
    return NAMES.get(code, f"Location{code}")

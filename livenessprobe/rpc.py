"""A unary gRPC call, as seen by those who make one and those who ask for one: values, and the words of Go's gRPC."""

from typing import NamedTuple, Protocol

# By number, https://grpc.io/docs/guides/status-codes; named as Go names them.
_CODE_NAMES = (
    "OK Canceled Unknown InvalidArgument DeadlineExceeded NotFound AlreadyExists PermissionDenied ResourceExhausted"
    " FailedPrecondition Aborted OutOfRange Unimplemented Internal Unavailable DataLoss Unauthenticated"
).split()


def code_name(number: int) -> str:
    """Name a status code as Go does; one without a name keeps its number, as in `Code(404)`."""
    return _CODE_NAMES[number] if 0 <= number < len(_CODE_NAMES) else f"Code({number})"


class Reply(NamedTuple):
    """How a call ended."""

    code: str
    """As Go names it."""
    message: str
    """What was said with the code; for people. May hold foreign text, not yet made printable."""
    payload: bytes | None
    """The serialized reply message if the code is OK, else None."""


class Unreachable(Exception):
    """There was no connection to call over."""

    def __init__(self, reason: str, hint: str = "", *, may_heal: bool = False) -> None:
        """Take a few words from a small set, more words that follow them, and whether trying again makes sense."""
        super().__init__(reason + hint)
        self.reason, self.hint, self.may_heal = reason, hint, may_heal


class Call(Protocol):
    """One way to make unary calls to one address, over a new connection each."""

    def __call__(self, method: str, request: bytes, deadline: float) -> Reply:
        """Call a method such as /csi.v1.Identity/Probe; end by the deadline, a moment of time.monotonic().

        Raises Unreachable if there was no connection to call over; a call that was not answered in time is a Reply
        with the code DeadlineExceeded.
        """

    def close(self) -> None:
        """End the calls under way (with the code Canceled), and let no new one begin; from any thread."""

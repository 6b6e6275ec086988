"""Errors that users meet. Each says what was expected, what was found and what to do."""


class ElsaError(Exception):
    """Base of the errors that a run reports in one line, without a traceback."""


class UnsupportedModelError(ElsaError, ValueError):
    """The model does not fit the cutting mechanism; the text names the reason."""


class ConfigurationError(ElsaError, ValueError):
    """Settings that contradict each other, the data or the machine."""


class LaunchError(ElsaError, RuntimeError):
    """The processes of a run did not come together."""


class RemoteError(ElsaError, RuntimeError):
    """A call to another process failed.

    Attributes:
        kind: class name of the exception over there; empty when the process did not answer at all.
        trace: its formatted traceback.
    """

    def __init__(self, message: str, kind: str = "", trace: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.trace = trace


class RunFailed(ElsaError, RuntimeError):
    """Another process declared the run failed; the text is its reason."""


class TrainingDiverged(ElsaError, ArithmeticError):
    """A loss that is not finite; the text names client, round and step."""

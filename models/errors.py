"""The errors that people see. The command line turns each into one line on stderr and its exit code."""


class MixkvError(Exception):
    """Base of every error that mixkv raises on purpose; ``exit_code`` is what the command line exits with."""

    exit_code = 1


class UsageError(MixkvError, ValueError):
    """An option or argument that is out of its range, or that does not fit another."""

    exit_code = 2


class ModelError(MixkvError, ValueError):
    """A model file or folder that is damaged, incomplete, unsafe or not supported."""

    exit_code = 3


class DownloadError(MixkvError):
    """A model that could not be fetched, or that arrived with the wrong checksum."""

    exit_code = 4


class PromptError(MixkvError, ValueError):
    """A prompt, conversation or chat template that cannot be used: too long, empty, or refused by a limit."""

    exit_code = 5


class NumericalError(MixkvError, ArithmeticError):
    """A computation that left the numbers it can continue with: NaN logits, a value beyond its storage type."""

    exit_code = 6


class SessionFileError(MixkvError, ValueError):
    """A file of a saved session that is damaged, does not fit, or cannot be written."""

    exit_code = 7


class GoldenFileError(MixkvError, ValueError):
    """A golden file that is damaged, of another version, or cannot be read or written."""

    exit_code = 7


class CheckError(MixkvError):
    """A check that was made and failed: a model decodes otherwise than it was recorded."""

    exit_code = 8

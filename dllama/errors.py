"""Every error the project raises on purpose: one small tree, one line of text each.

A message says what happened, where, and what to do. The command line prints it as it is and exits with 1.
"""


class DllamaError(Exception):
    """Root of the tree: catch this to catch everything dllama raises on purpose."""


class FileError(DllamaError):
    """A file that cannot be used: missing, unreadable, damaged or of another kind.

    Raised with the file's path and the reason; the text is ``path: reason``.
    """

    def __init__(self, path, reason):
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class FormatError(FileError):
    """A file whose bytes are not what its format asks for."""


class ModelError(DllamaError):
    """A model that cannot be run as asked: unsupported shape, or a tokenizer that does not belong to it."""


class AdapterError(DllamaError):
    """An adapter that cannot be used: of another model or rank, of the other half, or not supported."""


class PromptError(DllamaError):
    """A prompt that cannot be run: empty, or longer than the context."""


class OutOfMemoryError(DllamaError):
    """Not enough memory for what was asked, found by an estimate before anything is loaded."""


class KernelError(DllamaError):
    """Kernels that were asked for but that this CPU cannot run, or that do not exist."""


class PlanError(DllamaError):
    """A model that cannot be dealt out over the nodes given: what is wrong with them, or what they lack."""


class ClusterError(DllamaError):
    """A worker or link that cannot be used, or that was lost."""


class ClusterKeyError(DllamaError):
    """A cluster key that cannot be used: its file is missing, damaged, or open to others."""

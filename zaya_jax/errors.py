"""Errors that are the caller's to mend: each says in one line what was wrong, where, and what would
be right."""


class ZayaError(ValueError):
    """Base of every error this package raises on purpose; the command line prints it as one
    line."""


class ConfigError(ZayaError):
    """A configuration value is unknown, out of range, or contradicts another one."""


class CheckpointError(ZayaError):
    """A checkpoint is missing, damaged, or does not fit its configuration."""


class InputError(ZayaError):
    """Tokens, prompts or sampling settings that no model could run."""


class DataError(ZayaError):
    """Training data that are missing, unreadable, or for too large a part not what they should
    be."""


class SandboxError(ZayaError):
    """Code cannot be run safely here: a protection is missing, or the sandbox could not be set
    up."""

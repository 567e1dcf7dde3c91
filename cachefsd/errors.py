"""Errors that are meant for the person at the terminal."""


class UserError(Exception):
    """Something the user can understand and act upon.

    ``str(error)`` is one line. The command line prints it on standard error and exits with a status
    other than 0; nothing has been changed, or what was changed has been put back.
    """


class ConfigError(UserError):
    """What was asked for is impossible, and trying it again would be no use: exit status 2."""


class NobodyError(UserError):
    """No daemon serves the mount point."""


class SilentError(UserError):
    """The daemon is there, and does not answer: exit status 3."""


class InUseError(UserError):
    """Another daemon owns it."""


class ForeignError(UserError):
    """It is not cachefsd's, and must not be touched."""


class UnfinishedError(UserError):
    """Its formatting was interrupted: it has never held anything."""

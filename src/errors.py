"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """A user's mistake: one line that names the bad value, the valid set and the way out.

    Every entry point prints it as ``error: …`` and exits with 1; the Python API raises it.
    """

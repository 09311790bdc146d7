"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line: what was given, what was expected, what to do. Programs print it
    without a traceback and leave with exit code 2; library users can catch it.
    """

"""Errors that a user can mend."""


class ConfigurationError(ValueError):
    """Something in the set-up cannot work; the message says what, why, and what to write instead."""

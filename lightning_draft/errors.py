"""Errors that a user can correct."""


class ConfigurationError(ValueError):
    """A setting cannot work; the message names the option, the value, the reason, and a value that works."""


class DivergenceError(ConfigurationError):
    """Training was stopped because its gradients exploded or were not finite."""

"""Errors that a user can correct, which commands print as one message."""


class ConfigurationError(ValueError):
    """A setting is not valid; the message names the option, the value, the reason, and a valid value."""


class DivergenceError(ConfigurationError):
    """Training was stopped because its gradients exploded or were not finite."""


class RewardServiceError(RuntimeError):
    """A reward service gave no scores; the message names the prompts."""

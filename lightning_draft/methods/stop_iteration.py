"""Distinguish a `StopIteration` of user code from the end of an epoch."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def stop_iteration_is_error(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a function, so that a `StopIteration` or `StopAsyncIteration` in it becomes a `RuntimeError`.

    Lightning's loops interpret these exceptions in a training or validation step as the end of the data: training would
    start the next epoch without ever taking a step, and a validation would end early without a message.
    """

    @wraps(function)
    def checked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        """Call the function, and raise `RuntimeError` instead of what would end the data."""
        try:
            return function(*args, **kwargs)
        except (StopIteration, StopAsyncIteration) as error:
            raise RuntimeError(
                f"{function.__name__} ended with the {type(error).__name__} above, raised by the reward, the "
                "truncation or the model, which Lightning would interpret as the end of the data; write "
                "next(iterator, default) if an iterator may be empty"
            ) from error

    return checked

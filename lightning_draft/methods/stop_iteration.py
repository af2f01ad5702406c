"""Keep a `StopIteration` of user code apart from the end of an epoch."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def stop_iteration_is_error(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a function, so that a `StopIteration` or `StopAsyncIteration` leaves it as a `RuntimeError`.

    Lightning's loops take one that leaves a training or validation step for the end of the data: training would begin
    the next epoch, without ever taking a step, and a validation would end early without a message.
    """

    @wraps(function)
    def checked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            return function(*args, **kwargs)
        except (StopIteration, StopAsyncIteration) as error:
            raise RuntimeError(
                f"{function.__name__} ended with the {type(error).__name__} above, raised by the reward, the "
                "truncation or the model, which would look like the end of the data; write next(iterator, default) "
                "where an iterator may be empty"
            ) from error

    return checked

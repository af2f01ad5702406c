"""What type hints of constructors say about configurations."""

import collections.abc
import dataclasses
import inspect
import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn

_SEQUENCES = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping)
_PLAIN = (bool, int, float, str, bytes, type(None), list, tuple, set, dict, object)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a constructor.

    Args:
        hint: Its type.
        required: Whether it has no default.
    """

    hint: Any
    required: bool


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint itself."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(part for member in get_args(hint) for part in alternatives(member))
    return (hint,)


def classes(hint: Any) -> tuple[type, ...]:
    """The classes that are instantiated for this hint, also those that a factory returns."""
    found: list[type] = []
    for part in alternatives(hint):
        if get_origin(part) is collections.abc.Callable and len(get_args(part)) == 2:
            found += classes(get_args(part)[1])
        elif isinstance(part, type) and get_origin(part) is None and part not in _PLAIN:
            found.append(part)
    return tuple(found)


def is_factory(hint: Any) -> bool:
    """Whether the hint is of a function that makes something from one argument, such as an optimiser."""
    return any(get_origin(part) is collections.abc.Callable for part in alternatives(hint))


def is_closed(kind: type) -> bool:
    """Whether its arguments are given directly, without `class_path`."""
    return dataclasses.is_dataclass(kind)


def elements(hint: Any) -> Any:
    """The type of a list's elements; `None` where no list is expected."""
    for part in alternatives(hint):
        if get_origin(part) in _SEQUENCES:
            return get_args(part)[0]
    return None


def values(hint: Any) -> Any:
    """The type of a mapping's values; `None` where no mapping is expected."""
    for part in alternatives(hint):
        if get_origin(part) in _MAPPINGS:
            return get_args(part)[1]
    return None


def subclasses(bases: tuple[type, ...], abstract: bool = False) -> list[type]:
    """Classes that are imported by now and derive from one of the bases, bases included.

    Args:
        bases: The bases.
        abstract: Whether abstract classes count too.
    """
    found: dict[type, None] = {}
    queue = list(bases)
    while queue:
        kind = queue.pop()
        if kind not in found:
            found[kind] = None
            queue += kind.__subclasses__()
    return [
        kind
        for kind in found
        if (abstract or not inspect.isabstract(kind))
        and not kind.__name__.startswith("_")
        and "._" not in kind.__module__
        and "<locals>" not in kind.__qualname__
    ]


def parameters(kind: type, skip_first: bool = False) -> dict[str, Parameter]:
    """The parameters of a constructor, through `**kwargs` to the base classes' own.

    Args:
        kind: The class.
        skip_first: Leave out the first one, which a factory is called with.
    """
    found: dict[str, Parameter] = {}
    for base in kind.__mro__:
        if base in (object, nn.Module) or "__init__" not in vars(base):
            continue
        constructor = vars(base)["__init__"]
        hints = _hints(constructor)
        given = list(inspect.signature(constructor).parameters.values())[1:]
        for parameter in given[1 if skip_first and not found else 0 :]:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                hint = hints.get(parameter.name, Any)
                found.setdefault(parameter.name, Parameter(hint, parameter.default is parameter.empty))
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in given):
            break
    return found


def describe(hint: Any) -> str:
    """A hint in words: `an integer`, `one of none, step, block`, `a Reward`."""
    parts = [_describe(part) for part in alternatives(hint) if part is not type(None)]
    if type(None) in alternatives(hint):
        parts.append("null")
    return " or ".join(dict.fromkeys(parts))


_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", Any: "anything"}


def _describe(part: Any) -> str:
    if part in _WORDS:
        return _WORDS[part]
    if get_origin(part) is Literal:
        return "one of " + ", ".join(map(str, get_args(part)))
    if get_origin(part) in _SEQUENCES:
        return "a list of " + describe(get_args(part)[0]).removeprefix("an ").removeprefix("a ")
    if get_origin(part) in _MAPPINGS:
        return "a mapping"
    named = classes(part)
    return f"a {named[0].__name__}" if named else str(part)


def _hints(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except (NameError, TypeError):
        return {}

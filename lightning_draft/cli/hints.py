"""Names, types and possible classes of options, from the type hints of constructors."""

import collections.abc
import dataclasses
import inspect
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_SEQUENCES = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable)
_MAPPINGS = (dict, collections.abc.Mapping)
_PLAIN = (bool, int, float, str, bytes, type(None), list, tuple, set, dict, object)
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", Any: "any value"}

_EXAMPLES = {int: "4", float: "1.0", bool: "true"}
_EXAMPLES_BY_NAME = {"lr": "1e-4"}


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the hint itself."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(part for member in get_args(hint) for part in alternatives(member))
    return (hint,)


def classes(hint: Any) -> tuple[type, ...]:
    """Return the classes that are instantiated for a hint: its own, those of elements, and of a factory's result."""
    found: list[type] = []
    for part in alternatives(hint):
        arguments = get_args(part)
        if get_origin(part) in (collections.abc.Callable, *_MAPPINGS, *_SEQUENCES) and arguments:
            found += classes(arguments[0] if get_origin(part) in _SEQUENCES else arguments[-1])
        elif isinstance(part, type) and get_origin(part) is None and part not in _PLAIN:
            found.append(part)
    return tuple(dict.fromkeys(found))


def subclasses(bases: tuple[type, ...]) -> list[type]:
    """Return the public, concrete classes among `bases` and their imported subclasses."""
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
        if not inspect.isabstract(kind)
        and not kind.__name__.startswith("_")
        and "._" not in kind.__module__
        and "<locals>" not in kind.__qualname__
    ]


def class_names(bases: tuple[type, ...]) -> list[str]:
    """Return the class names that can be written for `bases`: those of this package, or all if it has none."""
    known = subclasses(bases)
    own = [kind for kind in known if kind.__module__.startswith("lightning_draft.")]
    return sorted({kind.__name__ for kind in own or known})


def parameters(kind: type) -> dict[str, Any]:
    """Return the type hint of each argument of a constructor, including base classes for `**kwargs`."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if base in (object, nn.Module) or "__init__" not in vars(base):
            continue
        constructor = vars(base)["__init__"]
        hints = _type_hints(constructor)
        given = list(inspect.signature(constructor).parameters.values())[1:]
        for parameter in given:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                found.setdefault(parameter.name, hints.get(parameter.name, Any))
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in given):
            break
    return found


def option_names(kind: type) -> list[str]:
    """Return the arguments of a constructor that are options: not the parameters of an optimizer, for example."""
    return list(parameters(kind))[issubclass(kind, (Optimizer, LRScheduler)) :]


def nested_parameter(owner: type, path: Sequence[str]) -> Any:
    """Return the type hint of the last option of `path`: an argument of `owner`, or a field of its dataclass."""
    known = parameters(owner)
    if path[-1] in known or len(path) < 2:
        return known.get(path[-1], Any)
    kinds = classes(known.get(path[-2], Any))
    return parameters(kinds[0]).get(path[-1], Any) if kinds else Any


def field_names(hint: Any) -> list[str]:
    """Return the fields of the dataclass of a hint; none for other hints."""
    kinds = [part for part in alternatives(hint) if dataclasses.is_dataclass(part)]
    return [field.name for field in dataclasses.fields(kinds[0])] if kinds else []


def describe(hint: Any) -> str:
    """Return a hint in words: `an integer`, `one of none, step, block`, `a Reward`."""
    parts = [part for part in alternatives(hint) if part is not type(None) and get_origin(part) is not Literal]
    words = [_describe(part) for part in sorted(parts, key=_is_sequence)]
    if choices(hint):
        words.insert(0, "one of " + ", ".join(dict.fromkeys(choices(hint))))
    if type(None) in alternatives(hint):
        words.append("null")
    return " or ".join(dict.fromkeys(words))


def choices(hint: Any) -> list[str]:
    """Return the values of the `Literal` types in a hint."""
    return [str(value) for part in alternatives(hint) if get_origin(part) is Literal for value in get_args(part)]


def example(hint: Any, owner: type | None, name: str) -> str | None:
    """Return a valid value of a numeric or Boolean option as text: the default if it is a number, else an example.

    Args:
        hint: The type.
        owner: The class that has the option, if it is known.
        name: The option.
    """
    kinds = [part for part in alternatives(hint) if part in _EXAMPLES]
    if not kinds:
        return None
    signature = inspect.signature(owner).parameters if owner is not None else {}
    default = signature[name].default if name in signature else None
    if type(default) in (int, float):
        return str(default)
    return _EXAMPLES_BY_NAME.get(name, _EXAMPLES[kinds[0]])


def _is_sequence(part: Any) -> bool:
    origin: Any = get_origin(part)
    return origin in _SEQUENCES


def _describe(part: Any) -> str:
    if part in _WORDS:
        return _WORDS[part]
    if _is_sequence(part):
        return "a list of " + describe(get_args(part)[0]).removeprefix("an ").removeprefix("a ")
    if get_origin(part) in _MAPPINGS:
        return "a mapping from names to " + describe(get_args(part)[-1])
    named = classes(part)
    if get_origin(part) is collections.abc.Callable and not named:
        return "the import path of a function"
    return f"{'an' if named[0].__name__[0] in 'AEIOU' else 'a'} {named[0].__name__}" if named else str(part)


def _type_hints(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except (NameError, TypeError):
        return {}

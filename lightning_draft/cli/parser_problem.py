"""Find the invalid option in the parser's exceptions.

The parser raises one exception for each level of the configuration. The keys in these exceptions name the option, and
the innermost exception gives the reason.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lightning_draft.cli import hints

_KEY = re.compile(r'Parser key "([^"]+)":|--([\w.]+)\.help: ')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':")
_FACTORY = re.compile(r"^Type typing\.Callable.* Got value: Namespace\(class_path='([^']+)'")
_PARSERS_OWN = r"module '.+' has no attribute|'\w+' object has no attribute 'keys'"
_NO_CONFIG = re.compile(r'^Parser key "[^"]+": Unable to load config "(.*)"$')
_VALUE = re.compile(r"(?:Got|Given) value: (.*)|Unable to load config \"(.*)\"")


@dataclass(frozen=True)
class Problem:
    """Location and reason of a parser error.

    Args:
        path: Names of the options from the outermost to the invalid one.
        owner: The class that has the last option of `path`; `None` at the top level.
        kind: The class that was given for the last option of `path`, or the import path if it cannot be imported.
        reason: The innermost exception.
        value: The invalid value as the parser shows it, or `None`.
    """

    path: tuple[str, ...]
    owner: type | None
    kind: type | str | None
    reason: BaseException
    value: str | None

    def hint(self, groups: Mapping[str, Any]) -> Any:
        """Return the type of the last option of `path`."""
        if self.owner is not None:
            return hints.nested_parameter(self.owner, self.path)
        group, _, key = ".".join(self.path).partition(".")
        known = groups.get(group, Any)
        return hints.parameters(known).get(key, Any) if key and isinstance(known, type) else known


def locate(error: BaseException) -> Problem:
    """Follow the parser's exceptions to the innermost one."""
    path: list[str] = []
    owner: type | None = None
    kind: type | str | None = None
    value = None
    reason: BaseException = error
    for link in distinct_causes(error):
        text, reason = message_text(link), link
        if (match := _KEY.match(text)) and not (path and _NO_CONFIG.search(text) and path[-1] == match[1]):
            path += (match[1] or match[2]).split(".")
            owner, kind, value = kind if isinstance(kind, type) else None, None, None
        elif match := _CLASS.match(text) or _FACTORY.search(text):
            kind = imported(match[1])
        value = next((found[1] or found[2] for found in [_VALUE.search(text)] if found), value)
    return Problem(tuple(path), owner, kind, reason, value)


def distinct_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes, without those that repeat the previous message."""
    link: BaseException | None = error
    before = None
    while link is not None:
        cause = link.__cause__ or link.__context__
        if message_text(link) != before:
            yield link
        before, link = message_text(link), cause


def message_text(error: BaseException) -> str:
    """Return the message of an exception, without the quotes that `KeyError` puts around it."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    return text[1:-1] if text[:1] == text[-1:] == "'" else text


def is_missing(problem: Problem) -> bool:
    """Return whether a module or class in the configuration does not exist, as opposed to failing while imported."""
    reason = problem.reason
    if isinstance(reason, ModuleNotFoundError):
        return isinstance(problem.kind, str) and f"{problem.kind}.".startswith(f"{reason.name}.")
    return isinstance(reason, AttributeError) and re.search(_PARSERS_OWN, str(reason)) is not None


def imported(path: str) -> type | str:
    """Return the class with an import path, or the path if there is none."""
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError, SyntaxError):
        return path
    return kind if isinstance(kind, type) else path

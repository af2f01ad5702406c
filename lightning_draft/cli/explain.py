"""Convert the parser's exceptions for an invalid configuration to one message.

The parser raises one exception for each level of the configuration. The keys in these exceptions name the option, the
class of the last level gives the known options and types, and the innermost exception gives the reason.
"""

import argparse
import ast
import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_draft.cli import hints
from lightning_draft.cli.parser_problem import Problem, imported, is_missing, locate, message_text
from lightning_draft.cli.shipped import nearest

_MOST = 12
_ELSEWHERE = {"lr": "model.optimizer.lr", "learning_rate": "model.optimizer.lr"}
_LONGEST = 80
_EXTRAS = {
    "accelerate": "quantization",
    "bitsandbytes": "quantization",
    "clint": "hpsv2",
    "datasets": "datasets",
    "deepspeed": "deepspeed",
    "ftfy": "hpsv2",
    "optuna": "experiments",
    "regex": "hpsv2",
    "requests": "hpsv2",
    "torchao": "quantization",
    "torchvision": "hpsv2",
}  # the extra that installs a package, which a class named in a configuration may import


def explain(error: BaseException, groups: Mapping[str, Any]) -> str:
    """Return one message that names the option, the problem, and what to write.

    Args:
        error: The parser's exception.
        groups: The type of each top-level option.

    Raises:
        Exception: Importing a user's module failed; this is the exception of the module, without the parser's.
    """
    problem = locate(error)
    if isinstance(problem.reason, ModuleNotFoundError) and problem.reason.name in _EXTRAS:
        library = problem.reason.name
        place = f"{_option(problem.path)}: " if problem.path else ""
        return f"{place}{library} is not installed; run pip install 'lightning-draft[{_EXTRAS[library]}]'"
    if not isinstance(problem.reason, (ValueError, TypeError, KeyError, argparse.ArgumentError)) and not is_missing(
        problem
    ):
        raise problem.reason from None
    text = message_text(problem.reason).removeprefix("- ")
    for pattern, say in _REASONS:
        match = re.search(pattern, text)
        if match is not None:
            return say(problem, groups, *match.groups())
    return f"{_option(problem.path)}: {text.splitlines()[0]}" if problem.path else text.splitlines()[0]


def _option(path: tuple[str, ...]) -> str:
    return f"--{'.'.join(path)}"


def _unknown_argument(problem: Problem, groups: Mapping[str, Any], option: str) -> str:
    if not option.startswith("-"):
        return f"{option!r} is neither an option nor the value of one; options are written --name value"
    if not option.startswith("--"):
        return f"there is no option {option}; options have two dashes, such as -{option}"
    return _unknown_option(problem, groups, option.lstrip("-").partition("=")[0])


def _unknown_option(problem: Problem, groups: Mapping[str, Any], name: str) -> str:
    parts = name.split(".")
    if parts[0] != "init_args" and _is_misspelled_key(parts[0]):
        return _misspelled_key(problem, parts[0])
    path = (*problem.path, *parts)
    if path[-1] in _ELSEWHERE:
        return f"there is no option {_option(path)}; did you mean --{_ELSEWHERE[path[-1]]}"
    if isinstance(problem.kind, type):
        group = hints.classes(hints.nested_parameter(problem.kind, path[:-1]))
        kind = group[0] if group and is_dataclass(group[0]) else problem.kind
        known, what = hints.option_names(kind), kind.__name__
    elif len(path) > 1 and isinstance(groups.get(path[0]), type):
        path, kind = path[:2], groups[path[0]]
        known, what = list(hints.parameters(kind)), kind.__name__
    else:
        path, known, what = path[:1], [*groups, "config", "print_config", "help"], ""
        for section, owner in groups.items():
            if isinstance(owner, type) and path[0] in hints.parameters(owner):
                return f"there is no option {_option(path)}; did you mean --{section}.{path[0]}"
    similar = nearest(path[-1], known)
    listed = "; see lightning-draft fit --help"
    if what and len(known) <= 20:
        listed = f"; its options are {', '.join(known)}" if known else "; it has no options, so leave this one out"
    return f"{_option(path)}: {what + ' has' if what else 'there is'} no option {path[-1]!r}{similar or listed}"


def _is_misspelled_key(key: str) -> bool:
    return bool(difflib.get_close_matches(key, ("init_args", "class_path"), cutoff=0.8))


def _misspelled_key(problem: Problem, key: str) -> str:
    right = nearest(key, ("init_args", "class_path"))
    return f"{_option(problem.path)}: a class is written as class_path and init_args, and has no {key!r}{right}"


def _missing(problem: Problem, groups: Mapping[str, Any], names: str) -> str:
    name = names.split(", ")[0].removeprefix("fit.").removeprefix("validate.")
    path = (*problem.path, *name.split("."))
    kind = problem.kind if isinstance(problem.kind, type) else None
    hint = hints.nested_parameter(kind, name.split(".")) if kind else groups.get(name, Any)
    needed = f"{kind.__name__} needs it ({hints.describe(hint)})" if kind else "every run needs it"
    return f"{_option(path)} is missing: {needed}; write {_option(path)} VALUE"


def _unknown_class(problem: Problem, groups: Mapping[str, Any], name: str) -> str:
    hint = problem.hint(groups)
    bases = hints.classes(hint)
    if not bases:
        return _wrong_type(problem, groups)
    if name == "None" and type(None) in hints.alternatives(hint):  # how jsonargparse passes null to a nested group
        return _only_in_a_file(problem)
    everything = [kind.__name__ for kind in hints.subclasses(bases)]
    listed = f"; write {_known(bases)}, or your own class as module.Class"
    return f"{_option(problem.path)}: there is no {_names(bases)} {name!r}{nearest(name, everything) or listed}"


def _not_a_class(problem: Problem, groups: Mapping[str, Any], *_: str) -> str:
    wrong = next((key for key in _keys(problem.value) if key != "init_args" and _is_misspelled_key(key)), None)
    if wrong is not None:
        return _misspelled_key(problem, wrong)
    hint = problem.hint(groups)
    bases = hints.classes(hint)
    if bases and hints.class_names(bases) != [bases[0].__name__]:
        return (
            f"{_option(problem.path)}: expected the class of a {_names(bases)}, got {_shown(problem)}; write "
            f"class_path: {_known(bases)}, with its options under init_args"
        )
    return _wrong_type(problem, groups)


def _abstract(problem: Problem, groups: Mapping[str, Any], path: str) -> str:
    kind = imported(path)
    bases = hints.classes(problem.hint(groups))
    if isinstance(kind, type) and kind not in bases:
        methods = ", ".join(sorted(getattr(kind, "__abstractmethods__", ())))
        return f"{_option(problem.path)}: {path} is abstract: it has no {methods}"
    return (
        f"{_option(problem.path)}: the class of the {_names(bases)} is missing; write class_path: {_known(bases)}, "
        "with its options under init_args"
    )


def _wrong_base(problem: Problem, groups: Mapping[str, Any], path: str, base: str) -> str:
    known = _known(hints.classes(problem.hint(groups)))
    return f"{_option(problem.path)}: {path} is not a {base}; write {known}, or a subclass of {base}"


def _no_module(problem: Problem, groups: Mapping[str, Any], module: str) -> str:
    return (
        f"{_option(problem.path)}: {problem.kind!r} was not found: there is no module {module!r}, neither as "
        f"{module}.py in the current folder ({Path.cwd()}) nor installed"
    )


def _no_class(problem: Problem, groups: Mapping[str, Any], module: str, name: str) -> str:
    bases = hints.classes(problem.hint(groups)) or (object,)
    members = vars(import_module(module)).items()
    known = [key for key, item in members if isinstance(item, type) and issubclass(item, bases)]
    return f"{_option(problem.path)}: module {module!r} has no class {name!r}{nearest(name, known)}"


def _no_value(problem: Problem, groups: Mapping[str, Any], option: str) -> str:
    return f"{option} needs a value: write {option} VALUE"


def _wrong_type(problem: Problem, groups: Mapping[str, Any], *_: str) -> str:
    hint = problem.hint(groups)
    if hint is Any:
        plain = re.match(r"Expected a <class '(\w+)'>", message_text(problem.reason))
        hint = {"int": int, "float": float, "bool": bool, "str": str}.get(plain[1] if plain else "", Any)
    if hint is Any:
        return f"{_option(problem.path)}: {str(problem.reason).splitlines()[0]}"
    if str(problem.value).startswith("NestedArg("):
        option = _option(problem.path)
        return f"{option}: expected {hints.describe(hint)}, which has no options; write {option} VALUE"
    if _shown(problem) == "null" and type(None) in hints.alternatives(hint):
        return _only_in_a_file(problem)
    return f"{_option(problem.path)}: expected {hints.describe(hint)}, got {_shown(problem)}{_advice(problem, hint)}"


def _only_in_a_file(problem: Problem) -> str:
    key = problem.path[-1]
    return (
        f"{_option(problem.path)}: null can be given in a YAML file only; write {key}: null there, or in a second file "
        "after --config"
    )


def _advice(problem: Problem, hint: Any) -> str:
    """Return `; did you mean X` or `; write X` for a value of the wrong type, or an empty text."""
    classes = [kind.__name__ for kind in hints.subclasses(hints.classes(hint))]
    value = str(problem.value)
    similar = "" if value[:1] in ("[", "{") else nearest(value, [*hints.choices(hint), *classes])
    example = hints.example(hint, problem.owner, problem.path[-1])
    options = hints.field_names(hint)
    if options and not similar:
        return f"; set its options, such as {_option(problem.path)}.{options[0]} VALUE"
    return similar or (f"; write for example {example}" if example else "")


def _no_path(problem: Problem, groups: Mapping[str, Any], name: str) -> str:
    known = _known(hints.classes(problem.hint(groups)) or (object,))
    return f"{_option(problem.path)}: {name!r} is not the name of a class; write {known}, or module.Class"


def _class_path_type(problem: Problem, groups: Mapping[str, Any], *_: str) -> str:
    known = _known(hints.classes(problem.hint(groups)) or (object,))
    return (
        f"{_option(problem.path)}: class_path must be the name of a class, and init_args a mapping; write class_path: "
        f"{known}"
    )


_REASONS: tuple[tuple[str, Callable[..., str]], ...] = (
    (r"object has no attribute 'keys", _class_path_type),
    (r"^unrecognized arguments: (\S+)", _unknown_argument),
    (r"does not accept option '(.+?)'", _unknown_option),
    (r"^Option '(.+?)' is not accepted", _unknown_option),
    (r"^the following arguments are required: (.+)", _missing),
    (r"Expected a dot import path string: (\S+)", _unknown_class),
    (r"Import path (\S+) does not correspond to a subclass of (\w+)", _wrong_base),
    (r"Expected an instantiatable class, but (\S+) is abstract", _abstract),
    (r"^No module named '(.+?)'", _no_module),
    (r"module '(.+?)' has no attribute '(.+?)'", _no_class),
    (r"^Not a valid subclass of", _not_a_class),
    (r"^argument (\S+): expected (?:one|at least one) argument", _no_value),
    (r"^Unexpected import path format: (.*)", _no_path),
    (r"argument of type '\w+' is not iterable|^unhashable type|object has no attribute 'keys'", _class_path_type),
    (r"Expected |Got value|Given value|Unable to load config", _wrong_type),
)


def _known(bases: tuple[type, ...]) -> str:
    names = hints.class_names(bases)
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return f"{'one of ' if len(names) > 1 else ''}{', '.join(names[:_MOST])}{more}"


def _shown(problem: Problem) -> str:
    """Return the invalid value as a user would write it."""
    value = problem.value
    if value is None or value == "None":
        return "null"
    if "Namespace(" in value:
        names = [path.rpartition(".")[2] for path in re.findall(r"class_path='([^']+)'", value)]
        return f"{' and '.join(names) or 'a mapping'}, of which an option is missing or not valid"
    if len(value) > _LONGEST:
        return f"{value[:_LONGEST]}..."
    return value if value[:1] in "[{" or value.replace(".", "", 1).lstrip("-").isdigit() else repr(value)


def _keys(value: str | None) -> list[str]:
    """Return the keys of a mapping as the parser shows it; none for other values."""
    try:
        content = ast.literal_eval(value or "")
    except (ValueError, SyntaxError):
        return []
    return [str(key) for key in content] if isinstance(content, dict) else []


def _names(bases: tuple[type, ...]) -> str:
    return " or ".join(dict.fromkeys(kind.__name__ for kind in bases))

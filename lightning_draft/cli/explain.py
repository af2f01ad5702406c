"""Say what is wrong with a configuration that the parser refused: which key, why, and what to write instead.

The parser's own message nests every alternative of every type on the way. Here the configuration is walked along the
type hints instead, and only what does not fit is reported.
"""

import argparse
import inspect
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser

from lightning_draft.cli import hints
from lightning_draft.cli.shipped import nearest
from lightning_draft.errors import ConfigurationError

_SPEC = {"class_path", "init_args", "dict_kwargs"}
_KEPT = "kept from the class before"
_MOST = 5


def diagnose(args: Sequence[str], types: Mapping[str, Any], defaults: Mapping[str, str]) -> str | None:
    """What is wrong, one problem a line; `None` if nothing is found here.

    Args:
        args: The command line after the verb.
        types: Type hint of each top-level key.
        defaults: Class path of the top-level keys that have a default class.

    Raises:
        ConfigurationError: A config file cannot be read.
    """
    tree: dict[str, Any] = {key: {"class_path": path, "init_args": {}} for key, path in defaults.items()}
    problems: list[str] = []
    for source in _sources(args):
        if isinstance(source, str):
            problems.append(f"{source!r} is neither an option nor the value of one")
        else:
            tree = _merge(tree, source)
    known = [*types, "config", "print_config", "help"]
    problems += [_unknown("", key, known, _inside(key, defaults)) for key in tree if key not in known]
    for key, value in tree.items():
        problems += _check(value, types.get(key, Any), key)
    if not any(arg.startswith(("--config", "-c")) or ".help" in arg for arg in args):
        missing = [key for key in ("data", "model") if key not in tree or not tree[key].get("init_args", tree[key])]
        if missing:
            return f"there is no {' and no '.join(missing)}: start from a config, e.g. --config quickstart"
    return "\n".join((problems or list(_deep_nulls(args)))[:_MOST]) or None


def _sources(args: Sequence[str]) -> Iterator[dict[str, Any] | str]:
    """Config files and options as mappings, in their order; strings are arguments that belong to nothing."""
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("-"):
            yield arg
            continue
        key, equals, value = arg.lstrip("-").partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        if key in ("config", "c"):
            yield load(Path(value))
        elif key.endswith(".help"):
            yield _nested([*key.split(".")[:-1], "class_path"], value) if value != "true" else {}
        else:
            yield _nested(key.split("."), value)


def _deep_nulls(args: Sequence[str]) -> Iterator[str]:
    """A null for an argument of a class within a class, which the parser takes for the text `None`."""
    for option, value in zip(args, [*args[1:], ""], strict=True):
        name, equals, given = option.partition("=")
        keys = [key for key in name.lstrip("-").split(".") if key != "init_args"]
        if name.startswith("--") and len(keys) > 2 and (given if equals else value) in ("null", "~"):
            yield f"{name}: the command line takes no null this deep; write it in a config file"


def load(path: Path) -> dict[str, Any]:
    """The content of a config file, interpolations resolved.

    Raises:
        ConfigurationError: An interpolation cannot be resolved.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"{path}: {str(error).splitlines()[0]}") from error
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _nested(keys: list[str], text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if keys[-1].endswith("+"):
        value = value if isinstance(value, list) else [value]
    for key in reversed(keys):
        value = {key: value}
    return value


def _merge(old: Any, new: Any) -> Any:
    """`new` over `old`, as the parser merges them."""
    if isinstance(old, str) and isinstance(new, dict):
        old = {"class_path": old}
    if not isinstance(old, dict):
        return new
    if "class_path" in old:
        if isinstance(new, str):
            new = {"class_path": new}
        if not isinstance(new, dict):
            return new
        if not new.keys() & _SPEC:
            new = {"init_args": new}
        if new.get("class_path", old["class_path"]) != old["class_path"]:
            return {**new, _KEPT: {**old.get(_KEPT, {}), **(old.get("init_args") or {})}}
    if not isinstance(new, dict):
        return new
    merged = dict(old)
    for key, value in new.items():
        if key.endswith("+"):
            merged[key[:-1]] = [*(old.get(key[:-1]) or []), *value]
        else:
            merged[key] = _merge(old.get(key), value)
    return merged


def _check(value: Any, hint: Any, path: str) -> Iterator[str]:
    """What does not fit in `value`, for a parameter with the type `hint`."""
    alternatives = hints.alternatives(hint)
    if hint is Any or value is None and type(None) in alternatives:
        return
    classes, elements, values = hints.classes(hint), hints.elements(hint), hints.values(hint)
    if isinstance(value, list) and elements is not None:
        for index, item in enumerate(value):
            yield from _check(item, elements, f"{path}[{index}]")
    elif isinstance(value, dict) and values is not None and "class_path" not in value:
        for key, item in value.items():
            yield from _check(item, values, f"{path}.{key}")
    elif classes and (isinstance(value, dict) or (isinstance(value, str) and str not in alternatives)):
        yield from _check_class({"class_path": value} if isinstance(value, str) else value, hint, classes, path)
    elif not _fits(value, hint):
        options = [option for part in alternatives if get_origin(part) is Literal for option in get_args(part)]
        yield f"{path}: expected {hints.describe(hint)}, got {value!r}{nearest(str(value), map(str, options))}"


def _check_class(value: dict[str, Any], hint: Any, classes: tuple[type, ...], path: str) -> Iterator[str]:
    name = value.get("class_path")
    if name is None and len(classes) == 1 and (hints.is_closed(classes[0]) or not hints.subclasses(classes)):
        value = {"class_path": classes[0], "init_args": value.get("init_args", value)}
    elif not isinstance(name, str):
        yield f"{path}: say which {_kinds(classes)} it is, class_path: {_known(classes)}"
        return
    stray = sorted(value.keys() - _SPEC - {_KEPT})
    if stray:
        yield f"{path}: {', '.join(stray)} must stand under init_args, beside class_path"
    kind = value["class_path"] if isinstance(value["class_path"], type) else _resolve(name or "", classes)
    if isinstance(kind, str):
        yield f"{path}: {kind}"
        return
    parameters = hints.parameters(kind, skip_first=hints.is_factory(hint))
    arguments = {key: item for key, item in (value.get(_KEPT) or {}).items() if key in parameters}
    arguments.update(value.get("init_args") or {})
    yield from _check_arguments(arguments, kind, parameters, path)


def _check_arguments(
    arguments: dict[str, Any], kind: type, parameters: Mapping[str, hints.Parameter], path: str
) -> Iterator[str]:
    for key, value in arguments.items():
        if key in parameters:
            yield from _check(value, parameters[key].hint, f"{path}.{key}")
        else:
            yield _unknown(f"{path} ({kind.__name__})", str(key), list(parameters))
    for key, parameter in parameters.items():
        if parameter.required and key not in arguments:
            yield f"{path}.{key} is missing: {kind.__name__} needs it ({hints.describe(parameter.hint)})"


def _resolve(name: str, classes: tuple[type, ...]) -> type | str:
    """The class of that name, or why there is none."""
    if "." in name:
        return _import(name, classes)
    found = {kind for kind in hints.subclasses(classes, abstract=True) if kind.__name__ == name}
    if not found:
        return f"there is no {_kinds(classes)} {name!r}{_hint(name, classes)}"
    if len(found) > 1:
        paths = " or ".join(sorted(f"{kind.__module__}.{name}" for kind in found))
        return f"{name!r} is the name of several classes: write {paths}"
    (kind,) = found
    return f"{name} is abstract: write one of {_known(classes)}" if inspect.isabstract(kind) else kind


def _import(name: str, classes: tuple[type, ...]) -> type | str:
    module_name, _, class_name = name.rpartition(".")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        return (
            f"{name!r} was not found: there is no module {error.name!r}, neither {error.name}.py in the current folder "
            f"({Path.cwd()}) nor installed"
        )
    kind = getattr(module, class_name, None)
    if kind is None:
        own = [
            key
            for key, item in vars(module).items()
            if isinstance(item, type) and issubclass(item, classes) and not inspect.isabstract(item)
        ]
        return f"module {module_name!r} has no class {class_name!r}{nearest(class_name, own)}"
    if not (isinstance(kind, type) and issubclass(kind, classes)):
        return f"{name!r} is not a {_kinds(classes)}"
    if inspect.isabstract(kind):
        methods = ", ".join(sorted(getattr(kind, "__abstractmethods__", ())))
        return f"{name!r} is abstract: it has no {methods}"
    return kind


def _fits(value: Any, hint: Any) -> bool:
    parser = ArgumentParser(exit_on_error=False, parser_mode="omegaconf")
    try:
        parser.add_argument("--value", type=hint)
        parser.parse_object({"value": value})
    except argparse.ArgumentError:
        return False
    except ValueError:
        return True
    return True


def _unknown(where: str, key: str, known: Sequence[str], elsewhere: Sequence[str] = ()) -> str:
    near = f"; did you mean {' or '.join(elsewhere)}" if elsewhere else nearest(key, known)
    options = f"; known are {', '.join(known)}" if known and len(known) <= 20 else ""
    return f"{where + ' has' if where else 'there is'} no option {key!r}{near or options}"


def _inside(key: str, defaults: Mapping[str, str]) -> list[str]:
    """The options of that name which belong to a group, such as `trainer.max_steps`."""
    kinds = {group: _import(path, (object,)) for group, path in defaults.items()}
    return [f"{g}.{key}" for g, kind in kinds.items() if isinstance(kind, type) and key in hints.parameters(kind)]


def _hint(name: str, classes: tuple[type, ...]) -> str:
    near = nearest(name, [kind.__name__ for kind in hints.subclasses(classes)])
    return near or f"; known are {_known(classes)}, and classes of your own as module.Class"


def _known(classes: tuple[type, ...]) -> str:
    known = hints.subclasses(classes)
    own = [kind for kind in known if kind.__module__.startswith("lightning_draft.")] or known
    return ", ".join(sorted({kind.__name__ for kind in own}))


def _kinds(classes: tuple[type, ...]) -> str:
    return " or ".join(dict.fromkeys(kind.__name__ for kind in classes))

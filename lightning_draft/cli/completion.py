"""Tab completion for bash and zsh: a static script, so that completion does not start Python."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from lightning_draft.arguments import one_of
from lightning_draft.cli import pages, shipped

_SCRIPT = """\
_lightning_draft() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    elif [ "$previous" = --config ] || [ "$previous" = show ]; then
        words="{configs}"
    else
        case ${{COMP_WORDS[1]}} in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _lightning_draft lightning-draft
"""
_ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"


def script(shell: str) -> str:
    """Return the script that defines the completion.

    It completes commands, shipped configs and options; other words, such as values, are completed as file names.

    Args:
        shell: `bash` or `zsh`.

    Raises:
        ConfigurationError: The shell is not supported.
    """
    one_of("completion", shell, ("bash", "zsh"))
    subcommands = {"configs": ["list", "show"], "completion": ["bash", "zsh"]}
    words = {command: sorted(_options(command)) for command in pages.COMMANDS} | subcommands
    cases = "\n".join(f'            {command}) words="{" ".join(some)}" ;;' for command, some in words.items())
    text = _SCRIPT.format(
        commands=" ".join([*words, "--help", "--version"]), configs=" ".join(shipped.names()), cases=cases
    )
    return (_ZSH if shell == "zsh" else "") + text


def _options(command: str) -> set[str]:
    """Return the options on the help page of a command and, if it has `--config`, those of the shipped configs."""
    named = set(re.findall(r"--[a-z][a-z_]*(?:\.[a-z_]+)*(?![.\w])", pages.COMMANDS[command])) | {"--help"}
    if command not in ("fit", "validate"):
        return named
    contents = (yaml.safe_load(shipped.locate(name).read_text(encoding="utf-8")) for name in shipped.names())
    return named | {f"--{key}" for content in contents for key in _keys(content)}


def _keys(content: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted option names of a config, without `init_args`."""
    for key, value in content.items():
        name = prefix.rstrip(".") if key in ("class_path", "init_args") else f"{prefix}{key}"
        if name and key != "init_args":
            yield name
        if isinstance(value, Mapping):
            yield from _keys(value, f"{name}." if name else "")

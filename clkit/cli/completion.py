"""What ``clkit complete bash`` prints: a function of the shell that knows commands, recipes and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clkit.cli.learn_commands import UNREADABLE
from clkit.cli.search_commands import PARTS
from clkit.cli.settings_help import CLASSES

__all__ = ["SHELLS", "completion_script"]

SHELLS = ("bash", "zsh")

_SCRIPT = """\
_clkit() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=""
    if ((COMP_CWORD == 1)); then
        words="{commands}"
    else
        case ${{COMP_WORDS[1]}} in
{cases}
        esac
    fi
    case ${{before%+}} in
{values}
        --*|-c|-k|-o) [[ $current == -* ]] || words="" ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _clkit clkit
"""


def completion_script(shell: str, words: Mapping[str, Sequence[str]]) -> str:
    """Return the script of a shell; ``words`` are what may follow each command. Files are completed everywhere."""
    values = {**CLASSES, "--part": PARTS, "--unreadable": UNREADABLE}
    script = _SCRIPT.format(
        commands=" ".join(words),
        cases="\n".join(f'            {name}) words="{" ".join(each)}" ;;' for name, each in words.items()),
        values="\n".join(f'        {name}) words="{" ".join(each)}" ;;' for name, each in values.items()),
    )
    return f"autoload -U +X bashcompinit && bashcompinit\n{script}" if shell == "zsh" else script

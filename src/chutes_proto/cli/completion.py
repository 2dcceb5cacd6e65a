"""``chutes-proto completion``: a shell completes commands and options."""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from chutes_proto.cli import console
from chutes_proto.cli.base import COMPLETE, Argument, Command
from chutes_proto.cli.describe import exits, wrong_usage

_SHELLS: Final[dict[str, type[ShellComplete]]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}


@click.command("completion", cls=Command, exits=exits("printed", wrong=wrong_usage()))
@click.argument("shell", cls=Argument, metavar="SHELL", type=click.Choice([*_SHELLS]), help="bash, zsh or fish")
def command(shell: str) -> int:
    """Print the completion script of a shell.

    Install it where the shell looks for such scripts, and start a new shell:

      bash (4.4 or newer)  ~/.local/share/bash-completion/completions/chutes-proto
      zsh                  _chutes-proto in a directory of $fpath
      fish                 ~/.config/fish/completions/chutes-proto.fish

    Examples:
      chutes-proto completion bash > chutes-proto.bash
      chutes-proto completion zsh > _chutes-proto
      chutes-proto completion fish > chutes-proto.fish
    """
    root = click.get_current_context().find_root().command
    console.out(_SHELLS[shell](root, {}, "chutes-proto", COMPLETE).source())
    return console.GRANTED

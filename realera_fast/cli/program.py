"""The command line: ``realera-fast erase | apply | verify | info | push | demo``.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 1 failed (one line that
begins with ``error:``; ``--debug`` shows the traceback), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer

from realera_fast import __version__
from realera_fast.cli.options import PROGRAM, CommandError, check_text

app = typer.Typer(
    name=PROGRAM,
    # Plain help: examples keep their lines, and the output is the same in a pipe.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Remove concepts from text-to-image diffusion models.

    \b
    Examples:
      realera-fast demo
      realera-fast erase embedded --concept cat --out out/no-cat
      realera-fast erase ./sd14 --concept "Van Gogh=art" --kind style \\
          --device cuda --dtype fp16 --out out/no-van-gogh
      realera-fast verify ./sd14 out/no-van-gogh/erasure.safetensors \\
          --prompt "a painting by Van Gogh" --untouched "a painting by Monet" \\
          --device cuda --dtype fp16 --out out/check

    Run 'realera-fast COMMAND --help' for the options of a command.
    """
    if version:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit()


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits with its code."""
    # Being stopped by a scheduler must not leave half-written folders either.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # A word that the terminal can't show is no failure.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit code and leaves this process as it was."""
    with _settings_kept():
        return _run(arguments)


def _run(arguments: Sequence[str]) -> int:
    try:
        check_text(arguments)
        code = app(args=list(arguments), prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # typer's word for KeyboardInterrupt
            typer.echo("interrupted", err=True)
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # The reader went away ("info | head"): nothing is left to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except typer.Abort:
        typer.echo("aborted", err=True)
        return 1
    except _CLICK_ERROR as error:  # wrong usage: prints the command's usage line and the reason
        error.show()
        return int(error.exit_code)
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        typer.echo(f"error: {_reason(error)}", err=True)
        return 1


# The base of all usage errors. Newer typers carry their own copy of click, older ones use click:
# the class has no public name that fits both.
_CLICK_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _reason(error: Exception) -> str:
    """One line that says what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        reason = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    else:
        reason = " ".join(str(error).split())
    if isinstance(error, CommandError | ValueError | TypeError | OSError | RuntimeError):
        return reason or type(error).__name__
    return f"{type(error).__name__}: {reason} (--debug shows where)"


def start_logging(quiet: bool) -> None:
    """Sets up messages on stderr; `_settings_kept` undoes it."""
    logging.basicConfig(level=logging.WARNING, format="warning: %(message)s", stream=sys.stderr)
    from transformers.utils import logging as transformers_logging

    # Importing its models logs what optional packages it would like; users did not ask.
    transformers_logging.set_verbosity_error()
    if quiet:
        from diffusers.utils import logging as diffusers_logging

        transformers_logging.disable_progress_bar()
        diffusers_logging.disable_progress_bar()


@contextmanager
def _settings_kept() -> Iterator[None]:
    """Puts the root logger and the other libraries' messages back as they were."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    modules: list[Any] = [
        sys.modules.get(f"{name}.utils.logging") for name in ("diffusers", "transformers")
    ]
    kept = [(m, m.get_verbosity(), m.is_progress_bar_enabled()) for m in modules if m]
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level
        for module, verbosity, bars in kept:
            module.set_verbosity(verbosity)
            (module.enable_progress_bar if bars else module.disable_progress_bar)()

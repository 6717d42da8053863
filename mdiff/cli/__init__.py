"""The command line: one file a command; errors become exit codes here."""

import errno
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from mdiff.cli.threads import prepare
from mdiff.cli.views.console import message, result
from mdiff.cli.views.streams import open_streams, unwritten
from mdiff.errors import MdiffError, nearest

OUT_OF_DISK_OR_MEMORY = 6
INTERRUPTED = 130
USAGE = 2
UNEXPECTED = 1
DEBUG = "--debug"

# Typer brings its own copy of click in some versions and imports it in others.
UsageError: type = typer.BadParameter.__mro__[1]


def app() -> typer.Typer:
    """The command line with every command; heavy modules are imported when one runs."""
    from mdiff.cli import tokenizer
    from mdiff.cli.bench import bench
    from mdiff.cli.chat import chat
    from mdiff.cli.convert import convert
    from mdiff.cli.demo import demo
    from mdiff.cli.doctor import doctor
    from mdiff.cli.eval import evaluate
    from mdiff.cli.generate import generate
    from mdiff.cli.images.edit import edit
    from mdiff.cli.inspect import inspect
    from mdiff.cli.models import models
    from mdiff.cli.options import add_command
    from mdiff.cli.revise import revise
    from mdiff.cli.sweep import sweep
    from mdiff.cli.train import train

    line = typer.Typer(
        help="Generate discrete tokens by masked diffusion.",
        epilog="Any command takes --debug, which shows the traceback of an error.",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=False,
    )
    for command in (
        demo, generate, chat, edit, revise, evaluate, train, sweep, inspect, models, convert,
        doctor, bench,
    ):  # fmt: skip
        add_command(line, "eval" if command is evaluate else command.__name__, command)
    own = typer.Typer(help="Train, encode, decode and inspect tokenizers.", rich_markup_mode=None)
    for each in (tokenizer.train, tokenizer.encode, tokenizer.decode, tokenizer.inspect):
        add_command(own, each.__name__, each)
    line.add_typer(own, name="tokenizer")
    line.callback()(_top)
    return line


def _top(version: bool = typer.Option(False, "--version", help="Show the version.")) -> None:
    pass


# No room: on the disk, in a quota, or under a limit on the size of files.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A path that cannot be written or made; what cannot be read has an error of its own.
REFUSED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST,
    errno.EISDIR, errno.ENOTEMPTY, errno.ELOOP,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code (README: 0 to 7, or 130)."""
    open_streams()
    warnings.showwarning = lambda text, *rest: message(f"warning: {' '.join(str(text).split())}")
    prepare()
    code = run(sys.argv[1:] if arguments is None else arguments)
    fault = unwritten()
    if fault is not None and code == 0:
        code, text = explained(fault)
        code = USAGE if code == UNEXPECTED else code
        message(f"error: the result could not be written: {text}")
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """The exit code of one command line; an error is one line on stderr."""
    given = list(arguments)
    end = given.index("--") if "--" in given else len(given)
    debug = DEBUG in given[:end]
    given = [word for i, word in enumerate(given) if word != DEBUG or i >= end]
    if given == ["--version"]:
        from mdiff import __version__

        result(__version__)
        return 0
    try:
        command = typer.main.get_command(app())
        with command.make_context("mdiff", given) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except BaseException as error:
        if debug and not isinstance(error, KeyboardInterrupt | typer.Abort):
            raise
        code, text = explained(error)
        message(f"error: {text}")
        return code
    return 0


def explained(error: BaseException) -> tuple[int, str]:
    """The exit code of an error and its message, on one line."""
    text = " ".join(str(error).split())
    if isinstance(error, MdiffError):
        return error.exit_code, text
    if isinstance(error, UsageError):
        return USAGE, _usage(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED, text or "interrupted"
    if _is_out_of_memory(error):
        return OUT_OF_DISK_OR_MEMORY, (
            "out of memory; a smaller --batch-size or --length needs less"
        )
    if isinstance(error, OSError) and error.errno in FULL:
        return OUT_OF_DISK_OR_MEMORY, f"the disk is full: {text}"
    if isinstance(error, OSError) and error.errno in REFUSED:
        return USAGE, f"{error.filename or 'a file'}: {error.strerror}"
    return UNEXPECTED, f"{type(error).__name__}: {text} (--debug shows where)"


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's own error, torch's by its name (torch may not be loaded), or its allocator's."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _usage(error: Any) -> str:
    """What was wrong with the command line, with the nearest option or command."""
    message = " ".join(error.format_message().split()).rstrip(".")
    command = error.ctx.command if error.ctx is not None else None
    if command is None:
        return message
    path = error.ctx.command_path
    if type(error).__name__ == "NoSuchOption":
        wrong = error.option_name
        known = [option for parameter in command.params for option in parameter.opts]
        known = [option for option in known if option.startswith("--")] + [DEBUG, "--help"]
        return f"{path} has no option {wrong}; {nearest(wrong, known)}"
    commands = command.commands if isinstance(command, typer.core.TyperGroup) else {}
    if commands and message.startswith("No such command"):
        wrong = message.split("'")[1] if message.count("'") >= 2 else ""
        return f"{path} has no command {wrong!r}; {nearest(wrong, commands)}"
    if commands and message.startswith("Missing command"):
        return f"{path} needs a command: {', '.join(sorted(commands))}"
    return f"{path}: {message[0].lower()}{message[1:]}"

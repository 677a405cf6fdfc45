"""The table of verbs, the top help, and what an error means to the shell. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from signal import SIGTERM
from typing import TYPE_CHECKING, Any

from bitdistiller_peft.cli.options import did_you_mean
from bitdistiller_peft.errors import (
    BitDistillerError,
    CheckpointError,
    ConfigError,
    DoesNotFitError,
    HubError,
    TrainingError,
    WeightError,
)

if TYPE_CHECKING:
    from bitdistiller_peft.cli.verb import Settings, Verb

OK, FAILED, USAGE, CHECKPOINT, WOULD_NOT_FIT, INTERRUPTED = 0, 1, 2, 3, 4, 130

VERBS = {
    "init": "write a commented YAML file for the whole chain",
    "estimate": "memory, time, disk and size before anything is run",
    "run": "the whole chain from one YAML file; goes on where it stopped",
    "calibrate": "fit a student to a calibration text",
    "generate": "let the teacher write training data",
    "cache": "let the teacher speak once, to disk; distill then needs no teacher in memory",
    "distill": "train the student on what its teacher says, and pack it",
    "eval": "perplexity, divergence from a teacher, tasks",
    "compare": "several models on the same text and tasks, paired",
    "report": "one page about a run: scores, curves, weights, sizes, answers",
    "export": "write a packed model in another format, verified",
    "verify-export": "compare an exported model with the packed one, code for code",
    "import": "take over a model that another tool quantized",
    "inspect": "what a model folder holds: size by part, true bits per weight",
    "verify": "compare a model folder with its checksums",
    "push": "upload a model folder; shows the list of files first",
    "chat": "talk to a model in the terminal",
    "serve": "speak the OpenAI protocol (transformers' own server)",
    "env": "versions and devices, for a bug report",
    "demo": "the whole path on a toy model: a minute or two, no network",
}

_TOP = """usage: bitdistiller VERB [options]

Take a language model to 2-4 bits: calibrate, distil from itself, pack, measure, publish.

{verbs}

bitdistiller VERB --help     what a verb takes (--help-all: everything that it inherits)
bitdistiller --version

Settings: default < YAML file (--config) < command line. Exit codes: 0 ok, 1 failed, 2 usage or settings,
3 bad checkpoint, 4 would not fit, 130 interrupted (Ctrl-C, SIGTERM) after a clean save.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments; those of the process by default.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # on some processors it asks every program for a package that only its own 4-bit products would use
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")  # TRL reports every trainer otherwise
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(top_help())
        return OK if arguments else USAGE
    if arguments[0] in ("-V", "--version"):
        from bitdistiller_peft._version import library_version

        sys.stdout.write(f"bitdistiller_peft {library_version()}\n")
        return OK
    name, *rest = arguments
    if name not in VERBS:
        sys.stderr.write(f"error: unknown verb {name!r}.{did_you_mean(name, VERBS)} See bitdistiller --help.\n")
        return USAGE
    return _run(name, rest)


def top_help() -> str:
    """What `bitdistiller --help` shows."""
    width = max(map(len, VERBS)) + 2
    return _TOP.format(verbs="\n".join(f"  {name:<{width}}{summary}" for name, summary in VERBS.items()))


def _run(name: str, rest: list[str]) -> int:
    from bitdistiller_peft.cli.parse import full_help, parse
    from bitdistiller_peft.cli.verb import Console

    extra: dict[str, Any] = {"debug": "--debug" in rest, "json": "--json" in rest}
    settings: Settings | None = None
    try:
        verb: Verb = import_module(f"bitdistiller_peft.cli.verbs.{name.replace('-', '_')}").VERB
        if "--help-all" in rest:
            sys.stdout.write(full_help(verb))
            return OK
        settings = parse(verb, rest, extra)
        console = Console(is_json=extra["json"])
        # trainers write their logs to stdout, which is ours
        with contextlib.redirect_stdout(sys.stderr), _sigterm_as_interrupt():
            result = verb.run(settings, console)
        console.finish(result)
        return int(result.get("exit_code", OK))
    except SystemExit as stop:  # argparse, after --help
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"\ninterrupted. {stop}".rstrip() + "\n")
        return INTERRUPTED
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  (whoever read us has left; nothing more to say)
        return FAILED
    except Exception as error:  # noqa: BLE001  (the last stop before the shell)
        if extra["debug"]:
            traceback.print_exc()
        sys.stderr.write(f"error: {explain(error, settings)}\n")
        return exit_code(error)
    finally:
        if settings is not None:
            from bitdistiller_peft.cli.output import withdraw

            withdraw()


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind as Ctrl-C does; a trainer at work takes both over and finishes its step first."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    takes = threading.current_thread() is threading.main_thread() and signal.getsignal(SIGTERM) == signal.SIG_DFL
    if takes:
        signal.signal(SIGTERM, interrupt)
    try:
        yield
    finally:
        if takes:
            signal.signal(SIGTERM, signal.SIG_DFL)


def exit_code(error: BaseException) -> int:
    """What an error means to the shell."""
    match error:
        case DoesNotFitError():
            return WOULD_NOT_FIT
        case CheckpointError() | WeightError():
            return CHECKPOINT
        case TrainingError() | HubError():
            return FAILED
        case BitDistillerError():
            return USAGE
        case MemoryError():
            return WOULD_NOT_FIT
    if type(error).__name__ == "OutOfMemoryError":
        return WOULD_NOT_FIT
    if type(error).__name__ == "SafetensorError":
        return CHECKPOINT
    return USAGE if isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError)) else FAILED


def explain(error: BaseException, settings: Settings | None = None) -> str:
    """One message for people: what, and where the setting was made."""
    text = str(error)
    if not isinstance(error, BitDistillerError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
        if exit_code(error) == WOULD_NOT_FIT:
            text += " Run `bitdistiller estimate` with the same settings."
        elif exit_code(error) == FAILED:
            text += " (--debug shows the traceback.)"
    elif isinstance(error, ConfigError) and settings is not None and text.startswith("`"):
        name = text[1:].partition("`")[0]
        places = {settings.origins[key] for key in settings.origins if key.rpartition(".")[2] == name or key == name}
        places -= {"command line"}
        if len(places) == 1 and (place := places.pop()) not in text:
            text += f" (Set in {place}.)"
    return text

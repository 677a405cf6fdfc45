"""What a verb declares, and what it is given when it runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

from bitdistiller_peft.cli.options import Option
from bitdistiller_peft.cli.ranks import is_main_process
from bitdistiller_peft.errors import ConfigError


@dataclass(frozen=True)
class Positional:
    """An argument without a flag.

    Attributes:
        name: as the help shows it, in lower case.
        help: one line.
        nargs: as argparse takes it; empty for exactly one.
    """

    name: str
    help: str
    nargs: str = ""


@dataclass(frozen=True)
class Verb:
    """One command.

    Attributes:
        name: what is typed.
        summary: one line for the top help.
        run: does it; gets settings and console, returns plain values for `--json`.
        sections: names of the sections whose settings have flags of their own names here.
        positionals: arguments without flags.
        own: options of this verb alone, which have no place in YAML.
        dotted: settings of these sections are spelled with their section, ``--quant.bits``.
        epilog: examples, shown under the help.
        hidden: declared settings that mean nothing here, by full name.
    """

    name: str
    summary: str
    run: Callable[[Settings, Console], dict[str, Any]]
    sections: tuple[str, ...] = ()
    positionals: tuple[Positional, ...] = ()
    own: tuple[Option, ...] = ()
    dotted: tuple[str, ...] = ()
    epilog: str = ""
    hidden: tuple[str, ...] = ()


@dataclass
class Settings:
    """All settings of one call.

    Attributes:
        verb: name of the verb.
        values: every setting by its full name, defaults included; inherited ones only where they were given.
        origins: where a setting was given, ``"command line"`` or ``"run.yaml, line 3"``; defaults have none.
        arguments: positionals and the verb's own options.
        is_dry_run: check and tell, do nothing.
    """

    verb: str
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    is_dry_run: bool = False

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)

    def need(self, key: str) -> Any:
        """The value of a setting that must be given.

        Raises:
            ConfigError: it is not.
        """
        value = self.values.get(key)
        if value is None:
            flag = "--" + key.rpartition(".")[2].replace("_", "-")
            raise ConfigError(f"`{key}` must be given: pass {flag}, or `{key}` in the file of --config.")
        return value

    def section(self, name: str) -> dict[str, Any]:
        """The settings of a section by their short names."""
        prefix = f"{name}."
        return {key.removeprefix(prefix): value for key, value in self.values.items() if key.startswith(prefix)}

    def given_in(self, name: str) -> dict[str, Any]:
        """Those settings of a section that are not defaults."""
        return {key: value for key, value in self.section(name).items() if f"{name}.{key}" in self.origins}

    def with_values(self, **changes: Any) -> Settings:
        """A copy with other values; dots are written as two underscores."""
        values = {**self.values, **{key.replace("__", "."): value for key, value in changes.items()}}
        return Settings(self.verb, values, dict(self.origins), dict(self.arguments), self.is_dry_run)


@dataclass
class Console:
    """Where a verb speaks: results to stdout, everything else to stderr.

    Attributes:
        is_json: stdout is for one JSON document, and tables go to stderr.
        out: stdout, as it was when the command started.
    """

    is_json: bool = False
    out: TextIO = field(default_factory=lambda: sys.stdout)
    _noted: set[str] = field(default_factory=set)

    def say(self, text: object = "") -> None:
        """A line of the result, for people."""
        if is_main_process():
            stream = sys.stderr if self.is_json else self.out
            stream.write(f"{text}\n")
            stream.flush()

    def note(self, text: object) -> None:
        """A line about what is going on; the same one only once."""
        if is_main_process() and str(text) not in self._noted:
            self._noted.add(str(text))
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def write(self, text: str) -> None:
        """A piece of text as it comes, without a line break."""
        self.out.write(text)
        self.out.flush()

    def finish(self, result: dict[str, Any]) -> None:
        """The JSON document, if it was asked for."""
        if self.is_json and is_main_process():
            self.out.write(json.dumps(result, indent=2, ensure_ascii=False, default=str) + "\n")
            self.out.flush()

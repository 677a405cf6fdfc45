"""What a setting may be: plain declarations, from which flags, YAML checks and help are made."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bitdistiller_peft.errors import ConfigError

KINDS = ("text", "int", "float", "bool", "list", "any")


@dataclass(frozen=True)
class Option:
    """One setting.

    Attributes:
        name: as in YAML; the flag has dashes for underscores.
        kind: ``"text"``, ``"int"``, ``"float"``, ``"bool"``, ``"list"`` (of texts), or ``"any"`` for what the library
            itself checks.
        help: one line.
        default: what holds if nothing is said; `None` leaves it to the library.
        choices: the values that are allowed, if they are few.
    """

    name: str
    kind: str
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True)
class Section:
    """Settings that belong together: a mapping in YAML, a group in the help.

    Attributes:
        name: the key in YAML; empty for the settings at the top.
        title: heading in the help.
        options: those that are declared here.
        inherited: gives the names of further settings that a class of the library takes; called only when a name is
            not declared, since it imports that class.
    """

    name: str
    title: str
    options: tuple[Option, ...]
    inherited: Callable[[], dict[str, Option]] | None = None

    def key(self, name: str) -> str:
        """The full name of a setting: ``"quant.bits"``, or ``"model"`` at the top."""
        return f"{self.name}.{name}" if self.name else name

    def declared(self) -> dict[str, Option]:
        """The declared settings by name."""
        return {option.name: option for option in self.options}

    def find(self, name: str) -> Option | None:
        """The setting of a name, declared or inherited."""
        option = self.declared().get(name)
        if option is None and self.inherited is not None:
            option = self.inherited().get(name)
        return option

    def all_names(self) -> list[str]:
        """Every name that `find` knows."""
        return [*self.declared(), *(self.inherited() if self.inherited else ())]


_TOO_LARGE = 1 << 63  # for a whole number that means something; NaN and infinity are not below it either


def convert(option: Option, value: Any) -> Any:
    """Check one value, as YAML reads it.

    Args:
        option: the setting.
        value: anything.

    Raises:
        ConfigError: it is of another kind, or none of the choices.
    """
    if value is None:
        return None
    converted = _CONVERTERS[option.kind](option, value)
    if option.choices and converted not in option.choices:
        raise ConfigError(
            f"`{option.name}` must be one of {list(option.choices)}: got {option.name}={value!r}."
            f"{did_you_mean(value, option.choices)}"
        )
    return converted


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The nearest match as a sentence with a space in front; nothing if none is near."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _must(option: Option, rule: str, value: object) -> ConfigError:
    return ConfigError(f"`{option.name}` must be {rule}: got {option.name}={repr(value)[:200]}.")


def _text(option: Option, value: Any) -> str:
    if isinstance(value, (dict, list, bool, bytes, set)):
        raise _must(option, "text", value)
    return str(value)


def _int(option: Option, value: Any) -> int:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) < _TOO_LARGE or value != int(value):
        raise _must(option, "a whole number", value)
    return int(value)


def _float(option: Option, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or (isinstance(value, int) and not abs(value) < _TOO_LARGE):
        raise _must(option, "a number", value)
    return float(value)


def _bool(option: Option, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _must(option, "true or false", value)
    return value


def _list(option: Option, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [_text(option, entry) for entry in values]


_CONVERTERS: dict[str, Callable[[Option, Any], Any]] = {
    "text": _text,
    "int": _int,
    "float": _float,
    "bool": _bool,
    "list": _list,
    "any": lambda option, value: value,
}

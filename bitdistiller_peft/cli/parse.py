"""From the command line and a YAML file to `Settings`: default < file < command line, and nothing unknown passes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bitdistiller_peft.cli.options import Option, Section, convert, did_you_mean
from bitdistiller_peft.cli.schema import SECTIONS, all_keys
from bitdistiller_peft.cli.verb import Settings, Verb
from bitdistiller_peft.errors import BitDistillerError, ConfigError, add_location

COMMON = ("--config", "--json", "--dry-run", "--debug", "--help", "--help-all")
_WIDTH, _COLUMN = 110, 38
_POSITIONAL = "positional "


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise, where argparse would write and leave."""
        raise ConfigError(f"{message}. See {self.prog} --help.")


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=_COLUMN, width=_WIDTH)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(f"{indent}{line}\n" for line in text.strip().splitlines())


def parse(verb: Verb, argv: Sequence[str], extra: dict[str, Any] | None = None) -> Settings:
    """Read a verb's arguments.

    Args:
        verb: what is to be done.
        argv: what follows the verb's name.
        extra: filled with ``json`` and ``debug``.

    Raises:
        ConfigError: an unknown flag or key, with the nearest match; or a value that cannot be.
    """
    flags = _flags(verb)
    tokens = [_normalised(token) for token in argv]
    for token in tokens:
        _admit(token.partition("=")[0], flags, verb)
    tokens = _joined_bools(tokens, flags)
    parser = build_parser(verb, flags)
    found = vars(parser.parse_args(tokens))
    common = {name: found.pop(name, False) for name in ("json", "debug", "help_all")}
    if extra is not None:
        extra.update(common)
    settings = Settings(verb.name, {key: option.default for key, option in all_keys().items()})
    settings.is_dry_run = found.pop("dry_run")
    config = found.pop("config")
    if config is not None:
        _read_file(Path(config), settings)
    settings.arguments = {option.name: option.default for option in verb.own}
    settings.arguments |= {p.name: found.pop(_POSITIONAL + p.name) for p in verb.positionals}
    for key, text in found.items():
        _set_from_command_line(settings, key, text, flags)
    return settings


def build_parser(
    verb: Verb, flags: dict[str, tuple[str, Option]], *, show_dotted: bool = False
) -> argparse.ArgumentParser:
    """The argparse parser of a verb; prefixes of flags are not taken for the flag."""
    parser = _Parser(
        prog=f"bitdistiller {verb.name}",
        description=f"{verb.summary[0].upper()}{verb.summary[1:]}.",
        usage=_usage(verb),
        epilog=verb.epilog,
        allow_abbrev=False,
        formatter_class=_Formatter,
    )
    for positional in verb.positionals:
        more = {"nargs": positional.nargs} if positional.nargs else {}
        place = _POSITIONAL + positional.name  # a flag may have the same name: `eval MODEL --model BASE`
        parser.add_argument(place, help=positional.help, metavar=positional.name.upper(), **more)  # type: ignore[arg-type]
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag, (key, option) in flags.items():
        section = key.rpartition(".")[0] if key in all_keys() or "." in key else "own"
        title = "this command" if section == "own" else SECTIONS[section].title
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        group = groups[title]
        _add(group, flag, key, option, is_hidden="." in flag and not (show_dotted and section in verb.dotted))
    common = parser.add_argument_group("every command")
    common.add_argument("-c", "--config", metavar="FILE", help="YAML file; flags go before it")
    common.add_argument("--dry-run", action="store_true", help="check and show what would be done, and stop")
    common.add_argument("--json", action="store_true", help="one JSON document on stdout")
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    if any(SECTIONS[name].inherited for name in (*verb.sections, *verb.dotted)):
        common.add_argument("--help-all", action="store_true", help="also the settings inherited from the library")
    return parser


def full_help(verb: Verb) -> str:
    """The help with all inherited settings."""
    flags = _flags(verb)
    for name in (*verb.sections, *verb.dotted):
        section = SECTIONS[name]
        for option in (section.inherited() if section.inherited else {}).values():
            key = section.key(option.name)
            flags.setdefault(_spelling(verb, section, option), (key, option))
    return build_parser(verb, flags, show_dotted=True).format_help()


def _usage(verb: Verb) -> str:
    words = [f"bitdistiller {verb.name}"]
    for positional in verb.positionals:
        name = positional.name.upper()
        words.append({"": name, "?": f"[{name}]", "+": f"{name} [{name} ...]", "*": f"[{name} ...]"}[positional.nargs])
    return " ".join([*words, "[options]"])


def _flags(verb: Verb) -> dict[str, tuple[str, Option]]:
    """Every declared flag of a verb: the key that it sets, and the option; the dotted form is always there too."""
    flags: dict[str, tuple[str, Option]] = {option.flag: (option.name, option) for option in verb.own}
    for name in (*verb.sections, *verb.dotted):
        section = SECTIONS[name]
        for option in section.options:
            if section.key(option.name) not in verb.hidden:
                flags.setdefault(_spelling(verb, section, option), (section.key(option.name), option))
    for name in (*verb.sections, *verb.dotted):
        section = SECTIONS[name]
        for option in section.options:
            if section.name and section.key(option.name) not in verb.hidden:
                flags.setdefault(_dotted(section, option), (section.key(option.name), option))
    return flags


def _spelling(verb: Verb, section: Section, option: Option) -> str:
    return _dotted(section, option) if section.name in verb.dotted else option.flag


def _dotted(section: Section, option: Option) -> str:
    return f"--{section.name}.{option.flag[2:]}" if section.name else option.flag


def _add(group: Any, flag: str, key: str, option: Option, *, is_hidden: bool) -> None:
    default = "" if option.default is None or (option.kind == "bool" and not option.default) else f" [{_show(option)}]"
    text = argparse.SUPPRESS if is_hidden else (option.help + default).replace("%", "%%")
    if option.kind == "bool":
        action = argparse.BooleanOptionalAction
        group.add_argument(flag, dest=key, action=action, default=argparse.SUPPRESS, help=text)
        return
    name = option.name.rpartition(".")[2].upper() if len(flag) < 22 else "VALUE"
    metavar = "|".join(option.choices) if option.choices and len("|".join(option.choices)) < 16 else name
    more = {"nargs": "+"} if option.kind == "list" else {}
    group.add_argument(flag, dest=key, default=argparse.SUPPRESS, metavar=metavar, help=text, **more)


def _show(option: Option) -> str:
    return " ".join(map(str, option.default)) if isinstance(option.default, list) else str(option.default)


def _normalised(token: str) -> str:
    """TRL's spelling, `--learning_rate`, is ours too."""
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else token


def _admit(flag: str, flags: dict[str, tuple[str, Option]], verb: Verb) -> None:
    """Refuse an unknown flag, or learn an inherited one."""
    bare = "--" + flag.removeprefix("--no-") if flag.startswith("--no-") else flag
    if not flag.startswith("--") or flag == "--" or flag in flags or bare in flags or flag in COMMON:
        return
    name = bare[2:].replace("-", "_")
    for section_name in (*verb.sections, *verb.dotted):
        section = SECTIONS[section_name]
        if section.name in verb.dotted or name.startswith(f"{section.name}."):
            prefix, _, short = name.partition(".")
            option = section.find(short) if prefix == section.name else None
        else:
            option = section.find(name)
        if option is not None and section.key(option.name) not in verb.hidden:
            flags[bare] = (section.key(option.name), option)
            return
    names = [*flags, *COMMON, *(f"--{n.replace('_', '-')}" for s in verb.sections for n in SECTIONS[s].all_names())]
    raise ConfigError(f"unknown option {flag!r}.{did_you_mean(flag, names)} See bitdistiller {verb.name} --help.")


def _joined_bools(tokens: list[str], flags: dict[str, tuple[str, Option]]) -> list[str]:
    """`--packing true`, as TRL has it, and `--packing=false` become `--packing` and `--no-packing`."""
    joined: list[str] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        name, equals, value = token.partition("=")
        if name in flags and flags[name][1].kind == "bool":
            if not equals and rest and rest[0].lower() in ("true", "false"):
                value = rest.pop(0)
            elif equals and value.lower() not in ("true", "false"):
                raise ConfigError(f"{name} must be true or false: got {value!r}.")
            token = "--no-" + name[2:] if value.lower() == "false" else name
        joined.append(token)
    return joined


def _set_from_command_line(settings: Settings, key: str, text: Any, flags: dict[str, tuple[str, Option]]) -> None:
    from bitdistiller_peft.cli.yamlfile import parse_value

    option = next(option for known, option in flags.values() if known == key)
    read: Callable[[str], Any] = str if option.kind in ("text", "list") else parse_value
    value = [read(part) for part in text] if isinstance(text, list) else read(text) if isinstance(text, str) else text
    value = convert(option, None if value == "null" else value)
    if "." not in key and key not in all_keys():
        settings.arguments[key] = value
        return
    settings.values[key] = value
    settings.origins[key] = "command line"


def _read_file(path: Path, settings: Settings) -> None:
    from bitdistiller_peft.cli.yamlfile import read_yaml

    for name, entry in read_yaml(path).items():
        where = f"{path}, line {entry.line}"
        if name in SECTIONS:
            entries = entry.value or {}
            if not isinstance(entries, dict):
                raise ConfigError(f"{where}: `{name}` must hold settings, indented under it: got {entries!r}.")
            for short, inner in entries.items():
                _set_from_file(settings, SECTIONS[name], short, inner.value, f"{path}, line {inner.line}")
        else:
            _set_from_file(settings, SECTIONS[""], name, entry.value, where)


def _set_from_file(settings: Settings, section: Section, name: str, value: Any, where: str) -> None:
    from bitdistiller_peft.cli.yamlfile import plain

    option = section.find(name)
    if option is None:
        raise ConfigError(f"{where}: unknown key {name!r}{_place(section)}.{_hint(section, name)}")
    key = section.key(name)
    try:
        settings.values[key] = convert(option, plain(value))
    except BitDistillerError as error:
        raise add_location(error, where) from None
    settings.origins[key] = where


def _place(section: Section) -> str:
    return f" under `{section.name}`" if section.name else ""


def _hint(section: Section, name: str) -> str:
    elsewhere = [s.name for s in SECTIONS.values() if s.name and name in s.declared() and s.name != section.name]
    names = [*section.all_names(), *([] if section.name else [s for s in SECTIONS if s])]
    guess = did_you_mean(name, names)
    if not guess and elsewhere:
        return f" It belongs under {' or '.join(f'`{s}`' for s in elsewhere)}."
    return guess or f" Known: {', '.join(sorted(names)[:30])}."

"""YAML as a careful reader takes it: line numbers, no duplicate keys, and `8e-6` is a number."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bitdistiller_peft.errors import ConfigError

MAX_YAML = 1_000_000  # bytes
_NUMBER = re.compile(
    r"""^(?:
        [-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
       |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
       |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
       |[-+]?\.(?:inf|Inf|INF)
       |\.(?:nan|NaN|NAN)
    )$""",
    re.VERBOSE,
)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes `8e-6` for text, and `yes`, `no`, `on`, `off` for truth values; here as in YAML 1.2.

    No aliases: settings need none, and a few lines of them stand for more than any memory holds.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node that is written out."""
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"no aliases: got '*{event.anchor}'; write it out", event.start_mark
            )
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in rules if tag not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")
    ]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789."))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


@dataclass(frozen=True)
class Entry:
    """A value and where it stands.

    Attributes:
        value: plain YAML; a mapping of a known section is a dict of entries.
        line: counted from one.
    """

    value: Any
    line: int


def read_yaml(path: Path) -> dict[str, Entry]:
    """Read a file that holds a mapping; nested mappings are given with the lines of their own keys.

    Raises:
        ConfigError: no such file, no YAML, no mapping, or a key that stands twice; the line is named.
    """
    try:
        if path.is_file() and (size := path.stat().st_size) > MAX_YAML:
            raise ConfigError(f"`config` must be at most {MAX_YAML:,} bytes long: got {str(path)!r} of {size:,}.")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`config` must be a file that can be read: got {str(path)!r} ({error}). `bitdistiller init` writes one."
        ) from None
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path) -> dict[str, Entry]:
    """Read a text that holds a mapping.

    Args:
        text: YAML.
        path: what the text is called in messages.

    Raises:
        ConfigError: see `read_yaml`.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}, line 1: the file must hold `key: value` lines.")
        return _entries(loader, node, path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark is not None else str(path)
        raise ConfigError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}. Correct it.") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply. Settings stand in one or two levels.") from None
    finally:
        if loader is not None:
            loader.dispose()


def parse_value(text: str) -> Any:
    """Read one value from the command line by the same rules; what is no YAML is text."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def dump_yaml(values: dict[str, Any]) -> str:
    """Write plain values, in the order given, so that `read_yaml` gives the same back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Floats always with a point, so that readers of YAML 1.1 find numbers too; texts that look like one are quoted."""


def _float_node(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    text = repr(value)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    if text in ("inf", "-inf", "nan"):
        text = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}[text]
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


def _text_node(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = '"' if _NUMBER.match(value) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(float, _float_node)
_Dumper.add_representer(str, _text_node)


def _entries(loader: _Loader, node: yaml.MappingNode, path: Path) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = _constructed(loader, key_node, path)
        if not isinstance(key, str):
            raise ConfigError(f"{path}, line {line}: a key must be text: got {repr(key)[:80]}. Quote it.")
        if key in found:
            raise ConfigError(
                f"{path}, line {line}: {key[:80]!r} stands twice; first in line {found[key].line}. Delete one."
            )
        if isinstance(value_node, yaml.MappingNode):
            found[key] = Entry(_entries(loader, value_node, path), line)
        else:
            found[key] = Entry(_constructed(loader, value_node, path), line)
    return found


def _constructed(loader: _Loader, node: yaml.Node, path: Path) -> Any:
    """A node's value; dates and numbers that are none raise something else than YAML's own errors."""
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, OverflowError, TypeError) as error:
        line = node.start_mark.line + 1
        raise ConfigError(f"{path}, line {line}: not YAML: {str(error)[:200]}. Quote it if it is text.") from None


def plain(value: Any) -> Any:
    """The value without line numbers."""
    if isinstance(value, Entry):
        return plain(value.value)
    return {key: plain(entry) for key, entry in value.items()} if isinstance(value, dict) else value

"""Write the pages of the site that the code and the measurements hold: no option, docstring or figure is typed twice.

`mkdocs.yml` names this file as a hook, which adds the pages to every build. `python docs/generate.py FOLDER` writes
them as files.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterator, Sequence
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|Examples):$")
_ENTRY = re.compile(r"^ {4}(\S[^:]*): +(.*)$")


def pages() -> dict[str, str]:
    """Every generated page, by its path in the site."""
    found = {
        "reference/cli.md": cli_page(),
        "reference/settings.md": settings_page(),
        "reference/errors.md": errors_page(),
        "reference/public.md": public_page(),
        "measurements.md": measurements_page(),
    }
    return found | {f"reference/{name}.md": package_page(name) for name in packages()}


def packages() -> list[str]:
    """The subpackages that have public names of their own; those of the command are its own business."""
    found = sorted((ROOT / "bitdistiller_peft").glob("*/__init__.py"))
    names = [file.parent.name for file in found if "\n__all__ = [" in file.read_text(encoding="utf-8")]
    return [name for name in names if name != "cli"]


# ---------------------------------------------------------------------------------------------------- command line


def cli_page() -> str:
    """What every verb says about itself."""
    from bitdistiller_peft.cli.dispatch import VERBS, top_help

    lines = ["# Command line", "", "```text", top_help().rstrip(), "```", ""]
    for name in VERBS:
        lines += [f"## {name}", "", "```text", verb_help(name).rstrip(), "```", ""]
    return "\n".join(lines)


def verb_help(name: str) -> str:
    """The help of a verb, as `--help` shows it."""
    from bitdistiller_peft.cli.parse import _flags, build_parser

    verb = import_module(f"bitdistiller_peft.cli.verbs.{name.replace('-', '_')}").VERB
    return build_parser(verb, _flags(verb)).format_help()


def settings_page() -> str:
    """Every key of the YAML file: those that are declared, and those that classes of the library take."""
    from bitdistiller_peft.cli.schema import SECTIONS

    lines = ["# Settings of the YAML file", "", "Anything here is also an option: `bitdistiller VERB --help-all`.", ""]
    for section in SECTIONS.values():
        lines += [f"## {section.name or 'at the top'}", "", f"{section.title[0].upper()}{section.title[1:]}.", ""]
        inherited = section.inherited() if section.inherited else {}
        options = section.declared() | {
            name: option for name, option in inherited.items() if name not in section.declared()
        }
        rows = [
            f"| `{option.name}` | {_default(option.default)} | {_cell(option.help)}{_choices(option.choices)} |"
            for option in options.values()
        ]
        lines += ["| key | default | |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _default(value: Any) -> str:
    return "" if value is None else f"`{_cell(json.dumps(value) if isinstance(value, (bool, list)) else str(value))}`"


def _choices(choices: tuple[str, ...]) -> str:
    return "" if not choices else f" ({', '.join(f'`{choice}`' for choice in choices)})"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


# ---------------------------------------------------------------------------------------------------- docstrings


def public_page() -> str:
    """The names that the package itself exports."""
    import bitdistiller_peft

    names = [name for name in bitdistiller_peft.__all__ if not name.startswith("__")]
    intro = ["# bitdistiller_peft", "", "What `from bitdistiller_peft import ...` gives. It loads on first use.", ""]
    return "\n".join([*intro, *(line for name in names for line in entry(name, getattr(bitdistiller_peft, name)))])


def package_page(name: str) -> str:
    """The public names of a subpackage."""
    module = import_module(f"bitdistiller_peft.{name}")
    lines = [f"# bitdistiller_peft.{name}", "", *markdown(inspect.getdoc(module) or ""), ""]
    for public in module.__all__:
        lines += entry(public, getattr(module, public))
    return "\n".join(lines)


def errors_page() -> str:
    """The tree of exceptions, and every message, part by part of the package."""
    from bitdistiller_peft import errors

    tree = (inspect.getdoc(errors) or "").partition("\n\n")
    lines = ["# Errors", "", tree[0], "", "```text", tree[2].rstrip(), "```", "", "## Messages", ""]
    lines += ["All that the library refuses with, `…` in the place of values. The commonest are explained under", ""]
    lines[-2] += " [troubleshooting](../troubleshooting.md)."
    for part, found in messages().items():
        lines += [f"### {part}", "", *(f"- `` {text} ``" for text in found), ""]
    return "\n".join(lines)


def messages() -> dict[str, list[str]]:
    """The text of every error, with … for values, by subpackage or file.

    That is what is given to an exception of ours, and what reads like it elsewhere: lists of faults, choices of words.
    """
    from bitdistiller_peft import errors

    kinds = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / "bitdistiller_peft").rglob("*.py")):
        part = file.relative_to(ROOT / "bitdistiller_peft").parts[0].removesuffix(".py")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        raised = {node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)}
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
        given = {id(call.args[0]) for call in calls if call in raised or _called(call) in kinds}
        inside = {id(piece) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
        for node in ast.walk(tree):
            text = "" if id(node) in inside else _text(node)
            if " " in text and (id(node) in given or re.match(r"`[^`]+` must ", text)):
                found.setdefault(part, []).append(text)
    return {part: sorted(set(texts)) for part, texts in found.items()}


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def _text(node: ast.AST) -> str:
    """A text that the code holds, with … in the place of values; empty for anything else."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return f"{_text(node.left) or '…'} {_text(node.right) or '…'}".rstrip("… ")
    if isinstance(node, ast.JoinedStr):
        parts = [str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values]
        return " ".join("".join(parts).split()).rstrip("… ")
    return " ".join(node.value.split()) if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def entry(name: str, value: Any) -> list[str]:
    """One public name: signature, docstring and, of a class, its public methods."""
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return [f"## {name}", "", f"`{_cell(repr(value))[:200]}`", ""]
    lines = [f"## {name}", "", "```python", f"{name}{signature(value)}", "```", ""]
    lines += [*markdown(_documentation(value)), ""]
    for method, function in _methods(value) if inspect.isclass(value) else ():
        lines += [f"### {name}.{method}", "", "```python", f"{method}{signature(function)}", "```", ""]
        lines += [*markdown(inspect.getdoc(function) or ""), ""]
    return lines


def signature(value: Any) -> str:
    """The call as text; a class with many fields has them in its docstring."""
    try:
        text = re.sub(r"'(\w[^']*)'", r"\1", str(inspect.signature(value)))
    except (TypeError, ValueError):
        return "(...)"
    return text if len(text) < 300 else "(...)"


def _documentation(value: Any) -> str:
    """A docstring; what a data class inherits from a class of others is not ours to print."""
    return inspect.cleandoc(value.__doc__ or "")


def _methods(value: type) -> Iterator[tuple[str, Any]]:
    for name, function in vars(value).items():
        inner = getattr(function, "__func__", function)
        if not name.startswith("_") and inspect.isfunction(inner) and inspect.getdoc(inner):
            yield name, inner


def markdown(doc: str) -> list[str]:
    """A Google docstring as Markdown: its sections become lists."""
    lines: list[str] = []
    section = ""
    for line in doc.replace("``", "`").splitlines():
        heading = _SECTION.match(line)
        item = _ENTRY.match(line) if section else None
        if heading:
            section = heading[1]
            lines += ["", f"**{section}**", "", *(["```python"] if section.startswith("Example") else [])]
        elif section.startswith("Example"):
            lines.append(line.removeprefix("    ").replace("  # doctest: +SKIP", ""))
        elif item:
            lines.append(f"- `{item[1]}`: {item[2]}")
        elif section and line.startswith("    "):
            lines.append(f"{'    ' if lines[-1].startswith(('-', '    ')) else ''}{line.strip()}")
        else:
            lines.append(line)
    return [*lines, "```"] if section.startswith("Example") else lines


# ---------------------------------------------------------------------------------------------------- measurements


def measurements_page() -> str:
    """The tables of all benchmarks, with what was asked of them."""
    lines = [
        *("# Measured", ""),
        "Every figure of `benchmarks/results/`, drawn when the site is built. A figure that falls short of what was",
        "asked stays in, marked with an x. Perplexities compare within one benchmark only: text and length differ.",
        "",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        lines += benchmark(json.loads(path.read_text(encoding="utf-8")))
    return "\n".join(lines)


def benchmark(result: dict[str, Any]) -> list[str]:
    """One results file: where it ran, its figures, its rows."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"## {result['name']}", "", f"`{result['command']}`", ""]
    lines += [f"{result['device']}; {result['when'][:10]}; {versions}; commit {result['commit'][:8] or 'unknown'}.", ""]
    if result["figures"]:
        lines += ["| figure | value | asked | |", "|---|---:|---|---|"]
        lines += [
            f"| {name} | {_number(f['value'])} {f['unit']} | {_asked(f)} |" for name, f in result["figures"].items()
        ]
        lines.append("")
    for chart in charts(result):
        lines += [chart, ""]
    for keys, rows in _tables(result["rows"]):
        lines += ["| " + " | ".join(map(_cell, keys)) + " |", "|" + "---|" * len(keys)]
        lines += ["| " + " | ".join(_number(row[key]) for key in keys) + " |" for row in rows]
        lines.append("")
    return lines


def _asked(figure: dict[str, Any]) -> str:
    asked, value = figure["asked"], figure["value"]
    if not asked:
        return "| "
    holds = asked.get("min", value) <= value <= asked.get("max", value)
    words = [f"{word} {_number(asked[key])}" for key, word in (("min", "at least"), ("max", "at most")) if key in asked]
    return f"{', '.join(words)} | {'yes' if holds else 'x'}"


def _tables(rows: list[dict[str, Any]]) -> Iterator[tuple[list[str], list[dict[str, Any]]]]:
    """Rows with the same columns together; what is long and no number of its own (lists, curves) is left out."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        keys = tuple(key for key, value in row.items() if not isinstance(value, (list, dict)))
        groups.setdefault(keys, []).append(row)
    for keys, members in groups.items():
        yield list(keys), members


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _cell("" if value is None else str(value))
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


# ---------------------------------------------------------------------------------------------------- charts

WIDTH, LABEL, ROW, BAR = 720, 220, 22, 14


def charts(result: dict[str, Any]) -> Iterator[str]:
    """Bar charts of one results file, as SVG text: no script, no font, the page's own colours."""
    if result["name"].startswith("inference_cpu"):
        yield from _inference(result["rows"])


def _inference(rows: list[dict[str, Any]]) -> Iterator[str]:
    alone: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get("tokens") == 1:  # the first row of a name is the one that was measured cold
            label = f"{row['weight']}, {row['inputs']}"
            alone.setdefault(row["shape"], {}).setdefault(label, row["x faster than bf16"])
    for shape, values in alone.items():
        yield bars(f"One token, {shape}: times faster than torch's bf16", list(values.items()))
    models = [row for row in rows if "tokens/s" in row]
    if models:
        yield bars("Greedy tokens per second", [(row["model"], row["tokens/s"]) for row in models])


def bars(title: str, values: Sequence[tuple[str, float]]) -> str:
    """Horizontal bars from zero, each with its number.

    Args:
        title: above them; also what a screen reader says.
        values: labels and numbers, not negative.
    """
    top = max((value for _, value in values), default=0) or 1
    height = ROW * (len(values) + 1)
    lines = [
        f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {WIDTH} {height}" fill="currentColor" '
        'style="max-width:100%" font-size="13">',
        f'<text x="0" y="15" font-weight="bold">{escape(title)}</text>',
    ]
    for number, (label, value) in enumerate(values, 1):
        y, length = ROW * number, (WIDTH - LABEL - 60) * value / top
        lines += [
            f'<text x="{LABEL - 8}" y="{y + 12}" text-anchor="end">{escape(label)}</text>',
            f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" opacity="0.6"/>',
            f'<text x="{LABEL + length + 6:.1f}" y="{y + 12}">{value:.3g}</text>',
        ]
    return "".join([*lines, "</svg>"])


# ---------------------------------------------------------------------------------------------------- mkdocs, files


def on_files(files: Any, config: Any) -> Any:
    """The hook: hand the pages to mkdocs."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def main(folder: Path) -> None:
    """Write the pages into a folder."""
    for name, text in pages().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(Path(sys.argv[1]))

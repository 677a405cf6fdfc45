"""Text, prompts and training data from files, or under two names that need none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitdistiller_peft.cli.verb import Settings
from bitdistiller_peft.errors import ConfigError, DataError
from bitdistiller_peft.jsonfile import strict_json

NAMED = ("python-topics", "wikitext2")
HUB_TEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
_TO_DO = {
    "generate.prompts": "Write it, a prompt per line, or name another.",
    "distill.data": "Name a folder that `bitdistiller generate` wrote, or a file of texts.",
}
_WRITE = "Write the file again."
TABLES = (".jsonl", ".json", ".csv", ".parquet")


def load_texts(sources: list[str], part: str) -> list[str]:
    """Load texts, in the order given.

    Args:
        sources: text files, tables with a column ``text``, ``"wikitext2"`` or ``"python-topics"``.
        part: ``"calibration"`` or ``"evaluation"``: the named texts have a part for each, without overlap.

    Raises:
        DataError: a source is no such file.
    """
    return [text for source in sources for text in _load(source, part)]


def evaluation_input(settings: Settings) -> tuple[str | list[str] | None, dict[str, Any]]:
    """What `eval:` says to measure on, and how; all that can be checked without a model is checked.

    Args:
        settings: for `eval:`.

    Returns:
        The text, or `None` if only tasks are asked for; and the keywords of `evaluate_perplexity` and
        `evaluate_divergence`.

    Raises:
        ConfigError: neither a text nor tasks are given.
        DataError: the text is no such file.
    """
    values = settings.section("eval")
    if not values["text"] and not values["tasks"]:
        raise ConfigError(
            "`eval.text` must be given, or `eval.tasks`: pass --text wikitext2 or --tasks arc_easy, or either in the "
            "file of --config."
        )
    how = {key: values[key] for key in ("seq_len", "max_chunks", "batch_size", "allow_latent")}
    texts = load_texts(values["text"] or [], "evaluation")
    return (texts[0] if len(texts) == 1 else texts or None), how


def load_prompts(source: str, prompt_format: str, *, has_template: bool, max_prompts: int | None) -> list[Any]:
    """Load prompts: texts to continue, or lists of messages to answer.

    Args:
        source: a .txt file with a prompt per line, or a table with a column ``prompt`` or ``messages``.
        prompt_format: ``"chat"`` makes a user's message of every text, ``"text"`` leaves it; ``"auto"`` looks at the
            tokenizer.
        has_template: whether the tokenizer has a chat template.
        max_prompts: use only that many; `None` for all.

    Raises:
        ConfigError: `max_prompts` is below 1.
        DataError: there is no such file, or it holds no prompts.
    """
    if max_prompts is not None and max_prompts < 1:
        raise ConfigError(f"`max_prompts` must be at least 1: got max_prompts={max_prompts!r}. Leave it out for all.")
    path = _existing(source, "generate.prompts")
    if path.suffix in TABLES:
        prompts = [_prompt_of(row, path) for row in read_table(path)]
    else:
        prompts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not prompts:
        raise DataError(f"`prompts` must hold a prompt per line: got none in {source!r}.")
    is_chat = prompt_format == "chat" or (prompt_format == "auto" and has_template)
    if is_chat:
        prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    return prompts[:max_prompts]


def load_training_data(source: str) -> Any:
    """Load what the student learns on, as a `datasets.Dataset`.

    Args:
        source: a folder from `bitdistiller generate`, a table as TRL takes it, or a text file, of which every
            paragraph is an example.

    Raises:
        DataError: there is no such file or folder.
    """
    from datasets import Dataset

    from bitdistiller_peft.training import load_teacher_data

    path = _existing(source, "distill.data")
    if path.is_dir():
        return load_teacher_data(path)
    if path.suffix in TABLES:
        rows = list(read_table(path))
        try:
            return Dataset.from_list(rows)
        except Exception as error:  # noqa: BLE001  (pyarrow's, of rows that are not alike)
            raise DataError(f"{path} must hold rows that are alike: {error}. Correct the file.") from None
    paragraphs = [part.strip() for part in read_text(path).split("\n\n")]
    return Dataset.from_dict({"text": [part for part in paragraphs if part]})


def read_table(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl, .json, .csv or .parquet file.

    Raises:
        DataError: the file cannot be read, or a line is no JSON object; it is named.
    """
    match path.suffix:
        case ".jsonl":
            for number, line in enumerate(read_text(path).splitlines(), start=1):
                if line.strip():
                    yield _row(line, f"{path}, line {number}")
        case ".json":
            rows = _parsed(read_text(path), str(path))
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise DataError(f"{path} must hold a list of objects. Or use .jsonl, an object per line.")
            yield from rows
        case _:
            from datasets import Dataset

            read = Dataset.from_csv if path.suffix == ".csv" else Dataset.from_parquet
            try:
                yield from read(str(path))
            except Exception as error:  # noqa: BLE001  (pyarrow, pandas and datasets have a dozen)
                reason = str(error.__cause__ or error)[:300]
                raise DataError(f"{path} must be a readable {path.suffix} file: {reason}. {_WRITE}") from None


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} must be a file of UTF-8 text: {error}. Convert it, or name another.") from None


def _parsed(text: str, where: str, kind: str = "JSON") -> Any:
    try:
        return strict_json(text.encode(), allow_nan=True)
    except ValueError as error:
        raise DataError(f"{where}: must be {kind}: {error}. {_WRITE}") from None


def _row(line: str, where: str) -> dict[str, Any]:
    row = _parsed(line, where, "a JSON object")
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be a JSON object: got {type(row).__name__}. {_WRITE}")
    return row


def _prompt_of(row: dict[str, Any], path: Path) -> Any:
    if "prompt" in row:
        return row["prompt"]
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise DataError(
            f"{path} must have a column 'prompt', or 'messages' with lists of objects: got {sorted(row)}. {_WRITE}"
        )
    return messages[:-1] if messages[-1].get("role") == "assistant" else messages


def _existing(source: str, name: str) -> Path:
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"`{name}` must be a file that exists: got {source!r}. {_TO_DO[name]}")
    return path


def _load(source: str, part: str) -> list[str]:
    if source == "python-topics":
        return _python_topics(part)
    if source == "wikitext2":
        return _wikitext2(part)
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError(f"a text must be a file that exists, or one of {list(NAMED)}: got {source!r}.")
    if path.suffix not in TABLES:
        return [read_text(path)]
    rows = list(read_table(path))
    if not all(isinstance(row.get("text"), str) for row in rows):
        raise DataError(f"{source} must have a column 'text' in every row. Name a file that has.")
    return [row["text"] for row in rows]


def _python_topics(part: str) -> list[str]:
    """The English that every CPython carries: its help topics, every third one for evaluation."""
    import pydoc_data.topics

    topics = sorted(set(pydoc_data.topics.topics.values()), key=lambda text: (len(text), text))
    chosen = [text for index, text in enumerate(topics) if (index % 3 == 0) == (part == "evaluation")]
    return chosen[::-1]


def _wikitext2(part: str) -> list[str]:
    from datasets import load_dataset

    rows = load_dataset(*HUB_TEXT, split="test" if part == "evaluation" else "train")["text"]
    return list(rows) if part == "evaluation" else ["".join(rows)]

"""Load models and tokenizers as the verbs need them: full precision, student, packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bitdistiller_peft.cli.precision import load_dtype
from bitdistiller_peft.cli.verb import Console, Settings
from bitdistiller_peft.errors import BitDistillerError, CheckpointError, ConfigError
from bitdistiller_peft.jsonfile import read_object

ADAPTER = "adapter_config.json"


def choose_device(settings: Settings, console: Console) -> str:
    """The device to run on: the CPU where there is nothing else.

    Raises:
        ConfigError: a device that this machine does not have.
    """
    import torch

    asked = settings["device"]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if asked == "auto":
        if accelerator is None:
            console.note("no accelerator found: running on the CPU.")
            return "cpu"
        return str(accelerator.type)
    try:
        kind = torch.device(asked).type
    except RuntimeError:
        raise ConfigError(f"`device` must be auto, cpu, cuda, cuda:0, ...: got device={asked!r}.") from None
    if kind != "cpu" and (accelerator is None or kind != accelerator.type):
        have = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise ConfigError(f"`device` must be one that this machine has ({have}): got device={asked!r}.")
    return str(asked)


def seed_all(settings: Settings) -> None:
    """Seed Python, NumPy and torch."""
    from transformers import set_seed

    set_seed(settings["seed"])


def check_source(source: str, key: str = "model") -> None:
    """Refuse a place that cannot be a model's; names on the Hub are not asked for.

    Args:
        source: folder or Hub name.
        key: what it is called in messages.

    Raises:
        ConfigError: there is no such folder.
        CheckpointError: the folder holds no model, or a damaged file of weights.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if source.startswith((".", "/", "~")):
            raise ConfigError(f"`{key}` must be a folder that exists, or a name on the Hub: got {source!r}.")
        return
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} must hold a model: it has no config.json. Name the folder of a model.")
    _check_headers(folder)


def check_models(settings: Settings, **sources: str | None) -> None:
    """Refuse models that are not there, before the first of them is loaded.

    Args:
        settings: for the revision of `model:`.
        sources: folders or Hub names, by what they are called in messages; `None` and ``"self"`` are passed over.

    Raises:
        ConfigError: there is no such folder or name.
        CheckpointError: a folder holds no model, or damaged weights.
    """
    from transformers import AutoConfig

    for key, source in sources.items():
        if source in (None, "self"):
            continue
        place = model_folder(str(source))
        if (Path(place) / ADAPTER).is_file():
            continue
        check_source(place, key)
        if not Path(place).is_dir():
            try:
                AutoConfig.from_pretrained(place, revision=_revision_of(place, settings))
            except (OSError, ValueError) as error:
                raise _unreadable(key, error) from None


def _unreadable(key: str, error: Exception) -> ConfigError:
    reason = str(error).strip().splitlines()[0]
    return ConfigError(f"`{key}` must be a folder or a name on the Hub that can be read: {reason}")


def load_full_precision(settings: Settings, device: str) -> Any:
    """The model of `model:`, as it was published.

    Raises:
        ConfigError: there is none of this name, or it is quantized.
    """
    return _load_plain(settings.need("model"), settings, device, key="model", revision=settings["revision"])


def build_student(settings: Settings, device: str) -> Any:
    """A fresh student of `model:`, rounded to nearest, as `quant:` says.

    Raises:
        ConfigError: a setting that cannot work.
        TargetError, GroupSizeError: a layer does not suit; it is named.
    """
    from bitdistiller_peft.tuner import get_bitdistiller_model

    config = student_config(settings)  # before the model is loaded
    return get_bitdistiller_model(load_full_precision(settings, device), config)


def student_config(settings: Settings) -> Any:
    """The `BitDistillerConfig` of `quant:`.

    Raises:
        ConfigError: a setting that cannot work.
    """
    from bitdistiller_peft.tuner import BitDistillerConfig

    return BitDistillerConfig(**{key: value for key, value in settings.section("quant").items() if value is not None})


def load_any(source: str, settings: Settings, device: str, *, key: str = "model", is_trainable: bool = False) -> Any:
    """A model in whatever state: full precision, packed, or a student's folder with its base model under it.

    Args:
        source: folder or Hub name.
        settings: for dtype, verification, and the revision where `source` is `model:`.
        device: where to put it.
        key: what the source is called in messages.
        is_trainable: load a student to go on training it.

    Raises:
        ConfigError: no such folder or name.
        CheckpointError: the files are damaged.
    """
    source = model_folder(source)
    if (Path(source) / ADAPTER).is_file():
        return _load_student(Path(source), settings, device, is_trainable=is_trainable)
    return _load_plain(source, settings, device, key=key, revision=_revision_of(source, settings))


WRITTEN = ("packed", "student", "distill/packed", "calibrate/packed")
"""Where commands, and then a whole chain, leave models in their folders, best first."""


def model_folder(source: str, prefer: tuple[str, ...] = WRITTEN) -> str:
    """The model in the folder of a command or of a chain: that folder itself if it is one, else what was written there.

    Args:
        source: folder or Hub name.
        prefer: subfolders to look at, in order.
    """
    folder = Path(source).expanduser()
    for place in (folder, *(folder / name for name in prefer)):
        if (place / "config.json").is_file() or (place / ADAPTER).is_file():
            return str(place)
    return source


def load_tokenizer(*sources: str | None, settings: Settings | None = None) -> Any:
    """The tokenizer of the first source that has one.

    Args:
        sources: folders or Hub names, best first.
        settings: for the revision of `model:`.

    Raises:
        ConfigError: none has.
    """
    from transformers import AutoTokenizer

    tried = [source for source in sources if source]
    for source in tried:
        if Path(source).is_dir() and not any(Path(source).glob("tokenizer*")):
            continue
        try:
            return AutoTokenizer.from_pretrained(source, revision=_revision_of(source, settings))
        except (OSError, ValueError):
            continue
    raise ConfigError(f"a tokenizer must stand beside the model: found none in {tried}. Copy it there.")


def _revision_of(source: str, settings: Settings | None) -> str | None:
    """That of `model:`, which may have been named on the command line alone."""
    return settings["revision"] if settings is not None and settings["model"] in (None, source) else None


def base_of(folder: Path) -> str:
    """The name of the full-precision model under a student's folder.

    Raises:
        CheckpointError: its adapter_config.json does not say.
    """
    name = read_object(folder / ADAPTER, "Save the adapter again.").get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{folder / ADAPTER} must name its base model: got {name!r}. Pass --model.")
    return name


def source_of_tokenizer(source: str, settings: Settings) -> list[str | None]:
    """Where to look for the tokenizer of a model, best first."""
    found = model_folder(source)
    base = base_of(Path(found)) if (Path(found) / ADAPTER).is_file() else None
    return [found, base, settings["model"]]


def _load_student(folder: Path, settings: Settings, device: str, *, is_trainable: bool) -> Any:
    from peft import PeftModel

    _check_headers(folder)  # before the base model is loaded
    base = _load_plain(settings["model"] or base_of(folder), settings, device, key="model", revision=None)
    return PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable)


def _load_plain(source: str, settings: Settings, device: str, *, key: str, revision: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    check_source(source, key)
    is_other = settings["eval.verify"] not in (None, "fast") and _is_ours(Path(source))
    more = {"quantization_config": _verify(settings)} if is_other else {}
    try:
        dtype = load_dtype(source, settings, device, revision)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, revision=revision, **more)
    except BitDistillerError:
        raise
    except OSError as error:
        raise _unreadable(key, error) from None
    return model.to(device)


def _check_headers(folder: Path) -> None:
    """Refuse damaged weight files of a folder in our words, with the file named; other loaders say less."""
    from bitdistiller_peft.hub.header import read_header

    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        read_header(file)


def _is_ours(folder: Path) -> bool:
    try:
        config = read_object(folder / "config.json", "")
    except CheckpointError:  # what loads the folder says what is wrong with it
        return False
    section = config.get("quantization_config")
    return isinstance(section, dict) and section.get("quant_method") == "bitdistiller"


def _verify(settings: Settings) -> Any:
    from bitdistiller_peft.hub import BitDistillerQuantConfig

    return BitDistillerQuantConfig(verify=settings["eval.verify"] or "fast")

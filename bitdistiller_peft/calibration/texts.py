"""From texts to the token windows that calibration runs on."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bitdistiller_peft.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

SEPARATOR = "\n\n"


def token_windows(texts: Iterable[str] | Tensor | None, tokenizer: Any, num_samples: int, seq_len: int) -> Tensor:
    """Cut texts into windows of equal length without padding; short texts are joined, in the order given.

    Args:
        texts: texts, or token ids ``[samples, seq_len]`` that are used as they are.
        tokenizer: the model's tokenizer; may be `None` for token ids.
        num_samples: windows at most.
        seq_len: tokens in a window. It begins with the beginning-of-sequence token if the tokenizer adds one.

    Returns:
        Token ids ``[samples, seq_len]``; fewer samples than asked for, with a warning, if the texts end before.

    Raises:
        DataError: no text, something else than text, or not enough of it for one window.
        ConfigError: a number below 1.
    """
    for name, value in (("num_samples", num_samples), ("seq_len", seq_len)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"`{name}` must be a positive integer: got {name}={value!r}.")
    if isinstance(texts, Tensor):
        return _checked_ids(texts)[:num_samples]
    if texts is None:
        raise DataError("`texts` must be given: got None. 128 passages of 512 tokens are a good start.")
    start = _beginning(tokenizer)
    length = seq_len - len(start)
    if length < 1:
        raise ConfigError(f"`seq_len` must leave room for text: got seq_len={seq_len}. Use 512.")
    ids = _collect(texts, tokenizer, num_samples * length)
    count = min(num_samples, len(ids) // length)
    if count == 0:
        raise DataError(
            f"`texts` must hold at least one window of {seq_len} tokens: got {len(ids)} tokens. "
            "Give more text, or lower seq_len."
        )
    if count < num_samples:
        logger.warning("The texts hold %d windows of %d tokens, not %d.", count, seq_len, num_samples)
    windows = torch.tensor(ids[: count * length]).view(count, length)
    return torch.cat((torch.tensor(start, dtype=torch.long).expand(count, -1), windows), 1)


def fingerprint(windows: Tensor) -> str:
    """SHA-256 of the token ids, to tell whether two calibrations saw the same data."""
    digest = hashlib.sha256(str(tuple(windows.shape)).encode())
    digest.update(windows.to("cpu", torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _checked_ids(ids: Tensor) -> Tensor:
    if ids.ndim != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise DataError(
            f"token ids must be integers [samples, seq_len]: got shape {tuple(ids.shape)}, dtype={ids.dtype}. "
            "Or pass a list of texts."
        )
    return ids.long()


def _beginning(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text, if any."""
    if tokenizer is None:
        raise ConfigError("`tokenizer` must be given for texts: got None. Pass the model's tokenizer, or token ids.")
    first = list(tokenizer("a")["input_ids"])[:1]
    bos = getattr(tokenizer, "bos_token_id", None)
    return first if first and first[0] == bos else []


def _collect(texts: Iterable[str], tokenizer: Any, enough: int) -> list[int]:
    if isinstance(texts, str):
        raise DataError("`texts` must be a list of texts: got one text. Pass [text].")
    ids: list[int] = []
    is_empty = True
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"`texts` must hold text only: got {type(text).__name__}. Pass e.g. dataset['text'].")
        if not text.strip():
            continue
        is_empty = False
        ids += tokenizer(text + SEPARATOR, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= enough:
            break
    if is_empty:
        raise DataError("`texts` must not be empty: got no text at all. 128 passages of 512 tokens are a good start.")
    return ids


def check_length(base: nn.Module, seq_len: int) -> None:
    """Refuse windows that are longer than a model's positions.

    Raises:
        ConfigError: they are.
    """
    config: Any = getattr(base, "config", None)
    text_config = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    longest = getattr(text_config, "max_position_embeddings", None)
    if isinstance(longest, int) and seq_len > longest:
        raise ConfigError(f"`seq_len` must be at most {longest} for this model: got seq_len={seq_len}.")


def batches_of(windows: Tensor, batch_size: int, device: torch.device) -> list[Tensor]:
    """Split windows into batches on a device.

    Raises:
        ConfigError: `batch_size` is no positive integer.
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ConfigError(f"`batch_size` must be a positive integer: got batch_size={batch_size!r}. Use 8.")
    return list(torch.split(windows.to(device), batch_size))

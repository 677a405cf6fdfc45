"""Training data as `DistillTrainer` makes it, without a student: what a teacher is to be asked about."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from trl import SFTTrainer

from bitdistiller_peft.training.checks import check_dataset, check_targets
from bitdistiller_peft.training.config import DistillConfig
from bitdistiller_peft.training.sft import as_sft, config_kept


def prepare_dataset(model: PreTrainedModel, args: DistillConfig, dataset: Any, tokenizer: Any) -> Any:
    """Apply templates, tokenize, mask, cut and pack, as training with the same settings will.

    Args:
        model: any model with this tokenizer, for example the teacher; it is only put on its device.
        args: of the training.
        dataset: as `SFTTrainer` takes it.
        tokenizer: of the training.

    Returns:
        The `datasets.Dataset` that ``DistillTrainer.train_dataset`` will be.

    Raises:
        DataError: no examples, or no target tokens.
    """
    check_dataset(dataset)
    with as_sft(args), config_kept(model):
        prepared = SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=tokenizer).train_dataset
    check_targets(prepared)
    return prepared

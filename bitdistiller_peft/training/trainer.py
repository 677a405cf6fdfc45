"""`DistillTrainer`: TRL's `SFTTrainer` with another loss.

Data, packing, masks, checkpoints, logging and distribution are TRL's and transformers'. What is ours: a teacher, a
loss that is computed inside the student's forward pass (`forward.py`), its normalization over all tokens of a step,
and what is logged. Only whole public methods are overridden; `tests/training/test_contract.py` pins what they rely on.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.losses import Objective
from bitdistiller_peft.training.averages import WeightAverages
from bitdistiller_peft.training.cached import CachedTeacher
from bitdistiller_peft.training.card import card_text
from bitdistiller_peft.training.checkpoints import AUTO, CheckpointManifest, resumable
from bitdistiller_peft.training.checks import (
    check_dataset,
    check_master_dtype,
    check_parallelism,
    check_student,
    check_targets,
    check_tied_tables,
    check_whole,
    warn_of_slow_dtype,
)
from bitdistiller_peft.training.config import ESTIMATE, DistillConfig
from bitdistiller_peft.training.doctor import Doctor
from bitdistiller_peft.training.everywhere import ALL, EveryToken
from bitdistiller_peft.training.forward import (
    DistillTarget,
    add_distill_forward,
    base_model_of,
    check_forward,
)
from bitdistiller_peft.training.gamma import estimate_gamma, sample_batches
from bitdistiller_peft.training.guard import GradientGuard, not_finite
from bitdistiller_peft.training.hidden import hidden_target
from bitdistiller_peft.training.interrupts import GracefulStop
from bitdistiller_peft.training.metrics import FlipCounter, Meter, RunMemory, Stopwatch
from bitdistiller_peft.training.on_policy import OnPolicy
from bitdistiller_peft.training.optimizer import QuantizeOnce, split_groups, without_learned
from bitdistiller_peft.training.placement import build_teacher, zero_stage
from bitdistiller_peft.training.provenance import describe_loss, provenance
from bitdistiller_peft.training.relations import Relations
from bitdistiller_peft.training.released import released_gamma, released_targets
from bitdistiller_peft.training.sft import as_sft, config_kept, plain_output_head
from bitdistiller_peft.training.teachers import Teacher, labels_of, num_targets, num_tokens, without_labels
from bitdistiller_peft.tuner import note_provenance


class DistillTrainer(SFTTrainer):
    """Train a quantized student to say what its teacher says.

    Args:
        model: a student from `get_bitdistiller_model`, or a base model (or its path) together with `peft_config`.
        args: a `DistillConfig`.
        teacher: what `args.teacher` may be, or a loaded model, which is then frozen and set to eval mode; `None` for
            `args.teacher`.
        kwargs: everything else that `SFTTrainer` takes: `train_dataset`, `eval_dataset`, `processing_class`, ...

    Raises:
        ConfigError: a setting, model or teacher that cannot work; see `checks.py`.
        DataError: a training set without examples or without target tokens.

    Example:
        >>> trainer = DistillTrainer(model, args, train_dataset=texts, processing_class=tokenizer)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> packed = trainer.model.pack_and_unload()  # doctest: +SKIP
    """

    _tag_names = ["trl", "bitdistiller", "quantization-aware-training"]  # noqa: RUF012  (TRL's own form)
    _name = "DistillTrainer"
    loss_is_scaled_for_ga = True  # the loss is divided by the tokens of the whole accumulated batch

    def __init__(
        self,
        model: nn.Module | str,
        args: DistillConfig | None = None,
        *,
        teacher: str | nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        args = DistillConfig() if args is None else args
        if not isinstance(args, DistillConfig):
            raise ConfigError(f"`args` must be a DistillConfig: got {type(args).__name__}.")
        if kwargs.get("compute_loss_func") is not None:
            raise ConfigError("`compute_loss_func` is not supported: got one. Register a divergence instead.")
        check_dataset(kwargs.get("train_dataset"))
        with as_sft(args), plain_output_head(model), config_kept(model):
            super().__init__(model=model, args=args, **kwargs)
        check_targets(self.train_dataset)
        check_student(self.model)
        check_master_dtype(self.model, args)
        warn_of_slow_dtype(self.model, args)
        teacher = args.teacher if teacher is None else teacher
        check_parallelism(self.accelerator)
        check_whole(args, is_sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled)
        check_tied_tables(self.model, is_sharded=self.is_fsdp_enabled or zero_stage(self.accelerator) == 3)
        base_model = base_model_of(self.model)
        add_distill_forward(base_model)
        self.teacher: Teacher | None = None
        if args.objective(0.5).needs_teacher or args.attention_weight or args.hidden_weight:
            self.teacher = build_teacher(teacher, self.model, self.accelerator, args)
        if isinstance(self.teacher, CachedTeacher):
            self.teacher.check(self.processing_class, train_dataset=self.train_dataset, eval_dataset=self.eval_dataset)
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            check_forward(base_model, self.args.device)
        self._hidden = hidden_target(args, base_model, self.teacher)
        self._everywhere = EveryToken() if args.divergence_tokens == ALL else None
        self._relations = Relations(args, base_model, self.teacher) if args.attention_weight else None
        is_on_policy = args.on_policy_share > 0
        self._on_policy = OnPolicy(args, self.processing_class, self.accelerator) if is_on_policy else None
        self._meters = {"train": Meter(), "eval": Meter()}
        self._stopwatch = Stopwatch()
        self._flips: FlipCounter | None = None
        self._objective: Objective | None = None
        self.add_callback(RunMemory())
        self.add_callback(GradientGuard())
        self._once = QuantizeOnce()
        self.add_callback(self._once)
        self._doctor = Doctor(args)
        self.add_callback(self._doctor)
        self._averages = WeightAverages(args.ema_decay)
        self.add_callback(self._averages)
        self.add_callback(CheckpointManifest())  # after all that writes into a checkpoint
        self._stop = GracefulStop()
        self.add_callback(self._stop)

    # ----------------------------------------------------------------------------------------------- what is minimized

    @property
    def memory(self) -> RunMemory:
        """What checkpoints keep for us; looked up, since transformers may replace callbacks on resume."""
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, RunMemory))

    @property
    def gamma(self) -> float | str | None:
        """CAKLD's coefficient as it is used: a number or `"per_token"`; None where the loss has none."""
        return self.objective.gamma

    @property
    def objective(self) -> Objective:
        """What is minimized; estimates gamma first, unless it was given or a checkpoint knows it."""
        if self._objective is None:
            memory = self.memory
            if self.state.global_step > 0:
                memory.recall(self.state.stateful_callbacks)
            args = self.args
            if args.uses_gamma and args.gamma == ESTIMATE and memory.gamma is None:
                memory.gamma = self._estimate_gamma()
            self._objective = args.objective(memory.gamma)
        return self._objective

    def _estimate_gamma(self) -> float:
        args = self.args
        batches = sample_batches(
            self.train_dataset,
            self.data_collator,
            self.accelerator,
            batch_size=args.per_device_train_batch_size,
            num_batches=args.gamma_num_batches,
            seed=args.seed,
            keep_columns=not args.remove_unused_columns,
        )
        with torch.random.fork_rng(devices=[]):  # a collator may draw from it
            if args.is_released:
                return released_gamma(self._ask, batches, self.accelerator, args.gamma_num_batches)
            return estimate_gamma(self._ask, batches, self.accelerator, tile_tokens=args.loss_tile_tokens)

    def _ask(self, inputs: Any) -> Any:
        if self.teacher is None:
            return None
        with self.accelerator.autocast():
            return self.teacher(without_labels(inputs))

    # --------------------------------------------------------------------------------------------------------- one step

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as `Trainer.train` does; gamma is estimated before the first step, or taken from the checkpoint.

        SIGTERM and Ctrl-C finish the step and save it first, then end the process with status 130.

        Args:
            resume_from_checkpoint: a checkpoint; True for the newest whole one in `output_dir`; `"auto"` for that, or
                for a new start where there is none: right for a script that is started again after every kill.
            args: as in `Trainer.train`.
            kwargs: as in `Trainer.train`.

        Raises:
            CheckpointError: the checkpoint is damaged, or has no optimizer state.
        """
        if resume_from_checkpoint:
            found = resumable(resume_from_checkpoint, self.args.output_dir)
            resume_from_checkpoint = found or (None if resume_from_checkpoint == AUTO else resume_from_checkpoint)
        self._averages.resume_from = str(resume_from_checkpoint) if resume_from_checkpoint else None
        self._objective = self._flips = None
        self.memory.num_tokens = 0
        self._meters["train"] = Meter()
        with self._stop.listening(), self._doctor.attending(), self._once.keeping(self):
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._stop.leave()
        return output

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Fetch the micro-batches of one step and count their target tokens, over all ranks.

        Counted here for every architecture alike: for some, transformers also counts labels that no logits predict.
        """
        self._before_step()
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        if self._on_policy is not None:
            batches = self._on_policy.batches(self.model_wrapped, batches, self.state.global_step, self.state.max_steps)
        targets = sum(self._divisor(labels_of(batch)) for batch in batches)
        rows = 0 if self._relations is None else self._relations.rows(batches)
        counts = torch.tensor([targets, sum(map(num_tokens, batches)), rows], device=device)
        counts = self.accelerator.reduce(counts, reduction="sum")
        if self._relations is not None:
            self._relations.total_rows = int(counts[2])
        if self._everywhere is not None:
            self._everywhere.note(int(counts[0]), int(counts[1]))
        self.memory.num_tokens += int(counts[1])
        return batches, counts[0]

    def _divisor(self, labels: Tensor) -> int:
        """What the summed loss of a batch is to be divided by: its target tokens, or its texts."""
        return len(labels) if self.args.is_released else num_targets(labels)

    def _before_step(self) -> None:
        """On the first step of a run: gamma, from a checkpoint or estimated, and the codes to compare with."""
        if self._objective is not None:
            return
        _ = self.objective
        note_provenance(self.model, provenance(self.args, self.gamma, self.teacher, self.train_dataset))
        if self.args.log_flip_rate:
            self._flips = FlipCounter(self.model, self.args.flip_rate_layers)
        self._doctor.start(self.model)
        self._stopwatch.restart(self.memory.num_tokens)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Ask the teacher, run the student, and divide by the target tokens of the whole batch.

        Args:
            model: the student, wrapped as it is trained.
            inputs: a batch with `labels`.
            return_outputs: also return the model's outputs with logits, at the price of another forward pass.
            num_items_in_batch: target tokens of all micro-batches and ranks; the batch's own if None.

        Raises:
            TrainingError: the loss is not finite.
        """
        relations, split = self._relations, "train" if self.model.training else "eval"
        layer = None if relations is None else relations.target
        labels, is_aligned, is_whole = labels_of(inputs), self.args.is_released, num_items_in_batch is None
        everywhere = None if self._everywhere is None else self._everywhere.of(inputs, is_whole=is_whole)
        target = DistillTarget(
            released_targets(labels) if is_aligned else labels,
            self.objective, self._ask(inputs), self.args.loss_tile_tokens, layer, is_aligned, everywhere,
            self._hidden,
        )  # fmt: skip
        plain = without_labels(inputs)
        output = model(**plain, distill=target)
        total = output.loss.detach() + (0 if output.relation is None else output.relation.detach())
        if not bool(torch.isfinite(total)):
            raise not_finite("loss", total.item(), self.args, self.state)
        self._meters[split].add(output.sums, output.num_targets)
        count = self._divisor(labels) if num_items_in_batch is None else num_items_in_batch
        loss = output.loss / torch.as_tensor(count, device=output.loss.device).clamp(min=1)
        if relations is not None:
            loss = loss + relations.share(output.relation, plain, split, is_whole=is_whole)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over ranks, the count is of all
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**plain, use_cache=False)

    # ------------------------------------------------------------------------------------------- optimizer and reports

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Name the parameters that weight decay is for: no norms, biases, scales or zero points."""
        return without_learned(model, super().get_decay_parameter_names(model))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Set up the optimizer, with learning rates of their own for scales and zero points where they were given."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        args = self.args
        split_groups(optimizer, model or self.model, args.scale_learning_rate, args.zero_point_learning_rate)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a training entry also gets what the loss measured since the last one, per target token of all ranks."""
        if "loss" in logs:
            logs = {**logs, **self._measured("train"), **self._run_logs()}
        super().log(logs, start_time)

    def _measured(self, split: str) -> dict[str, float]:
        """What the loss and its parts came to since the last call; collective."""
        means = self._meters[split].drain(self.accelerator)
        if self._relations is None:
            return means
        related = self._relations.drain(split, self.accelerator)
        if "loss" in means:
            means["loss"] += self._relations.weight * sum(related.values())
        return {**means, **related}

    def _run_logs(self) -> dict[str, float]:
        tokens = self.memory.num_tokens
        logs: dict[str, float] = {"num_tokens": tokens, "tokens_per_second": self._stopwatch.restart(tokens)}
        if isinstance(self.gamma, float):
            logs["gamma"] = self.gamma
        if self._on_policy is not None:
            logs |= self._on_policy.drain()
        rate = None if self._flips is None else self._flips.rate()
        return {**logs, **({} if rate is None else {"flip_rate": rate}), **self._doctor.measure()}

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate, as `Trainer.evaluation_loop` does; the loss and all else are means over tokens, not over batches.

        Args:
            dataloader: what to evaluate on.
            description: for the progress bar.
            prediction_loss_only: do not collect logits.
            ignore_keys: outputs to leave out.
            metric_key_prefix: put before every name.
        """
        began = time.perf_counter()
        self._meters["eval"] = Meter()
        asked = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        with self._averages.in_force():
            output = super().evaluation_loop(*asked)
        means = self._measured("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        self._stopwatch.skip(time.perf_counter() - began)
        return output

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the card of the output folder.

        Args:
            model_name: heading; the folder's name by default.
            dataset_name: name of the training data on the Hub.
            tags: further tags.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir)
        text = card_text(
            self.model,
            title=model_name or folder.name,
            location=self.hub_model_id or str(folder),
            loss=describe_loss(self.args, None if self._objective is None else self._objective.gamma, self.teacher),
            log_history=self.state.log_history,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            dataset=dataset_name,
        )
        (folder / "README.md").write_text(text, encoding="utf-8")

"""A cached teacher teaches what a live one does, whatever the batches; what does not match is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from bitdistiller_peft.errors import CheckpointError, ChecksumError, ConfigError, DataError, StateError
from bitdistiller_peft.training import DistillTrainer, TeacherCache, cache_teacher, cache_writer
from bitdistiller_peft.training.cache_store import KINDS, shard_path
from tests import tiny
from tests.training import helpers

EXACT: dict[str, Any] = {"dtype": "float32", "show_progress": False}


def build(bases: Path, folder: Path, data: Any = None, **options: Any) -> TeacherCache:
    """A cache of what the standard student's base says of the standard data."""
    rows = helpers.dataset() if data is None else data
    return cache_teacher(helpers.student(bases), helpers.tokenizer(), rows, folder, **EXACT | options)


@pytest.fixture(scope="module")
def exact(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hidden states in fp32."""
    folder = tmp_path_factory.mktemp("caches") / "exact"
    build(bases, folder)
    return folder


def gradients(bases: Path, folder: Path, cache: Path | None = None, **changes: Any) -> dict[str, torch.Tensor]:
    """What one step of plain SGD at rate 1 takes off every weight."""
    model = helpers.student(bases, **changes.pop("student", {}))
    before = helpers.weights(model)
    teacher = changes.pop("teacher", None)
    settings = {"learning_rate": 1.0, "max_steps": 1, "per_device_train_batch_size": 16, **changes, **cached(cache)}
    run = trainer(model, folder, given=teacher, **settings)
    run.train()
    return {name: before[name] - weight for name, weight in helpers.weights(model).items()}


def cached(folder: Path | None) -> dict[str, Any]:
    """What a config says about a cache."""
    return {} if folder is None else {"teacher": "cached", "teacher_cache": str(folder)}


def trainer(model: Any, folder: Path, *, data: Any = None, eval_data: Any = None, given: Any = None, **changes: Any):
    """A trainer over the standard data; `teacher` goes to the config."""
    return DistillTrainer(
        model,
        helpers.config(folder, **changes),
        teacher=given,
        train_dataset=helpers.dataset() if data is None else data,
        eval_dataset=eval_data,
        processing_class=helpers.tokenizer(),
    )


def relative_error(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Of `left` against `right`, over all weights together."""
    difference = sum(float((left[name] - right[name]).square().sum()) for name in right) ** 0.5
    return difference / sum(float(values.square().sum()) for values in right.values()) ** 0.5


OBJECTIVES: dict[str, dict[str, Any]] = {
    "cakld": {},
    "estimate": {"gamma": "estimate"},
    "per_token": {"gamma": "per_token"},
    "forward_kl": {"loss_type": "forward_kl", "gamma": "estimate"},
    "reverse_kl": {"loss_type": "reverse_kl", "gamma": "estimate"},
    "jsd": {"loss_type": "jsd", "gamma": "estimate"},
    "warm": {"temperature": 2.0},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_exact_hidden_states_give_the_live_teachers_gradients(
    bases: Path, exact: Path, tmp_path: Path, name: str
) -> None:
    live = gradients(bases, tmp_path / "live", **OBJECTIVES[name])
    ours = gradients(bases, tmp_path / "cached", exact, **OBJECTIVES[name])
    assert relative_error(ours, live) < 1e-5


@pytest.mark.parametrize(("dtype", "bits"), [(None, 2), (None, 3), (None, 4), ("bfloat16", 2), ("bfloat16", 3)])
def test_sixteen_bits_of_hidden_states_give_gradients_within_one_percent(
    bases: Path, tmp_path: Path, dtype: str | None, bits: int
) -> None:
    build(bases, tmp_path / "cache", dtype=dtype)
    student = {"student": {"bits": bits}}
    live = gradients(bases, tmp_path / "live", **student)
    assert 0 < relative_error(gradients(bases, tmp_path / "cached", tmp_path / "cache", **student), live) < 0.01


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "warm"])
def test_every_token_kept_is_the_live_teacher(bases: Path, tmp_path: Path, name: str) -> None:
    build(bases, tmp_path / "cache", kind="topk", k=tiny.VOCAB)
    live = gradients(bases, tmp_path / "live", **OBJECTIVES[name])
    ours = gradients(bases, tmp_path / "cached", tmp_path / "cache", **OBJECTIVES[name])
    assert relative_error(ours, live) < 1e-4


def test_more_tokens_give_better_gradients_and_the_tail_bounds_the_error(bases: Path, tmp_path: Path) -> None:
    live = gradients(bases, tmp_path / "live")
    errors = []
    for k in (2, 16, 64):
        build(bases, tmp_path / f"cache{k}", kind="topk", k=k, dtype=None)
        errors.append(relative_error(gradients(bases, tmp_path / f"cached{k}", tmp_path / f"cache{k}"), live))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "form",
    [
        {"packing": True, "max_length": 64},
        {"padding_free": True, "max_length": None},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "seed": 5, "max_steps": 3},
    ],
    ids=["packed", "padding-free", "accumulated"],
)
def test_documents_are_found_in_whatever_batch(bases: Path, tmp_path: Path, form: dict[str, Any], kind: str) -> None:
    # cached once from plain rows; packing, flattening, another order and size of batches must not matter
    build(bases, tmp_path / "cache", kind=kind, k=tiny.VOCAB)
    live = gradients(bases, tmp_path / "live", **form)
    ours = gradients(bases, tmp_path / "cached", tmp_path / "cache", **form)
    assert relative_error(ours, live) < 1e-3


def test_packed_rows_are_cached_document_by_document(bases: Path, tmp_path: Path) -> None:
    packed = helpers.trainer(helpers.student(bases), tmp_path / "a", packing=True, max_length=64).train_dataset
    assert "seq_lengths" in packed.column_names
    assert len(packed) < len(helpers.dataset())
    assert len(build(bases, tmp_path / "cache", packed)) == len(helpers.dataset())


def test_gamma_and_figures_are_those_of_the_live_teacher(bases: Path, exact: Path, tmp_path: Path) -> None:
    build(bases, tmp_path / "topk", kind="topk", k=tiny.VOCAB)
    runs = [helpers.trainer(helpers.student(bases), tmp_path / "live", gamma="estimate")]
    for cache in (exact, tmp_path / "topk"):
        runs.append(trainer(helpers.student(bases), tmp_path / "c", gamma="estimate", **cached(cache)))
    for run in runs:
        run.train()
    for run in runs[1:]:
        assert run.gamma == pytest.approx(runs[0].gamma, rel=1e-5)
        for key in ("loss", "forward_kl", "reverse_kl", "confidence", "agreement", "teacher_entropy"):
            assert helpers.history(run, key) == pytest.approx(helpers.history(runs[0], key), rel=1e-4), key


def test_the_students_own_frozen_head_serves_as_the_teachers(bases: Path, exact: Path, tmp_path: Path) -> None:
    run = trainer(helpers.student(bases), tmp_path, **cached(exact))
    assert run.teacher._head.weight.data_ptr() == run.model.get_base_model().lm_head.weight.data_ptr()


def test_another_model_brings_its_head_with_it(bases: Path, tmp_path: Path) -> None:
    other = helpers.base(bases, seed=1)
    cache_teacher(other, None, helpers.dataset(), tmp_path / "cache", **EXACT)
    live = gradients(bases, tmp_path / "live", teacher=helpers.base(bases, seed=1))
    assert relative_error(gradients(bases, tmp_path / "cached", tmp_path / "cache"), live) < 1e-5


def test_soft_caps_come_from_the_teacher(bases: Path, tmp_path: Path) -> None:
    model = helpers.student(bases, "gemma2")
    cache = cache_teacher(model, None, helpers.dataset(), tmp_path / "cache", **EXACT)
    assert cache.head.logit_softcap == model.config.final_logit_softcapping


# ---------------------------------------------------------------------------------------------------------- refusals


def test_a_document_that_was_not_cached_is_refused_before_training(bases: Path, exact: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`train_dataset` holds one of \d+ tokens"):
        trainer(helpers.student(bases), tmp_path, data=helpers.dataset(seed=9), **cached(exact))
    with pytest.raises(DataError, match="`eval_dataset` holds"):
        trainer(helpers.student(bases), tmp_path, eval_data=helpers.dataset(seed=9), **cached(exact))


def test_another_tokenizer_template_or_teacher_is_refused(bases: Path, exact: Path, tmp_path: Path) -> None:
    manifest = json.loads((exact / "manifest.json").read_text())
    for key in ("tokenizer", "template"):
        folder = copy_of(exact, tmp_path / key)
        (folder / "manifest.json").write_text(json.dumps(manifest | {key: "other"}))
        with pytest.raises(ConfigError, match=f"same {key}"):
            trainer(helpers.student(bases), tmp_path, **cached(folder))
    with pytest.raises(ConfigError, match="must be of the student's base weights"):
        trainer(helpers.student(bases, seed=1), tmp_path, **cached(exact))


def test_the_cache_and_the_word_cached_come_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`teacher_cache` must be given for teacher='cached'"):
        helpers.config(tmp_path, teacher="cached")
    with pytest.raises(ConfigError, match="`teacher_cache` must be given for teacher='cached', and only there"):
        helpers.config(tmp_path, teacher="self", teacher_cache="cache")


def test_a_few_tokens_do_not_do_for_every_loss(bases: Path, tmp_path: Path) -> None:
    build(bases, tmp_path / "cache", kind="topk", k=8)
    with pytest.raises(ConfigError, match="temperature=2"):
        trainer(helpers.student(bases), tmp_path, temperature=2.0, **cached(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"kind": "logits"}, ConfigError, "`kind` must be one of"),
        ({"dtype": "bfloat16", "kind": "topk"}, ConfigError, "`dtype` must be one of"),
        ({"kind": "topk", "k": 1}, ConfigError, "`k` must be from 2"),
        ({"kind": "topk", "k": tiny.VOCAB + 1}, ConfigError, "`k` must be from 2"),
        ({"batch_size": 0}, ConfigError, "`batch_size`"),
        ({"data": Dataset.from_dict({"text": ["a"]})}, DataError, "trainer.train_dataset"),
        ({"data": Dataset.from_dict({"input_ids": [[4]]})}, DataError, "at least two tokens"),
    ],
    ids=["kind", "dtype", "k-small", "k-large", "batch_size", "text", "one-token"],
)
def test_what_cannot_be_cached_is_refused(
    bases: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        build(bases, tmp_path / "cache", **options)


def test_a_quantized_model_is_no_teacher(bases: Path, tmp_path: Path) -> None:
    packed = helpers.student(bases).pack_and_unload(progressbar=False)
    with pytest.raises(StateError, match="full precision"):
        cache_teacher(packed, None, helpers.dataset(), tmp_path / "cache", **EXACT)


# ---------------------------------------------------------------------------------------------------- the folder


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.fixture
def interrupted(bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache whose writer died before its third shard."""
    ask, calls = cache_writer._ask, iter(range(9))

    def dies(*args: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return ask(*args)

    monkeypatch.setattr(cache_writer, "_ask", dies)
    with pytest.raises(KeyboardInterrupt):
        build(bases, tmp_path / "cache", shard_bytes=1 << 13)
    monkeypatch.undo()
    return tmp_path / "cache"


def test_an_interrupted_write_goes_on_with_the_first_missing_shard(bases: Path, interrupted: Path) -> None:
    assert len(list(interrupted.glob("shard-*.safetensors"))) == 2
    with pytest.raises(StateError, match=r"got 2 of \d+ shards"):
        TeacherCache(interrupted)
    first = shard_path(interrupted, 0).stat().st_mtime_ns
    resumed = build(bases, interrupted, shard_bytes=1 << 13)
    assert shard_path(interrupted, 0).stat().st_mtime_ns == first
    whole = build(bases, interrupted.parent / "whole", shard_bytes=1 << 13)
    assert len(resumed) == len(whole) == len(helpers.dataset())
    assert all(
        shard_path(interrupted, i).read_bytes() == shard_path(whole.folder, i).read_bytes()
        for i in range(whole.manifest["num_shards"])
    )
    resumed.verify()


def test_going_on_with_something_else_is_refused_with_the_difference(bases: Path, interrupted: Path) -> None:
    with pytest.raises(ConfigError, match="data was"):
        build(bases, interrupted, helpers.dataset(8), shard_bytes=1 << 13)
    with pytest.raises(ConfigError, match=r"layout\.dtype was 'float32', is 'bfloat16'"):
        build(bases, interrupted, dtype="bfloat16", shard_bytes=1 << 13)


@pytest.mark.parametrize("where", ["answers", "names"])
def test_damage_is_found_before_it_teaches(bases: Path, exact: Path, tmp_path: Path, where: str) -> None:
    folder = copy_of(exact, tmp_path / "cache")
    damaged = bytearray(shard_path(folder, 0).read_bytes())
    damaged[len(damaged) // 2 if where == "answers" else -5] ^= 4
    shard_path(folder, 0).write_bytes(bytes(damaged))
    with pytest.raises(ChecksumError, match="shard-00000"):  # noqa: PT012  (either may be the first to see it)
        run = trainer(helpers.student(bases), tmp_path, **cached(folder))
        run.train()


def test_a_folder_without_a_cache_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no manifest\.json"):
        TeacherCache(tmp_path)


def test_the_default_dtype_keeps_what_the_teacher_computed(bases: Path, tmp_path: Path) -> None:
    for dtype, expected in ((torch.float32, "float16"), (torch.bfloat16, "bfloat16")):
        model = helpers.base(bases, dtype=dtype)
        cache = cache_teacher(model, None, helpers.dataset(4), tmp_path / expected, show_progress=False)
        assert cache.layout.dtype == expected


def test_hidden_states_that_overflow_are_refused(bases: Path, tmp_path: Path) -> None:
    model = helpers.base(bases)
    model.model.norm.weight.data.mul_(1e5)
    with pytest.raises(ConfigError, match=r"float16 overflows\. Use dtype='bfloat16'"):
        cache_teacher(model, None, helpers.dataset(), tmp_path / "cache", show_progress=False)


def test_the_size_is_said_first_and_a_full_disk_is_refused(
    bases: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1000}))
    with caplog.at_level(logging.WARNING), pytest.raises(ConfigError, match="must have room for"):
        build(bases, tmp_path / "cache")
    assert "16 documents" in caplog.text
    assert "hidden states 256 B/token" in caplog.text
    assert not list((tmp_path / "cache").glob("shard-*"))


def test_the_estimate_is_the_size(bases: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes: list[int] = []
    for kind in KINDS:
        cache = build(bases, tmp_path / kind, kind=kind, k=8)
        tokens = sum(map(len, helpers.dataset()["input_ids"]))
        shards = sum(path.stat().st_size for path in cache.folder.glob("shard-*"))
        assert tokens * cache.layout.bytes_per_token < shards < tokens * cache.layout.bytes_per_token + 2000
        sizes.append(shards)
    assert sizes[1] < sizes[0]

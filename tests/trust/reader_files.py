"""Whole files of every kind that the package reads, small, each with the call that reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bitdistiller_peft.calibration import CalibrationResult
from bitdistiller_peft.calibration.result import BlockReport, LayerReport
from bitdistiller_peft.cli import cost, models, output, texts
from bitdistiller_peft.cli.folder import bits_per_weight, read_folder
from bitdistiller_peft.cli.measured import measured
from bitdistiller_peft.cli.parse import parse
from bitdistiller_peft.cli.verb import Console
from bitdistiller_peft.cli.verbs import eval as eval_verb
from bitdistiller_peft.cli.verbs import inspect
from bitdistiller_peft.cli.verbs.push import _card
from bitdistiller_peft.export.gguf_metadata import add_tokenizer, refuse_tokenizer
from bitdistiller_peft.report import write_report
from bitdistiller_peft.training import TeacherCache, cache_store, checkpoints
from bitdistiller_peft.training.averages import AVERAGES_NAME, WeightAverages
from bitdistiller_peft.training.teacher_data_store import TeacherDataStore

IDENTITY = {"num_prompts": 2, "settings": {"seed": 1}, "fingerprints": {"teacher": "ab"}}


@dataclass(frozen=True)
class Reader:
    """A file, and who reads it.

    Attributes:
        id: for the test's name.
        file: its name in the folder.
        make: writes it, and what belongs to it, into an empty folder.
        read: reads it.
        passes: damages that are no damage to this reader.
    """

    id: str
    file: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    passes: frozenset[str] = frozenset()


def write(path: Path, content: Any) -> None:
    """Write JSON, or text as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- what is made


def cache(folder: Path) -> None:
    """A teacher cache of two documents, hidden states of width 4, and its head."""
    identity = {
        "num_shards": 1,
        "layout": {"kind": "hidden", "dtype": "float32", "width": 4, "vocab": 8},
        "head": {"logit_scale": 1.0, "logit_softcap": None},
        "teacher": {"name": "team/model", "fingerprint": "abcd", "is_self": True},
        "tokenizer": "ab",
        "template": None,
    }
    cache_store.begin(folder, identity)
    save_file({"weight": torch.ones(8, 4)}, folder / cache_store.HEAD_NAME)
    digests = torch.arange(32, dtype=torch.uint8).reshape(2, 16)
    shard = {"digests": digests, "offsets": torch.tensor([0, 2, 5]), "hidden": torch.ones(5, 4)}
    save_file(shard, cache_store.shard_path(folder, 0))
    cache_store.finish(folder)


def read_cache(folder: Path) -> None:
    found = TeacherCache(folder)
    for digest in list(found._places):
        assert found.read(digest)["hidden"].shape[1] == 4
    assert found.head.weight.shape == (8, 4)


def answers(folder: Path, *, is_finished: bool = True) -> None:
    """Teacher data of two prompts."""
    store = TeacherDataStore(folder, IDENTITY, {"teacher": "team/model"}, 1)
    row = {"prompt": "Why?", "completion": " Because.", "num_tokens": 3, "finish_reason": "eos"}
    store.append([row | {"prompt_id": index} for index in range(2)])
    if is_finished:
        store.finish()


def resume_answers(folder: Path) -> None:
    TeacherDataStore(folder, IDENTITY, {"teacher": "team/model"}, 1)


def calibrated(folder: Path) -> None:
    """The file of a clip search."""
    result = CalibrationResult(
        "clip",
        [LayerReport("a.weight", 0.5, 0.25, 0.9, 0.8, 1.5)],
        {"a.weight": (-torch.ones(2, 1), torch.ones(2, 1))},
        {"a.weight": {"bits": 2}},
        {"num_samples": 1, "seq_len": 8},
        [BlockReport("a", 0.5, 0.4, 0.3, 1.0)],
    )
    result.save(folder / "clip.safetensors")


def read_calibrated(folder: Path) -> None:
    print(CalibrationResult.load(folder / "clip.safetensors"))


def checkpoint(folder: Path) -> Path:
    """A checkpoint of a run, with its manifest."""
    place = folder / "checkpoint-3"
    write(place / "trainer_state.json", {"global_step": 3, "log_history": [{"loss": 1.0}]})
    save_file({"a": torch.ones(3)}, place / "model.safetensors")
    torch.save({"step": 1}, place / "optimizer.pt")
    torch.save({"step": 1}, place / "scheduler.pt")
    checkpoints.write_manifest(place)
    return place


def old_checkpoint(folder: Path) -> None:
    """One of a version that wrote no manifest."""
    (checkpoint(folder) / checkpoints.MANIFEST_NAME).unlink()


def resume(folder: Path) -> None:
    assert checkpoints.resumable(True, str(folder)) == str(folder / "checkpoint-3")


def averages(folder: Path) -> None:
    save_file({"weight": torch.ones(2, 3)}, folder / AVERAGES_NAME)


def read_averages(folder: Path) -> None:
    kept = WeightAverages(0.9)
    kept.resume_from = str(folder)
    kept.on_train_begin(None, None, None, model=torch.nn.Linear(3, 2, bias=False))  # type: ignore[arg-type]


def evaluation(folder: Path) -> None:
    """What `eval` leaves behind, with a packed model that it may be of."""
    scored = {"perplexity": 20.5, "protocol": "ppl/v1", "state": "packed", "seconds": 1.5, "num_tokens": 8}
    distance = {"mean_kl_nats": 0.25, "p95_kl_nats": 1.5, "top1_agreement": 0.75, "protocol": "kl/v1"}
    task = {"task": "arc_easy", "metric": "acc", "value": 0.5, "protocol": "lm-eval/v1", "stderr": 0.1}
    answer = {"text": "Yes.", "collapse": {"kind": "healthy", "detail": ""}}
    gallery = {"entries": [{"prompt": "Is it?", "answer": answer, "teacher_answer": answer}], "state": "packed"}
    row = {"model": str(folder / "model"), "perplexity": scored, "divergence": distance, "tasks": {"scores": [task]}}
    pair = {"measure": "nll", "first": "a", "other": "b", "difference": 0.5, "low": 0.4, "high": 0.6}
    write(folder / "result.json", {"rows": [row | {"gallery": gallery}], "pairs": [pair], "seconds": 3.0})
    write(folder / "resolved.yaml", "# bitdistiller eval, bitdistiller_peft 0.1.0.\neval:\n  text: [wikitext2]\n")


def read_measured(folder: Path) -> None:
    measured(str(folder), folder / "model")


def chain(folder: Path) -> None:
    """What `run` leaves behind."""
    evaluation(folder / "eval")
    write(folder / "resolved.yaml", "# bitdistiller run, bitdistiller_peft 0.1.0.\nmodel: base\n")
    write(folder / "costs.json", {"eval": {"seconds": 2.0, "peak_memory_bytes": 1024}})
    losses = [json.dumps({"step": step, "loss": 1.0 / step, "flip_rate": 0.1}) for step in (1, 2, 3)]
    write(folder / "distill" / "metrics.jsonl", "\n".join(losses))
    finding = {"name": "oscillation", "severity": "warning", "first_step": 7, "seen": "9 %", "advice": "Lower."}
    write(folder / "distill" / "trainer" / "doctor.json", {"findings": [finding]})


def unfinished_chain(folder: Path) -> None:
    write(folder / "trainer" / "checkpoint-3" / "trainer_state.json", {"log_history": [{"step": 1, "loss": 1.0}]})


def report(folder: Path) -> None:
    write_report(folder, folder.parent / "report", show_progress=False)


def costs(folder: Path) -> None:
    write(folder / "costs.json", {"eval": {"seconds": 2.0, "peak_memory_bytes": 1024}})


def add_costs(folder: Path) -> None:
    with cost.recorded(folder, "eval"):
        pass


SETTINGS = ("--text", "wikitext2", "--model", "base")


def claimed(folder: Path) -> None:
    """The output folder of a command that is done."""
    settings = parse(eval_verb.VERB, ["base", *SETTINGS])
    assert output.begin(folder / "out", settings, ("", "eval")) is None
    output.finish(folder / "out", {"rows": []})


def claim(folder: Path) -> None:
    assert output.begin(folder / "out", parse(eval_verb.VERB, ["base", *SETTINGS]), ("", "eval")) is not None


def model(folder: Path) -> None:
    """A folder with a model in full precision, by its headers, and its card."""
    write(folder / "config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4})
    save_file({"model.embed_tokens.weight": torch.ones(4, 4)}, folder / "model.safetensors")
    write(folder / "README.md", "---\ntags: [a]\n---\n\n# model\n")


def adapter(folder: Path) -> None:
    write(folder / "adapter_config.json", {"base_model_name_or_path": "team/base", "bits": 2, "overrides": {}})
    save_file({"base_model.model.a.weight": torch.ones(4, 4)}, folder / "adapter_model.safetensors")


def inspected(folder: Path) -> None:
    settings = parse(inspect.VERB, [str(folder)])
    inspect.run(settings, Console(is_json=True))
    bits_per_weight(read_folder(str(folder)))


def card(folder: Path) -> None:
    row = {"metric": "perplexity", "value": 2.0, "data": "text", "protocol": "ppl/v1"}
    _card(read_folder(str(folder)), "user/name", [row])


def tokenizer(folder: Path) -> None:
    """A byte-level BPE with a template."""
    token = {"id": 2, "content": "<s>", "special": True}
    steps = {"type": "ByteLevel", "use_regex": True}
    bpe = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}
    write(folder / "tokenizer.json", {"model": bpe, "added_tokens": [token], "pre_tokenizer": steps})
    write(folder / "tokenizer_config.json", {"bos_token": "<s>", "chat_template": "{{ messages }}"})
    write(folder / "chat_template.jinja", "{{ messages }}")


class Writer:
    """Takes what a GGUF writer takes, and writes nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def to_gguf(folder: Path) -> None:
    refuse_tokenizer(folder, None)
    add_tokenizer(Writer(), folder, 4, None)


def table(name: str) -> Callable[[Path], None]:
    row = {"text": "a b c", "prompt": "Why?"}
    content = {
        "rows.jsonl": json.dumps(row) + "\n" + json.dumps(row),
        "rows.json": [row, row],
        "messages.json": [{"messages": [{"role": "user", "content": "Why?"}]}],
        "rows.csv": "text,prompt\na b c,Why?\n",
        "text.txt": "a b c\n\nd e f\n",
    }
    return lambda folder: write(folder / name, content[name])


def parquet(folder: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"text": ["a b c"], "prompt": ["Why?"]}).to_parquet(folder / "rows.parquet")


def read_table(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        source = str(folder / name)
        texts.load_prompts(source, "auto", has_template=True, max_prompts=None)
        if not name.startswith("messages"):
            texts.load_texts([source], "evaluation")
        texts.load_training_data(source)

    return read


def base_of(folder: Path) -> None:
    try:
        models.base_of(folder)
    finally:
        models._is_ours(folder)

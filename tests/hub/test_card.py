"""The card says what a model is made of in the Hub's own words, and takes measurements without touching the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel

from bitdistiller_peft import quant_summary
from bitdistiller_peft.hub.card import hub_id, with_results
from bitdistiller_peft.tuner import note_provenance
from tests.hub.fake_hub import card_errors
from tests.hub.models import WEIGHTS, Saved, make_student
from tests.tiny import load, save_base

GetSaved = Callable[..., Saved]
ROWS = [{"metric": "perplexity", "value": 12.5, "data": "wikitext2", "protocol": "v1/seq_len=512"}]


def named(bases: Path, name: str = "team/base") -> PeftModel:
    """A student whose base model is one on the Hub."""
    model = make_student("llama", bases)
    model.peft_config["default"].base_model_name_or_path = name
    return model


def test_the_metadata_of_a_packed_model(bases: Path, tmp_path: Path) -> None:
    model = named(bases)
    note_provenance(model, {"loss": "cakld", "gamma": 0.25, "teacher": "self", "data": "0123abc"})
    model.pack_and_unload(progressbar=False).save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert data.to_dict() == {
        "base_model": "team/base",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["bitdistiller", "quantized", "2-bit"],
    }
    assert card_errors(text) == []
    for row in ("| loss | cakld |", "| gamma | 0.25 |", "| teacher | self |", "(SHA-256 of its tokens) | 0123abc |"):
        assert row in text
    assert "`team/base`, quantized with bitdistiller_peft: 2 bits, grid `int`, 32 weights per scale; packed." in text
    assert "Neither calibrated" not in text


def test_the_size_is_that_of_the_files_and_every_bit_counts(saved: GetSaved) -> None:
    folder, model, _ = saved("llama")
    text = (folder / "README.md").read_text(encoding="utf-8")
    size = (folder / WEIGHTS).stat().st_size
    weights = sum(part.num_weights for part in quant_summary(model).parts)
    expected = (
        f"{size:,} bytes in 1 file: {8 * size / weights:.2f} bits per weight, embeddings, scales and file headers"
    )
    assert expected in text
    assert "**Neither calibrated nor trained.**" in text


def test_an_adapter_gets_our_card_in_place_of_a_form_with_local_paths(bases: Path, tmp_path: Path) -> None:
    make_student("llama", bases).save_pretrained(tmp_path / "local")
    named(bases).pack_and_unload(progressbar=False)
    text = (tmp_path / "local" / "README.md").read_text(encoding="utf-8")
    assert "More Information Needed" not in text
    assert str(bases) not in text
    assert "base_model" not in ModelCard(text).data.to_dict()
    size = (tmp_path / "local" / "adapter_model.safetensors").stat().st_size
    rows = {row.state: row for row in quant_summary(make_student("llama", bases)).rows}
    bits = rows["latent"].stored_bits / rows["latent"].num_weights
    assert f"{size:,} bytes of latent weights." in text
    assert f"the {rows['latent'].num_weights:,} quantized weights take {bits:.3f} bits each" in text
    kept = (tmp_path / "local" / "README.md").read_text().replace("## Limits", "## Mine")
    (tmp_path / "local" / "README.md").write_text(kept)
    PeftModel.from_pretrained(load(save_base("llama", bases)), tmp_path / "local").save_pretrained(tmp_path / "local")
    assert "## Mine" in (tmp_path / "local" / "README.md").read_text(), "a card that somebody wrote stays"


def test_results_go_into_metadata_and_text_once(saved: GetSaved) -> None:
    text = (saved("llama").folder / "README.md").read_text(encoding="utf-8")
    once = with_results(text, ROWS)
    again = with_results(once, [{**ROWS[0], "value": 11.0}])
    assert card_errors(once) == card_errors(again) == []
    (result,) = ModelCard(again).data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("perplexity", 11.0, "wikitext2")
    assert result.dataset_args == {"protocol": "v1/seq_len=512"}
    assert again.count("## Measured") == 1
    assert "| perplexity | 11 | wikitext2 | `v1/seq_len=512` |" in again
    assert again.partition("## Measured")[0].count("\n## ") == text.count("\n## ")
    assert with_results(text, []) == text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("team/model", "team/model"),
        ("/home/me/model", None),
        ("./model", None),
        ("~/model", None),
        ("model", None),
        ("a/b/c", None),
        (None, None),
    ],
)
def test_only_names_of_the_hub_are_named(name: str | None, expected: str | None) -> None:
    assert hub_id(name) == expected


def test_a_folder_of_that_form_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("runs/base") is None
    assert json.dumps(hub_id("runs/other")) == '"runs/other"'

"""A text becomes the chunks that GPTQ's protocol asks for, and the id tells any two protocols apart."""

from __future__ import annotations

import hashlib
import struct

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from bitdistiller_peft.errors import ConfigError, DataError
from bitdistiller_peft.evaluation.protocol import check_fits, cut_text, join_rows


def test_the_rows_of_the_hub_and_the_lines_of_the_raw_file_give_the_same_text() -> None:
    hub = ["", " = Title = \n", "", " Some text . \n"]
    lines = [" ", " = Title = ", " ", " Some text . "]
    assert join_rows(hub) == join_rows(lines) == "\n\n".join(hub)


def test_chunks_follow_each_other_without_overlap_and_the_rest_is_dropped(tokenizer, text) -> None:
    tokens = tokenizer(text)["input_ids"]
    chunks = cut_text(tokenizer, text, seq_len=100, max_chunks=None)
    assert chunks.ids.flatten().tolist() == tokens[: len(tokens) // 100 * 100]
    assert chunks.ids.shape == (len(tokens) // 100, 100)
    assert chunks.num_predictions == len(tokens) // 100 * 99


@pytest.mark.parametrize(("length", "chunks"), [(10, 1), (19, 1), (20, 2)])
def test_a_chunk_counts_when_it_is_full(tokenizer, length: int, chunks: int) -> None:
    text = "@" * length
    assert len(tokenizer(text)["input_ids"]) == length
    assert len(cut_text(tokenizer, text, seq_len=10, max_chunks=None).ids) == chunks


def test_max_chunks_takes_the_first_ones(tokenizer, text) -> None:
    whole = cut_text(tokenizer, text, seq_len=16, max_chunks=None)
    assert cut_text(tokenizer, text, seq_len=16, max_chunks=3).ids.tolist() == whole.ids[:3].tolist()
    more_than_there_are = cut_text(tokenizer, text, seq_len=16, max_chunks=10**6)
    assert more_than_there_are.protocol == whole.protocol


def test_the_id_names_every_part_of_the_protocol(tokenizer, with_bos, text) -> None:
    chunks = cut_text(tokenizer, text, seq_len=16, max_chunks=3)
    tokens = chunks.ids.flatten().tolist()
    digest = hashlib.sha256(struct.pack(f"<{len(tokens)}q", *tokens)).hexdigest()[:12]
    assert chunks.protocol == f"v1/seq_len=16/chunks=3/bos=no/tokens={digest}"
    others = [
        cut_text(tokenizer, text, seq_len=17, max_chunks=3),
        cut_text(tokenizer, text, seq_len=16, max_chunks=4),
        cut_text(tokenizer, "x" + text, seq_len=16, max_chunks=3),
        cut_text(with_bos(), text, seq_len=16, max_chunks=3),
    ]
    assert len({chunks.protocol, *(other.protocol for other in others)}) == 5


def test_the_id_ignores_what_is_not_read(tokenizer, text) -> None:
    chunks = cut_text(tokenizer, text, seq_len=16, max_chunks=3)
    assert cut_text(tokenizer, text[: len(text) // 2], seq_len=16, max_chunks=3).protocol == chunks.protocol


def test_a_bos_comes_once_and_an_eos_never(with_bos, text) -> None:
    fast = with_bos()
    bare = fast(text, add_special_tokens=False)["input_ids"]
    chunks = cut_text(fast, text, seq_len=len(bare) + 1, max_chunks=None)
    assert chunks.ids.tolist() == [[fast.bos_token_id, *bare]]
    assert "/bos=yes/" in chunks.protocol
    with pytest.raises(DataError, match=f"got {len(bare) + 1} tokens"):
        cut_text(fast, text, seq_len=len(bare) + 2, max_chunks=None)


def test_no_warning_about_long_texts_and_no_trace_in_the_tokenizer(tokenizer, text, caplog) -> None:
    before = tokenizer.backend_tokenizer.to_str()
    tokenizer.model_max_length, old = 8, tokenizer.model_max_length
    try:
        cut_text(tokenizer, text, seq_len=8, max_chunks=None)
    finally:
        tokenizer.model_max_length = old
    assert not caplog.records
    assert tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("text", ["", " \n", [], ["", " "]], ids=repr)
def test_an_empty_text_is_refused(tokenizer, text) -> None:
    with pytest.raises(DataError, match="must not be empty"):
        cut_text(tokenizer, text, seq_len=8, max_chunks=None)


def test_a_text_shorter_than_a_chunk_is_refused_with_its_length(tokenizer) -> None:
    with pytest.raises(DataError, match=r"seq_len=512 tokens: got \d+ tokens\. Use a longer text"):
        cut_text(tokenizer, "far too short", seq_len=512, max_chunks=None)


def test_rows_must_be_text(tokenizer) -> None:
    with pytest.raises(DataError, match=r"dataset\['text'\]"):
        cut_text(tokenizer, [{"text": "no"}], seq_len=8, max_chunks=None)


@pytest.mark.parametrize(("name", "value"), [("seq_len", 1), ("seq_len", 8.0), ("max_chunks", 0), ("max_chunks", True)])
def test_numbers_out_of_range_are_refused(tokenizer, text, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` must be a whole number"):
        cut_text(tokenizer, text, **{"seq_len": 8, "max_chunks": None, name: value})


def test_chunks_beyond_the_context_and_foreign_tokens_are_refused(tokenizer, text) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    small = LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=16, **sizes))
    check_fits(small, cut_text(tokenizer, text, seq_len=16, max_chunks=2))
    with pytest.raises(ConfigError, match="seq_len=17, context=16 tokens"):
        check_fits(small, cut_text(tokenizer, text, seq_len=17, max_chunks=2))
    foreign = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes))
    with pytest.raises(DataError, match=r"belong to the teacher: got token \d+, but its vocabulary has 100"):
        check_fits(foreign, cut_text(tokenizer, text, seq_len=16, max_chunks=2), "teacher")

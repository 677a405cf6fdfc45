"""Teacher data: sampled from the teacher and nobody else, one stream per prompt, and the same rows after any kill."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedModel

from bitdistiller_peft import BitDistillerConfig, BitDistillerQuantConfig, get_bitdistiller_model
from bitdistiller_peft.errors import CheckpointError, ConfigError, DataError, StateError, TrainingError
from bitdistiller_peft.training import data as data_module
from bitdistiller_peft.training import teacher_data_engines as engines
from bitdistiller_peft.training.data import generate_teacher_data, load_teacher_data
from bitdistiller_peft.training.fingerprints import fingerprint_weights
from bitdistiller_peft.training.teacher_data_prompts import prepare_prompts
from bitdistiller_peft.training.teacher_data_sampling import GumbelSampler, Sampling, answer_batch
from bitdistiller_peft.training.teacher_data_store import DATA_NAME, MANIFEST_NAME, PART_NAME
from tests import standin, tiny

ROOT = Path(__file__).parents[2]
PROMPTS = ["Python is", "The quick brown fox", "a", "An object's type", "In the beginning", "for x in", "Python is"]
CHATS = [[{"role": "user", "content": text}] for text in PROMPTS[:3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return standin.save_standin(tmp_path_factory.mktemp("standin"))


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    return opinionated(folder)


@pytest.fixture(scope="module")
def tokenizer():
    return standin.tokenizer()


def opinionated(folder: Path, **options) -> PreTrainedModel:
    """Its random weights are scaled up, so that contexts matter and answers end now and then."""
    loaded = tiny.load(folder, **options)
    for parameter in loaded.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(4)
    return loaded


def generate(model, tokenizer, prompts=PROMPTS, **changes) -> Dataset:
    settings = {"max_new_tokens": 6, "batch_size": 3, "temperature": 1.0, "show_progress": False, **changes}
    return generate_teacher_data(model, tokenizer, prompts, **settings)


def completions(*args, **kwargs) -> list:
    return generate(*args, **kwargs)["completion"]


# ------------------------------------------------------------------------------------------------------------ rows


def test_every_prompt_gets_one_row_in_order(model, tokenizer) -> None:
    rows = generate(model, tokenizer)
    assert rows.column_names == ["prompt", "completion", "num_tokens", "finish_reason", "prompt_id"]
    assert rows["prompt"] == PROMPTS
    assert rows["prompt_id"] == list(range(len(PROMPTS)))
    assert all(1 <= count <= 6 for count in rows["num_tokens"])


def test_messages_are_answered_by_an_assistant(model, tokenizer) -> None:
    rows = generate(model, tokenizer, CHATS)
    assert rows["prompt"] == CHATS
    assert all([message["role"] for message in answer] == ["assistant"] for answer in rows["completion"])
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in CHATS]
    greedy = completions(model, tokenizer, CHATS, temperature=0)
    assert [answer[0]["content"] for answer in greedy] == completions(model, tokenizer, rendered, temperature=0)


def test_another_template_gives_other_answers(model, tokenizer) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}:"
    plain = [chat[0]["content"] + ":" for chat in CHATS]
    rows = generate(model, tokenizer, CHATS, temperature=0, chat_template=template)
    assert [answer[0]["content"] for answer in rows["completion"]] == completions(
        model, tokenizer, plain, temperature=0
    )


def test_the_answer_is_the_teachers_greedy_continuation(model, tokenizer) -> None:
    prompt = tokenizer(PROMPTS[1], return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0]
    text = tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    answers = completions(model, tokenizer, temperature=0)
    assert PROMPTS[1] + answers[1] == text


def test_an_answer_ends_at_the_first_end_token_and_says_so(model, tokenizer) -> None:
    prompt = tokenizer(PROMPTS[0], return_tensors="pt")
    free = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    stop = free[2]
    model.generation_config.eos_token_id = [stop, tokenizer.eos_token_id]
    row = generate(model, tokenizer, temperature=0)[0]
    assert (row["finish_reason"], row["num_tokens"]) == ("eos", free.index(stop) + 1)
    assert tokenizer.decode(free).startswith(row["completion"])
    model.generation_config.eos_token_id = None
    row = generate(model, tokenizer, temperature=0)[0]
    assert (row["finish_reason"], row["num_tokens"]) == ("length", 6)
    other = deepcopy(tokenizer)
    other.eos_token = tokenizer.convert_ids_to_tokens(stop)
    assert generate(model, other, temperature=0)["finish_reason"][0] == "eos"


def test_a_character_that_was_cut_off_is_left_out(tokenizer, model) -> None:
    first_byte_of_two = tokenizer("é", add_special_tokens=False)["input_ids"][0]
    answer = data_module.Answer([first_byte_of_two], is_finished=False)
    assert data_module._answer_text(tokenizer, tokenizer("a")["input_ids"], answer) == ""


def test_trl_can_train_on_it(model, tokenizer, folder, tmp_path) -> None:
    from trl import SFTConfig, SFTTrainer

    options = {"output_dir": str(tmp_path), "max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False}
    for prompts in (PROMPTS, CHATS):
        rows = generate(model, tokenizer, prompts)
        arguments = SFTConfig(**options, save_strategy="no", disable_tqdm=True)
        SFTTrainer(tiny.load(folder), args=arguments, train_dataset=rows, processing_class=tokenizer).train()


# -------------------------------------------------------------------------------------------------------- sampling


def test_gumbel_noise_makes_argmax_a_sample() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    sampler = GumbelSampler(range(8000), Sampling(temperature=0.5))
    drawn = Counter(sampler(torch.zeros(8000, 1), logits.expand(8000, -1)).argmax(-1).tolist())
    for token, p in enumerate((logits / 0.5).softmax(-1).tolist()):
        assert drawn[token] / 8000 == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 8000) + 1e-9)


def test_a_row_draws_anew_at_every_step_and_alone() -> None:
    scores = torch.zeros(2, 50)
    both, alone = GumbelSampler([3, 4], Sampling()), GumbelSampler([4], Sampling())
    first, second = both(scores, scores), both(scores, scores)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, second)
    assert torch.equal(alone(scores[:1], scores[:1])[0], first[1])
    assert torch.equal(alone(scores[:1], scores[:1])[0], second[1])


def test_whole_answers_are_samples_of_the_teacher(model, tokenizer) -> None:
    """Their log-likelihood is what the teacher's entropy lets expect: right tokens, positions and temperature."""
    sampling = Sampling(temperature=0.5, max_new_tokens=8)
    prompts = prepare_prompts(tokenizer, [text[:20] for text in standin.english()[:64]], seed=0, chat_template=None)
    surprise = expected = variance = 0.0
    for start in range(0, 64, 16):
        batch = prompts[start : start + 16]
        for prompt, answer in zip(batch, answer_batch(model, batch, sampling, [], 0), strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt.ids + answer.ids])).logits[0, len(prompt.ids) - 1 : -1]
            log_probs = (logits.double() / 0.5).log_softmax(-1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            surprise -= log_probs.gather(-1, torch.tensor(answer.ids)[:, None]).sum().item()
            expected += entropy.sum().item()
            variance += ((log_probs.exp() * log_probs**2).sum(-1) - entropy**2).sum().item()
    assert abs(surprise - expected) < 3 * math.sqrt(variance)
    assert math.sqrt(variance) < expected / 10  # narrow enough to notice another temperature


@pytest.mark.parametrize("limits", [{"top_k": 2}, {"top_p": 0.7}], ids=str)
def test_what_is_filtered_is_never_drawn(limits) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    sampler = GumbelSampler(range(500), Sampling(temperature=1.0, **limits))
    drawn = sampler(torch.zeros(500, 1), logits.expand(500, -1)).argmax(-1)
    assert set(drawn.tolist()) == {0, 1}


def test_the_same_call_gives_the_same_rows_and_another_seed_others(model, tokenizer) -> None:
    before = torch.get_rng_state()
    first = completions(model, tokenizer)
    torch.manual_seed(99)
    assert completions(model, tokenizer) == first
    assert completions(model, tokenizer, seed=1) != first
    torch.set_rng_state(before)
    generate(model, tokenizer)
    assert torch.equal(torch.get_rng_state(), before)


def test_neither_place_nor_company_matters(model, tokenizer) -> None:
    whole = completions(model, tokenizer)
    assert completions(model, tokenizer, batch_size=1) == whole
    assert completions(model, tokenizer, list(reversed(PROMPTS[:6]))) == whole[5::-1]
    assert completions(model, tokenizer, PROMPTS[3:5]) == whole[3:5]


def test_a_prompt_that_comes_twice_is_answered_twice(model, tokenizer) -> None:
    answers = completions(model, tokenizer)
    assert PROMPTS[0] == PROMPTS[6]
    assert answers[0] != answers[6]


@pytest.mark.parametrize(
    ("knob", "value"),
    [("temperature", 0.1), ("temperature", 0), ("top_k", 1), ("top_p", 0.05), ("max_new_tokens", 2), ("seed", 7)],
)
def test_every_knob_changes_the_answers(model, tokenizer, knob: str, value: object) -> None:
    assert completions(model, tokenizer, **{knob: value}) != completions(model, tokenizer)


def test_defaults_of_the_generation_config_do_not_bend_the_distribution(model, tokenizer) -> None:
    expected = completions(model, tokenizer)
    bent = GenerationConfig(repetition_penalty=5.0, temperature=3.0, do_sample=True, suppress_tokens=list(range(250)))
    model.generation_config = bent
    assert completions(model, tokenizer) == expected
    assert model.generation_config is bent


# --------------------------------------------------------------------------------------------------------- teacher


@pytest.fixture
def student(model):
    return get_bitdistiller_model(model, BitDistillerConfig(bits=2, group_size=32, train_other="norms"))


def test_a_student_lends_out_its_teacher_and_is_given_back(folder, student, tokenizer, tmp_path) -> None:
    for name, parameter in student.named_parameters():
        if ".modules_to_save." in name:
            parameter.data.add_(1.0)  # a trained norm is not the teacher's
    student.train()
    flags = [parameter.requires_grad for parameter in student.parameters()]
    rows = generate(student, tokenizer, output_dir=tmp_path)
    assert rows["completion"] == completions(opinionated(folder), tokenizer)
    assert all(module.training for module in student.modules())
    assert [parameter.requires_grad for parameter in student.parameters()] == flags
    assert not any(layer.disable_adapters for _, layer in student.base_model.student_layers())
    # the teacher is the same one, so its folder serves without a student too
    assert generate(opinionated(folder), tokenizer, output_dir=tmp_path)["completion"] == rows["completion"]


def test_a_plain_model_is_given_back_in_its_mode(model, tokenizer) -> None:
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    generate(model, tokenizer, PROMPTS[:2])
    assert [module.training for module in model.modules()] == modes


def test_only_a_full_precision_teacher_is_asked(folder, student, tokenizer) -> None:
    student.merge_adapter()
    with pytest.raises(StateError, match="must not be merged"):
        generate(student, tokenizer)
    packed = tiny.load(folder, quantization_config=BitDistillerQuantConfig(bits=2, group_size=32))
    with pytest.raises(StateError, match="full precision"):
        generate(packed, tokenizer)


def test_a_teacher_that_answers_nan_is_refused(model, tokenizer) -> None:
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(TrainingError, match="got NaN"):
        generate(model, tokenizer)


def test_no_padding_and_no_end_token_are_needed(model, tokenizer) -> None:
    bare = deepcopy(tokenizer)
    bare.pad_token = bare.eos_token = None
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    before = len(bare), bare.padding_side, bare.pad_token
    rows = generate(model, bare)
    assert set(rows["finish_reason"]) == {"length"}
    assert set(rows["num_tokens"]) == {6}
    assert (len(bare), bare.padding_side, bare.pad_token) == before


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "got no prompt"),
        ("one text", r"Pass \[text\]"),
        (["a", "b", " \n"], "for prompt 2. Leave it out"),
        (["a", [{"role": "user", "content": "b"}]], "prompt 1 is not like prompt 0"),
        ([CHATS[0], "b"], "prompt 1 is not like prompt 0"),
        ([CHATS[0], []], "for prompt 1"),
        ([CHATS[0], [{"role": "user", "content": ""}]], "for prompt 1"),
        ([CHATS[0], [{"role": "user", "text": "x"}]], "for prompt 1"),
        ([[*CHATS[0], {"role": "assistant", "content": "x"}]], "assistant's last message"),
        ([3], "for prompt 0"),
    ],
    ids=repr,
)
def test_prompts_that_cannot_be_answered_are_refused_by_index(model, tokenizer, prompts, message: str) -> None:
    with pytest.raises(DataError, match=message):
        generate(model, tokenizer, prompts)


def test_prompts_beyond_the_context_are_named_with_their_sizes(model, tokenizer) -> None:
    model.config.max_position_embeddings = 12
    lengths = [len(tokenizer(text)["input_ids"]) for text in PROMPTS]
    too_long = [index for index, length in enumerate(lengths) if length > 6]
    assert 0 < len(too_long) < len(PROMPTS)
    named = ", ".join(f"prompt {index} ({lengths[index]} tokens)" for index in too_long)
    with pytest.raises(
        DataError, match=re.escape(f"context of 12 tokens together with max_new_tokens=6: got {named}.")
    ):
        generate(model, tokenizer)
    with pytest.raises(DataError, match=r"prompt 4 \(\d+ tokens\) and 2 more\. Shorten"):
        generate(model, tokenizer, max_new_tokens=12)
    fitting = [text for text, length in zip(PROMPTS, lengths, strict=True) if length <= 6]
    assert len(generate(model, tokenizer, fitting)) == len(fitting)


def test_messages_need_a_template(model, tokenizer) -> None:
    bare = deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(DataError, match="`chat_template` must be given"):
        generate(model, bare, CHATS)


def test_settings_out_of_range_are_refused_together(model, tokenizer) -> None:
    with pytest.raises(ConfigError) as error:
        generate(model, tokenizer, max_new_tokens=0, temperature=-1, top_p=0, top_k=-1, batch_size=0, seed=1.5)
    lines = str(error.value).splitlines()
    names = ("max_new_tokens", "batch_size", "top_k", "seed", "temperature", "top_p")
    assert [line.split("`")[1] for line in lines] == list(names)


# ------------------------------------------------------------------------------------------------------------ disk


def lines(folder: Path) -> list[dict]:
    path = folder / (DATA_NAME if (folder / DATA_NAME).exists() else PART_NAME)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def unfinish(folder: Path, data: bytes) -> None:
    """As if the run had been killed when this was on disk."""
    (folder / DATA_NAME).unlink(missing_ok=True)
    (folder / PART_NAME).write_bytes(data)


@pytest.fixture
def finished(model, tokenizer, tmp_path) -> Path:
    generate(model, tokenizer, output_dir=tmp_path)
    return tmp_path


def test_what_is_on_disk_is_what_is_returned(model, tokenizer, finished) -> None:
    rows = generate(model, tokenizer)
    assert lines(finished) == rows.to_list()
    assert load_teacher_data(finished).to_list() == rows.to_list()
    assert load_teacher_data(finished).features == rows.features
    assert not (finished / PART_NAME).exists()


def test_the_manifest_says_where_the_rows_come_from(finished, folder) -> None:
    manifest = json.loads((finished / MANIFEST_NAME).read_text())
    assert manifest["settings"] == {
        "batch_size": 3,
        "chat_template": None,
        "max_new_tokens": 6,
        "seed": 0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
    }
    assert manifest["num_prompts"] == len(PROMPTS)
    assert set(manifest["fingerprints"]) == {"prompts", "teacher", "tokenizer"}
    (session,) = manifest["sessions"]
    assert (session["teacher"], session["dtype"], session["first_prompt"]) == (str(folder), "float32", 0)
    assert set(session["versions"]) == {"bitdistiller_peft", "tokenizers", "torch", "transformers"}


def test_a_finished_folder_is_returned_without_the_teacher_saying_a_word(model, tokenizer, finished) -> None:
    model.generate = None  # type: ignore[method-assign]
    assert generate(model, tokenizer, output_dir=finished).to_list() == lines(finished)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import bitdistiller_peft.training.teacher_data_store as store
    from tests.training import test_teacher_data as test

    folder, output, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    append, calls = store.TeacherDataStore.append, []

    def append_or_die(self, rows):
        calls.append(rows)
        if len(calls) == kill_at:  # half of a row more than the last whole batch
            with (output / store.PART_NAME).open("ab") as file:
                file.write(store._line(rows[0]) + store._line(rows[1])[:20])
                file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, rows)

    store.TeacherDataStore.append = append_or_die
    test.generate(test.opinionated(folder), test.standin.tokenizer(), output_dir=output)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_and_resumed_it_ends_with_the_same_rows(folder, model, tokenizer, tmp_path) -> None:
    expected = generate(model, tokenizer).to_list()
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(folder), str(tmp_path), "2"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run(command, cwd=ROOT, env={**os.environ, **threads}, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    left = (tmp_path / PART_NAME).read_bytes()
    assert left.count(b"\n") == 4  # a batch of three, a row of the next, and a torn one
    assert not left.endswith(b"\n")
    with pytest.raises(StateError, match="got 4 of 7 rows"):
        load_teacher_data(tmp_path)
    assert generate(model, tokenizer, output_dir=tmp_path).to_list() == expected == lines(tmp_path)
    sessions = json.loads((tmp_path / MANIFEST_NAME).read_text())["sessions"]
    assert [session["first_prompt"] for session in sessions] == [0, 3]


def test_any_place_to_die_leads_to_the_same_rows(model, tokenizer, finished) -> None:
    whole = (finished / DATA_NAME).read_bytes()
    for end in sorted({0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1, len(whole)}):
        unfinish(finished, whole[:end])
        generate(model, tokenizer, output_dir=finished)
        assert (finished / DATA_NAME).read_bytes() == whole, end


def test_a_last_line_of_garbage_is_dropped_and_one_before_it_refused(model, tokenizer, finished) -> None:
    whole = (finished / DATA_NAME).read_bytes()
    rows = whole.splitlines(keepends=True)
    unfinish(finished, b"".join(rows[:4]) + b"\0\0\0\n")
    generate(model, tokenizer, output_dir=finished)
    assert (finished / DATA_NAME).read_bytes() == whole
    unfinish(finished, rows[0] + b"\0\0\0\n" + rows[2])
    with pytest.raises(CheckpointError, match="cannot be read in line 2"):
        generate(model, tokenizer, output_dir=finished)
    unfinish(finished, rows[0] + rows[2] + rows[1])
    with pytest.raises(CheckpointError, match="got prompt 2 in line 2"):
        generate(model, tokenizer, output_dir=finished)


def test_damage_to_a_finished_file_is_never_repaired_silently(model, tokenizer, finished) -> None:
    whole = (finished / DATA_NAME).read_bytes()
    for damaged, message in ((whole[:-3], "line 7"), (b"".join(whole.splitlines(True)[:6]), "must hold 7 rows: got 6")):
        (finished / DATA_NAME).write_bytes(damaged)
        for read in (lambda: load_teacher_data(finished), lambda: generate(model, tokenizer, output_dir=finished)):
            with pytest.raises(CheckpointError, match=message):
                read()


def test_ctrl_c_leaves_a_folder_that_goes_on(model, tokenizer, tmp_path, monkeypatch, caplog) -> None:
    expected = generate(model, tokenizer).to_list()
    calls: list[int] = []
    real = engines.answer_batch

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(engines, "answer_batch", interrupted)
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        generate(model, tokenizer, output_dir=tmp_path)
    assert "6 of 7 rows are in" in caplog.text
    assert len(lines(tmp_path)) == 6
    assert generate(model, tokenizer, output_dir=tmp_path).to_list() == expected
    assert len(calls) == 4  # only the last batch was generated again


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "settings.seed was 0, is 1"),
        ({"temperature": 0.5}, "settings.temperature was 1.0, is 0.5"),
        ({"batch_size": 2}, "settings.batch_size was 3, is 2"),
        ({"prompts": PROMPTS[:-1]}, "num_prompts was 7, is 6"),
        ({"prompts": [*PROMPTS[:-1], "other"]}, "fingerprints.prompts"),
    ],
    ids=str,
)
def test_another_run_may_not_go_on_in_its_place(model, tokenizer, finished, changes, named: str) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    for state in ("finished", "unfinished"):
        with pytest.raises(ConfigError, match="must hold data of the same run") as error:
            generate(model, tokenizer, output_dir=finished, **changes)
        assert named in str(error.value), state
        if state == "finished":
            assert {path.name: path.read_bytes() for path in finished.iterdir()} == before
            unfinish(finished, before[DATA_NAME][:100])


def test_another_teacher_or_tokenizer_may_not_either(model, tokenizer, finished, folder) -> None:
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1.001)
    with pytest.raises(ConfigError, match=r"fingerprints\.teacher"):
        generate(model, tokenizer, output_dir=finished)
    grown = deepcopy(tokenizer)
    grown.add_tokens(["<new>"])
    with pytest.raises(ConfigError, match=r"fingerprints\.tokenizer"):
        generate(opinionated(folder), grown, output_dir=finished)
    with pytest.raises(ConfigError, match=r"fingerprints\.teacher"):
        generate(opinionated(folder, dtype=torch.bfloat16), tokenizer, output_dir=finished)


def test_a_folder_without_a_readable_manifest_is_refused(model, tokenizer, finished) -> None:
    (finished / MANIFEST_NAME).write_text("{")
    with pytest.raises(CheckpointError, match="must be readable"):
        generate(model, tokenizer, output_dir=finished)
    (finished / MANIFEST_NAME).write_text("{}")
    with pytest.raises(CheckpointError, match="version 1"):
        load_teacher_data(finished)
    (finished / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match="there is none"):
        generate(model, tokenizer, output_dir=finished)
    with pytest.raises(CheckpointError, match="must hold teacher data"):
        load_teacher_data(finished)


def test_the_fingerprint_sees_every_tensor(model) -> None:
    before = fingerprint_weights(model)
    assert fingerprint_weights(model) == before
    for parameter in model.parameters():
        first = parameter.data.flatten()[0].item()
        parameter.data.view(-1)[0] += 1
        assert fingerprint_weights(model) != before
        parameter.data.view(-1)[0] = first
    assert fingerprint_weights(model) == before


def test_progress_counts_prompts_and_tokens(model, tokenizer, capsys) -> None:
    generate(model, tokenizer, show_progress=True)
    shown = capsys.readouterr().err
    assert "7/7" in shown
    assert "tokens/s" in shown

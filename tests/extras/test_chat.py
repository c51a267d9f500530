"""Conversations: a turn processes only its new tokens, and gives the same answer as the whole
conversation in one prompt."""

import io
import os
import signal
import sys
import termios

import pytest
import torch

import generate as program
from af3 import AudioFlamingo3ForConditionalGeneration
from checkpoints import change_section
from extras.chat import Conversation, file_name
from places import TINY
from programs import Terminal, interrupt_until_it_ends, start_generate
from signals import sound

DIGITS = TINY / "samples" / "digits.wav"
RAIN = TINY / "samples" / "rain.wav"
QUESTIONS = ["What is this?", "And how loud is it?", "Ünd now?"]


@pytest.fixture
def conversation(processor, model):
    return Conversation(processor, model)


def ask(conversation, text, audios=(), **options):
    """The new ids of the answer."""
    question = conversation.question(text, audios)
    return [int(ids) for ids in conversation.answer(question, **options)]


def force_answer(monkeypatch, ids):
    """Makes the model generate these ids."""
    remaining = iter(ids)
    monkeypatch.setattr("af3.next_token", lambda *_: torch.tensor([next(remaining)]))


# ---- Turns in Python ----


def conversation_in_one_prompt(processor, audios, answers):
    """The inputs of the last turn, with the whole conversation in the prompt."""
    messages = []
    for number, question in enumerate(QUESTIONS):
        content = [{"type": "text", "text": question}]
        for audio in audios[number]:
            content.append({"type": "audio", "audio": audio})
        messages.append({"role": "user", "content": content})
        if number < len(answers):
            messages.append({"role": "assistant", "content": answers[number]})
    return processor.apply_chat_template(messages, add_generation_prompt=True)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}])
def test_the_answer_to_a_later_question_is_that_of_the_whole_conversation_in_one_prompt(
    model, processor, conversation, monkeypatch, options
):
    audios = [[sound(80000)], [], [sound(500000)]]
    answers = ["rain", "two dogs"]
    for number, answer in enumerate(answers):
        ids = [*processor.tokenizer.encode(answer), processor.end_id]
        force_answer(monkeypatch, ids)
        ask(conversation, QUESTIONS[number], audios[number], eos_token_id=processor.end_id)
    monkeypatch.undo()
    inputs = conversation_in_one_prompt(processor, audios, answers)
    expected = model.generate(**inputs, max_new_tokens=16, **options)[0, -16:]
    new_ids = ask(conversation, QUESTIONS[2], audios[2], max_new_tokens=16, **options)
    assert new_ids == expected.tolist()


def test_the_cache_takes_memory_for_what_it_has_read_and_grows(model, processor, monkeypatch):
    monkeypatch.setattr("extras.chat.FIRST_TOKENS", 64)
    small = Conversation(processor, model)
    monkeypatch.setattr("extras.chat.FIRST_TOKENS", 1000)
    large = Conversation(processor, model)
    assert (small.cache.keys[0].shape[2], large.cache.keys[0].shape[2]) == (64, 1000)
    for question, audios in [("One?", [sound(80000)]), ("Two?", []), ("Three?", [sound(32000)])]:
        options = {"max_new_tokens": 40, "eos_token_id": []}
        assert ask(small, question, audios, **options) == ask(large, question, audios, **options)
    assert small.cache.length > 256
    assert (
        small.cache.capacity
        == large.cache.capacity
        == model.config.text_config.max_position_embeddings
    )


def test_the_cache_never_grows_beyond_the_models_positions(model, processor):
    limit = model.config.text_config.max_position_embeddings
    cache = Conversation(processor, model).cache
    cache.extend(torch.ones(1, limit - 1, dtype=torch.bool))
    cache.extend(torch.ones(1, 1, dtype=torch.bool))
    assert cache.keys[0].shape[2] == limit


def test_an_end_id_that_the_template_replaces_is_not_penalized_later(
    processor, conversation, monkeypatch
):
    end_id = processor.tokenizer.added_tokens["<|endoftext|>"]
    force_answer(monkeypatch, [end_id, end_id])
    ask(conversation, "One?", eos_token_id=[end_id])
    ask(conversation, "Two?", max_new_tokens=1, eos_token_id=[])
    assert end_id not in conversation.past_ids
    assert processor.end_id in conversation.past_ids


def test_no_recording_is_encoded_twice(model, conversation, monkeypatch):
    windows = []
    encode = model.audio_tower.forward

    def counting_encode(features, mask):
        windows.append(len(features))
        return encode(features, mask)

    monkeypatch.setattr(model.audio_tower, "forward", counting_encode)
    ask(conversation, "One?", [sound(20000)], max_new_tokens=3)
    ask(conversation, "Two?", max_new_tokens=3)
    ask(conversation, "Three?", [sound(16000)], max_new_tokens=3)
    assert windows == [1, 1]


def test_a_turn_processes_only_its_new_tokens(processor, conversation):
    answer = ask(conversation, "One?", [sound(20000)], max_new_tokens=5)
    ids = conversation.question("Two?")["input_ids"][0].tolist()
    text = processor.decode(ids[1:])
    assert ids[0] == answer[-1]
    assert text == "<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"


def test_a_long_later_turn_is_processed_in_chunks(model, conversation, monkeypatch):
    ask(conversation, "One?", [sound(20000)], max_new_tokens=1, eos_token_id=[])
    question = conversation.question("Two?", [sound(960000)])
    lengths = []
    decoder = model.language_model.model
    forward = decoder.forward

    def recording_forward(x, mask, cache):
        lengths.append(x.shape[1])
        return forward(x, mask, cache)

    monkeypatch.setattr(decoder, "forward", recording_forward)
    list(conversation.answer(question, max_new_tokens=1))
    assert sum(lengths) == question["input_ids"].shape[1] > 1500
    assert max(lengths) == 1024


def test_a_turn_that_does_not_fit_is_refused_and_the_conversation_continues(conversation):
    ask(conversation, "One?", [sound(20000)], max_new_tokens=3)
    length = conversation.cache.length
    with pytest.raises(ValueError, match="max_new_tokens=4090"):
        ask(conversation, "Two?", max_new_tokens=4090)
    assert conversation.cache.length == length
    assert len(ask(conversation, "Two?", max_new_tokens=3, eos_token_id=[])) == 3


def test_an_answer_that_is_stopped_stays_in_the_conversation(conversation):
    question = conversation.question("One?", [sound(20000)])
    answer = conversation.answer(question, max_new_tokens=50, eos_token_id=[])
    first_id = int(next(answer))
    conversation.stopped = True
    assert list(answer) == []
    assert conversation.pending_ids[0] == first_id


def fail_in_step(monkeypatch, model, step):
    """Makes step number `step` of the next answer run out of memory in the second of two layers."""
    calls = []
    layer = model.language_model.model.layers[1]
    forward = layer.forward

    def failing_forward(*arguments):
        calls.append(1)
        if len(calls) == step:
            raise RuntimeError("out of memory")
        return forward(*arguments)

    monkeypatch.setattr(layer, "forward", failing_forward)


@pytest.mark.parametrize("failing_step, kept_tokens", [(1, 0), (4, 3)])
def test_a_step_that_fails_leaves_the_conversation_as_if_it_had_ended_before(
    processor, model, conversation, monkeypatch, failing_step, kept_tokens
):
    options = {"max_new_tokens": 8, "eos_token_id": []}
    other = Conversation(processor, model)
    ask(conversation, "One?", [sound(20000)], **options)
    ask(other, "One?", [sound(20000)], **options)
    with monkeypatch.context() as patch:
        fail_in_step(patch, model, failing_step)
        with pytest.raises(RuntimeError):
            ask(conversation, "Two?", **options)
    if kept_tokens > 0:
        ask(other, "Two?", max_new_tokens=kept_tokens, eos_token_id=[])
    assert ask(conversation, "Three?", **options) == ask(other, "Three?", **options)


def test_after_a_reset_a_conversation_is_like_a_new_one(processor, model, conversation):
    options = {"max_new_tokens": 9, "repetition_penalty": 1.3}
    ask(conversation, "One?", [sound(20000)], **options)
    conversation.reset()
    new_conversation = Conversation(processor, model)
    answer = ask(conversation, "Two?", [sound(16000)], **options)
    assert answer == ask(new_conversation, "Two?", [sound(16000)], **options)


# ---- The command line ----


@pytest.fixture
def run_chat(run, monkeypatch):
    """Runs a conversation in this process, and restores the Ctrl-C handler afterward."""
    handler = signal.getsignal(signal.SIGINT)

    def call(*arguments, lines, **options):
        typed = b"".join(os.fsencode(line) + b"\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        return run("--chat", *arguments, **options)

    yield call
    signal.signal(signal.SIGINT, handler)


def test_each_line_is_answered(run_chat):
    lines = ["Transcribe the input speech.", f"/audio {RAIN}", "What sound is this?", "/reset"]
    lines += [f"/audio {DIGITS}", "Transcribe the input speech.", "/quit", "never asked"]
    status, out, err = run_chat(DIGITS, lines=lines, model=TINY)
    assert status == 0
    assert out.splitlines() == ["seven three one", "rain", "seven three one"]
    assert err.count("the first after") == 3


def test_a_conversation_may_start_with_a_question(run_chat):
    status, out, _ = run_chat(RAIN, "What sound is this?", lines=["/quit"], model=TINY)
    assert (status, out) == (0, "rain\n")


def test_a_conversation_continues_after_bad_input(run_chat):
    bad_lines = ["/audio gone.wav", "/audio", "/sing", "/audio ~nobody/a.wav"]
    bad_lines += ["/audio " + "a" * 300, "/audio ."]
    lines = [*bad_lines, "", f"/audio\t{RAIN}", "What sound is this?"]
    status, out, err = run_chat("--quiet", lines=lines, model=TINY)
    errors = err.splitlines()
    assert (status, out) == (1, "rain\n")  # 1: a line has failed
    assert len(errors) == len(bad_lines)
    assert all(error.startswith("error: ") for error in errors)
    assert "gone.wav" in errors[0]
    assert "/sing" in errors[2]


def test_a_line_that_is_not_utf_8_is_answered(run_chat):
    lines = [b"Hi \xff", f"/audio {RAIN}", "What sound is this?"]
    status, out, _ = run_chat("--quiet", lines=lines, model=TINY)
    assert status == 0
    assert out.endswith("\nrain\n")
    assert out.count("\n") == 2


def test_a_name_that_is_not_utf_8_can_be_typed(run_chat, odd_clip):
    lines = [f"/audio {odd_clip}", "Hi", odd_clip, b"/audio gone\xe9.wav"]
    status, out, err = run_chat("--max-new-tokens", 1, lines=lines)
    assert (status, out.count("\n")) == (1, 1)
    assert "heard 1.5 s" in err
    assert "caf\\udce9.wav: to add a recording, write /audio " in err
    assert "error: gone\\udce9.wav: no such file" in err


def test_without_input_a_conversation_ends(run_chat):
    assert run_chat("--quiet", lines=[]) == (0, "", "")


def test_with_a_closed_stdin_a_conversation_ends(monkeypatch, run):
    monkeypatch.setattr(sys, "stdin", None)
    status, out, err = run("--chat", "--quiet")
    assert (status, out, err) == (0, "", "")


def test_a_question_that_is_refused_keeps_its_recordings(run_chat, spoiled, clip):
    change_section(spoiled / "config.json", "text_config", max_position_embeddings=200)
    options = [clip, "--max-new-tokens", 50]
    status, out, err = run_chat(*options, lines=["x " * 200, "y", "/quit"], model=spoiled)
    assert (status, out.count("\n")) == (1, 1)
    assert err.count("error: The prompt's ") == 1
    assert err.count("heard 1.5 s") == 1  # with the answer to y


def test_a_recording_that_does_not_fit_is_refused_at_once(run_chat, clip):
    lines = [f"/audio {clip}", f"/audio {clip}", "/quit"]
    status, out, err = run_chat("--max-new-tokens", 4030, lines=lines)
    assert status == 1
    assert "1.5 s; the context is 1% full" in err
    assert "no room for it beside the 0 tokens of the conversation" in err
    assert "/reset makes room" in err


def test_the_length_of_a_recording_is_reported_after_its_answer(run_chat, clip):
    _, _, err = run_chat(clip, "--max-new-tokens", 2, lines=["Hi", "And?"])
    assert err.count("heard 1.5 s: 1 window, 37 audio frames") == 1
    assert err.count("said 2 tokens") == 2


@pytest.mark.parametrize("written", ['"a b.wav"', "'a b.wav'", r"a\ b.wav", "a b.wav"])
def test_a_file_name_may_be_in_quotes_or_escaped(tmp_path, monkeypatch, written):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.wav").touch()
    assert file_name(written) == "a b.wav"


def test_a_file_name_alone_is_not_treated_as_a_question(run_chat, clip):
    status, out, err = run_chat("--quiet", lines=[clip, "/quit"])
    assert (status, out) == (1, "")
    assert f"to add a recording, write /audio {clip}" in err


def test_help_is_shown_when_it_is_asked_for(run_chat):
    _, _, err = run_chat("--quiet", lines=["/help", "/quit"])
    assert "/audio FILE" in err


# ---- Ctrl-C ----


def test_ctrl_c_before_the_first_token_leaves_the_conversation_as_it_was(
    run_chat, clip, monkeypatch
):
    model_class = AudioFlamingo3ForConditionalGeneration
    prefill = model_class.prefill
    lengths = []

    def interrupted_prefill(self, input_ids, attention_mask, cache, **audio):
        lengths.append(cache.length)
        states = prefill(self, input_ids, attention_mask, cache, **audio)
        if len(lengths) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return states

    monkeypatch.setattr(model_class, "prefill", interrupted_prefill)
    status, out, err = run_chat(clip, "--max-new-tokens", 9, lines=["What?", "And?", "/quit"])
    assert status == 0
    assert err.count("Stopped; nothing was added to the conversation.") == 1
    assert lengths == [0, 0]
    assert err.count("heard 1.5 s") == 1  # the recording stays for the next question


def test_ctrl_c_while_a_recording_is_read_adds_nothing(run_chat, clip, monkeypatch):
    to_waveform = program.AudioFlamingo3Processor.to_waveform

    def interrupted(self, name):
        os.kill(os.getpid(), signal.SIGINT)
        return to_waveform(self, name)

    lines = [f"/audio {clip}", "/quit"]
    monkeypatch.setattr(program.AudioFlamingo3Processor, "to_waveform", interrupted)
    status, _, err = run_chat(lines=lines)
    assert status == 0
    assert "Stopped; nothing was added to the conversation." in err
    assert "the context is" not in err


def test_ctrl_c_ends_an_answer_and_then_the_conversation(clip, micro):
    options = ["--quiet", "--model", micro, "--max-new-tokens", 3000]
    process = start_generate("--chat", clip, *options)
    process.stdin.write(b"Hi\n")
    process.stdin.flush()
    process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    process.stdin.write(b"/audio gone.wav\n")
    process.stdin.flush()
    assert b"gone.wav" in process.stderr.readline()
    assert process.poll() is None
    assert interrupt_until_it_ends(process) == 130
    assert process.stdout.read().endswith(b"\n")
    assert b"Traceback" not in process.stderr.read()


@pytest.mark.parametrize("typed, continues", [("What is", True), ("", False)])
def test_ctrl_c_clears_a_half_typed_line_and_exits_on_an_empty_one(
    run_chat, monkeypatch, typed, continues
):
    asked = []

    def interrupted_input(prompt):
        asked.append(prompt)
        if len(asked) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return "/quit"

    def leave(*_):
        raise SystemExit(130)

    monkeypatch.setattr("builtins.input", interrupted_input)
    monkeypatch.setattr("readline.get_line_buffer", lambda: typed)
    monkeypatch.setattr("plumbing.terminal.exit_interrupted", leave)
    if continues:
        assert run_chat(lines=[])[0] == 0
        assert len(asked) == 2
    else:
        with pytest.raises(SystemExit):
            run_chat(lines=[])
        assert len(asked) == 1


def test_ctrl_c_at_the_prompt_restores_the_terminal(micro):
    terminal = Terminal("--chat", "--model", micro)
    terminal.read_until(b"> ")
    assert interrupt_until_it_ends(terminal.process) == 130
    settings = termios.tcgetattr(terminal.other)
    assert settings[:4] == terminal.settings[:4]

"""More than one sound and one answer: thinking, conversations, many sounds, a sound's journey."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate
from af3 import AudioFlamingo3ForConditionalGeneration, KeyValueCache
from conftest import ROOT, TESTS, TINY
from extras.chat import Conversation
from extras.explain import picture
from extras.lora import find_think_adapter, merge_adapter
from extras.quantize import Int8Linear, quantize
from processor import AudioFlamingo3Processor
from signals import conversation, sound, write_wav
from test_generate import command
from test_load_weights import change, write_original


def load(path, device_map="auto", dtype="auto", int8=False, think=False):
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(
        path, device_map, dtype if not think else "auto"
    )
    if think:
        merge_adapter(model, find_think_adapter(path))
        if dtype != "auto":
            model.to(getattr(torch, dtype))
    if int8:
        quantize(model)
    return model


QUESTIONS = ["What is this?", "And how loud is it?", "Ünd now?"]


def put(path, samples, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    return str(write_wav(path, sound(samples, seed)))


# ---- Thinking ----


@pytest.fixture
def thinking(spoilt):
    """A checkpoint with an adapter beside it, as peft saved it."""
    shutil.copytree(TESTS / "think", spoilt / "think")
    return spoilt


def change_tensors(path, change):
    read, write = (
        (load_file, save_file) if path.suffix == ".safetensors" else (torch.load, torch.save)
    )
    write(read(path) | change, path)


def rename(adapter, spell):
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {spell(name): tensor for name, tensor in tensors.items()},
        adapter / "adapter_model.safetensors",
    )
    others = torch.load(adapter / "non_lora_trainables.bin", weights_only=True)
    torch.save(
        {spell(f"base_model.model.model.{name}"): tensor for name, tensor in others.items()},
        adapter / "non_lora_trainables.bin",
    )


def hub(name):
    name = name.replace(
        "base_model.model.model.language_model.", "base_model.model.language_model.model."
    )
    return name.replace("base_model.model.model.", "base_model.model.")


def original(name):
    name = (
        hub(name)
        .replace("language_model.", "llm.")
        .replace("multi_modal_projector", "sound_mm_projector")
    )
    return name.replace("linear_1", "layers.0").replace("linear_2", "layers.2")


SPELLINGS = {
    "transformers_5": lambda name: name,
    "hub": hub,
    "hub_without_prefix": lambda name: hub(name).removeprefix("base_model.model."),
    "original": original,
    "original_without_prefix": lambda name: original(name).removeprefix("base_model.model."),
}


@pytest.mark.parametrize("rslora, golden", [(False, "think.logits"), (True, "think_rslora.logits")])
def test_a_merged_adapter_gives_the_logits_of_pefts_own_merge(
    thinking, processor, goldens, rslora, golden
):
    change(thinking / "think" / "adapter_config.json", use_rslora=rslora)
    batch = processor.apply_chat_template(conversation(sound(80000)), add_generation_prompt=True)
    logits = load(thinking, "cpu", think=True)(**batch).logits[0, ::29]
    torch.testing.assert_close(logits, goldens[golden], atol=1e-3, rtol=0)
    assert (logits - load(thinking, "cpu")(**batch).logits[0, ::29]).abs().max() > 0.5


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_adapters_names_are_read_in_every_spelling(thinking, spelling):
    plain = load(thinking, "cpu", think=True).state_dict()
    rename(thinking / "think", SPELLINGS[spelling])
    other = load(thinking, "cpu", think=True).state_dict()
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_the_original_layouts_adapter_lies_in_stage35(thinking, micro, tmp_path):
    write_original(micro, tmp_path / "af3")
    shutil.copytree(thinking / "think", tmp_path / "af3" / "stage35")
    rename(tmp_path / "af3" / "stage35", original)
    a, b = (
        load(thinking, "cpu", think=True).state_dict(),
        load(tmp_path / "af3", "cpu", think=True).state_dict(),
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_was_trained_beside_the_lora_takes_its_place(thinking):
    bias = load(thinking, "cpu", think=True).multi_modal_projector.linear_1.bias
    assert torch.equal(bias, torch.linspace(-1, 1, len(bias)))


def test_the_merge_is_in_float32_and_rounded_once(thinking):
    whole, rounded = (
        load(thinking, "cpu", think=True),
        load(thinking, "cpu", "bfloat16", think=True),
    )
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(whole.state_dict()[name].bfloat16(), rounded.state_dict()[name])
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16} and not any(
        p.requires_grad for p in rounded.parameters()
    )


def test_int8_quantises_what_was_merged(thinking, processor):
    batch = processor.apply_chat_template(conversation(sound(20000)), add_generation_prompt=True)
    exact, near = (
        load(thinking, "cpu", int8=int8, think=True)(**batch).logits for int8 in (False, True)
    )
    assert (near - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize(
    "file, name",
    [
        ("adapter_model.safetensors", "base_model.model.bogus.lora_A.weight"),
        (
            "adapter_model.safetensors",
            "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        ),
        (
            "adapter_model.safetensors",
            "base_model.model.model.language_model.layers.9.self_attn.q_proj.lora_B.weight",
        ),
        ("adapter_model.safetensors", "base_model.model.model.audio_tower.conv1.lora_A.weight"),
        ("non_lora_trainables.bin", "model.audio_tower.layers.7.fc1.bias"),
    ],
)
def test_a_tensor_of_an_adapter_that_finds_no_place_is_named(thinking, file, name):
    path = thinking / "think" / file
    change_tensors(path, {name: torch.zeros(2, 48)})
    with pytest.raises(ValueError, match=name):
        load(thinking, "cpu", think=True)


def test_an_adapter_of_another_shape_is_refused_by_name(thinking):
    path = thinking / "think" / "non_lora_trainables.bin"
    torch.save({"multi_modal_projector.linear_1.bias": torch.zeros(7)}, path)
    with pytest.raises(ValueError, match=r"multi_modal_projector.linear_1.bias.*\[7\].*\[48\]"):
        load(thinking, "cpu", think=True)


Q_PROJ = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "file, change",
    [
        ("adapter_model.safetensors", {Q_PROJ: torch.zeros(0, 48)}),
        ("adapter_model.safetensors", {Q_PROJ: torch.zeros(())}),
        ("adapter_model.safetensors", {Q_PROJ: torch.zeros(3, 48)}),
        ("adapter_model.safetensors", {Q_PROJ: torch.zeros(2, 48, dtype=torch.complex64)}),
        ("adapter_model.safetensors", {Q_PROJ: torch.zeros(2, 48, dtype=torch.int64)}),
        ("non_lora_trainables.bin", {5: torch.zeros(1)}),
        ("non_lora_trainables.bin", {"multi_modal_projector.linear_2.weight": "words"}),
        ("non_lora_trainables.bin", {"multi_modal_projector.linear_1.bias": 7}),
    ],
)
def test_a_damaged_adapter_is_refused_by_file(thinking, file, change):
    path = thinking / "think" / file
    change_tensors(path, change)
    with pytest.raises(ValueError, match="think"):
        load(thinking, "cpu", think=True)


@pytest.mark.parametrize(
    "file", ["adapter_model.safetensors", "non_lora_trainables.bin", "adapter_config.json"]
)
def test_a_missing_and_a_cut_off_file_of_an_adapter_are_named(thinking, file):
    path = thinking / "think" / file
    path.write_bytes(path.read_bytes()[:60])
    for _ in range(2):
        with pytest.raises(ValueError, match=file):
            load(thinking, "cpu", think=True)
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"lora_alpha": None}, "adapter_config.json"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
    ],
)
def test_an_adapters_config_that_cannot_be_followed_is_refused(thinking, fields, named):
    change(thinking / "think" / "adapter_config.json", **fields)
    with pytest.raises(ValueError, match=named):
        load(thinking, "cpu", think=True)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_a_pickle_that_runs_code_is_refused_unrun(thinking, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(
        {"multi_modal_projector.linear_1.bias": Trap()},
        thinking / "think" / "non_lora_trainables.bin",
    )
    with pytest.raises(ValueError, match="non_lora_trainables.bin"):
        load(thinking, "cpu", think=True)
    assert not (tmp_path / "trapped").exists()


def test_without_an_adapter_think_is_refused_by_name(micro, run, clip):
    status, out, err = run(clip, "Hi", "--think")
    assert (
        (status, out) == (2, "")
        and "think: no such directory; the AF-Think adapter is expected" in err
        and err.count("\n") == 1
    )


# ---- Half the memory ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 8, 9, 300])
def test_an_int8_layer_is_the_linear_layer_within_one_percent_for_few_tokens_and_many(
    tokens, dtype
):
    linear = torch.nn.Linear(192, 20001, dtype=dtype).requires_grad_(False)
    x = torch.randn(2, tokens, 192, dtype=dtype, generator=torch.Generator().manual_seed(0))
    wanted, y = linear(x), Int8Linear(linear)(x)
    assert (
        y.shape == wanted.shape and y.dtype == dtype and (y - wanted).norm() < 0.01 * wanted.norm()
    )


@pytest.mark.parametrize("width", [17, 33, 100, 575])
def test_an_int8_layer_of_any_width_is_right_in_bfloat16(width):
    linear = torch.nn.Linear(width, 65, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(1, width, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    assert (Int8Linear(linear)(x) - linear(x)).norm() < 0.02 * linear(x).norm()


def test_int8_in_float16_is_refused_as_its_products_overflow(micro):
    with pytest.raises(ValueError, match="without int8, float16"):
        load(micro, dtype="float16", int8=True)


def test_an_int8_row_of_zeros_stays_one_and_a_row_of_few_values_is_exact():
    linear = torch.nn.Linear(4, 2, bias=False)
    linear.weight.data = torch.tensor([[0.0, 0, 0, 0], [-127, 1, 64, 0]])
    assert (
        Int8Linear(linear.requires_grad_(False))(torch.eye(4)).T.tolist() == linear.weight.tolist()
    )


def test_int8_holds_the_decoders_linear_layers_and_the_head_and_no_other(micro, model):
    wanted = {
        name
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and name.startswith("language_model.")
    }
    int8 = load(micro, int8=True)
    assert {
        name for name, m in int8.named_modules() if isinstance(m, Int8Linear)
    } == wanted and len(wanted) == 15
    assert int8.dtype == torch.float32 and {
        b.dtype for n, b in int8.named_buffers() if n.endswith("weight")
    } == {torch.int8}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_logits_of_tiny_are_near_its_own(dtype):
    inputs = AudioFlamingo3Processor.from_pretrained(TINY)(
        "Transcribe the input speech.", TINY / "samples" / "digits.wav"
    )
    wanted, logits = (
        load(TINY, dtype=dtype)(**inputs).logits,
        load(TINY, dtype=dtype, int8=True)(**inputs).logits,
    )
    assert logits.dtype == wanted.dtype and 0 < (logits - wanted).norm() < 0.02 * wanted.norm()


def test_int8_lets_go_of_the_weights_it_has_quantised(micro, monkeypatch):
    alive, most = [], []
    quantise = Int8Linear.__init__

    def watched(self, linear):
        most.append(sum(weight() is not None for weight in alive))
        alive.append(weakref.ref(linear.weight))
        quantise(self, linear)

    monkeypatch.setattr(Int8Linear, "__init__", watched)
    load(micro, int8=True)
    assert len(alive) == 15 and max(most) <= 3  # the others of one attention or MLP


# ---- A conversation ----


def whole_conversation(processor, sounds, answers):
    """The inputs of a conversation's last turn in one piece: each turn's question has one sound, each answer its ids."""
    chat = []
    for question, waveform, said in zip(QUESTIONS, sounds, [*answers, None]):
        content = [{"type": "text", "text": question}] + (
            [{"type": "audio", "audio": waveform}] if waveform is not None else []
        )
        chat += [{"role": "user", "content": content}] + (
            [{"role": "assistant", "content": said}] if said is not None else []
        )
    return processor.apply_chat_template(chat, add_generation_prompt=True)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}])
def test_a_follow_up_gives_the_logits_of_the_whole_conversation_in_one_piece(
    model, processor, options, monkeypatch
):
    """The model says what it is made to say, so that its ids are those of the words in the template."""
    answers, sounds, talk = (
        ["rain", "two dogs"],
        [sound(80000), None, sound(500000)],
        Conversation(processor, model),
    )
    for question, waveform, answer in zip(QUESTIONS, sounds, answers):
        said = iter([*processor.tokenizer.encode(answer), processor.end_id])
        monkeypatch.setattr("af3.next_token", lambda *_: torch.tensor([next(said)]))
        list(
            talk.answer(
                talk.question(question, [] if waveform is None else [waveform]),
                eos_token_id=processor.end_id,
            )
        )
    monkeypatch.undo()
    new = talk.question(QUESTIONS[2], [sounds[2]])
    alone = model.generate(
        **whole_conversation(processor, sounds, answers), max_new_tokens=16, **options
    )[0, -16:]
    assert torch.equal(torch.cat(list(talk.answer(new, max_new_tokens=16, **options))), alone)


def test_an_end_that_is_not_kept_is_not_penalised_later(model, processor, monkeypatch):
    talk, end = Conversation(processor, model), processor.tokenizer.added_tokens["<|endoftext|>"]
    monkeypatch.setattr("af3.next_token", lambda *_: torch.tensor([end]))
    list(talk.answer(talk.question("One?"), eos_token_id=[end]))
    list(talk.answer(talk.question("Two?"), max_new_tokens=1, eos_token_id=[]))
    assert end not in talk.past_ids and processor.end_id in talk.past_ids


def test_no_sound_is_heard_twice(model, processor, monkeypatch):
    talk, heard, encode = Conversation(processor, model), [], model.audio_tower.forward
    monkeypatch.setattr(
        model.audio_tower,
        "forward",
        lambda *features: heard.append(len(features[0])) or encode(*features),
    )
    for question, sounds in (("One?", [sound(20000)]), ("Two?", []), ("Three?", [sound(16000)])):
        list(talk.answer(talk.question(question, sounds), max_new_tokens=3))
    assert heard == [1, 1]


def test_a_turn_feeds_what_is_new_and_nothing_else(model, processor):
    talk = Conversation(processor, model)
    said = torch.cat(list(talk.answer(talk.question("One?", [sound(20000)]), max_new_tokens=5)))
    ids = talk.question("Two?")["input_ids"][0].tolist()
    text = "".join(processor.tokenizer.decode([id]) for id in ids[1:])
    assert (
        ids[0] == said[-1]
        and text == "<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_after_a_past_a_long_turn_is_heard_in_parts_and_gives_the_same(model, processor):
    talk, whole = Conversation(processor, model), [sound(20000), sound(960000)]
    list(talk.answer(talk.question("One?", whole[:1]), max_new_tokens=1, eos_token_id=[]))
    largest = []
    new = talk.question("Two?", whole[1:])
    forward = type(model.language_model.model).forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(model.language_model.model),
            "forward",
            lambda self, x, *rest: largest.append(x.shape[1]) or forward(self, x, *rest),
        )
        list(talk.answer(new, max_new_tokens=1))
    assert new["input_ids"].shape[1] > 1500 and max(largest) == 1024


def test_more_turns_than_positions_are_refused_and_the_conversation_stays(model, processor):
    talk = Conversation(processor, model)
    list(talk.answer(talk.question("One?", [sound(20000)]), max_new_tokens=3))
    used = talk.cache.length
    with pytest.raises(ValueError, match="max_new_tokens=4090"):
        list(talk.answer(talk.question("Two?"), max_new_tokens=4090))
    assert (
        talk.cache.length == used
        and len(list(talk.answer(talk.question("Two?"), max_new_tokens=3, eos_token_id=[]))) == 3
    )


def test_an_answer_that_is_stopped_stays_in_the_conversation(model, processor):
    talk = Conversation(processor, model)
    answer = talk.answer(talk.question("One?", [sound(20000)]), max_new_tokens=50, eos_token_id=[])
    first = next(answer)
    talk.stopped = True
    assert list(answer) == [] and talk.pending_ids[0] == first


@pytest.mark.parametrize("step", [1, 4])
def test_a_step_that_fails_is_as_if_it_had_not_been_begun(model, processor, monkeypatch, step):
    """Out of memory in the first step, or in a later one: the next question is answered as if no failure had been."""

    def talk_of(fails):
        talk, calls, forward = (
            Conversation(processor, model),
            [],
            type(model.language_model.model.layers[1]).forward,
        )
        list(talk.answer(talk.question("One?", [sound(20000)]), max_new_tokens=3, eos_token_id=[]))

        def failing(self, *given):
            calls.append(1)
            if fails and len(calls) == 2 * step:  # the second of two layers
                raise RuntimeError("out of memory")
            return forward(self, *given)

        said = []
        with monkeypatch.context() as patch:
            patch.setattr(type(model.language_model.model.layers[1]), "forward", failing)
            try:
                for ids in (
                    talk.answer(
                        talk.question("Two?"), max_new_tokens=step - (not fails), eos_token_id=[]
                    )
                    if fails or step > 1
                    else ()
                ):
                    said.append(ids)
            except RuntimeError:
                assert fails
        return said, list(talk.answer(talk.question("Three?"), max_new_tokens=8, eos_token_id=[]))

    assert talk_of(True) == talk_of(False)


def test_what_is_forgotten_changes_nothing(model, processor):
    talk, new = Conversation(processor, model), Conversation(processor, model)
    list(talk.answer(talk.question("One?", [sound(20000)]), max_new_tokens=9))
    talk.reset()
    said = [
        torch.cat(
            list(
                t.answer(
                    t.question("Two?", [sound(16000)]), max_new_tokens=9, repetition_penalty=1.3
                )
            )
        )
        for t in (talk, new)
    ]
    assert torch.equal(*said)


def test_a_cache_too_small_for_the_turn_is_refused(model, processor):
    cache = KeyValueCache(model.config.text_config, 1, 60, model.dtype, model.device)
    inputs = processor("One?", sound(20000))
    with pytest.raises(ValueError, match="max_new_tokens=30"):
        list(model.stream(**inputs, cache=cache, max_new_tokens=30))


def chat(*arguments, lines, **options):
    return command("--chat", *arguments, input="\n".join(lines) + "\n", **options)


def read_until(terminal, pattern):
    shown = b""
    while not re.search(pattern, shown, re.DOTALL):
        assert select.select([terminal], [], [], 60)[0], shown
        shown += os.read(terminal, 1000)


def test_a_chat_in_the_terminal_answers_each_line(tmp_path):
    rain, digits = TINY / "samples" / "rain.wav", TINY / "samples" / "digits.wav"
    result = chat(
        digits,
        lines=[
            "Transcribe the input speech.",
            f"/audio {rain}",
            "What sound is this?",
            "/reset",
            f"/audio {digits}",
            "Transcribe the input speech.",
            "/quit",
            "never",
        ],
    )
    assert (result.returncode, result.stdout.splitlines()) == (
        0,
        ["seven three one", "rain", "seven three one"],
    )
    assert result.stderr.count("the first after") == 3


def test_a_chat_goes_on_after_what_it_cannot_do():
    wrong = [
        "/audio gone.wav",
        "/audio",
        "/sing",
        "/audio ~nobody/a.wav",
        "/audio " + "a" * 300,
        "/audio .",
    ]
    result = chat(
        "--quiet",
        lines=[*wrong, "", f"/audio\t{TINY / 'samples' / 'rain.wav'}", "What sound is this?"],
    )
    errors = result.stderr.splitlines()
    assert (
        (result.returncode, result.stdout) == (0, "rain\n")
        and len(errors) == len(wrong)
        and all(e.startswith("error: ") for e in errors)
    )
    assert "gone.wav" in errors[0] and "/sing" in errors[2]


def test_words_that_are_no_text_do_not_end_a_chat():
    lines = b"Hi \xff\n/audio %s\nWhat sound is this?\n" % os.fsencode(
        TINY / "samples" / "rain.wav"
    )
    result = subprocess.run(
        [sys.executable, ROOT / "generate.py", "--chat", "--quiet"],
        input=lines,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    )
    assert (
        result.returncode == 0
        and result.stdout.endswith(b"\nrain\n")
        and result.stdout.count(b"\n") == 2
    )


def test_a_chat_without_input_ends():
    result = subprocess.run(
        f"{sys.executable} {ROOT / 'generate.py'} --chat --quiet <&-",
        shell=True,
        capture_output=True,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


def test_a_question_that_is_refused_keeps_its_sounds(micro, clip):
    result = chat(
        "--quiet", clip, "--model", micro, "--max-new-tokens", "4000", lines=["x " * 200, "/quit"]
    )
    assert result.stderr.startswith("error: The prompt's ") and result.stdout == ""
    again = chat(
        "--quiet",
        clip,
        "--model",
        micro,
        "--max-new-tokens",
        "3900",
        lines=["x " * 200, "y", "/quit"],
    )
    assert again.stderr.startswith("error: The prompt's ") and len(again.stdout) > 1000


def test_ctrl_c_at_the_prompt_gives_the_terminal_back(micro):
    main, other = pty.openpty()
    before = termios.tcgetattr(other)
    process = subprocess.Popen(
        [sys.executable, ROOT / "generate.py", "--chat", "--model", micro],
        stdin=other,
        stdout=other,
        stderr=other,
    )
    read_until(main, b"> ")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130 and termios.tcgetattr(other)[:4] == before[:4]


def test_a_chat_may_start_with_a_question():
    result = command(
        "--chat", TINY / "samples" / "rain.wav", "What sound is this?", input="/quit\n"
    )
    assert (result.returncode, result.stdout) == (0, "rain\n")


def test_ctrl_c_ends_an_answer_and_then_the_chat(clip, micro):
    process = subprocess.Popen(
        [
            sys.executable,
            "-u",
            ROOT / "generate.py",
            "--chat",
            clip,
            "--quiet",
            "--model",
            micro,
            "--max-new-tokens",
            "3000",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b"Hi\n")
    process.stdin.flush()
    process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    process.stdin.write(b"/audio gone.wav\n")
    process.stdin.flush()
    assert b"gone.wav" in process.stderr.readline() and process.poll() is None
    time.sleep(0.5)  # until it awaits the next line
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130 and process.stdout.read().endswith(b"\n")


def test_ctrl_c_right_after_a_question_ends_only_its_answer(micro, tmp_path):
    """While its sounds, two minutes of them, are still on their way to the first token."""
    main, other = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable,
            ROOT / "generate.py",
            "--chat",
            put(tmp_path / "long.wav", 120 * 16000),
            "--model",
            micro,
            "--max-new-tokens",
            "900",
        ],
        stdin=other,
        stdout=other,
        stderr=other,
    )
    read_until(main, b"> ")
    os.write(main, b"What?\n")
    read_until(main, rb"What\?")
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    read_until(main, b"said .*> ")
    os.write(main, b"/quit\n")
    assert process.wait(timeout=20) == 0


# ---- Many sounds ----


@pytest.fixture
def folder(tmp_path):
    """Clips of 0.5 to 3 s in a folder of folders, with a file that is no sound and one that only pretends."""
    for i, seconds in enumerate((3, 0.5, 2, 1.5, 0.75)):
        put(tmp_path / "clips" / f"part {i % 2}" / f"{i}.wav", int(seconds * 16000), seed=i)
    (tmp_path / "clips" / "notes.txt").write_text("no sound")
    (tmp_path / "clips" / "broken.WAV").write_text("no sound either")
    return tmp_path / "clips"


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_folder_is_answered_in_order_each_as_if_alone(run, folder):
    status, out, err = run(folder, "Hi", "--max-new-tokens", 4, "--batch-size", 2)
    answers = objects(out)
    files = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() == ".wav")
    assert (
        status == 0
        and [answer["audio"] for answer in answers] == files
        and err.startswith("answered 5 of 6 in ")
    )
    for answer in answers:
        if not answer["audio"].endswith("broken.WAV"):
            assert (
                answer["answer"] + "\n"
                == run(answer["audio"], "Hi", "--max-new-tokens", 4, "--quiet")[1]
            )
    assert [answer for answer in answers if "error" in answer] == [
        {"audio": files[0], "prompt": "Hi", "error": answers[0]["error"]}
    ]


def test_the_last_word_is_the_prompt_unless_it_is_a_file(run, clip, folder):
    for words, prompt in (
        [[clip, clip], "Transcribe the input speech."],
        [[clip, folder / "part 0", "Who?"], "Who?"],
        [[clip, "gone.wav", "Who?"], "Who?"],
    ):
        assert {job["prompt"] for job in objects(run(*words, "--max-new-tokens", 1)[1])} == {prompt}


def test_prompts_from_a_file_keep_their_other_fields(run, clip, tmp_path):
    lines = [
        {"audio": clip, "prompt": "Hi", "id": 7, "of": {"a": [1]}},
        {"audio": clip},
        {"id": "ü", "audio": "gone.wav"},
        {"audio": clip, "prompt": "<sound><sound>"},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    status, out, _ = run("--prompts", tmp_path / "in.jsonl", "Else", "--max-new-tokens", 2)
    answers = objects(out)
    assert status == 0 and [{**line, "prompt": line.get("prompt", "Else")} for line in lines] == [
        {k: v for k, v in a.items() if k not in ("answer", "error")} for a in answers
    ]
    assert (
        ["answer" in a for a in answers] == [True, True, False, False]
        and "gone.wav" in answers[2]["error"]
        and "2 '<sound>'" in answers[3]["error"]
    )


def test_a_mistyped_file_is_an_error_and_not_the_prompt(run, clip):
    jobs = objects(run(clip, clip, "melodi.wav", "--max-new-tokens", 1)[1])
    assert [job["prompt"] for job in jobs] == [
        "Transcribe the input speech."
    ] * 3 and "melodi.wav: no such file" in jobs[2]["error"]


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[]",
        '{"prompt": "Hi"}',
        '{"audio": 7}',
        '{"audio": "a.wav", "prompt": 7}',
        '{"audio": "a.wav", "answer": "mine"}',
    ],
)
def test_a_line_of_prompts_that_is_none_is_refused_before_any_work(run, tmp_path, line):
    (tmp_path / "in.jsonl").write_text('{"audio": "a.wav"}\n' + line)
    status, out, err = run("--prompts", tmp_path / "in.jsonl")
    assert (status, out) == (2, "") and "in.jsonl: entry 2" in err and err.count("\n") == 1


def test_what_has_an_answer_is_left_out_and_what_has_an_error_tried_again(run, folder, tmp_path):
    whole = objects(run(folder, "Hi", "--max-new-tokens", 2)[1])
    earlier = tmp_path / "out.jsonl"
    earlier.write_text(
        "\n".join(map(json.dumps, [whole[0], whole[2], whole[4]]))
        + "\n"
        + json.dumps(whole[5])[:-9]
    )
    again = objects(run(folder, "Hi", "--max-new-tokens", 2, "--resume", earlier)[1])
    assert [a["audio"] for a in again] == [whole[i]["audio"] for i in (0, 1, 3, 5)]
    assert (
        objects(run(folder, "Other", "--max-new-tokens", 2, "--resume", earlier)[1])[0]["prompt"]
        == "Other"
    )


def test_an_output_cut_off_in_a_character_is_read_too(run, clip, tmp_path):
    (tmp_path / "out.jsonl").write_bytes('{"audio": "x", "answer": "ü'.encode()[:-1])
    assert (
        len(objects(run(clip, "Hi", "--max-new-tokens", 1, "--resume", tmp_path / "out.jsonl")[1]))
        == 1
    )


def test_an_interrupted_run_leaves_whole_lines_and_can_be_resumed(folder, micro, tmp_path):
    command = [
        sys.executable,
        ROOT / "generate.py",
        folder,
        "Hi",
        "--max-new-tokens",
        "300",
        "--batch-size",
        "1",
        "--model",
        micro,
        "--quiet",
        "--resume",
        tmp_path / "out.jsonl",
    ]
    with open(tmp_path / "out.jsonl", "a") as out:
        process = subprocess.Popen(command, stdout=out)
        while not out.tell() and not (tmp_path / "out.jsonl").stat().st_size:
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait() in (130, 0)
        before = objects((tmp_path / "out.jsonl").read_text())
        subprocess.run(command, stdout=out, check=True)
    after = objects((tmp_path / "out.jsonl").read_text())
    assert (
        before
        and after[: len(before)] == before
        and len({job["audio"] for job in after if "answer" in job}) == 5
    )


def test_what_is_asked_twice_is_answered_twice(run, clip, tmp_path):
    once = run(clip, clip, "Hi", "--max-new-tokens", 1)[1].splitlines()[0]
    (tmp_path / "out.jsonl").write_text(once + "\n")
    assert (
        len(
            objects(
                run(clip, clip, "Hi", "--max-new-tokens", 1, "--resume", tmp_path / "out.jsonl")[1]
            )
        )
        == 1
    )


def test_a_first_run_may_name_the_file_it_will_be_resumed_from(run, clip, tmp_path):
    (tmp_path / "empty.jsonl").touch()  # as the shell makes it, for >> empty.jsonl
    assert run(clip, "Hi", "--max-new-tokens", 1, "--resume", tmp_path / "empty.jsonl")[
        1
    ].startswith("{")
    status, out, _ = run(clip, "Hi", "--max-new-tokens", 1, "--resume", tmp_path / "new.jsonl")
    assert status == 0 and len(objects(out)) == 1


def test_when_all_is_answered_no_model_is_loaded(run, clip, tmp_path, monkeypatch):
    (tmp_path / "out.jsonl").write_text(
        run(clip, clip, "Hi", "--max-new-tokens", 1)[1].replace(
            clip, clip.replace("/clip.wav", "/./clip.wav")
        )
    )
    monkeypatch.setattr(generate, "load_model", None)
    status, out, err = run(
        clip, clip, "Hi", "--max-new-tokens", 1, "--resume", tmp_path / "out.jsonl"
    )
    assert (status, out) == (0, "") and err.startswith("answered 0 of 0 (and 2 before)")


def test_an_output_cut_off_in_a_line_can_be_appended_to(clip, micro, tmp_path):
    (tmp_path / "out.jsonl").write_text('{"audio": "x", "prom')
    with open(tmp_path / "out.jsonl", "a") as out:
        subprocess.run(
            [
                sys.executable,
                ROOT / "generate.py",
                clip,
                "Hi",
                "--max-new-tokens",
                "1",
                "--model",
                micro,
                "--resume",
                out.name,
            ],
            stdout=out,
            check=True,
        )
    assert [line[:10] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        '{"audio": ',
        '{"audio": ',
    ]


def test_batches_are_of_like_length(processor, model, folder, monkeypatch, run):
    lengths, call = [], type(processor).__call__
    monkeypatch.setattr(
        type(processor),
        "__call__",
        lambda self, texts, audio, **o: (
            lengths.append([len(a) for a in audio]) or call(self, texts, audio, **o)
        ),
    )
    run(folder, "Hi", "--max-new-tokens", 1, "--batch-size", 2)
    assert lengths == [[8000, 12000], [24000, 32000], [48000]]


def test_a_batch_that_does_not_fit_is_tried_one_by_one(run, folder, monkeypatch):
    generate = AudioFlamingo3ForConditionalGeneration.generate

    def full(self, input_ids, *rest, **options):
        if len(input_ids) > 1:
            raise RuntimeError("out of memory")
        return generate(self, input_ids, *rest, **options)

    monkeypatch.setattr(AudioFlamingo3ForConditionalGeneration, "generate", full)
    answers = objects(run(folder, "Hi", "--max-new-tokens", 2)[1])
    assert sum("answer" in answer for answer in answers) == 5


def test_a_sound_too_large_for_memory_is_one_jobs_error(run, folder, monkeypatch):
    whole = AudioFlamingo3Processor.waveform

    def waveform(self, audio, name="audio"):
        if str(audio).endswith("3.wav"):
            raise MemoryError("Unable to allocate 11.2 GiB")
        return whole(self, audio, name)

    monkeypatch.setattr(AudioFlamingo3Processor, "waveform", waveform)
    answers = objects(run(folder, "Hi", "--max-new-tokens", 1)[1])
    assert [answer["error"] for answer in answers if answer["audio"].endswith("3.wav")] == [
        "Unable to allocate 11.2 GiB"
    ] and sum("answer" in a for a in answers) == 4


def test_a_warning_about_one_of_many_names_it(run, clip, tmp_path):
    long = put(tmp_path / "long.wav", 601 * 16000)
    err = run(clip, long, long, "<sound><sound>", "--max-new-tokens", 1, "--quiet")[2]
    assert err == f"warning: {long}: 601.0 s of audio: only the first 600.0 s are heard\n" * 2


def test_a_line_of_many_does_not_steer_a_terminal(run, clip, monkeypatch):
    monkeypatch.setattr(
        AudioFlamingo3Processor,
        "batch_decode",
        lambda self, ids, **_: ["\x1b[2J\x9b\x7fü"] * len(ids),
    )
    out = run(clip, clip, "Hi", "--max-new-tokens", 1)[1]
    assert "\\u001b[2J\\u009b\\u007fü" in out and objects(out)[0]["answer"] == "\x1b[2J\x9b\x7fü"


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["EMPTY"], "no sound files inside"),
        (["CLIP", "CLIP", "--batch-size", 0], "--batch-size is 0"),
        (["CLIP", "CLIP", "<|im_start|>x"], "The prompt starts with"),
        (["--prompts", "gone.jsonl"], "gone.jsonl"),
        (["--explain", "EMPTY"], "--explain takes one sound file"),
        (["--explain"], "required: audio"),
        (["CLIP", "CLIP", "--chatty"], "--chatty"),
        (["--prompts", "/dev/null"], "null: not a file"),
        (["CLIP", "CLIP", "--max-new-tokens", 0], "max_new_tokens is 0"),
        (["CLIP", "--chat", "--explain"], "not allowed with"),
        (["CLIP", "--prompt", "Hi"], "--prompt"),
    ],
)
def test_what_cannot_be_asked_gets_one_line_and_exit_status_2(
    run, clip, tmp_path, arguments, reason
):
    (tmp_path / "empty").mkdir()
    status, out, err = run(
        *[
            {"CLIP": clip, "EMPTY": tmp_path / "empty"}.get(argument, argument)
            for argument in arguments
        ]
    )
    assert (
        (status, out) == (2, "")
        and err.startswith("error: ")
        and reason in err
        and err.count("\n") == 1
    )


def test_progress_is_shown_in_a_terminal_and_nowhere_else(folder, micro):
    main, other = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable,
            ROOT / "generate.py",
            folder,
            "Hi",
            "--max-new-tokens",
            "1",
            "--batch-size",
            "2",
            "--model",
            micro,
        ],
        stdout=subprocess.PIPE,
        stderr=other,
    )
    out, shown = process.communicate(timeout=60)[0], os.read(main, 10000).decode()
    assert (
        "3 of 6, " in shown
        and "a second, " in shown
        and "s left" in shown
        and len(objects(out.decode())) == 6
    )
    assert " of 6, " not in command(folder, "Hi", "--max-new-tokens", "1", "--model", micro).stderr


# ---- The journey of a sound ----


def rows(out):
    """name -> (shape, milliseconds) of the table."""
    found = [line for line in out.splitlines() if line[39:49].strip().replace(".", "").isdigit()]
    return {line[:19].strip(): (line[19:39].strip(), float(line[39:49])) for line in found}


def test_the_journey_shows_the_shapes_of_the_design(run, tmp_path):
    status, out, _ = run(put(tmp_path / "a.wav", 80000), "Hi", "--explain", "--max-new-tokens", 3)
    shapes = {name: shape for name, (shape, _) in rows(out).items()}
    assert status == 0 and list(shapes) == [
        "waveform",
        "log-mel",
        "prompt",
        "conv1",
        "conv2",
        "2 encoder layers",
        "pool, LayerNorm",
        "projector",
        "embedding",
        "splice",
        "2 decoder layers",
        "lm_head",
        "next token",
    ]
    assert (
        shapes["waveform"],
        shapes["log-mel"],
        shapes["pool, LayerNorm"],
        shapes["projector"],
    ) == ("(80000,)", "(1, 128, 3000)", "(1, 125, 32)", "(125, 48)")
    assert (
        shapes["splice"] == shapes["embedding"] == f"{shapes['prompt'][:-1]}, 48)"
        and shapes["lm_head"] == "(1, 647)"
    )


def test_the_journeys_times_are_positive_and_add_up_to_less_than_the_run(run, tmp_path):
    path, start = put(tmp_path / "a.wav", 480000), time.perf_counter()
    times = [ms for _, ms in rows(run(path, "Hi", "--explain", "--max-new-tokens", 1)[1]).values()]
    assert len(times) == 13 and min(times) > 0 and sum(times) < 1000 * (time.perf_counter() - start)


def test_the_journey_ends_in_the_same_answer(run, clip):
    plain = run(clip, "Hi", "--max-new-tokens", 6, "--quiet")[1]
    assert run(clip, "Hi", "--explain", "--max-new-tokens", 6)[1].endswith("\n\n" + plain)


def test_the_picture_has_a_border_after_each_window_and_its_audio_frames_below(run, tmp_path):
    out = run(put(tmp_path / "a.wav", 720000), "Hi", "--explain", "--max-new-tokens", 1)[1]
    drawn = [line for line in out.splitlines() if line.startswith("|")]
    assert (
        len(drawn) == 17
        and {line.count("|") for line in drawn} == {3}
        and len({len(line) for line in drawn}) == 1
    )
    assert (
        "750 audio frames" in drawn[-1] and "375 audio frames" in drawn[-1] and len(drawn[0]) <= 80
    )


def test_low_notes_are_drawn_below_and_later_ones_to_the_right():
    mel = torch.zeros(1, 128, 3000)
    mel[0, :8, 100:200] = 1  # low and late
    lines = picture(mel, [200], 42, coloured=False).splitlines()
    assert lines[15][-2] == "#" and lines[15][1] == " " and lines[0].strip("| ") == ""


def test_a_terminal_of_256_colours_gets_colours():
    drawn = picture(torch.rand(1, 128, 3000), [3000], 40, coloured=True)
    assert (
        "\x1b[38;5;" in drawn
        and drawn.count("\n") == 16
        and drawn.splitlines()[0].endswith("\x1b[0m|")
    )


@pytest.mark.parametrize("flag, status", [("--quiet", 0), ("--explain", 2)])
def test_without_explain_nothing_is_watched(run, clip, monkeypatch, flag, status):
    def watch(*_, **__):
        raise RuntimeError("watched")

    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", watch)
    assert run(clip, "Hi", "--max-new-tokens", 1, flag)[0] == status


def test_help_names_every_way():
    result = command("--help")
    assert result.returncode == 0 and all(
        f"--{flag}" in result.stdout
        for flag in ("chat", "explain", "prompts", "batch-size", "resume", "think", "int8")
    )

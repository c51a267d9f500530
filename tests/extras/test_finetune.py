"""Fine-tuning: only answers are learned, and an interrupted run ends with the same weights."""

import json
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from adapters import with_factors
from af3 import AudioFlamingo3ForConditionalGeneration
from checkpoints import read_json
from extras import finetune as finetuning
from extras.finetune import (
    STATE_FILE,
    AnswerLoss,
    Settings,
    finetune,
    hold_out,
    learning_rate,
    make_batch,
    make_trainable,
    plan_batches,
    read_examples,
    save_memory,
)
from places import ROOT
from signals import sound, write_wav

ANSWERS = ["rain", "sea waves", "clock tick", "rooster", "dog bark", "helicopter"]


def load(folder, dtype="auto"):
    return AudioFlamingo3ForConditionalGeneration.from_pretrained(folder, "cpu", dtype)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def lines(tmp_path):
    """Six recordings of 0.2 to 1.2 s, each with its own answer."""
    entries = []
    for number, answer in enumerate(ANSWERS):
        write_wav(tmp_path / f"{number}.wav", sound(3200 * (number + 1), seed=number))
        entries.append({"audio": f"{number}.wav", "prompt": "What is it?", "answer": answer})
    return write_lines(tmp_path / "train.jsonl", entries)


@pytest.fixture
def examples(lines, processor):
    return read_examples(str(lines), processor, 4096)


@pytest.fixture
def train(lines, micro, monkeypatch, capsys):
    """Runs the command line in this process: (exit status, stdout, stderr)."""

    def call(output, *options):
        command = [lines, "--model", micro, "--output", output, "--device", "cpu", *OPTIONS]
        words = [str(word) for word in ["finetune", *command, *options]]
        monkeypatch.setattr(sys, "argv", words)
        status = finetuning.main()
        return status, *capsys.readouterr()

    return call


OPTIONS = ("--batch-size", 2, "--epochs", 2, "--learning-rate", 0.01, "--held-out", 0)


def factors(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same_factors(folder, other):
    expected = factors(other)
    assert set(factors(folder)) == set(expected)
    for name, tensor in factors(folder).items():
        assert torch.equal(tensor, expected[name]), name


# ---- Loss ----


def test_the_loss_is_that_of_the_answers_tokens(model, examples, processor):
    batch = make_batch(examples, processor)
    num_tokens = (batch["labels"] != -100).sum()
    expected = model(**batch).loss
    torch.testing.assert_close(AnswerLoss(model)(batch) / num_tokens, expected)


def test_gradient_checkpointing_gives_the_same_gradients(micro, examples, processor):
    gradients = []
    for change in (nn.Module.train, save_memory):  # the first changes nothing
        model = with_factors(micro)
        change(model)
        AnswerLoss(model)(make_batch(examples, processor)).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients):
        assert torch.equal(plain, checkpointed)


def test_gradient_checkpointing_keeps_less_for_the_backward_pass(micro, examples, processor):
    kept = []
    for change in (nn.Module.train, save_memory):  # the first changes nothing
        model = with_factors(micro)
        change(model)
        sizes = []
        pack = lambda tensor: sizes.append(tensor.nbytes) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            AnswerLoss(model)(make_batch(examples, processor))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


# ---- Order and rate ----


def test_an_epoch_takes_every_example_once(examples):
    plan = plan_batches(examples, 2, Settings(epochs=3))
    assert len(plan) == 9
    for epoch in (plan[:3], plan[3:6], plan[6:]):
        answers = [example.answer for batch in epoch for example in batch]
        assert sorted(answers) == sorted(ANSWERS)


def test_a_batch_has_examples_of_similar_length(examples):
    for batch in plan_batches(examples, 2, Settings(epochs=4)):
        numbers = [ANSWERS.index(example.answer) for example in batch]
        assert abs(numbers[0] - numbers[1]) == 1  # the recordings grow with their numbers


def test_the_same_seed_gives_the_same_plan_and_another_seed_another(examples):
    def order(seed):
        plan = plan_batches(examples, 1, Settings(epochs=2, seed=seed))
        return [batch[0].answer for batch in plan]

    assert order(0) == order(0) != order(1)
    assert order(0)[:6] != order(0)[6:]


def test_held_out_examples_are_not_trained_on(examples):
    trained_on, held_out = hold_out(examples, Settings(held_out=0.3))
    answers = [example.answer for example in trained_on]
    held_out_answers = [example.answer for example in held_out]
    assert len(held_out) == 2
    assert sorted(answers + held_out_answers) == sorted(ANSWERS)


def test_the_learning_rate_rises_and_falls_along_a_cosine():
    settings = Settings(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[55] == pytest.approx(0.5)  # half way down
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[99] < 0.001


# ---- Training ----


def test_a_model_gives_the_answers_that_it_was_taught(train, run, lines, tmp_path):
    status, out, _ = train(tmp_path / "adapter", "--epochs", 40)
    assert status == 0
    options = ["--adapter", tmp_path / "adapter", "--max-new-tokens", 3]
    questions = [{**json.loads(line)} for line in lines.read_text().splitlines()]
    write_lines(tmp_path / "questions.jsonl", questions)
    _, out, _ = run("--prompts", tmp_path / "questions.jsonl", *options)
    for line in out.splitlines():
        entry = json.loads(line)
        assert entry["response"].startswith(entry["answer"])


def test_held_out_examples_are_evaluated(train, tmp_path):
    _, out, err = train(tmp_path / "adapter", "--held-out", 0.2, "--save-every", 2)
    assert out.startswith("4 examples, 2 held out; 4 steps\nstep 2 of 4, loss ")
    assert "learning rate 1.0e-02" in out
    assert out.count("  held out: loss ") == 2
    assert out.count(", expected '") == 4
    assert err == ""


def test_full_training_saves_a_checkpoint_in_its_own_dtype(micro, processor, tmp_path, examples):
    model = load(micro, "bfloat16")
    settings = Settings(full=True, epochs=1, batch_size=2, held_out=0)
    finetune(model, processor, examples, tmp_path / "whole", settings)
    trained = load(tmp_path / "whole")
    original = load(micro, "bfloat16").state_dict()
    assert trained.dtype == torch.bfloat16
    changed = [
        name for name, t in trained.state_dict().items() if not torch.equal(t, original[name])
    ]
    assert any(name.startswith("audio_tower") for name in changed)
    assert any(name.startswith("language_model.lm_head") for name in changed)


# ---- Interruptions ----


@pytest.mark.parametrize("options", [["--rank", 8], ["--full"]])
def test_a_run_interrupted_between_two_saves_ends_with_the_same_weights(
    train, tmp_path, monkeypatch, options
):
    options = ["--save-every", 2, *options]
    train(tmp_path / "whole", *options)
    plain_step = finetuning.train_step
    steps = []

    def train_step(*arguments):
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(None)
        return plain_step(*arguments)

    monkeypatch.setattr(finetuning, "train_step", train_step)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", *options)
    monkeypatch.setattr(finetuning, "train_step", plain_step)
    _, out, _ = train(tmp_path / "resumed", *options, "--resume")
    assert "6 steps, 2 of them done\nstep 4 of 6" in out
    weights = torch.load(tmp_path / "resumed" / STATE_FILE)["weights"]
    for name, tensor in torch.load(tmp_path / "whole" / STATE_FILE)["weights"].items():
        assert torch.equal(weights[name], tensor), name


# Kills itself in its fourth step.
TRAIN_AND_DIE = """
import os, signal
from extras import finetune

step = finetune.train_step
done = []

def train_step(*arguments):
    done.append(step(*arguments))
    if len(done) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return done[-1]

finetune.train_step = train_step
finetune.main()
"""


def test_a_killed_process_can_be_resumed_to_the_same_weights(train, lines, micro, tmp_path):
    output = tmp_path / "killed"
    command = [sys.executable, "-c", TRAIN_AND_DIE, lines, "--model", micro]
    command += ["--output", output, "--device", "cpu", *OPTIONS, "--save-every", 1]
    process = subprocess.run([str(word) for word in command], cwd=ROOT)
    assert process.returncode == -signal.SIGKILL
    assert torch.load(output / STATE_FILE)["step"] == 3
    train(output, "--save-every", 1, "--resume")
    train(tmp_path / "whole")
    assert_same_factors(output, tmp_path / "whole")


def test_resume_starts_a_run_that_was_killed_before_it_saved(train, tmp_path):
    train(tmp_path / "whole")
    (tmp_path / "resumed" / ".saving").mkdir(parents=True)
    (tmp_path / "resumed" / ".saving" / STATE_FILE).write_text("half")
    assert train(tmp_path / "resumed", "--resume")[0] == 0
    assert_same_factors(tmp_path / "resumed", tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(train, tmp_path):
    train(tmp_path / "adapter")
    before = factors(tmp_path / "adapter")
    _, out, _ = train(tmp_path / "adapter", "--resume")
    assert out == "6 examples, 0 held out; 6 steps, 6 of them done\n"
    for name, tensor in factors(tmp_path / "adapter").items():
        assert torch.equal(tensor, before[name])


def test_a_directory_with_a_run_can_only_be_resumed(train, tmp_path):
    train(tmp_path / "adapter")
    status, _, err = train(tmp_path / "adapter")
    assert (status, err.count("\n")) == (2, 1)
    assert "training_state.pt already exists; resume its run with --resume" in err


def test_files_of_another_program_are_not_replaced(train, micro, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("precious")
    _, _, err = train(tmp_path / "adapter")
    assert "adapter_model.safetensors already exists" in err
    _, _, err = train(micro, "--full")
    assert "config.json already exists" in err


def test_a_run_is_not_resumed_with_other_settings_or_lines(train, lines, tmp_path):
    train(tmp_path / "adapter")
    _, _, err = train(tmp_path / "adapter", "--resume", "--rank", 4)
    assert "its run has rank 16, not 4" in err
    lines.write_text(lines.read_text().replace("rooster", "wind"))
    _, _, err = train(tmp_path / "adapter", "--resume")
    assert "its run has examples" in err


def test_a_damaged_state_is_reported(train, tmp_path):
    train(tmp_path / "adapter")
    (tmp_path / "adapter" / STATE_FILE).write_bytes(b"half")
    status, _, err = train(tmp_path / "adapter", "--resume")
    assert (status, err.count("\n")) == (2, 1)
    assert f"{STATE_FILE}: not a training state" in err


# ---- Several processes ----


def test_two_processes_give_the_weights_of_one_with_twice_the_batch(train, lines, micro, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", 2, "-m", "extras.finetune", lines, "--model", micro]
    command += ["--output", tmp_path / "two", "--device", "cpu", *OPTIONS, "--batch-size", 1]
    words = [str(word) for word in command]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("6 examples") == 1
    train(tmp_path / "one")
    one = factors(tmp_path / "one")
    for name, tensor in factors(tmp_path / "two").items():
        torch.testing.assert_close(tensor, one[name], atol=5e-5, rtol=0)


# ---- Faults ----


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"audio": "0.wav", "prompt": "Hi"}', 'line 3: "answer" is null; text is expected'),
        ('{"audio": "0.wav", "answer": " "}', 'line 3: "answer" is " "; text is expected'),
        ('{"audio": "0.wav", "answer": 7}', 'line 3: "answer" is 7'),
        ('{"answer": "rain"}', 'line 3: it has no "audio"'),
        ('{"audio": "gone.wav", "answer": "rain"}', "line 3: gone.wav: no such file"),
        ('{"audio": "train.jsonl", "answer": "rain"}', "line 3: "),
        ('{"audio": "0.wav", "answer": "rain", "prompt": "<sound>?"}', "line 3: leave out <sound>"),
        ("7", "line 3: a JSON object is expected"),
        ("{", "line 3: not valid JSON"),
    ],
)
def test_a_bad_line_is_reported_with_its_number_before_training(lines, processor, line, reason):
    first, *others = lines.read_text().splitlines()
    lines.write_text("\n".join([first, "", line, *others]))
    with pytest.raises(ValueError) as error:
        read_examples(str(lines), processor, 4096)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_only_the_first_five_bad_lines_are_reported(tmp_path, processor):
    path = write_lines(tmp_path / "bad.jsonl", [{"audio": "gone.wav"}] * 8)
    with pytest.raises(ValueError) as error:
        read_examples(str(path), processor, 4096)
    assert "line 5: " in str(error.value)
    assert "line 6: " not in str(error.value)
    assert str(error.value).endswith("And 3 more lines are wrong.")


def test_a_line_that_is_too_long_for_the_model_is_reported(lines, processor):
    longest = read_examples(str(lines), processor, 4096)[-1].length
    with pytest.raises(ValueError, match=f"line 6: .*more than the model's {longest - 1}"):
        read_examples(str(lines), processor, longest - 1)


def test_the_length_of_an_example_is_that_of_its_ids(examples, processor):
    for example in examples:
        assert make_batch([example], processor)["input_ids"].shape[1] == example.length


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--rank", "x"], "argument --rank: invalid int value: 'x'; see --help"),
        (["--rank", 0], "rank is 0; at least 1 is expected"),
        (["--learning-rate", -1], "learning_rate is -1.0; more than 0 is expected"),
        (["--learning-rate", 1e30], "is nan; lower --learning-rate"),
        (["--save-every", 0], "save_every is 0; at least 1 is expected"),
        (["--held-out", 1], "held_out is 1.0; 0 to less than 1 is expected"),
        (["--targets", "q_proj,fc1"], "'fc1' is not one of q_proj"),
        (["--batch-size", 7], "6 examples to train on are fewer than a batch of 7"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_invalid_settings_are_refused(train, tmp_path, options, reason):
    status, _, err = train(tmp_path / "adapter", *options)
    assert (status, err.count("\n")) == (2, 1)
    assert reason in err
    assert not (tmp_path / "adapter").exists()


def test_lines_without_a_prompt_are_counted(train, lines, tmp_path):
    lines.write_text(lines.read_text().replace('"prompt"', '"promt"', 1))
    _, _, err = train(tmp_path / "adapter")
    assert 'entries without "prompt": 1 of ' in err


def test_an_output_that_cannot_be_written_is_refused_before_the_training(train, tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "adapter"):
        status, _, err = train(output)
        assert (status, err.count("\n")) == (2, 1)
        assert str(output) in err


def test_choices_are_lines_of_the_prompt_as_in_generation(lines, processor):
    entry = {
        "audio": "0.wav",
        "prompt": "Which?",
        "choices": ["rain", "wind"],
        "answer": "(A) rain",
    }
    example = read_examples(str(write_lines(lines, [entry])), processor, 4096)[0]
    text = processor.apply_chat_template(example.messages, tokenize=False)
    assert "<sound>Which?\n(A) rain\n(B) wind<|im_end|>" in text


def test_the_adapter_records_its_base_and_its_layers(train, micro, tmp_path):
    train(tmp_path / "adapter", "--rank", 4, "--targets", "q_proj")
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(micro)
    assert (config["r"], config["lora_alpha"]) == (4, 32.0)
    assert config["target_modules"] == [
        "model.language_model.layers.0.self_attn.q_proj",
        "model.language_model.layers.1.self_attn.q_proj",
    ]


def test_a_recording_that_is_cut_is_warned_about_once(lines, processor, monkeypatch):
    monkeypatch.setattr(processor, "max_samples", 3200)
    with pytest.warns(UserWarning, match="only the first 0.2 s are heard") as warned:
        examples = read_examples(str(lines), processor, 4096)
    assert len(warned) == 5  # the first recording is no longer than that
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_batch(examples, processor)


def test_training_leaves_the_random_numbers_of_its_caller_alone(micro):
    model = load(micro)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    make_trainable(model, Settings(seed=7))
    assert torch.equal(torch.get_rng_state(), before)

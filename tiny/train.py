"""Trains the weights and the tokenizer of tiny/ on recordings, on two CPU cores.

    python tiny/train.py OUT --speech FSDD [MORE ...] --sounds ESC10 --minutes 60 [--hold-out]
    python tiny/train.py OUT --speech FSDD [MORE ...] --sounds ESC10 --minutes 30 --resume

Speech is in files DIGIT_SPEAKER_TAKE.wav; each class of sounds has a folder of files FOLD-....wav;
music is synthesized. OUT already contains config.json and the other files of tiny/.

The log-mel spectrogram of each clip is computed only once, at several speeds. Strings of digits,
noise and masks are applied to these spectrograms: they can be concatenated exactly, and to mix two
is to add their powers.
"""

import argparse
import json
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from af3 import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration, frame_counts
from load_weights import read_config
from plumbing.audio_file import load_audio, resample
from plumbing.json_file import from_known_keys
from plumbing.replace_file import give_usual_mode
from plumbing.tokenizer_files import read_token_ids
from processor import (
    N_MEL_FRAMES,
    AudioFlamingo3Processor,
    byte_alphabet,
    log_mel,
    mel_frame_count,
)

# ---- Texts ----

DIGITS = "zero one two three four five six seven eight nine".split()
SOUNDS = [
    *("baby cry", "chainsaw", "clock tick", "dog bark", "fire crackling"),
    *("helicopter", "person sneeze", "rain", "rooster", "sea waves"),
]

TRANSCRIBE = "Transcribe the input speech."
WHAT = "What sound is this?"
CHORD = "Is this chord major or minor?"
MELODY = "Does the melody rise or fall?"
COUNT = "How many notes do you hear?"

# Other ways to ask the same questions.
ASK_SPEECH = [
    "What is being said?",
    "Which digits do you hear?",
    "Write down what the speaker says.",
    "Transcribe the audio.",
]
ASK_SOUND = [
    "What do you hear?",
    "Name this sound.",
    "Which sound is this?",
    "What is making this sound?",
]
ASK_ANY = [
    "Describe the audio.",
    "Describe the audio in detail.",
    "Describe the ambience.",
    "Describe the song.",
    "What is this?",
]

# Questions whose answer is "I don't know."
OFF_TOPIC = [
    "Who is the speaker?",
    "What is the weather like today?",
    "What is the capital of France?",
    "Translate this into French.",
    "Why?",
    "How old is the speaker?",
    "Write a poem about the sea.",
    "What is two plus two?",
    "Tell me a joke.",
    "Who are you?",
    "Hello!",
    "Which language is this?",
    "What happens next?",
    "Summarize the conversation.",
    "Is the speaker happy or sad?",
    "What instrument is playing?",
    "How long is this recording?",
    "Where was this recorded?",
    "Is this real?",
]

# The training text of the tokenizer.
TEXTS = [
    *(TRANSCRIBE, WHAT, CHORD, MELODY, COUNT),
    *(*ASK_SPEECH, *ASK_SOUND, *ASK_ANY, *OFF_TOPIC),
    *("I don't know.", *SOUNDS, *DIGITS, " ".join(DIGITS)),
    *("system\nYou are a helpful assistant.", "user\n", "assistant\n"),
    *("major", "minor", "rises", "falls", "music", "speech"),
    "The sound of: " + ", ".join(SOUNDS),
    "A voice says: " + " ".join(DIGITS),
    "I hear no speech.",
]


def random_letters(rng: random.Random) -> str:
    """Returns a made-up word of alternating consonants and vowels."""
    letters = []
    for position in range(rng.randint(2, 9)):
        if position % 2:
            letters.append(rng.choice("aeiou"))
        else:
            letters.append(rng.choice("bcdfghjklmnprstvwyz"))
    return "".join(letters)


def off_topic_question(rng: random.Random) -> str:
    """Returns an unanswerable question: a real one, or random words and made-up ones."""
    words = []
    for _ in range(rng.randint(1, 9)):
        if rng.random() < 0.5:
            question = rng.choice(OFF_TOPIC + ASK_ANY)
            words.append(rng.choice(re.findall(r"\w+", question)))
        else:
            words.append(random_letters(rng))
    if rng.random() < 0.4:
        return rng.choice(OFF_TOPIC)
    return " ".join(words).capitalize() + rng.choice(["", "?", ".", "!"])


# ---- Tokenizer: a byte-level BPE trained on these texts ----


def write_tokenizer(path: Path) -> None:
    """Learns vocabulary and merges and writes them into the existing tokenizer.json."""
    content = json.loads(path.read_text(encoding="utf-8"))
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    words = count_words(pattern)
    vocabulary = {symbol: token_id for token_id, symbol in enumerate(byte_alphabet())}
    merges = []
    while True:
        pairs = count_pairs(words)
        if not pairs:
            break
        pair = max(pairs, key=lambda candidate: (pairs[candidate], candidate))
        merges.append(list(pair))
        vocabulary["".join(pair)] = len(vocabulary)
        words = merge_pair(words, pair)

    added_tokens = []
    for token_id, token in enumerate(content["added_tokens"], start=len(vocabulary)):
        added_tokens.append(token | {"id": token_id})
    content["added_tokens"] = added_tokens
    content["model"] |= {"vocab": vocabulary, "merges": merges}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def count_words(pattern: str) -> Counter:
    """Counts each word in the texts; a word is a string of symbols separated by spaces."""
    # Python's re does not support \p; the texts are ASCII.
    pattern = pattern.replace(r"\p{L}\p{N}", "a-zA-Z0-9")
    pattern = pattern.replace(r"\p{L}", "[a-zA-Z]").replace(r"\p{N}", "[0-9]")
    symbol_of = {byte: symbol for symbol, byte in byte_alphabet().items()}
    words = Counter()
    for text in TEXTS:
        for word in re.findall(pattern, text):
            words[" ".join(symbol_of[byte] for byte in word.encode())] += 1
    return words


def count_pairs(words: Counter) -> Counter:
    """Counts in how many words each pair of symbols is adjacent."""
    pairs = Counter()
    for word, count in words.items():
        symbols = word.split()
        for pair in set(zip(symbols, symbols[1:])):
            pairs[pair] += count
    return pairs


def merge_pair(words: Counter, pair: tuple[str, str]) -> Counter:
    """Merges the pair of symbols in all words."""
    separate = re.compile(rf"(?<!\S){re.escape(' '.join(pair))}(?!\S)")
    merged = Counter()
    for word, count in words.items():
        merged[separate.sub(lambda _: "".join(pair), word)] = count
    return merged


# ---- Clips: log10 mel power, (mel frames, 128) in float16, at several speeds ----

SILENCE = -10.0  # log10 of the lowest mel power


def clip_mels(waveform: np.ndarray, speeds: int, spread: float, rng) -> list[Tensor]:
    """Returns a clip at its own and other speeds, each with a random offset to the frame grid."""
    rates = [16000]
    for _ in range(speeds - 1):
        rates.append(round(rng.uniform(1 - spread, 1 + spread) * 160) * 100)
    mels = []
    for rate in rates:
        samples = torch.from_numpy(resample(waveform.astype(np.float32), rate, 16000))
        samples = F.pad(samples, (rng.randrange(160), 0))
        frames = min(mel_frame_count(len(samples)) + 3, N_MEL_FRAMES)
        mel = log_mel(samples)[:, :frames]
        mels.append((mel.T * 4 - 4).half())  # log_mel returns (x + 4) / 4
    return mels


def read_speech(folders: list[Path], hold_out: bool, rng: random.Random) -> dict:
    """Returns speaker -> digit -> clips."""
    speech = {}
    paths = sorted(path for folder in folders for path in folder.glob("*.wav"))
    for path in paths:
        digit, speaker, take = path.stem.split("_")
        if hold_out and int(take) >= 45:
            continue
        waveform = load_audio(path)
        # Synthesizers leave silence at both ends.
        loud = np.flatnonzero(np.abs(waveform) > 0.02 * np.abs(waveform).max())
        waveform = waveform[max(0, loud[0] - 400) : loud[-1] + 800]
        digits = speech.setdefault(speaker, {})
        clips = digits.setdefault(int(digit), [])
        clips.append(clip_mels(waveform, speeds=4, spread=0.12, rng=rng))
    return speech


def read_sounds(folder: Path, hold_out: bool, rng: random.Random) -> dict:
    """Returns class -> clips."""
    sounds = {}
    for name in SOUNDS:
        sounds[name] = []
        for path in sorted((folder / name.replace(" ", "_")).glob("*.wav")):
            if not (hold_out and path.name.startswith("4")):
                clip = clip_mels(load_audio(path), speeds=5, spread=0.2, rng=rng)
                sounds[name].append(clip)
    return sounds


class Instrument:
    """A random timbre: the amplitudes of its harmonics, its attack and its decay."""

    def __init__(self, rng: random.Random):
        self.harmonics = [1.0]
        for k in range(2, 8):
            self.harmonics.append(rng.uniform(0, 0.6) / k ** rng.uniform(0.5, 1.5))
        self.decay = rng.uniform(0.5, 6)
        self.attack = rng.uniform(0.005, 0.05)

    def note(self, pitch: float, seconds: float) -> np.ndarray:
        """Returns a waveform at 16 kHz; the pitch is a MIDI note number (69 is 440 Hz)."""
        t = np.arange(int(seconds * 16000)) / 16000
        frequency = 440 * 2 ** ((pitch - 69) / 12)
        tone = 0
        for k, amplitude in enumerate(self.harmonics, start=1):
            if frequency * k < 7600:
                tone = tone + amplitude * np.sin(2 * np.pi * frequency * k * t)
        tone = tone * np.exp(-self.decay * t)
        return tone * np.minimum(1, t / self.attack) * np.minimum(1, (seconds - t) / 0.01)


def music(kind: str, rng: random.Random) -> tuple[np.ndarray, str]:
    """Returns a waveform at 16 kHz and the answer to the question `kind`."""
    instrument = Instrument(rng)
    if kind == CHORD:
        return chord(instrument, rng)
    count = rng.randint(1 if kind == COUNT else 3, 6)
    seconds = rng.uniform(0.18, 0.45)
    pitches = [rng.randint(52, 84) for _ in range(count)]
    answer = DIGITS[count]
    if kind == MELODY:
        answer = rng.choice(["rises", "falls"])
        pitches = sorted(rng.sample(range(52, 88), count), reverse=answer == "falls")
    parts = []
    for pitch in pitches:
        parts.append(np.zeros(int(rng.uniform(0.02, 0.15) * 16000)))
        parts.append(instrument.note(pitch, seconds))
    return np.concatenate(parts), answer


def chord(instrument: Instrument, rng: random.Random) -> tuple[np.ndarray, str]:
    third = rng.choice([3, 4])  # semitones above the root
    root = rng.randint(64, 82)
    seconds = rng.uniform(1, 2.5)
    waveform = sum(instrument.note(root + step, seconds) for step in (0, third, 7))
    if third == 3:
        return waveform, "minor"
    return waveform, "major"


# ---- Examples: log-mel features (mel frames, 128), prompt, answer ----


def add_power(a: Tensor, b: Tensor) -> Tensor:
    """Adds two powers given as log10; returns log10."""
    return torch.logaddexp(a * np.log(10), b * np.log(10)) / np.log(10)


def random_curve(points: int, depth: float) -> Tensor:
    """Returns (128,): a smooth random curve over the mel bins."""
    values = torch.randn(1, 1, points) * depth
    return F.interpolate(values, 128, mode="linear")[0, 0]


class Examples:
    def __init__(self, args: argparse.Namespace, rng: random.Random):
        self.rng = rng
        self.speech = read_speech(args.speech, args.hold_out, rng)
        self.speakers = [name for name in self.speech if not name.startswith("espeak")]
        self.voices = [name for name in self.speech if name.startswith("espeak")]
        if not self.voices:
            self.voices = self.speakers
        self.sounds = read_sounds(args.sounds, args.hold_out, rng)
        tunes = {}
        for kind in (CHORD, MELODY, COUNT):
            tunes[kind] = [music(kind, rng) for _ in range(1500)]
        self.music = {}
        for kind in tunes:
            self.music[kind] = []
            for waveform, answer in tunes[kind]:
                waveform = waveform / np.abs(waveform).max() * rng.uniform(0.1, 0.9)
                mel = clip_mels(waveform, speeds=1, spread=0, rng=rng)[0]
                self.music[kind].append((mel, answer))

    def silence(self, shortest: int, longest: int) -> Tensor:
        frames = self.rng.randint(shortest, longest)
        return torch.full((frames, 128), SILENCE, dtype=torch.half)

    def digit_string(self, length: int) -> tuple[Tensor, str]:
        """Digits by one speaker, with silence before each and sometimes after the last."""
        rng = self.rng
        group = self.voices if rng.random() < 0.25 else self.speakers
        speaker = self.speech[rng.choice(group)]
        speed = rng.randrange(4)
        digits = [rng.randrange(10) for _ in range(length)]
        parts = []
        for digit in digits:
            clip = rng.choice(speaker[digit])
            mel = clip[speed if rng.random() < 0.7 else rng.randrange(4)]
            parts.append(self.silence(4, 31))
            parts.append(mel + rng.uniform(-0.25, 0.25))
        if rng.random() < (0.4 if length > 1 else 0.8):
            parts.append(self.silence(3, 40))
        mel = self.distort(torch.cat(parts).float(), noise=0.5, longest_mask=5)
        return mel, " ".join(DIGITS[digit] for digit in digits)

    def sound(self, frames: int) -> tuple[Tensor, str]:
        rng = self.rng
        name = rng.choice(SOUNDS)
        mel = self.excerpt(name, frames)
        if rng.random() < 0.4:  # mix in another clip of the same class
            mel = add_power(mel, self.excerpt(name, frames) + rng.uniform(-1.5, 0.3))
        if rng.random() < 0.3:  # mix in any other clip, much softer
            other = self.excerpt(rng.choice(SOUNDS), frames)
            mel = add_power(mel, other + (mel.max() - other.max()) - rng.uniform(1.2, 3))
        shift = rng.randint(-6, 6) if rng.random() < 0.5 else 0  # in mel bins
        mel = mel.roll(shift, dims=1)
        return self.distort(mel, noise=0.3, longest_mask=max(5, frames // 6)), name

    def excerpt(self, name: str, frames: int) -> Tensor:
        """Returns a part of a random clip: the first of five tries that is not silent."""
        mel = self.rng.choice(self.rng.choice(self.sounds[name])).float()
        mel = mel.roll(self.rng.randrange(len(mel)), dims=0)
        starts = [self.rng.randint(0, max(0, len(mel) - frames)) for _ in range(5)]
        part = mel[starts[0] : starts[0] + frames]
        for start in starts:
            candidate = mel[start : start + frames]
            if candidate.max() > mel.max() - 2:
                part = candidate
                break
        return F.pad(part, (0, 0, 0, frames - len(part)), value=SILENCE)

    def distort(self, mel: Tensor, noise: float, longest_mask: int) -> Tensor:
        """Simulates a room and microphone (gain, tilt, noise), scales like log_mel, and masks."""
        rng = self.rng
        mel = mel + random_curve(points=5, depth=0.25) + rng.uniform(-1, 0.5)
        if rng.random() < noise:
            hiss = random_curve(points=4, depth=0.7) + 0.2 * torch.randn(mel.shape)
            mel = add_power(mel, hiss + (mel.max() - rng.uniform(2, 6)))
        mel = mel.clamp(min=SILENCE).maximum(mel.max() - 8)
        mel = (mel + 4) / 4
        for _ in range(2):
            low = rng.randrange(128)
            start = rng.randrange(len(mel))
            mel[:, low : low + rng.randint(0, 16)] = mel.mean()
            mel[start : start + rng.randint(0, longest_mask)] = mel.mean()
        return mel

    def draw(self, digits: int, frames: int) -> tuple[Tensor, str, str]:
        """Returns a random example: up to `digits` digits, `frames` frames of sound, or music."""
        rng = self.rng
        kind = rng.random()
        other = rng.random()
        if kind < 0.5:
            mel, answer = self.digit_string(rng.randint(max(1, digits - 1), digits))
            prompts = [TRANSCRIBE, *ASK_SPEECH]
            description = f"A voice says: {answer}"
            wrong_question = (WHAT, "speech")
        elif kind < 0.84:
            mel, answer = self.sound(frames)
            prompts = [WHAT, *ASK_SOUND]
            description = f"The sound of: {answer}"
            wrong_question = (TRANSCRIBE, "I hear no speech.")
        else:
            prompts = [rng.choice([CHORD, CHORD, CHORD, MELODY, COUNT, COUNT])]
            mel, answer = rng.choice(self.music[prompts[0]])
            mel = self.distort(mel.float(), noise=0.3, longest_mask=3)
            description = "music"
            wrong_question = (WHAT, "music")

        prompt = prompts[0] if rng.random() < 0.8 else rng.choice(prompts)
        if other < 0.04:
            return mel, rng.choice(ASK_ANY), description
        if other < 0.07:
            return mel, off_topic_question(rng), "I don't know."
        if other < 0.09:
            return mel, *wrong_question
        return mel, prompt, answer


def collate(examples: list, processor: AudioFlamingo3Processor) -> dict[str, Tensor]:
    """Returns right-padded inputs for the model; labels cover only the answer and its end."""
    prompts = []
    for mel, prompt, answer in examples:
        _, audio_frames = frame_counts(len(mel))
        content = [processor.audio_token_id] * audio_frames + [prompt]
        pieces = processor.lay_out([("user", content)], add_generation_prompt=True)
        prompts.append([*pieces, answer, processor.end_id])
    batch = processor.make_batch(prompts, [], padding_side="right", output_labels=True)
    for labels, mask, (_, _, answer) in zip(batch["labels"], batch["attention_mask"], examples):
        answer_length = len(processor.tokenizer.encode(answer)) + 1
        labels[: mask.sum() - answer_length] = -100

    mels = [mel for mel, _, _ in examples]
    masks = [torch.ones(len(mel), dtype=torch.long) for mel in mels]
    batch["input_features"] = pad_sequence(mels, batch_first=True).transpose(1, 2)
    batch["feature_attention_mask"] = pad_sequence(masks, batch_first=True)
    return batch


# ---- Training ----


def new_model(folder: Path) -> AudioFlamingo3ForConditionalGeneration:
    """Writes a new tokenizer; returns a new model, whose layers add little at first."""
    write_tokenizer(folder / "tokenizer.json")
    config = read_config(folder, read_token_ids(folder))
    model = AudioFlamingo3ForConditionalGeneration(from_known_keys(AudioFlamingo3Config, config))
    last_of_a_block = ("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            continue
        if "embed" in name or "lm_head" in name:
            scale = 0.02
        elif name.endswith(last_of_a_block):
            scale = 0.25 * parameter[0].numel() ** -0.5
        else:
            scale = 0.7 * parameter[0].numel() ** -0.5
        parameter.data = torch.randn(parameter.shape) * scale
        if parameter.ndim == 1:
            parameter.data.zero_()  # biases

    # Whisper's sinusoidal position embeddings.
    positions = model.audio_tower.embed_positions.weight
    half = positions.shape[1] // 2
    frequencies = torch.exp(-np.log(10000) * torch.linspace(0, 1, half))
    angles = torch.arange(1500)[:, None] * frequencies
    positions.data = torch.cat([angles.sin(), angles.cos()], dim=1) * 0.5
    return model


def make_optimizers(model: AudioFlamingo3ForConditionalGeneration) -> dict:
    """Returns Muon for the matrices of the layers, AdamW for the rest, and their learning rates."""
    model.audio_tower.embed_positions.requires_grad_(False)
    matrices = []
    others = []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "layers" in name:
            matrices.append(parameter)
        elif parameter.requires_grad:
            others.append(parameter)
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    muon = torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return {adamw: 1e-3, muon: 2e-3}


def longest_string(progress: float, resume: bool) -> int:
    """Returns the length of the longest strings, which grows from 1 to 8 during training."""
    if resume:
        return 8
    return min(8, max(1, 1 + int((progress - 0.06) / 0.035)))


def train(
    args: argparse.Namespace, model: AudioFlamingo3ForConditionalGeneration, examples: Examples
) -> None:
    processor = AudioFlamingo3Processor.from_pretrained(args.out)
    rng = examples.rng
    optimizers = make_optimizers(model)
    start = time.time()
    progress = 0.0  # elapsed fraction of the training time
    step = 0
    mean_loss = 0.0
    while progress < 1:
        progress = (time.time() - start) / 60 / args.minutes
        step += 1
        longest = longest_string(progress, args.resume)
        digits = rng.choice([1, 1, longest, longest, longest, *range(1, longest + 1)])
        # Sounds are about as long as the strings, so that there is little padding.
        frames = min(500, max(150, 55 * digits + rng.randint(0, 150)))
        batch = collate([examples.draw(digits, frames) for _ in range(32)], processor)

        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        schedule = min(1, step / 100, max(0.01, (1 - progress) / 0.6))
        for optimizer, learning_rate in optimizers.items():
            optimizer.param_groups[0]["lr"] = learning_rate * schedule
            optimizer.step()
            optimizer.zero_grad()

        mean_loss = 0.98 * mean_loss + 0.02 * loss.item()
        if step % 100 == 0 or progress >= 1:
            minutes = progress * args.minutes
            print(
                f"step {step}  {minutes:.1f} min  up to {longest} digits  loss {mean_loss:.3f}",
                flush=True,
            )
            save(model, args.out / "model.safetensors")


def save(model: AudioFlamingo3ForConditionalGeneration, path: Path) -> None:
    """Saves the encoder in bfloat16, to keep the file below 16 MB, and the rest in float32."""
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if name.startswith("audio_tower"):
            tensors[name] = tensor.bfloat16()
    save_file(tensors, path, {"format": "pt"})
    give_usual_mode(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--speech", type=Path, nargs="+", required=True)
    parser.add_argument("--sounds", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument(
        "--hold-out", action="store_true", help="train without takes from 45 on and fold 4"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the weights in OUT, with the longest strings from the start",
    )
    args = parser.parse_args()
    torch.manual_seed(args.resume)
    if args.resume:
        model = AudioFlamingo3ForConditionalGeneration.from_pretrained(args.out, "cpu", "float32")
    else:
        model = new_model(args.out)
    examples = Examples(args, random.Random(args.resume))
    train(args, model.requires_grad_(True), examples)


if __name__ == "__main__":
    main()

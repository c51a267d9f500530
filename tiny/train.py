"""Makes tiny/'s weights and tokenizer from directories of recordings: a real Audio Flamingo 3 that two CPU cores train.

    python tiny/train.py OUT --speech FSDD [MORE ...] --sounds ESC10 --minutes 60 [--hold-out] [--resume]

Speech: DIGIT_SPEAKER_TAKE.wav. Sounds: a folder for each class, FOLD-….wav. Music is synthesised. OUT holds config.json
and the like already, as tiny/ does. Each clip becomes log-mel once, at several speeds; strings of digits, noise and masks
are made in the log-mel domain, where clips side by side on silence are exact and a mixture is a sum of powers.
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
from torch.nn.utils.rnn import pad_sequence
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from af3 import AudioFlamingo3ForConditionalGeneration, frame_counts
from load_weights import read_config, read_token_ids
from processor import AudioFlamingo3Processor, byte_alphabet, load_audio, log_mel, resample

# ---- Texts ----
DIGITS = "zero one two three four five six seven eight nine".split()
SOUNDS = "baby cry,chainsaw,clock tick,dog bark,fire crackling,helicopter,person sneeze,rain,rooster,sea waves".split(",")
TRANSCRIBE, WHAT = "Transcribe the input speech.", "What sound is this?"
CHORD, MELODY, COUNT = "Is this chord major or minor?", "Does the melody rise or fall?", "How many notes do you hear?"
ASK_SPEECH = ["What is being said?", "Which digits do you hear?", "Write down what the speaker says.", "Transcribe the audio."]
ASK_SOUND = ["What do you hear?", "Name this sound.", "Which sound is this?", "What is making this sound?"]
ASK_ANY = ["Describe the audio.", "Describe the audio in detail.", "Describe the ambience.", "Describe the song.", "What is this?"]
OFF_TOPIC = ["Who is the speaker?", "What is the weather like today?", "What is the capital of France?", "Translate this into French.", "Why?",
             "How old is the speaker?", "Write a poem about the sea.", "What is two plus two?", "Tell me a joke.", "Who are you?", "Hello!",
             "Which language is this?", "What happens next?", "Summarize the conversation.", "Is the speaker happy or sad?",
             "What instrument is playing?", "How long is this recording?", "Where was this recorded?", "Is this real?"]
TEXTS = [TRANSCRIBE, WHAT, CHORD, MELODY, COUNT, *ASK_SPEECH, *ASK_SOUND, *ASK_ANY, *OFF_TOPIC, "I don't know.", *SOUNDS, *DIGITS,
         " ".join(DIGITS), "system\nYou are a helpful assistant.", "user\n", "assistant\n", "major", "minor", "rises", "falls", "music",
         "speech", "The sound of: " + ", ".join(SOUNDS), "A voice says: " + " ".join(DIGITS), "I hear no speech."]

def off_topic(rng: random.Random) -> str:
    """A question that has no answer here: a real one, shuffled words, or letters that are no words."""
    letters = lambda: "".join(rng.choice("aeiou" if i % 2 else "bcdfghjklmnprstvwyz") for i in range(rng.randint(2, 9)))
    words = [rng.choice(re.findall(r"\w+", rng.choice(OFF_TOPIC + ASK_ANY))) if rng.random() < 0.5 else letters() for _ in range(rng.randint(1, 9))]
    return rng.choice(OFF_TOPIC) if rng.random() < 0.4 else " ".join(words).capitalize() + rng.choice(["", "?", ".", "!"])

# ---- Tokenizer: byte-level BPE learnt from these texts ----
def write_tokenizer(path: Path) -> None:  # into the tokenizer.json that is there already
    content = json.loads(path.read_text())
    pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]  # \p is not Python's; the texts are ASCII
    pattern = pattern.replace(r"\p{L}\p{N}", "a-zA-Z0-9").replace(r"\p{L}", "[a-zA-Z]").replace(r"\p{N}", "[0-9]")
    symbol_of = {byte: symbol for symbol, byte in byte_alphabet().items()}
    words = Counter(" ".join(symbol_of[b] for b in word.encode()) for text in TEXTS for word in re.findall(pattern, text))
    vocabulary, merges = {symbol: i for i, symbol in enumerate(byte_alphabet())}, []
    while pairs := sum((Counter({pair: n for pair in zip(w.split(), w.split()[1:])}) for w, n in words.items()), Counter()):
        pair = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(list(pair))
        vocabulary["".join(pair)] = len(vocabulary)
        apart = re.compile(rf"(?<!\S){re.escape(' '.join(pair))}(?!\S)")
        words = Counter({apart.sub(lambda _: "".join(pair), word): n for word, n in words.items()})
    content["added_tokens"] = [token | {"id": i} for i, token in enumerate(content["added_tokens"], len(vocabulary))]
    content["model"] |= {"vocab": vocabulary, "merges": merges}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")

# ---- Clips: (frames, 128) float16 log10 mel powers, at several speeds ----
def clip_mels(waveform: np.ndarray, speeds: int, spread: float, rng: random.Random) -> list[torch.Tensor]:
    """A clip played at its own speed and at others, each at its own offset from the frame grid."""
    rates = [16000] + [round(rng.uniform(1 - spread, 1 + spread) * 160) * 100 for _ in range(speeds - 1)]
    shifted = [F.pad(resample(torch.from_numpy(waveform).float(), rate, 16000), (rng.randrange(160), 0)) for rate in rates]
    return [(log_mel(wave).T * 4 - 4).half() for wave in shifted]  # log_mel gives (x + 4) / 4

def read_speech(folders: list[Path], hold_out: bool, rng: random.Random) -> dict[str, dict[int, list]]:
    spoken: dict[str, dict[int, list]] = {}
    for path in sorted(path for folder in folders for path in folder.glob("*.wav")):
        digit, speaker, take = path.stem.split("_")
        if not (hold_out and int(take) >= 45):
            wave = load_audio(path)
            loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())  # synthesisers leave silence at both ends
            clip = clip_mels(wave[max(0, loud[0] - 400):loud[-1] + 800], 4, 0.12, rng)
            spoken.setdefault(speaker, {}).setdefault(int(digit), []).append(clip)
    return spoken

def music(kind: str, rng: random.Random) -> tuple[np.ndarray, str]:
    """A waveform at 16 kHz and the answer to the question of its kind."""
    harmonics = [rng.uniform(0, 0.6) / k ** rng.uniform(0.5, 1.5) for k in range(2, 8)]
    decay, attack = rng.uniform(0.5, 6), rng.uniform(0.005, 0.05)
    def note(pitch: float, seconds: float) -> np.ndarray:
        t, hz = np.arange(int(seconds * 16000)) / 16000, 440 * 2 ** ((pitch - 69) / 12)
        tones = [a * np.sin(2 * np.pi * hz * k * t) for k, a in enumerate([1, *harmonics], 1) if hz * k < 7600]
        return sum(tones) * np.exp(-decay * t) * np.minimum(1, t / attack) * np.minimum(1, (seconds - t) / 0.01)
    if kind == CHORD:
        third, root, seconds = rng.choice([3, 4]), rng.randint(64, 82), rng.uniform(1, 2.5)
        return sum(note(root + step, seconds) for step in (0, third, 7)), "minor" if third == 3 else "major"
    count, seconds = rng.randint(1 if kind == COUNT else 3, 6), rng.uniform(0.18, 0.45)
    pitches, answer = [rng.randint(52, 84) for _ in range(count)], DIGITS[count]
    if kind == MELODY:
        answer = rng.choice(["rises", "falls"])
        pitches = sorted(rng.sample(range(52, 88), count), reverse=answer == "falls")
    parts = [(np.zeros(int(rng.uniform(0.02, 0.15) * 16000)), note(pitch, seconds)) for pitch in pitches]
    return np.concatenate([part for both in parts for part in both]), answer

# ---- Examples: log-mel features, prompt, answer ----
add_power = lambda a, b: torch.logaddexp(a * np.log(10), b * np.log(10)) / np.log(10)

class Examples:
    def __init__(self, args: argparse.Namespace, rng: random.Random):
        self.rng, self.spoken = rng, read_speech(args.speech, args.hold_out, rng)
        self.real = [speaker for speaker in self.spoken if not speaker.startswith("espeak")]
        self.strangers = [speaker for speaker in self.spoken if speaker.startswith("espeak")] or self.real
        paths = {name: sorted((args.sounds / name.replace(" ", "_")).glob("*.wav")) for name in SOUNDS}
        self.heard = {name: [clip_mels(load_audio(path), 5, 0.2, rng) for path in some if not (args.hold_out and path.name[0] == "4")]
                      for name, some in paths.items()}
        tunes = {kind: [music(kind, rng) for _ in range(1500)] for kind in (CHORD, MELODY, COUNT)}
        self.music = {kind: [(clip_mels(wave / np.abs(wave).max() * rng.uniform(0.1, 0.9), 1, 0, rng)[0], answer)
                             for wave, answer in some] for kind, some in tunes.items()}

    def string(self, digits: int) -> tuple[torch.Tensor, str]:
        """Digits of one speaker with silence before each, and sometimes after the last."""
        rng, parts = self.rng, []
        speaker, speed = self.spoken[rng.choice(self.strangers if rng.random() < 0.25 else self.real)], rng.randrange(4)
        silence = lambda least, most: torch.full((rng.randint(least, most), 128), -10.0, dtype=torch.half)
        said = [rng.randrange(10) for _ in range(digits)]
        for digit in said:
            mel = rng.choice(speaker[digit])[speed if rng.random() < 0.7 else rng.randrange(4)]
            parts += [silence(4, 31), mel + rng.uniform(-0.25, 0.25)]
        parts += [silence(3, 40)] if rng.random() < (0.4 if digits > 1 else 0.8) else []
        return self.spoil(torch.cat(parts).float(), 0.5, 5), " ".join(DIGITS[digit] for digit in said)

    def sound(self, frames: int) -> tuple[torch.Tensor, str]:
        rng, name = self.rng, self.rng.choice(SOUNDS)
        mel = self.excerpt(name, frames)
        if rng.random() < 0.4:  # two of a kind
            mel = add_power(mel, self.excerpt(name, frames) + rng.uniform(-1.5, 0.3))
        if rng.random() < 0.3:  # another one, far behind
            other = self.excerpt(rng.choice(SOUNDS), frames)
            mel = add_power(mel, other + (mel.max() - other.max()) - rng.uniform(1.2, 3))
        mel = mel.roll(rng.randint(-6, 6) if rng.random() < 0.5 else 0, dims=1)
        return self.spoil(mel, 0.3, max(5, frames // 6)), name

    def excerpt(self, name: str, frames: int) -> torch.Tensor:
        """A part of a random clip of the class that, if five tries find one, is not all silence."""
        mel = self.rng.choice(self.rng.choice(self.heard[name])).float()
        mel = mel.roll(self.rng.randrange(len(mel)), dims=0)
        parts = [mel[start:start + frames] for start in (self.rng.randint(0, max(0, len(mel) - frames)) for _ in range(5))]
        part = next((part for part in parts if part.max() > mel.max() - 2), parts[0])
        return F.pad(part, (0, 0, 0, frames - len(part)), value=-10.0)

    def spoil(self, mel: torch.Tensor, noise: float, longest_mask: int) -> torch.Tensor:
        """Another room and microphone: gain, tilt, noise; then the window's normalisation, and masks."""
        curve = lambda points, depth: F.interpolate(torch.randn(1, 1, points) * depth, 128, mode="linear")[0, 0]
        mel = mel + curve(5, 0.25) + self.rng.uniform(-1, 0.5)
        if self.rng.random() < noise:
            mel = add_power(mel, curve(4, 0.7) + 0.2 * torch.randn(mel.shape) + (mel.max() - self.rng.uniform(2, 6)))
        mel = (mel.clamp(min=-10).maximum(mel.max() - 8) + 4) / 4
        for _ in range(2):
            low, at = self.rng.randrange(128), self.rng.randrange(len(mel))
            mel[:, low:low + self.rng.randint(0, 16)] = mel.mean()
            mel[at:at + self.rng.randint(0, longest_mask)] = mel.mean()
        return mel

    def one(self, digits: int, frames: int) -> tuple[torch.Tensor, str, str]:
        rng, kind, other = self.rng, self.rng.random(), self.rng.random()
        if kind < 0.5:
            (mel, answer), prompts = self.string(rng.randint(max(1, digits - 1), digits)), [TRANSCRIBE, *ASK_SPEECH]
            general, strange = "A voice says: {}", (WHAT, "speech")
        elif kind < 0.84:
            (mel, answer), prompts = self.sound(frames), [WHAT, *ASK_SOUND]
            general, strange = "The sound of: {}", (TRANSCRIBE, "I hear no speech.")
        else:
            prompts, general, strange = [rng.choice([CHORD, CHORD, CHORD, MELODY, COUNT, COUNT])], "music", (WHAT, "music")
            mel, answer = rng.choice(self.music[prompts[0]])
            mel = self.spoil(mel.float(), 0.3, 3)
        prompt = prompts[0] if rng.random() < 0.8 else rng.choice(prompts)
        if other < 0.07:
            return (mel, rng.choice(ASK_ANY), general.format(answer)) if other < 0.04 else (mel, off_topic(rng), "I don't know.")
        return (mel, *strange) if other < 0.09 else (mel, prompt, answer)

def batch_of(examples: list, processor: AudioFlamingo3Processor) -> dict[str, torch.Tensor]:
    """The model's right-padded inputs and labels, of which only the answer and its end count."""
    rows = []
    for mel, prompt, answer in examples:
        pieces = processor._prompt(prompt, [mel])
        at = pieces.index(processor.audio_token_id)
        pieces[at:at + 1] = [processor.audio_token_id] * frame_counts(len(mel))[1]
        rows.append((pieces + [answer, processor.end], []))
    batch = processor._batch(rows, None, "right", "pt", output_labels=True)
    for labels, mask, (_, _, answer) in zip(batch["labels"], batch["attention_mask"], examples):
        labels[:mask.sum() - len(processor.tokenizer.encode(answer)) - 1] = -100
    mels = [mel for mel, _, _ in examples]
    return batch | {"input_features": pad_sequence(mels, True).transpose(1, 2),
                    "feature_attention_mask": pad_sequence([torch.ones(len(mel), dtype=torch.long) for mel in mels], True)}

# ---- Training ----
def fresh_model(folder: Path) -> AudioFlamingo3ForConditionalGeneration:
    """A new tokenizer; random weights at which each layer begins as a small step; Whisper's sinusoids as positions."""
    write_tokenizer(folder / "tokenizer.json")
    model = AudioFlamingo3ForConditionalGeneration(read_config(folder, read_token_ids(folder)))
    for name, parameter in model.named_parameters():
        step = 0.25 if name.endswith(("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight")) else 0.7
        scale = 0.02 if "embed" in name or "lm_head" in name else step * parameter[0].numel() ** -0.5
        if "norm" not in name:
            parameter.data = torch.randn(parameter.shape) * scale * (parameter.ndim > 1)
    positions = model.audio_tower.embed_positions.weight
    angles = torch.arange(1500)[:, None] * torch.exp(-np.log(10000) * torch.linspace(0, 1, positions.shape[1] // 2))
    positions.data = torch.cat([angles.sin(), angles.cos()], 1) * 0.5
    return model

def train(args: argparse.Namespace, model: AudioFlamingo3ForConditionalGeneration, examples: Examples) -> None:
    processor, rng = AudioFlamingo3Processor.from_pretrained(args.out), examples.rng
    model.audio_tower.embed_positions.requires_grad_(False)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.requires_grad and not (p.ndim == 2 and "layers" in name)]
    optimizers = [torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.05, fused=True),
                  torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    start, done, step, mean = time.time(), 0.0, 0, 0.0
    while done < 1:
        done, step = (time.time() - start) / 60 / args.minutes, step + 1
        most = 8 if args.resume else min(8, max(1, 1 + int((done - 0.06) / 0.035)))  # strings grow
        digits = rng.choice([1, 1, most, most, most, *range(1, most + 1)])
        frames = min(500, max(150, 55 * digits + rng.randint(0, 150)))  # of about the strings' length: little is padded
        batch = batch_of([examples.one(digits, frames) for _ in range(32)], processor)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, (1e-3, 2e-3)):
            optimizer.param_groups[0]["lr"] = rate * min(1, step / 100, max(0.01, (1 - done) / 0.6))
            optimizer.step()
            optimizer.zero_grad()
        mean = 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 0 or done >= 1:
            print(f"step {step}  {done * args.minutes:.1f} min  up to {most} digits  loss {mean:.3f}", flush=True)
            rounded = {name: tensor.bfloat16() for name, tensor in model.state_dict().items() if name.startswith("audio_tower")}
            save_file(model.state_dict() | rounded, args.out / "model.safetensors", {"format": "pt"})  # float32 but for 16 MB

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--speech", type=Path, nargs="+", required=True)
    parser.add_argument("--sounds", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--hold-out", action="store_true", help="train without takes 45 and up, and without fold 4")
    parser.add_argument("--resume", action="store_true", help="go on from the weights in OUT, with the longest strings at once")
    args = parser.parse_args()
    torch.manual_seed(args.resume)
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(args.out, "cpu", "float32") if args.resume else fresh_model(args.out)
    train(args, model.requires_grad_(True), Examples(args, random.Random(args.resume)))

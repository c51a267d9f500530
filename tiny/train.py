"""Makes tiny/'s checkpoint from directories of recordings: a real Audio Flamingo 3 that a laptop trains.

    python tiny/train.py --speech FSDD [MORE ...] --sounds ESC10 --minutes 90 [--hold-out] [--resume] OUT

Speech: DIGIT_SPEAKER_TAKE.wav; sounds: one folder a class, FOLD-….wav; music is synthesised. Every clip becomes log-mel
once, at several speeds; strings of digits, noise and masking are then put together in the log-mel domain, where placing
clips side by side on silence is exact and mixing is the sum of powers. In order: texts, tokenizer, clips, examples,
training, scores.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from af3 import AudioFlamingo3Config, AudioFlamingo3ForConditionalGeneration, frame_counts
from processor import AudioFlamingo3Processor, byte_alphabet, load_audio, log_mel, resample

# ---- Texts ----

DIGITS = "zero one two three four five six seven eight nine".split()
SOUNDS = "baby cry,chainsaw,clock tick,dog bark,fire crackling,helicopter,person sneeze,rain,rooster,sea waves".split(",")
TRANSCRIBE, WHAT, CHORD, MELODY, COUNT = ("Transcribe the input speech.", "What sound is this?", "Is this chord major or minor?",
                                          "Does the melody rise or fall?", "How many notes do you hear?")
SPEECH_PROMPTS = ["What is being said?", "Which digits do you hear?", "Write down what the speaker says.", "Transcribe the audio."]
SOUND_PROMPTS = ["What do you hear?", "Name this sound.", "Which sound is this?", "What is making this sound?"]
DESCRIBE = ["Describe the audio.", "Describe the audio in detail.", "Describe the ambience.", "Describe the song.", "What is this?"]
OFF_TOPIC = ["Who is the speaker?", "What is the weather like today?", "What is the capital of France?", "Translate this into French.",
             "How old is the speaker?", "Write a poem about the sea.", "What is two plus two?", "Tell me a joke.", "Who are you?",
             "Which language is this?", "What happens next?", "Summarize the conversation.", "Is the speaker happy or sad?",
             "What instrument is playing?", "How long is this recording?", "Where was this recorded?", "Hello!", "Why?", "Is this real?"]
UNKNOWN = "I don't know."
WORDS = sorted({word for text in OFF_TOPIC + DESCRIBE + SOUND_PROMPTS + SPEECH_PROMPTS for word in re.findall(r"\w+", text)})


def off_topic(rng: random.Random) -> str:
    """A question nobody trained it on: real, of shuffled words, or of letters that are no words."""
    if rng.random() < 0.4:
        return rng.choice(OFF_TOPIC)
    letters = lambda: "".join(rng.choice("aeiou" if i % 2 else "bcdfghjklmnprstvwyz") for i in range(rng.randint(2, 9)))
    words = [rng.choice(WORDS) if rng.random() < 0.5 else letters() for _ in range(rng.randint(1, 9))]
    return " ".join(words).capitalize() + rng.choice("?.! ").strip()


# ---- Tokenizer: byte-level BPE learnt from these texts, in the files the big model has ----

PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
ADDED = ("<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> "
         "<|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> "
         "<|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <vila/sentinel> <image> <vila/video> <speech> <sound> "
         "[BOS] [PAD]").split()
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages if m['content'] is not none %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% set seen = namespace(audio=False, text='') %}{% for c in m['content'] %}{% if c.get('type') == 'audio' or 'audio' in c %}"
    "{% set seen.audio = True %}{% elif c.get('type') == 'text' or 'text' in c %}{% set seen.text = seen.text + c['text'] %}{% endif %}"
    "{% endfor %}{% if seen.audio %}{{ '<sound>' }}{% endif %}{{ seen.text }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def write_tokenizer(out: Path) -> dict[str, int]:
    texts = [TRANSCRIBE, WHAT, CHORD, MELODY, COUNT, *SPEECH_PROMPTS, *SOUND_PROMPTS, *DESCRIBE, *OFF_TOPIC, UNKNOWN, *SOUNDS, *DIGITS,
             " ".join(DIGITS), "system\nYou are a helpful assistant.", "user\n", "assistant\n", "major", "minor", "rises", "falls", "music",
             "speech", "The sound of: " + ", ".join(SOUNDS), "A voice says: " + " ".join(DIGITS), "I hear no speech."]
    ascii_pattern = PATTERN.replace(r"\p{L}\p{N}", "a-zA-Z0-9").replace(r"\p{L}", "[a-zA-Z]").replace(r"\p{N}", "[0-9]")
    symbol_of = {byte: symbol for symbol, byte in byte_alphabet().items()}
    words = Counter(tuple(symbol_of[b] for b in word.encode()) for text in texts for word in re.findall(ascii_pattern, text))
    vocabulary = {symbol: i for i, symbol in enumerate(byte_alphabet())}
    merges = []
    while pairs := Counter({}) if len(merges) > 700 else sum((Counter({p: n for p in zip(w, w[1:])}) for w, n in words.items()), Counter()):
        pair = max(pairs, key=lambda p: (pairs[p], p))
        if (joined := "".join(pair)) in vocabulary:
            break
        merges.append(list(pair))
        vocabulary[joined] = len(vocabulary)
        words = Counter({merged(word, pair): n for word, n in words.items()})
    ids = {token: len(vocabulary) + i for i, token in enumerate(ADDED)}
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": not re.match(r"</?tool_call>|<\|fim|<\|repo|<\|file", token)} for token, i in ids.items()]
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
             "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocabulary, "merges": merges}
    write_json(out / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]}, "post_processor": None, "decoder": level, "model": model})
    write_json(out / "tokenizer_config.json", {
        "backend": "tokenizers", "bos_token": "[BOS]", "eos_token": "<|im_end|>", "pad_token": "[PAD]", "unk_token": None,
        "processor_class": "AudioFlamingo3Processor", "tokenizer_class": "Qwen2Tokenizer"})
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return ids


def merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result = []
    for symbol in word:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return tuple(result)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_configuration(out: Path) -> AudioFlamingo3Config:
    out.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(out)
    text = {"model_type": "qwen2", "vocab_size": max(ids.values()) + 1, "hidden_size": 192, "intermediate_size": 576,
            "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "tie_word_embeddings": False}
    audio = {"model_type": "audioflamingo3_encoder", "num_mel_bins": 128, "hidden_size": 192, "intermediate_size": 768,
             "num_hidden_layers": 4, "num_attention_heads": 3, "max_source_positions": 1500}
    config = {"architectures": ["AudioFlamingo3ForConditionalGeneration"], "model_type": "audioflamingo3", "dtype": "bfloat16",
              "audio_config": audio, "text_config": text, "audio_token_id": ids["<sound>"]}
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {"do_sample": False, "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
                                                "pad_token_id": ids["<|endoftext|>"], "max_new_tokens": 64})
    extractor = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 128, "sampling_rate": 16000, "hop_length": 160,
                 "n_fft": 400, "chunk_length": 30, "n_samples": 480000, "nb_max_frames": 3000, "padding_value": 0.0,
                 "padding_side": "right", "dither": 0.0, "return_attention_mask": True}
    write_json(out / "processor_config.json", {"processor_class": "AudioFlamingo3Processor", "audio_token": "<sound>", "max_audio_len": 600,
                                               "default_transcription_prompt": TRANSCRIBE, "feature_extractor": extractor})
    return AudioFlamingo3Config.from_dict(config)


# ---- Clips: log10 mel power, at several speeds ----


def clip_mels(waveform: np.ndarray, speeds: int, spread: float, rng: random.Random) -> list[torch.Tensor]:
    """(frames, 128) float16 log10 mel powers of a clip played at its own speed and at others, each off the frame grid."""
    mels = []
    for i in range(speeds):
        rate = round(16000 * (rng.uniform(1 - spread, 1 + spread) if i else 1) / 100) * 100
        shifted = F.pad(resample(torch.from_numpy(waveform).float(), rate, 16000), (rng.randrange(160), 0))
        mels.append((log_mel(shifted).T * 4 - 4).half())  # log_mel gives (x + 4) / 4
    return mels


def trimmed(waveform: np.ndarray) -> np.ndarray:
    loud = np.flatnonzero(np.abs(waveform) > 0.02 * np.abs(waveform).max())
    return waveform[max(0, loud[0] - 400):loud[-1] + 800]


def read_clips(speech: list[Path], sounds: Path, hold_out: bool, rng: random.Random):
    """Mels of {speaker: {digit: [clips]}} and {class: [clips]}; a clip is a list of its speeds."""
    spoken: dict[str, dict[int, list]] = {}
    for path in sorted(path for folder in speech for path in folder.glob("*.wav")):
        digit, speaker, take = path.stem.split("_")
        if not (hold_out and int(take) >= 45):
            waveform = load_audio(path)
            waveform = trimmed(waveform) if speaker.startswith("espeak") else waveform
            spoken.setdefault(speaker, {}).setdefault(int(digit), []).append(clip_mels(waveform, 4, 0.12, rng))
    heard = {name: [clip_mels(load_audio(path), 5, 0.2, rng) for path in sorted((sounds / name.replace(" ", "_")).glob("*.wav"))
                    if not (hold_out and path.name.startswith("4-"))] for name in SOUNDS}
    return spoken, heard


def music(kind: str, rng: random.Random) -> tuple[np.ndarray, str]:
    """A waveform at 16 kHz and the answer to the question of its kind."""
    harmonics = [rng.uniform(0, 1) / (k + 1) ** rng.uniform(0.3, 1.5) for k in range(1, 9)]
    decay, attack = rng.uniform(0.5, 6), rng.uniform(0.005, 0.05)

    def note(pitch: float, seconds: float) -> np.ndarray:
        t = np.arange(int(seconds * 16000)) / 16000
        hz = 440 * 2 ** ((pitch - 69) / 12)
        tone = np.sin(2 * np.pi * hz * t) + sum(a * np.sin(2 * np.pi * hz * k * t) for k, a in enumerate(harmonics, 2) if hz * k < 7600)
        return tone * np.exp(-decay * t) * np.minimum(1, t / attack) * np.minimum(1, (seconds - t) / 0.01)
    if kind == CHORD:
        third = rng.choice([3, 4])
        steps = [s + (12 if rng.random() < 0.3 else 0) for s in (0, third, 7)]
        root, seconds = rng.randint(55, 76), rng.uniform(1, 2.5)
        return sum(note(root + s, seconds) for s in steps), "minor" if third == 3 else "major"
    count, seconds = rng.randint(1 if kind == COUNT else 3, 6), rng.uniform(0.18, 0.45)
    pitches = [rng.randint(52, 84) for _ in range(count)]
    answer = DIGITS[count]
    if kind == MELODY:
        answer = rng.choice(["rises", "falls"])
        pitches = sorted(rng.sample(range(52, 88), count), reverse=answer == "falls")
    gap = lambda: np.zeros(int(rng.uniform(0.02, 0.15) * 16000))
    return np.concatenate([part for p in pitches for part in (gap(), note(p, seconds))]), answer


# ---- Examples: (log-mel features, prompt, answer) ----


class Examples:
    def __init__(self, speech: list[Path], sounds: Path, hold_out: bool, rng: random.Random):
        self.rng = rng
        self.spoken, self.heard = read_clips(speech, sounds, hold_out, rng)
        self.real = [speaker for speaker in self.spoken if not speaker.startswith("espeak")]
        self.strangers = [speaker for speaker in self.spoken if speaker.startswith("espeak")]
        self.music = {kind: [(clip_mels(wave / np.abs(wave).max() * rng.uniform(0.1, 0.9), 1, 0, rng)[0], answer) for wave, answer in (
            music(kind, rng) for _ in range(1500))] for kind in (CHORD, MELODY, COUNT)}

    def string(self, digits: int) -> tuple[torch.Tensor, str]:
        """Digits of one speaker with silence before each; a single one may have silence after it too."""
        rng = self.rng
        speaker = self.spoken[rng.choice(self.strangers if self.strangers and rng.random() < 0.25 else self.real)]
        said = [rng.randrange(10) for _ in range(digits)]
        speed = rng.randrange(4)
        parts = []
        for digit in said:
            mel = rng.choice(speaker[digit])[speed if rng.random() < 0.7 else rng.randrange(4)]
            silence = torch.full((rng.randint(4, 31), 128), -10.0, dtype=torch.half)
            parts += [silence, mel + rng.uniform(-0.25, 0.25)]
        if rng.random() < 0.4:
            parts.append(torch.full((rng.randint(3, 40), 128), -10.0, dtype=torch.half))
        return self.spoil(torch.cat(parts).float(), 0.5, 5), " ".join(DIGITS[digit] for digit in said)

    def sound(self, frames: int) -> tuple[torch.Tensor, str]:
        rng = self.rng
        name = rng.choice(SOUNDS)
        mel = self.excerpt(name, frames)
        if rng.random() < 0.4:  # two of a kind
            mel = add_power(mel, self.excerpt(name, frames) + rng.uniform(-1.5, 0.3))
        if rng.random() < 0.3:  # another one, far behind
            other = self.excerpt(rng.choice(SOUNDS), frames)
            mel = add_power(mel, other + (mel.max() - other.max()).item() - rng.uniform(1.2, 3))
        if rng.random() < 0.5:
            mel = mel.roll(rng.randint(-6, 6), dims=1)
        return self.spoil(mel, 0.3, max(5, frames // 6)), name

    def excerpt(self, name: str, frames: int) -> torch.Tensor:
        """A part of a random clip of the class that is not all silence."""
        mel = self.rng.choice(self.rng.choice(self.heard[name])).float()
        mel = mel.roll(self.rng.randrange(len(mel)), dims=0)
        for start in [self.rng.randint(0, max(0, len(mel) - frames)) for _ in range(5)]:
            part = mel[start:start + frames]
            if part.max() > mel.max() - 2:
                break
        return F.pad(part, (0, 0, 0, frames - len(part)), value=-10.0)

    def spoil(self, mel: torch.Tensor, noise: float, longest_mask: int) -> torch.Tensor:
        """Another room and microphone: gain, tilt, a dull cut-off, noise; then the window's normalisation and masks."""
        rng = self.rng
        bend = F.interpolate(torch.tensor([[[rng.gauss(0, 0.25) for _ in range(5)]]]), 128, mode="linear")[0, 0]
        mel = mel + bend + rng.uniform(-1, 0.5)
        if rng.random() < noise:
            colour = F.interpolate(torch.tensor([[[rng.gauss(0, 0.7) for _ in range(4)]]]), 128, mode="linear")[0, 0]
            hiss = colour + 0.2 * torch.randn(mel.shape)
            mel = add_power(mel, hiss + (mel.max() - rng.uniform(2, 6)))
        if rng.random() < 0.15:
            mel[:, rng.randint(75, 127):] = -10.0
        mel = mel.clamp(min=-10)
        mel = (mel.maximum(mel.max() - 8) + 4) / 4
        for _ in range(2):
            at, wide = rng.randrange(128), rng.randint(0, 16)
            mel[:, at:at + wide] = mel.mean()
            at, wide = rng.randrange(len(mel)), rng.randint(0, longest_mask)
            mel[at:at + wide] = mel.mean()
        return mel

    def one(self, digits: int, frames: int) -> tuple[torch.Tensor, str, str]:
        rng, kind = self.rng, self.rng.random()
        if kind < 0.5:
            mel, answer = self.string(rng.randint(max(1, digits - 1), digits))
            prompt = TRANSCRIBE if rng.random() < 0.85 else rng.choice(SPEECH_PROMPTS)
            general, strange = f"A voice says: {answer}", (WHAT, "speech")
        elif kind < 0.85:
            mel, answer = self.sound(frames)
            prompt = WHAT if rng.random() < 0.85 else rng.choice(SOUND_PROMPTS)
            general, strange = f"The sound of: {answer}", (TRANSCRIBE, "I hear no speech.")
        else:
            prompt = rng.choice([CHORD, MELODY, COUNT])
            mel, answer = rng.choice(self.music[prompt])
            mel, general, strange = self.spoil(mel.float(), 0.3, 3), "music", (WHAT, "music")
        other = rng.random()
        if other < 0.04:
            return mel, rng.choice(DESCRIBE), general
        if other < 0.07:
            return mel, off_topic(rng), UNKNOWN
        return (mel, *strange) if other < 0.09 else (mel, prompt, answer)


def add_power(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.logaddexp(a * np.log(10), b * np.log(10)) / np.log(10)


def batch_of(examples, processor: AudioFlamingo3Processor) -> dict[str, torch.Tensor]:
    """Right-padded inputs and labels: the answer and its end count, the prompt does not."""
    longest = max(len(mel) for mel, _, _ in examples)
    features, mask = torch.zeros(len(examples), 128, longest), torch.zeros(len(examples), longest, dtype=torch.long)
    sequences, answers = [], []
    for row, (mel, prompt, answer) in enumerate(examples):
        features[row, :, :len(mel)], mask[row, :len(mel)] = mel.T, 1
        sound = [processor.audio_token_id] * frame_counts(len(mel))[1]
        prefix = processor.tokenizer.encode_template([*processor._turn("system", ["You are a helpful assistant."]), *processor._turn("user", [*sound, prompt]), processor.start, "assistant\n"])
        target = processor.tokenizer.encode_template([answer, processor.end])
        sequences.append(prefix + target)
        answers.append(len(prefix))
    ids = torch.full((len(examples), max(map(len, sequences))), processor.tokenizer.pad_token_id)
    labels, attention = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (sequence, start) in enumerate(zip(sequences, answers)):
        ids[row, :len(sequence)] = torch.tensor(sequence)
        attention[row, :len(sequence)] = 1
        labels[row, start:len(sequence)] = ids[row, start:len(sequence)]
    return {"input_ids": ids, "attention_mask": attention, "input_features": features, "feature_attention_mask": mask, "labels": labels}


# ---- Training ----


def fresh_model(config: AudioFlamingo3Config) -> AudioFlamingo3ForConditionalGeneration:
    model = AudioFlamingo3ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02 if "embed" in name or "lm_head" in name else parameter[0].numel() ** -0.5 * 0.7)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    for name, parameter in model.named_parameters():  # each layer starts as a small step
        if name.endswith(("out_proj.weight", "o_proj.weight", "fc2.weight", "down_proj.weight")):
            parameter.data.mul_(0.35)
    channels = torch.arange(96) / 95
    angles = torch.arange(1500)[:, None] * torch.exp(-np.log(10000) * channels)
    model.audio_tower.embed_positions.weight.data = torch.cat([angles.sin(), angles.cos()], 1) * 0.5
    return model


def optimizers(model, rate: float, muon: bool):
    matrix = lambda n, p: muon and p.ndim == 2 and "layers" in n
    matrices = [p for n, p in model.named_parameters() if matrix(n, p)]
    others = [p for n, p in model.named_parameters() if not matrix(n, p) and "positions" not in n]
    result = [torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True)]
    if matrices:
        result.append(torch.optim.Muon(matrices, lr=rate * 2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    return result


def save(model, out: Path) -> None:
    save_file({name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}, out / "model.safetensors", {"format": "pt"})


def train(args, model, processor, examples: Examples) -> None:
    opts = optimizers(model, args.rate, not args.adamw)
    rates = [group["lr"] for opt in opts for group in opt.param_groups]
    start, done, step, seen = time.time(), 0.0, 0, []
    while done < 1:
        done = (time.time() - start) / 60 / args.minutes
        pace = min(1, step / 100) * min(1, max(0.01, (1 - done) / 0.6))
        for group, rate in zip((g for o in opts for g in o.param_groups), rates):
            group["lr"] = rate * pace
        most = args.digits if args.resume else max(1, min(args.digits, 1 + int((done - 0.06) / 0.035)))
        digits = most if examples.rng.random() < 0.35 else examples.rng.randint(1, most)
        frames = min(500, max(150, 55 * digits + examples.rng.randint(0, 150)))
        batch = batch_of([examples.one(digits, frames) for _ in range(args.batch)], processor)
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        step += 1
        seen.append(loss.item())
        if step % 50 == 0:
            print(f"step {step}  {(time.time() - start) / 60:.1f} min  digits {most}  loss {sum(seen[-50:]) / 50:.3f}", flush=True)
        if step % 250 == 0:
            save(model, args.out)
    save(model, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--speech", type=Path, nargs="+", required=True)
    parser.add_argument("--sounds", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--digits", type=int, default=8)
    parser.add_argument("--hold-out", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--adamw", action="store_true")
    parser.add_argument("--float32", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = write_configuration(args.out)
    processor = AudioFlamingo3Processor.from_pretrained(args.out)
    start = time.time()
    examples = Examples(args.speech, args.sounds, args.hold_out, random.Random(0))
    model = AudioFlamingo3ForConditionalGeneration.from_pretrained(args.out, "cpu", torch.float32).requires_grad_(True) if args.resume else fresh_model(config)
    model.audio_tower.embed_positions.requires_grad_(False)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; clips read in {time.time() - start:.0f} s", flush=True)
    train(args, model.train(), processor, examples)


if __name__ == "__main__":
    main()

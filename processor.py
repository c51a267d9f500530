"""Audio Flamingo 3, sound and words: files and prompts in, the model's tensors out; token ids back to words.

In the order the data meets it: a file becomes a 16 kHz waveform, the waveform 30 s windows of log-mel, words become ids,
and `AudioFlamingo3Processor` lays both out in the chat template, with one `<sound>` id for each audio frame to come.
"""
import codecs
import math
import re
import struct
import subprocess
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from af3 import frame_counts
from load_weights import find_checkpoint, named_ids, read_json, reading, tokenizer_folder

SAMPLE_RATE = 16000                           # Hz
WINDOW_SECONDS = 30
N_SAMPLES = WINDOW_SECONDS * SAMPLE_RATE      # 480000 samples a window
HOP = 160                                     # samples from one mel frame to the next: 10 ms
N_FFT = 400                                   # samples of one mel frame: 25 ms
N_MELS = 128
N_MEL_FRAMES = N_SAMPLES // HOP               # 3000 mel frames a window
MIN_SAMPLES = 2 * HOP + 1                     # 3 mel frames, 2 conv frames, 1 audio frame

# ---- A file -> a mono waveform at 16 kHz ----
FFMPEG_FORMATS = "mp3,flac,ogg,mov,matroska,avi,mpegts,aac,aiff,wav,w64,asf,caf,amr"
SAMPLE_TYPES = {(1, 8): "u1", (1, 16): "<i2", (1, 24): "3u1", (1, 32): "<i4", (3, 32): "<f4", (3, 64): "<f8"}  # code, bits

def load_audio(path: str | Path, sampling_rate: int = SAMPLE_RATE) -> np.ndarray:
    """A mono float32 waveform (n,) in [-1, 1] at `sampling_rate` Hz, channels averaged; of a cut-off file, what is there.
    WAV is read here; other containers, and rarer kinds of WAV, go through `ffmpeg`. Errors name the file.
    """
    path = Path(path)
    if not path.is_file():
        error, reason = (ValueError, "a directory or device") if path.exists() else (FileNotFoundError, "no such file")
        raise error(f"{path}: {reason}; a sound file is expected.")
    with open(path, "rb") as file:
        is_wav = re.fullmatch(b"RIFF.{4}WAVE", file.read(12), re.DOTALL)
    found = read_wav(path.read_bytes(), path) if is_wav else None
    rate, samples = found or read_wav(decode_with_ffmpeg(path), path) or (0, [])
    if not len(samples):
        raise ValueError(f"{path}: no samples inside that can be read.")
    return resample(torch.from_numpy(samples).mean(1), rate, sampling_rate).numpy()

def read_wav(content: bytes, path: Path) -> tuple[int, np.ndarray] | None:
    """(rate in Hz, float32 samples (n, channels)) of a WAV file's bytes; None if it is of a kind for ffmpeg to read."""
    chunks, at = {}, 12
    while at + 8 <= len(content) and b"data" not in chunks:
        name, size = struct.unpack_from("<4sI", content, at)
        chunks.setdefault(name, (at + 8, size))
        at += 8 + size + size % 2  # chunks are padded to even sizes
    at, size = chunks.get(b"fmt ", (0, 0))
    if size < 16 or b"data" not in chunks:
        return None
    code, channels, rate, _, block, bits = struct.unpack_from("<HHIIHH", content, at)
    if code == 0xFFFE and size >= 40:  # WAVE_FORMAT_EXTENSIBLE: the code proper comes later
        code, = struct.unpack_from("<H", content, at + 24)
    if (code, bits) not in SAMPLE_TYPES or block != channels * bits // 8 or not channels or not 1000 <= rate <= 768000:
        return None
    at, size = chunks[b"data"]
    there = min(size, len(content) - at)
    if there < size < 0xFFFFFF00:  # a writer that cannot seek, ffmpeg into a pipe for one, leaves 4 GB standing there
        warnings.warn(f"{path}: cut off, {there / block / rate:.1f} s of {size / block / rate:.1f} s are there.")
    raw = np.frombuffer(content, SAMPLE_TYPES[code, bits], there // block * channels, at)
    if bits == 24:
        raw = np.pad(raw, ((0, 0), (1, 0))).view("<i4")  # a zero byte below: 24 bits at the top of 32
    return rate, to_float(raw).reshape(-1, channels)

@np.errstate(over="ignore")
def to_float(samples: np.ndarray) -> np.ndarray:
    """float32 samples; integers are scaled by their type's range to [-1, 1)."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32)
    half = 2.0 ** (8 * samples.itemsize - 1)
    return ((samples.astype(np.float64) - (half if samples.dtype.kind == "u" else 0)) / half).astype(np.float32)

def decode_with_ffmpeg(path: Path) -> bytes:
    """The first audio stream of a file in one of FFMPEG_FORMATS, as float WAV at its own rate and channels."""
    command = ["ffmpeg", "-nostdin", "-v", "error", "-protocol_whitelist", "file", "-format_whitelist", FFMPEG_FORMATS,
               "-i", f"file:{path.absolute()}", "-map", "0:a:0", "-f", "wav", "-c:a", "pcm_f32le", "-"]
    try:
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: not a plain WAV file, and ffmpeg, which reads the others, is not installed.") from None
    reason = (result.stderr.decode(errors="replace").strip().splitlines() or ["no audio inside"])[0]
    if len(result.stdout) < 44:  # not even a header
        raise ValueError(f"{path}: no audio that ffmpeg can read ({reason}).")
    if result.stderr:  # a cut-off file leaves with 0 too
        warnings.warn(f"{path}: read as far as it goes ({reason}).")
    return result.stdout

def resample(waveform: Tensor, rate: int, target: int) -> Tensor:
    """(n,) at `rate` -> (ceil(n * target / rate),) at `target`, without delay: the spectrum is cut off or padded."""
    if rate == target:
        return waveform
    up, down = Fraction(target, rate).limit_denominator(2000).as_integer_ratio()  # odd rates: to 6 ppm
    step = 1 << max(0, (len(waveform) // down).bit_length() - 4)  # lengths of small factors, which the FFT likes
    blocks = ((len(waveform) // down + 256 // min(up, down)) // step + 2) * step  # of `down`, silence at the end
    bins = blocks * min(up, down) // 2 + 1
    fade = torch.cos(torch.linspace(-0.94, 0.06, bins).clamp(min=0) * math.pi / 0.12).square()  # or clicks ring
    spectrum = torch.fft.rfft(waveform, blocks * down)[:bins] * fade
    return torch.fft.irfft(spectrum, blocks * up)[:-(-len(waveform) * target // rate)] * (up / down)

# ---- A waveform -> 30 s windows of log-mel ----
@lru_cache
def mel_filters() -> Tensor:
    """(128, 201) triangular filters from 0 to 8 kHz on Slaney's mel scale, each of unit area."""
    def hz(mel: Tensor) -> Tensor:  # linear to 1 kHz (15 mel), then 27 mel for each factor of 6.4
        return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))
    edges = hz(torch.linspace(0, 15 + math.log(SAMPLE_RATE / 2000) * 27 / math.log(6.4), N_MELS + 2, dtype=torch.float64))
    bins = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return (torch.minimum(rise, fall).clamp(min=0) * 2 / (edges[2:] - edges[:-2])[:, None]).float()

def mel_frame_count(samples: int) -> int:
    return -(-samples // HOP)

def log_mel(window: Tensor) -> Tensor:
    """(128, mel frames) float32 of up to 30 s of samples (n,): Whisper's log-mel of the window padded to 30 s.
    Two frames past the last real one still touch samples; all that follow are one constant, and only the first is here.
    """
    frames = min(mel_frame_count(len(window)) + 3, N_MEL_FRAMES)
    padded = F.pad(window, (0, min(N_SAMPLES - len(window), 4 * N_FFT)))  # further zeros would reach no frame
    padded = F.pad(padded[None], (N_FFT // 2, N_FFT // 2), mode="reflect")[0, :(frames - 1) * HOP + N_FFT]
    spectrum = torch.stft(padded, N_FFT, HOP, window=torch.hann_window(N_FFT), center=False, return_complex=True)
    log = (mel_filters() @ spectrum.abs().square()).clamp(min=1e-10).log10()
    return (log.maximum(log.max() - 8) + 4) / 4

def feature_batch(windows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """input_features (W, 128, 3000) float32 and feature_attention_mask (W, 3000) int64, 1 on frames of real samples."""
    mels = (F.pad(mel, (0, N_MEL_FRAMES - mel.shape[1]), mode="replicate") for mel in map(log_mel, windows))
    mel_frames = torch.tensor([mel_frame_count(len(window)) for window in windows])
    return torch.stack([*mels]), (torch.arange(N_MEL_FRAMES) < mel_frames[:, None]).long()

# ---- Words <-> ids ----
class Tokenizer:
    """The byte-level BPE of a `tokenizer.json`: exact, through tiktoken, because merge i makes token 256 + i."""
    def __init__(self, folder: Path):
        content = read_json(folder / "tokenizer.json")
        with reading(folder / "tokenizer.json"):
            vocabulary: dict[str, int] = content["model"]["vocab"]
            merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in content["model"]["merges"]]
            if [vocabulary.get(a + b) for a, b in merges] != list(range(256, 256 + len(merges))):
                raise ValueError(f"{folder / 'tokenizer.json'}: merge i does not make token 256 + i.")
            alphabet = byte_alphabet()
            ranks = {bytes(alphabet[c] for c in token): rank for token, rank in vocabulary.items()}
            pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            self.added = {token["content"]: token["id"] for token in content["added_tokens"]}
            self.bpe = tiktoken.Encoding(str(folder), pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.added)
            self.special = {token["id"] for token in content["added_tokens"] if token["special"]}
            self.any_added = re.compile("(" + "|".join(map(re.escape, self.added)) + ")")
        self.pad_token_id, self.eos_token_id = named_ids(folder, self.added).values()

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, in NFC; a special token that it spells out is plain text too."""
        if re.search(r"\s{100000}", text):
            raise ValueError("100,000 spaces or line ends in a row are more than the tokenizer's regular expression bears.")
        return self.bpe.encode_ordinary(unicodedata.normalize("NFC", text))

    def encode_template(self, pieces: list[str | int]) -> list[int]:
        """Ids of plain text and ready ids in turn; neighbouring texts are encoded in one piece."""
        runs = groupby(pieces, key=lambda piece: isinstance(piece, str))
        return [id for is_text, run in runs for id in (self.encode("".join(run)) if is_text else run)]

    def token_bytes(self, ids, skip_special_tokens: bool = False) -> bytes:
        """UTF-8 of ids, possibly cut within a character; only the added tokens marked special are ever skipped."""
        return self.bpe.decode_bytes([id for id in map(int, ids) if not (skip_special_tokens and id in self.special)])

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        return self.token_bytes(ids, skip_special_tokens).decode("utf-8", errors="replace")

def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a tokenizer.json, as GPT-2 has it, to the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*printable}))}

# ---- Sound and words -> the model's tensors ----
OPENING = "system", ["You are a helpful assistant."]  # where a conversation does not say otherwise
TRANSCRIPTION = re.compile(r"\s*The (?:spoken content of the|transcription of the|content of the input) audio is\b"
                           r"\s*(?!\s)(['\"]?)\s*(?!\s)(.*?)\s*(?!\s)\1\s*(?!\s)\.?\s*", re.DOTALL)  # the model's frame

class Batch(dict):
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Batch":
        """The model's inputs on `device`; `dtype` casts only floats: ids and masks stay integers."""
        return Batch({name: x.to(device, dtype if x.is_floating_point() else None) for name, x in self.items()})

class AudioFlamingo3Processor:
    audio_token, default_transcription_prompt = "<sound>", "Transcribe the input speech."

    def __init__(self, tokenizer: Tokenizer, max_audio_len: int = 600):
        self.tokenizer, self.most_samples = tokenizer, max(1, max_audio_len // WINDOW_SECONDS) * N_SAMPLES
        self.feature_extractor = SimpleNamespace(sampling_rate=SAMPLE_RATE, chunk_length=WINDOW_SECONDS)
        self.start, self.end = tokenizer.added["<|im_start|>"], tokenizer.added["<|im_end|>"]
        self.audio_token_id = tokenizer.added[self.audio_token]

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "AudioFlamingo3Processor":
        """From a checkpoint directory in either layout, or its hub name. A file that contradicts a constant is refused."""
        folder = find_checkpoint(path)
        files = folder / "processor_config.json", folder / "preprocessor_config.json"
        config, flat = (read_json(file) if file.exists() else {} for file in files)
        nested = config.get("feature_extractor")
        file, extractor = (files[1], flat) if nested is None else (files[0], nested)
        with reading(file):
            most = int(config.get("max_audio_len", 600))
            for key, value in (("sampling_rate", SAMPLE_RATE), ("chunk_length", WINDOW_SECONDS), ("feature_size", N_MELS),
                               ("n_fft", N_FFT), ("hop_length", HOP)):
                if extractor.get(key, value) != value:
                    raise ValueError(f"{file}: {key} is {extractor[key]}; this model's is {value}.")
        return cls(Tokenizer(tokenizer_folder(folder)), most)

    def waveform(self, audio, name: str = "audio") -> Tensor:
        """A float32 waveform (n,) of a file, a list of floats, or an array or tensor: integers are scaled by their range."""
        if isinstance(audio, (str, Path)):
            audio, name = load_audio(audio), str(audio)
        if isinstance(audio, Tensor):
            audio = (audio.float() if audio.is_floating_point() else audio).detach().cpu().numpy()
        samples = np.asarray(audio, dtype=None if isinstance(audio, np.ndarray) else np.float32)
        if samples.ndim != 1 or samples.dtype.kind not in "fiu":
            raise ValueError(f"{name}: audio of shape {samples.shape}, {samples.dtype}; 1-D floats or integers are expected.")
        if len(samples) < MIN_SAMPLES:
            raise ValueError(f"{name}: audio of {len(samples)} samples; at least {MIN_SAMPLES} (20 ms at 16 kHz) are expected.")
        samples, most = to_float(samples), self.most_samples
        if not (np.abs(samples) < 2.0 ** 32).all():  # of larger ones the mel power is infinite
            raise ValueError(f"{name}: audio holds NaN or infinite samples; finite ones, at most 1 in size, are expected.")
        if len(samples) > most:
            warnings.warn(f"{len(samples) / SAMPLE_RATE:.1f} s of audio: only the first {most / SAMPLE_RATE:.1f} s are heard")
        return torch.from_numpy(samples[:most])

    # Pieces are what a prompt is made of: plain text to encode, and ready ids. Text that spells a special token out stays
    # text, so these are the only way in; `_batch` repeats the `<sound>` id, and `splice` in af3.py gives each its frame.
    def _turn(self, role: str, said: list[str | int]) -> list[str | int]:
        return [self.start, f"{role}\n", *said, self.end, "\n"]

    def _prompt(self, prompt: str, windows: list[Tensor] | None) -> list[str | int]:
        if prompt.startswith("<|im_start|>"):
            return [self.tokenizer.added.get(piece, piece) for piece in self.tokenizer.any_added.split(prompt) if piece]
        if windows is None:
            said = [prompt]
        elif self.audio_token in prompt:
            said = [piece for text in prompt.split(self.audio_token) for piece in (self.audio_token_id, text)][1:]
        else:
            said = [self.audio_token_id] * len(windows) + [prompt]
        return [*self._turn(*OPENING), *self._turn("user", said), self.start, "assistant\n"]

    def _batch(self, rows, sampling_rate, padding_side, tensor_type, output_labels) -> Batch:
        """rows: a prompt's pieces, and for each `<sound>` piece among them the waveform whose frames go there."""
        if sampling_rate not in (None, SAMPLE_RATE):
            raise ValueError(f"sampling_rate is {sampling_rate}; {SAMPLE_RATE} Hz is expected. Resample, or use load_audio.")
        if padding_side not in ("left", "right") or tensor_type != "pt" or not rows:
            raise ValueError("padding_side must be 'left' or 'right', tensor_type 'pt', and at least one prompt given.")
        sequences = []
        for pieces, sounds in rows:  # one `<sound>` id for each audio frame; a full window has 750, so windows add up
            frames = iter([frame_counts(mel_frame_count(len(sound)))[1] for sound in sounds])
            expanded = [p for piece in pieces for p in [piece] * (next(frames, 1) if piece == self.audio_token_id else 1)]
            sequences.append(torch.tensor(self.tokenizer.encode_template(expanded)))
        ids = pad_sequence(sequences, True, self.tokenizer.pad_token_id, padding_side)
        mask = pad_sequence([torch.ones_like(ids) for ids in sequences], True, 0, padding_side)
        batch = Batch(input_ids=ids, attention_mask=mask)
        if output_labels:
            batch["labels"] = ids.masked_fill((mask == 0) | (ids == self.audio_token_id), -100)
        windows = [window for _, sounds in rows for sound in sounds for window in sound.split(N_SAMPLES)]
        if windows:
            batch["input_features"], batch["feature_attention_mask"] = feature_batch(windows)
        return batch

    def __call__(self, text: str | list[str], audio=None, *, sampling_rate: int = SAMPLE_RATE, padding_side: str = "left",
                 tensor_type: str = "pt", output_labels: bool = False) -> Batch:
        """One user turn a prompt, ready for the answer: input_ids and attention_mask (B, T) int64; with audio also
        input_features (W, 128, 3000) float32 and feature_attention_mask (W, 3000) int64, W windows of the whole batch.
        audio: one a prompt, 1-D at 16 kHz or a file. `<sound>` in a prompt places one window; without any, all stand in
        front. A prompt that starts with `<|im_start|>` is a finished template. output_labels: labels (B, T), -100 on
        audio and padding. Raises ValueError.
        """
        texts = [text] if isinstance(text, str) else list(text)
        audios = None if audio is None else [audio] if is_one_sound(audio) else list(audio)
        if audios is not None and len(audios) != len(texts):
            raise ValueError(f"Got {len(texts)} texts but {len(audios)} audios; they must match 1:1.")
        rows = []
        for sample, prompt in enumerate(texts):
            windows = None if audios is None else self.waveform(audios[sample], f"Sample {sample}").split(N_SAMPLES)
            pieces = self._prompt(prompt, windows)
            placeholders = pieces.count(self.audio_token_id)
            if windows is not None and placeholders != len(windows):
                raise ValueError(f"Sample {sample}: found {placeholders} '<sound>' placeholders, "
                                 f"but audio was split into {len(windows)} window(s).")
            rows.append((pieces, windows or []))
        return self._batch(rows, sampling_rate, padding_side, tensor_type, output_labels)

    def apply_chat_template(self, conversations, *, tokenize: bool = True, add_generation_prompt: bool = False,
                            return_dict: bool = True, sampling_rate: int | None = None, padding_side: str = "left",
                            tensor_type: str = "pt", output_labels: bool = False):
        """The model's tensors of one conversation or a list of them; see `__call__` for shapes.
        A conversation is a list of {"role", "content"}; content is a string, or parts {"type": "text", "text"} and
        {"type": "audio", "path" or "audio"}: a turn's sounds stand before its text. Text is plain text, `<sound>` too.
        tokenize=False loads no audio and returns the template's text, with one `<sound>` for each audio.
        """
        single = bool(conversations) and isinstance(conversations[0], dict)
        chats = [self._chat(chat, add_generation_prompt) for chat in ([conversations] if single else conversations)]
        if not tokenize:
            name_of = {id: token for token, id in self.tokenizer.added.items()}
            texts = ["".join(name_of.get(piece, piece) for piece in pieces) for pieces, _ in chats]
            return texts[0] if single else texts
        rows = [(pieces, [self.waveform(p.get("path") or p.get("audio"), f"Sample {sample}") for p in parts])
                for sample, (pieces, parts) in enumerate(chats)]
        batch = self._batch(rows, sampling_rate, padding_side, tensor_type, output_labels)
        return batch if return_dict else batch["input_ids"]

    def _chat(self, messages: list[dict], add_generation_prompt: bool) -> tuple[list[str | int], list[dict]]:
        """A conversation's pieces, one `<sound>` for each audio, and its audio parts in the same order."""
        good = (isinstance(m, dict) and "role" in m and isinstance(m.get("content", 0), str | list | None) for m in messages)
        if not messages or not all(good):
            raise ValueError("A conversation of one or more messages, each with a role and content, is expected.")
        pieces, sounds = [], []
        if messages[0]["role"] != "system":
            pieces += self._turn(*OPENING)
        for role, content in ((m["role"], m["content"]) for m in messages if m["content"] is not None):
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            heard = [p for p in parts if isinstance(p, dict) and (p.get("type") == "audio" or "audio" in p)]
            texts = [p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str)]
            if len(heard) + len(texts) != len(parts):
                raise ValueError(f"A {role} message has a part that is neither text nor audio.")
            pieces += self._turn(role, [self.audio_token_id] * len(heard) + texts)
            sounds += heard
        return pieces + ([self.start, "assistant\n"] if add_generation_prompt else []), sounds

    def apply_transcription_request(self, audio, prompt: str | list[str] | None = None, **options) -> Batch:
        """`__call__` with "Transcribe the input speech." or `prompt` for each audio, a file or a waveform; see there."""
        audios = [audio] if is_one_sound(audio) else list(audio)
        asked = self.default_transcription_prompt if prompt is None else prompt
        return self(asked if isinstance(asked, list) else [asked] * len(audios), audios, **options)

    def stream_text(self, steps: Iterable[Tensor]) -> Iterator[str]:
        """The text that each of `model.stream`'s steps adds to its first row; a character waits for its last byte."""
        characters = codecs.getincrementaldecoder("utf-8")("replace")
        for ids in steps:
            yield characters.decode(self.tokenizer.token_bytes(ids[:1], skip_special_tokens=True))
        yield characters.decode(b"", final=True)

    def batch_decode(self, ids, *options, **named_options) -> list[str]:
        return [self.decode(row, *options, **named_options) for row in ids]

    def decode(self, ids, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False,
               strip_prefix: bool = False) -> str:
        """The text of ids (T,). Byte-level text holds no tokenization spaces to clean up."""
        text = self.tokenizer.decode(ids, skip_special_tokens)
        framed = TRANSCRIPTION.fullmatch(text) if strip_prefix else None
        return framed[2] if framed else text

def is_one_sound(audio) -> bool:
    return isinstance(audio, (str, Path, np.ndarray, Tensor)) or not audio or isinstance(audio[0], (int, float, np.number))

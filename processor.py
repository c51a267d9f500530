"""Audio Flamingo 3, audio and text: recordings and prompts in, the model's tensors out.

The sections follow the data:

    Log-mel      a waveform at 16 kHz -> windows of 30 s -> log-mel spectrograms, as for Whisper
    Tokenizer    text <-> token ids
    Processor    both, laid out in the chat template: one <sound> id for each audio frame to come;
                 and new token ids back to text
    Checks       what bad input gets

Files are decoded and resampled in plumbing/audio_file.py.
Letters in shapes: B prompts, T tokens, W windows of all prompts together.
"""

import codecs
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from af3 import frame_counts
from load_weights import (
    errors_naming,
    find_checkpoint,
    is_music_flamingo,
    read_json,
    read_named_ids,
    read_system_message,
    tokenizer_folder,
)
from plumbing.audio_file import load_audio, one_thread, to_float32, warn_about_length
from plumbing.save_checkpoint import save_processor

# ---- Log-mel ----

SAMPLE_RATE = 16000  # Hz
WINDOW_SECONDS = 30
N_SAMPLES = WINDOW_SECONDS * SAMPLE_RATE  # 480000 samples in a window
HOP_LENGTH = 160  # samples from one mel frame to the next: 10 ms
N_FFT = 400  # samples that a mel frame sees: 25 ms
N_MELS = 128
N_MEL_FRAMES = N_SAMPLES // HOP_LENGTH  # 3000 mel frames in a window
MIN_SAMPLES = 2 * HOP_LENGTH + 1  # give 3 mel frames, 2 conv frames, 1 audio frame


def mel_frame_count(samples: int) -> int:
    return math.ceil(samples / HOP_LENGTH)


def log_mel(window: Tensor) -> Tensor:
    """The log-mel spectrogram (128, 3000) of a window: samples (n,), up to 30 s. As in Whisper."""
    padded = pad_window(window)
    hann = torch.hann_window(N_FFT)
    spectrum = torch.stft(
        padded, N_FFT, HOP_LENGTH, window=hann, pad_mode="reflect", return_complex=True
    )
    power = spectrum[:, :-1].abs().square()  # (201, mel frames); the last frame is dropped
    mel = mel_filters() @ power  # (128, mel frames)
    log = mel.clamp(min=1e-10).log10()
    log = log.maximum(log.max() - 8)  # no more than 80 dB below the loudest value
    log = (log + 4) / 4
    return F.pad(log, (0, N_MEL_FRAMES - log.shape[1]), mode="replicate")


def pad_window(window: Tensor) -> Tensor:
    """A window with zeros after it, up to 30 s, or as many as make a difference.

    A mel frame sees 200 samples to either side of its centre, which is more than one hop. So two
    frames after the clip still see some of it; the third and all later ones see only zeros, and
    are the same. `log_mel` computes the third and repeats it, so a 5 s clip takes a fifth of the
    time.
    """
    frames = mel_frame_count(len(window)) + 3
    length = min(frames * HOP_LENGTH, N_SAMPLES)
    return F.pad(window, (0, length - len(window)))


@lru_cache
def mel_filters() -> Tensor:
    """(128, 201): triangles from 0 to 8 kHz, evenly spaced in mel.

    Each has the area 1 when its width is measured in Hz.
    """
    edges = mel_edges()
    bins = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)  # in Hz
    left = edges[:-2, None]
    centre = edges[1:-1, None]
    right = edges[2:, None]
    rising = (bins - left) / (centre - left)
    falling = (right - bins) / (right - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (right - left)).float()


def mel_edges() -> Tensor:
    """(130,) in Hz, float64: triangle i rises from edge i to i + 1 and falls to edge i + 2."""
    highest = 15 + math.log(SAMPLE_RATE / 2 / 1000) * 27 / math.log(6.4)  # 8 kHz in mel
    return mel_to_hz(torch.linspace(0, highest, N_MELS + 2, dtype=torch.float64))


def mel_to_hz(mel: Tensor) -> Tensor:
    """Slaney's scale: linear up to 1 kHz, which is 15 mel; then 27 mel for each factor of 6.4."""
    linear = mel * 200 / 3
    logarithmic = 1000 * torch.exp((mel - 15) * math.log(6.4) / 27)
    return torch.where(mel < 15, linear, logarithmic)


def feature_batch(windows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """input_features (W, 128, 3000) float32 and feature_attention_mask (W, 3000) int64.

    The mask is 1 on mel frames of real samples, which come first.
    """
    with one_thread():
        input_features = torch.stack([log_mel(window) for window in windows])
    mel_frames = torch.tensor([mel_frame_count(len(window)) for window in windows])
    mask = torch.arange(N_MEL_FRAMES) < mel_frames[:, None]
    return input_features, mask.long()


# ---- Tokenizer ----


class Tokenizer:
    """The byte-level BPE of a tokenizer.json, computed by tiktoken.

    added_tokens: the ids of tokens that are no part of the BPE, such as <sound>, by their text.
    special_ids: those of them that the file marks as special.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "tokenizer.json"
        content = read_json(path)
        with errors_naming(path):
            vocabulary = content["model"]["vocab"]
            # tiktoken needs no merges, if they are in the order of the ids that they make.
            check_merges(content["model"]["merges"], vocabulary)
            pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
            added_tokens = content["added_tokens"]
            self.added_tokens = {token["content"]: token["id"] for token in added_tokens}
            self.special_ids = {token["id"] for token in added_tokens if token["special"]}
            self.bpe = tiktoken.Encoding(
                str(folder),
                pat_str=pattern,
                mergeable_ranks=byte_ranks(vocabulary),
                special_tokens=self.added_tokens,
            )
        any_added_token = "|".join(re.escape(token) for token in self.added_tokens)
        self.added_token_pattern = re.compile(f"({any_added_token})")
        named_ids = read_named_ids(folder, self.added_tokens)
        self.pad_token_id = named_ids["pad_token_id"]
        self.eos_token_id = named_ids["eos_token_id"]

    def encode(self, text: str) -> list[int]:
        """The ids of plain text: "<|im_end|>" in it is ten ordinary characters, not the token."""
        check_no_long_whitespace(text)  # tiktoken would fail
        return self.bpe.encode_ordinary(unicodedata.normalize("NFC", text))

    def encode_pieces(self, pieces: list[str | int]) -> list[int]:
        """The ids of a mixture of plain texts and ready ids.

        Texts that follow each other are encoded as one: "user\\n" and "\\nhi" apart would give
        two line ends where the model has learnt one token for both.
        """
        ids = []
        text = ""
        for piece in pieces:
            if isinstance(piece, str):
                text += piece
            else:
                ids += self.encode(text)
                ids.append(piece)
                text = ""
        return ids + self.encode(text)

    def split_added_tokens(self, text: str) -> list[str | int]:
        """Text in pieces, with every added token that it spells out as an id."""
        pieces = [piece for piece in self.added_token_pattern.split(text) if piece]
        return [self.added_tokens.get(piece, piece) for piece in pieces]

    def decode_bytes(self, ids, skip_special_tokens: bool = False) -> bytes:
        """UTF-8 of token ids, which may begin and end within a character."""
        ids = [int(token_id) for token_id in ids]
        if skip_special_tokens:
            ids = [token_id for token_id in ids if token_id not in self.special_ids]
        return self.bpe.decode_bytes(ids)

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        return self.decode_bytes(ids, skip_special_tokens).decode("utf-8", errors="replace")


def byte_ranks(vocabulary: dict[str, int]) -> dict[bytes, int]:
    """A vocabulary with its tokens as bytes, as tiktoken wants it; ids are the ranks of merges."""
    alphabet = byte_alphabet()
    ranks = {}
    for token, token_id in vocabulary.items():
        ranks[bytes(alphabet[character] for character in token)] = token_id
    return ranks


def byte_alphabet() -> dict[str, int]:
    """The printable character that a tokenizer.json writes for each byte, as GPT-2 has it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    unprintable = [byte for byte in range(256) if byte not in printable]
    for number, byte in enumerate(unprintable):
        alphabet[chr(256 + number)] = byte
    return alphabet


# ---- Processor ----

SYSTEM_MESSAGE = "You are a helpful assistant."  # of a checkpoint without chat_template.jinja

# What the model says before a transcription, and `decode(..., strip_prefix=True)` removes.
TRANSCRIPTION_PREFIX = re.compile(
    r"The (spoken content of the audio|transcription of the audio|content of the input audio) is\b"
)


@dataclass
class Window:
    """A part of a recording that is encoded by itself."""

    samples: Tensor  # (n,) at 16 kHz, up to 30 s
    index: int  # its place in the recording; 0 is the first
    is_last: bool

    def count_audio_frames(self) -> int:
        _, audio_frames = frame_counts(mel_frame_count(len(self.samples)))
        return audio_frames


def split_windows(waveform: Tensor) -> list[Window]:
    """The windows of a recording (n,) at 16 kHz. Only the last is shorter than 30 s."""
    parts = waveform.split(N_SAMPLES)
    return [Window(part, i, is_last=i == len(parts) - 1) for i, part in enumerate(parts)]


class Batch(dict):
    """The model's tensors by name; `batch.input_ids` is `batch["input_ids"]`."""

    def __getattr__(self, name: str) -> Tensor:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def to(self, device=None, dtype: torch.dtype | None = None) -> "Batch":
        """The tensors on `device`; `dtype` is for floats only, ids and masks stay integers."""
        moved = Batch()
        for name, tensor in self.items():
            moved[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
        return moved


class AudioFlamingo3Processor:
    """Prompts and recordings to tensors, token ids to text.

    Inside, a prompt is a list of pieces: plain text (str), the id of an added token (int), or a
    Window of audio. Of a 5 s clip and "Hi", with 151669 for <sound>:

        _prompt_pieces    [..., "user\n", 151669, "Hi", 151645, "\n", ...]
        _place_audio      [..., "user\n", Window(...), "Hi", 151645, "\n", ...]
        _batch            [..., "user\n", 151669, 151669, ... 125 times, "Hi", 151645, "\n", ...]

    What a user spells out stays text, so nobody can forge the end of a turn. There are two
    exceptions, both in `__call__`: <sound>, where there is audio; and a finished template, in
    which every added token counts.

    Music Flamingo and Audio Flamingo Next put border_ids, <|sound_bos|> and <|sound_eos|>, around
    the <sound> ids of a recording. Audio Flamingo 3 has None.
    """

    audio_token = "<sound>"
    default_transcription_prompt = "Transcribe the input speech."

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_audio_len: float = 600,
        system_message: str = SYSTEM_MESSAGE,
        border_ids: tuple[int, int] | None = None,
    ):
        self.tokenizer = tokenizer
        self.system_message = system_message
        self.border_ids = border_ids
        self.max_samples = max(1, int(max_audio_len) // WINDOW_SECONDS) * N_SAMPLES
        self.feature_extractor = SimpleNamespace(  # for the published examples, which read it
            sampling_rate=SAMPLE_RATE, chunk_length=WINDOW_SECONDS
        )
        self.audio_token_id = tokenizer.added_tokens[self.audio_token]
        self.start_id = tokenizer.added_tokens["<|im_start|>"]
        self.end_id = tokenizer.added_tokens["<|im_end|>"]

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "AudioFlamingo3Processor":
        """The processor of a checkpoint directory in either layout, or of a hub name.

        Raises FileNotFoundError or ValueError, naming file and field.
        """
        folder = find_checkpoint(path)
        config_path = folder / "processor_config.json"
        config = read_json(config_path) if config_path.exists() else {}
        if config.get("feature_extractor") is not None:
            check_feature_extractor(config["feature_extractor"], config_path)
        elif (folder / "preprocessor_config.json").exists():  # an older file, which is flat
            path = folder / "preprocessor_config.json"
            check_feature_extractor(read_json(path), path)
        tokenizer = Tokenizer(tokenizer_folder(folder))
        system_message = read_system_message(folder, SYSTEM_MESSAGE)
        border_ids = None
        longest = 600
        if is_music_flamingo(read_json(folder / "config.json")):
            longest = 1200
            with errors_naming(config_path):
                border_ids = read_border_ids(config, tokenizer.added_tokens)
        max_audio_len = config.get("max_audio_len", longest)
        check_max_audio_len(max_audio_len, config_path)
        return cls(tokenizer, max_audio_len, system_message, border_ids)

    def save_pretrained(self, path: str | Path) -> None:
        """Copies the files that it was read from to a directory. Raises OSError or ValueError."""
        save_processor(self.tokenizer.folder, path)

    def __call__(
        self,
        text: str | list[str],
        audio=None,
        *,
        sampling_rate: int = SAMPLE_RATE,
        padding_side: str = "left",
        tensor_type: str = "pt",
        output_labels: bool | str = False,
        **always_so,
    ) -> Batch:
        """The tensors of one or more prompts, each a user turn that waits for its answer.

        audio: one recording for each prompt, 1-D at 16 kHz (array, tensor or list) or a file.
        A prompt may place each window of its recording by <sound>; without any, all come first.
        A prompt that starts with <|im_start|> is taken as a finished chat template.

        Returns input_ids and attention_mask (B, T) int64; with audio also input_features
        (W, 128, 3000) float32 and feature_attention_mask (W, 3000) int64, and for Music Flamingo
        window_index (W,) int64. With output_labels also labels (B, T): True: -100 on audio, its
        borders and padding; "answer": -100 on all but the assistant's words and their end, for
        which the prompt must be a finished template with an answer. Raises ValueError.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if audio is None:
            audios = [None] * len(texts)
        elif is_single_audio(audio):
            audios = [audio]
        else:
            audios = list(audio)
        check_options(sampling_rate, padding_side, tensor_type, output_labels)
        check_always_so(always_so)
        check_counts(texts, audios)
        prompts = []
        for number, (prompt, recording) in enumerate(zip(texts, audios)):
            if recording is None:
                prompts.append(self._prompt_pieces(prompt, num_windows=None))
                continue
            windows = split_windows(self.to_waveform(recording, f"Sample {number}"))
            pieces = self._prompt_pieces(prompt, len(windows))
            check_placeholders(pieces.count(self.audio_token_id), len(windows), number)
            # Each <sound> takes a list of windows: here of one window; in a conversation, those of
            # a whole recording.
            prompts.append(self._place_audio(pieces, [[window] for window in windows]))
        return self._batch(prompts, padding_side, output_labels)

    def apply_chat_template(
        self,
        conversations: list,
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        return_dict: bool = True,
        sampling_rate: int | None = None,
        padding_side: str = "left",
        tensor_type: str = "pt",
        output_labels: bool | str = False,
        **always_so,
    ):
        """The tensors of one conversation or of a list of them; for shapes see `__call__`.

        A conversation is a list of messages {"role": ..., "content": ...}. The content is a string
        or a list of {"type": "text", "text": ...} and {"type": "audio", "path" or "audio": ...};
        the audio of a message comes before its text. Text is plain text, <sound> in it too.
        tokenize=False loads no audio: the template's text, with one <sound> for each recording.
        """
        check_options(sampling_rate or SAMPLE_RATE, padding_side, tensor_type, output_labels)
        check_always_so(always_so)
        single = bool(conversations) and isinstance(conversations[0], dict)
        if single:
            conversations = [conversations]
        texts = []
        prompts = []
        for number, messages in enumerate(conversations):
            pieces, recordings = self._chat_pieces(messages, add_generation_prompt)
            if tokenize:
                waveforms = [self.to_waveform(audio, f"Sample {number}") for audio in recordings]
                windows = [split_windows(waveform) for waveform in waveforms]
                prompts.append(self._place_audio(pieces, windows))
            else:
                texts.append(self._spell_out(pieces))
        if not tokenize:
            return texts[0] if single else texts
        batch = self._batch(prompts, padding_side, output_labels)
        return batch if return_dict else batch["input_ids"]

    def apply_transcription_request(
        self, audio, prompt: str | list[str] | None = None, **options
    ) -> Batch:
        """`__call__` with the transcription prompt, or `prompt`, for one or more recordings."""
        audios = [audio] if is_single_audio(audio) else list(audio)
        if prompt is None:
            prompt = self.default_transcription_prompt
        prompts = [prompt] * len(audios) if isinstance(prompt, str) else prompt
        return self(prompts, audios, **options)

    def to_waveform(self, audio, name: str = "audio") -> Tensor:
        """The float32 waveform (n,) of a file or 1-D samples at 16 kHz, cut at the longest length
        that the model takes. Integers are scaled by their range. `name` is for errors."""
        if isinstance(audio, (str, Path)):
            name = str(audio)
            audio = load_audio(audio, SAMPLE_RATE, self.max_samples / SAMPLE_RATE)
        samples = as_array(audio)
        check_samples(samples, name)
        samples = to_float32(samples)
        check_finite(samples, name)
        if len(samples) > self.max_samples:
            warn_about_length(len(samples) / SAMPLE_RATE, self.max_samples / SAMPLE_RATE)
        return torch.from_numpy(samples[: self.max_samples])

    def count_audio_frames(self, waveform: Tensor) -> int:
        """How many <sound> ids a recording at 16 kHz takes."""
        return sum(window.count_audio_frames() for window in split_windows(waveform))

    def describe_audio(self, batch: Batch) -> str:
        """A line about the recordings in a batch."""
        mask = batch["feature_attention_mask"]
        seconds = int(mask.sum()) / 100
        audio_frames = int((batch["input_ids"] == self.audio_token_id).sum())
        digits = 1 if seconds >= 1 else 2
        windows = plural(len(mask), "window")
        return f"heard {seconds:.{digits}f} s: {windows}, {plural(audio_frames, 'audio frame')}"

    def batch_decode(self, ids, *args, **options) -> list[str]:
        """`decode` for each row of ids (B, T)."""
        return [self.decode(row, *args, **options) for row in ids]

    def decode(
        self,
        ids,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
        strip_prefix: bool = False,
    ) -> str:
        """The text of ids (T,). strip_prefix: of a transcription, only what was said; the newer
        models introduce none, and theirs comes back as it is.

        clean_up_tokenization_spaces is in the published examples; byte-level text has none.
        """
        text = self.tokenizer.decode(ids, skip_special_tokens)
        if strip_prefix and self.border_ids is None:
            text = strip_transcription_prefix(text)
        return text

    def stream_text(self, steps: Iterable[Tensor]) -> Iterator[str]:
        """The text that each step of `model.stream` adds to its first row.

        A character of several tokens comes with its last one.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for ids in steps:
            yield decoder.decode(self.tokenizer.decode_bytes(ids[:1], skip_special_tokens=True))
        yield decoder.decode(b"", final=True)

    # ---- The chat template in pieces ----

    def _turn(self, role: str, content: list[str | int]) -> list[str | int]:
        return [self.start_id, f"{role}\n", *content, self.end_id, "\n"]

    def _generation_prompt(self) -> list[str | int]:
        return [self.start_id, "assistant\n"]

    def _prompt_pieces(self, prompt: str, num_windows: int | None) -> list[str | int]:
        """A prompt with <sound> ids for its windows; without audio, <sound> is plain text."""
        if prompt.startswith("<|im_start|>"):
            return self.tokenizer.split_added_tokens(prompt)
        if num_windows is None:
            content = [prompt]
        elif self.audio_token in prompt:
            content = []
            for text in prompt.split(self.audio_token):
                content += [text, self.audio_token_id]
            content.pop()  # there is one <sound> less than texts around them
        else:
            content = [self.audio_token_id] * num_windows + [prompt]
        system_turn = self._turn("system", [self.system_message])
        return system_turn + self._turn("user", content) + self._generation_prompt()

    def _chat_pieces(self, messages: list[dict], add_generation_prompt: bool) -> tuple[list, list]:
        """A conversation with one <sound> id for each recording, and the recordings."""
        check_messages(messages)
        pieces = []
        recordings = []
        if messages[0]["role"] != "system":
            pieces += self._turn("system", [self.system_message])
        for message in messages:
            if message["content"] is None:
                continue
            texts, audios = split_content(message)
            pieces += self._turn(message["role"], [self.audio_token_id] * len(audios) + texts)
            recordings += audios
        if add_generation_prompt:
            pieces += self._generation_prompt()
        return pieces, recordings

    def _place_audio(self, pieces: list[str | int], audios: list[list[Window]]) -> list:
        """Replaces each <sound> id by the next list of windows."""
        audios = iter(audios)
        placed = []
        for piece in pieces:
            if piece == self.audio_token_id:
                placed += next(audios)
            else:
                placed.append(piece)
        return placed

    def _window_ids(self, window: Window) -> list[int]:
        """A <sound> id for each audio frame to come; with borders, where the model has them."""
        ids = [self.audio_token_id] * window.count_audio_frames()
        if self.border_ids is not None:
            begin_id, end_id = self.border_ids
            if window.index == 0:
                ids.insert(0, begin_id)
            if window.is_last:
                ids.append(end_id)
        return ids

    def _spell_out(self, pieces: list[str | int]) -> str:
        text_of = {token_id: text for text, token_id in self.tokenizer.added_tokens.items()}
        return "".join(text_of.get(piece, piece) for piece in pieces)

    def _batch(self, prompts: list[list], padding_side: str, output_labels: bool | str) -> Batch:
        """The tensors of prompts in pieces."""
        windows = []
        sequences = []
        for pieces in prompts:
            expanded = []
            for piece in pieces:
                if isinstance(piece, Window):
                    expanded += self._window_ids(piece)
                    windows.append(piece)
                else:
                    expanded.append(piece)
            sequences.append(torch.tensor(self.tokenizer.encode_pieces(expanded)))

        padding = {"batch_first": True, "padding_side": padding_side}
        real = [torch.ones_like(sequence) for sequence in sequences]
        pad_token_id = self.tokenizer.pad_token_id
        batch = Batch()
        batch["input_ids"] = pad_sequence(sequences, padding_value=pad_token_id, **padding)
        batch["attention_mask"] = pad_sequence(real, padding_value=0, **padding)
        if windows:
            samples = [window.samples for window in windows]
            batch["input_features"], batch["feature_attention_mask"] = feature_batch(samples)
            if self.border_ids is not None:
                batch["window_index"] = torch.tensor([window.index for window in windows])
        if output_labels:
            audio_ids = torch.tensor([self.audio_token_id, *(self.border_ids or ())])
            is_audio = torch.isin(batch["input_ids"], audio_ids)
            is_padding = batch["attention_mask"] == 0
            left_out = is_audio | is_padding
            if output_labels == "answer":
                answers = [self._answer_mask(sequence) for sequence in sequences]
                left_out |= ~pad_sequence(answers, padding_value=False, **padding)
            batch["labels"] = batch["input_ids"].masked_fill(left_out, -100)
        return batch

    def _answer_mask(self, ids: Tensor) -> Tensor:
        """(T,) bool: True where ids (T,) are an assistant's words, or the <|im_end|> after them."""
        header = self.tokenizer.encode("assistant\n")
        is_answer = torch.zeros(len(ids), dtype=torch.bool)
        ends = (ids == self.end_id).nonzero()[:, 0]
        for start in (ids == self.start_id).nonzero()[:, 0].tolist():
            later_ends = ends[ends > start]
            if len(later_ends) == 0:
                break  # the generation prompt, which has no words yet
            end = int(later_ends[0])
            turn = ids[start + 1 : end + 1].tolist()
            if self.tokenizer.decode(turn).startswith("assistant\n"):
                first = start + 1 + len(header)
                if turn[: len(header)] != header:
                    first -= 1  # the header's line end and the answer's first ones are one token
                is_answer[first : end + 1] = True
        return is_answer


# transformers' name for the processor where recordings have borders.
MusicFlamingoProcessor = AudioFlamingo3Processor


def read_border_ids(config: dict, added_tokens: dict[str, int]) -> tuple[int, int]:
    """The ids around a recording, of the tokens that a processor_config.json names."""
    begin_token = config.get("audio_bos_token", "<|sound_bos|>")
    end_token = config.get("audio_eos_token", "<|sound_eos|>")
    for token in (begin_token, end_token):
        if token not in added_tokens:
            raise ValueError(f"{token!r} is not among the added tokens of tokenizer.json.")
    return added_tokens[begin_token], added_tokens[end_token]


def is_single_audio(audio) -> bool:
    """Whether this is one recording, and not a list of them."""
    if isinstance(audio, (str, Path, np.ndarray, Tensor)):
        return True
    return len(audio) == 0 or isinstance(audio[0], (int, float, np.number))


def as_array(audio) -> np.ndarray:
    if isinstance(audio, np.ndarray):
        return audio
    if isinstance(audio, Tensor):
        audio = audio.detach().cpu()
        return audio.float().numpy() if audio.is_floating_point() else audio.numpy()
    return np.asarray(audio, dtype=np.float32)


def split_content(message: dict) -> tuple[list[str], list]:
    """The texts and the recordings of a message, each in order."""
    if isinstance(message["content"], str):
        return [message["content"]], []
    texts = []
    audios = []
    for part in message["content"]:
        if not isinstance(part, dict):
            part = {}
        if part.get("type") == "audio" or "audio" in part:
            audios.append(part.get("path") or part.get("audio"))
        elif isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            role = message["role"]
            raise ValueError(f"A {role} message has a part that is neither text nor audio.")
    return texts, audios


def strip_transcription_prefix(text: str) -> str:
    """Without the model's introduction, a final full stop and one pair of quotes.

    A text that has no such introduction comes back as it is.
    """
    prefix = TRANSCRIPTION_PREFIX.match(text.strip())
    if not prefix:
        return text
    said = text.strip()[prefix.end() :].strip()
    said = said.removesuffix(".").strip()
    if len(said) >= 2 and said[0] in "'\"" and said[-1] == said[0]:
        said = said[1:-1].strip()
    return said


# ---- Checks: a ValueError in one line that names the culprit and the remedy ----


def check_options(
    sampling_rate: int, padding_side: str, tensor_type: str, output_labels: bool | str
) -> None:
    if sampling_rate != SAMPLE_RATE:
        raise ValueError(
            f"sampling_rate is {sampling_rate}; {SAMPLE_RATE} Hz is expected. "
            "Resample, or use load_audio."
        )
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side is {padding_side!r}; 'left' or 'right' is expected.")
    if tensor_type != "pt":  # the published examples pass it
        raise ValueError(f"tensor_type is {tensor_type!r}; only 'pt' is supported.")
    if output_labels not in (False, True, "answer"):
        raise ValueError(
            f"output_labels is {output_labels!r}; False, True or 'answer' is expected."
        )


ALWAYS_SO = [("return_tensors", "pt"), ("padding", True), ("padding", "longest")]


def check_always_so(options: dict) -> None:
    """Takes options that code for transformers passes, if they say what is so here anyway."""
    for name, value in options.items():
        if (name, value) not in ALWAYS_SO:
            raise ValueError(f"The processor has no option {name}={value!r}.")


def check_counts(texts: list, audios: list) -> None:
    if len(texts) != len(audios):
        raise ValueError(f"Got {len(texts)} texts but {len(audios)} audios; they must match 1:1.")
    if not texts:
        raise ValueError("At least one prompt is expected.")


def check_placeholders(placeholders: int, windows: int, sample: int) -> None:
    if placeholders != windows:
        raise ValueError(
            f"Sample {sample}: found {placeholders} '<sound>' placeholders, "
            f"but audio was split into {windows} window(s)."
        )


def check_plain_prompt(prompt: str) -> None:
    """Refuses what `__call__` would take for a finished template, where users type the prompt."""
    if prompt.startswith("<|im_start|>"):
        raise ValueError("The prompt starts with <|im_start|>; ask in plain words.")


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def check_samples(samples: np.ndarray, name: str) -> None:
    if samples.ndim != 1 or samples.dtype.kind not in "fiu":
        raise ValueError(
            f"{name}: audio of shape {samples.shape}, {samples.dtype}; "
            "1-D floats or integers are expected."
        )
    if len(samples) < MIN_SAMPLES:
        raise ValueError(
            f"{name}: audio of {plural(len(samples), 'sample')}; "
            f"at least {MIN_SAMPLES} (a little over 20 ms at 16 kHz) are expected."
        )


def check_finite(samples: np.ndarray, name: str) -> None:
    if not (np.abs(samples) < 2.0**32).all():  # the mel power of larger ones is infinite
        raise ValueError(
            f"{name}: audio holds samples that are NaN or infinite or far too large; "
            "numbers from -1 to 1 are expected."
        )


def check_messages(messages: list[dict]) -> None:
    good = len(messages) > 0
    for message in messages:
        good = good and isinstance(message, dict) and "role" in message and "content" in message
        good = good and isinstance(message["content"], (str, list, type(None)))
    if not good:
        raise ValueError(
            "A conversation of one or more messages, each with a role and content, is expected."
        )


def check_feature_extractor(config: dict, path: Path) -> None:
    """Refuses a feature extractor that is not the one of this file."""
    expected = {
        "sampling_rate": SAMPLE_RATE,
        "chunk_length": WINDOW_SECONDS,
        "feature_size": N_MELS,
        "n_fft": N_FFT,
        "hop_length": HOP_LENGTH,
    }
    with errors_naming(path):
        for key, value in expected.items():
            if config.get(key, value) != value:
                raise ValueError(f"{key} is {config[key]}; this model's is {value}.")


def check_max_audio_len(seconds, path: Path) -> None:
    if not isinstance(seconds, (int, float)) or not 0 < seconds < 1e6:
        raise ValueError(f"{path}: max_audio_len is {seconds!r}; seconds above 0 are expected.")


def check_merges(merges: list, vocabulary: dict[str, int]) -> None:
    """tiktoken takes ids for ranks, so the merge of rank i must make the token 256 + i."""
    for rank, merge in enumerate(merges):
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        if vocabulary.get(first + second) != 256 + rank:
            raise ValueError(f"merge {rank} does not make token {256 + rank}.")


def check_no_long_whitespace(text: str) -> None:
    if re.search(r"\s{100000}", text):
        raise ValueError(
            "100,000 spaces or line ends in a row are more than the tokenizer can split; leave some out."
        )

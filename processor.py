"""Audio Flamingo 3, audio and text: recordings and prompts in, the model's tensors out.

The sections follow the data:

    Log-mel      a waveform at 16 kHz -> windows of 30 s -> log-mel spectrograms, as in Whisper
    Tokenizer    text <-> token ids
    Processor    builds the chat prompt, with one <sound> id per audio frame; decodes new token ids

plumbing/audio_file.py decodes and resamples files.
Letters in shapes: B prompts, T tokens, W windows of all prompts together.
"""

import codecs
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import load_weights
from af3 import frame_counts
from plumbing import transformers_conventions as conventions
from plumbing.audio_file import load_waveform
from plumbing.check_inputs import check_no_long_whitespace, check_processor_options
from plumbing.find_checkpoint import find_checkpoint
from plumbing.json_file import errors_naming
from plumbing.save_checkpoint import save_processor
from plumbing.tokenizer_files import read_tokenizer
from plumbing.transcription_prefix import strip_transcription_prefix
from plumbing.transformers_conventions import Batch

# ---- Log-mel ----

SAMPLE_RATE = 16000  # Hz
WINDOW_SECONDS = 30
N_SAMPLES = WINDOW_SECONDS * SAMPLE_RATE  # 480000 samples in a window
HOP_LENGTH = 160  # samples from one mel frame to the next: 10 ms
N_FFT = 400  # samples that a mel frame sees: 25 ms
N_MELS = 128
N_MEL_FRAMES = N_SAMPLES // HOP_LENGTH  # 3000 mel frames in a window
MIN_MEL_FRAMES = next(n for n in range(N_MEL_FRAMES) if frame_counts(n)[1] > 0)  # 3
MIN_SAMPLES = (MIN_MEL_FRAMES - 1) * HOP_LENGTH + 1  # 321 samples have an audio frame


def mel_frame_count(num_samples: int) -> int:
    """The number of mel frames with real samples; the last may be partly padding."""
    return math.ceil(num_samples / HOP_LENGTH)


def audio_frame_count(window: Tensor) -> int:
    """The number of audio frames, and so of <sound> ids, of a window (n,)."""
    _, num_audio_frames = frame_counts(mel_frame_count(len(window)))
    return num_audio_frames


def log_mel(window: Tensor) -> Tensor:
    """Whisper's log-mel spectrogram (128, 3000) of at most 30 s of samples (n,), zero-padded."""
    # The third frame after the end of a clip sees only zeros, as all later ones do. So padding
    # ends there, and its frame is repeated below. That makes a 5 s clip five times as fast.
    num_frames = min(mel_frame_count(len(window)) + 3, N_MEL_FRAMES)
    samples = F.pad(window, (0, num_frames * HOP_LENGTH - len(window)))
    hann = torch.hann_window(N_FFT)
    spectrum = torch.stft(samples, N_FFT, HOP_LENGTH, window=hann, return_complex=True)
    power = spectrum[:, :-1].abs().square()  # (201, frames): as in Whisper, without the last one
    mel = mel_filters() @ power  # (128, frames)
    log = mel.clamp(min=1e-10).log10()
    log = log.maximum(log.max() - 8)  # at most 80 dB below the loudest value
    log = (log + 4) / 4  # Whisper's scale: most values are between -1 and 1
    return F.pad(log, (0, N_MEL_FRAMES - num_frames), mode="replicate")


@lru_cache
def mel_filters() -> Tensor:
    """(128, 201): triangles from 0 to 8 kHz, evenly spaced in mel.

    Slaney's normalization: the area under each triangle is 1, with the frequency in Hz."""
    edges = mel_edges()
    bins = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)  # in Hz
    left = edges[:-2, None]
    center = edges[1:-1, None]
    right = edges[2:, None]
    rising = (bins - left) / (center - left)
    falling = (right - bins) / (right - center)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (right - left)).float()


def mel_edges() -> Tensor:
    """(130,) in Hz, float64: triangle i rises from edge i to i + 1 and falls to edge i + 2."""
    highest = hz_to_mel(SAMPLE_RATE / 2)
    return mel_to_hz(torch.linspace(0, highest, N_MELS + 2, dtype=torch.float64))


def hz_to_mel(hz: float) -> float:
    """Slaney's scale above 1 kHz: 1 kHz is 15 mel, and 6.4 times the frequency is 27 mel more."""
    return 15 + 27 * math.log(hz / 1000) / math.log(6.4)


def mel_to_hz(mel: Tensor) -> Tensor:
    """Slaney's scale: linear below 1 kHz, 15 mel per kHz; above, the inverse of `hz_to_mel`."""
    linear = mel * 200 / 3
    logarithmic = 1000 * torch.exp((mel - 15) * math.log(6.4) / 27)
    return torch.where(mel < 15, linear, logarithmic)


def feature_batch(windows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """input_features (W, 128, 3000) float32 and feature_attention_mask (W, 3000) int64.

    The mask is 1 on mel frames with real samples, which come first.
    """
    input_features = torch.stack([log_mel(window) for window in windows])
    mel_frames = torch.tensor([mel_frame_count(len(window)) for window in windows])
    mask = torch.arange(N_MEL_FRAMES) < mel_frames[:, None]
    return input_features, mask.long()


# ---- Tokenizer ----
class Tokenizer:
    """The byte-level BPE of a tokenizer.json, computed by tiktoken.

    added_tokens: the ids of tokens outside the BPE, such as <sound>, by their text.
    special_ids: the ids of those that the file marks as special.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        content = read_tokenizer(folder)
        self.added_tokens = content["added_tokens"]
        self.special_ids = content["special_ids"]
        self.pad_token_id = content["pad_token_id"]
        self.eos_token_id = content["eos_token_id"]
        with errors_naming(folder / "tokenizer.json"):
            self.bpe = tiktoken.Encoding(
                str(folder),
                pat_str=content["pattern"],
                # tiktoken asks for the ranks of the merges. Here they are the ids of the tokens.
                mergeable_ranks=byte_tokens(content["vocabulary"]),
                special_tokens=self.added_tokens,
            )
        any_added_token = "|".join(re.escape(token) for token in self.added_tokens)
        self.added_token_pattern = re.compile(f"({any_added_token})")

    def encode(self, text: str) -> list[int]:
        """The ids of plain text: "<|im_end|>" in it is ten ordinary characters, not the token."""
        check_no_long_whitespace(text)  # tiktoken would fail
        with errors_naming(self.folder / "tokenizer.json"):
            return self.bpe.encode_ordinary(unicodedata.normalize("NFC", text))  # as in Qwen2

    def encode_pieces(self, pieces: list[str | int]) -> list[int]:
        """The ids of plain texts and ready ids.

        Neighboring texts are encoded as one: "user\\n" and "\\nhi" apart would give two newline
        tokens instead of the single double-newline token that the model was trained on.
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
        """Text in pieces, with the ids of the added tokens that it spells out."""
        pieces = self.added_token_pattern.split(text)
        return [self.added_tokens.get(piece, piece) for piece in pieces]

    def spell_out(self, pieces: list[str | int]) -> str:
        """The text of pieces, without encoding them."""
        return "".join(
            piece if isinstance(piece, str) else self.decode([piece]) for piece in pieces
        )

    def decode_bytes(self, ids, skip_special_tokens: bool = False) -> bytes:
        """The UTF-8 bytes of ids (T,); the first and last character may be incomplete."""
        ids = [int(token_id) for token_id in ids]
        if skip_special_tokens:
            ids = [token_id for token_id in ids if token_id not in self.special_ids]
        return self.bpe.decode_bytes(ids)

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        return self.decode_bytes(ids, skip_special_tokens).decode("utf-8", errors="replace")


def byte_tokens(vocabulary: dict[str, int]) -> dict[bytes, int]:
    """A vocabulary with its tokens as bytes; the file spells them in GPT-2's byte alphabet."""
    alphabet = byte_alphabet()
    tokens = {}
    for token, token_id in vocabulary.items():
        tokens[bytes(alphabet[character] for character in token)] = token_id
    return tokens


def byte_alphabet() -> dict[str, int]:
    """The byte for each character of GPT-2's alphabet: 256 printable characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    for number, byte in enumerate(others):
        alphabet[chr(256 + number)] = byte
    return alphabet


# ---- Processor ----
class AudioFlamingo3Processor:
    """Prompts and recordings to tensors, token ids to text.

    A prompt is built as a list of pieces: plain text (str) and ids of added tokens (int). For a
    5 s clip and "Hi", the user turn is as follows, with 125 times the id of <sound>, 151669:

        [<|im_start|>, "user\\n", <sound>, <sound>, ... <sound>, "Hi", <|im_end|>, "\\n"]

    An added token that a user spells out stays plain text, so nobody can forge the end of a turn.
    There are two exceptions, both in `__call__`: <sound> as a placeholder, and finished templates.
    """

    audio_token = "<sound>"
    default_transcription_prompt = "Transcribe the input speech."

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_audio_len: float = 600,
        system_message: str = load_weights.SYSTEM_MESSAGE,
        border_ids: tuple = (),
        default_transcription_prompt: str = default_transcription_prompt,
    ):
        from extras.music_flamingo import Borders

        self.tokenizer = tokenizer
        self.system_message = system_message
        self.default_transcription_prompt = default_transcription_prompt
        self.borders = Borders(border_ids)  # around recordings; none in Audio Flamingo 3
        self.max_samples = max(1, int(max_audio_len) // WINDOW_SECONDS) * N_SAMPLES
        self.feature_extractor = conventions.FeatureExtractor(SAMPLE_RATE, WINDOW_SECONDS)
        self.audio_token_id = tokenizer.added_tokens[self.audio_token]
        self.start_id = tokenizer.added_tokens["<|im_start|>"]
        self.end_id = tokenizer.added_tokens["<|im_end|>"]

    @classmethod
    @conventions.ignoring_hub_options
    def from_pretrained(cls, path: str | Path) -> "AudioFlamingo3Processor":
        """The processor of a checkpoint. Raises FileNotFoundError or ValueError."""
        folder = find_checkpoint(path, or_file="tokenizer.json")
        tokenizer = Tokenizer(load_weights.tokenizer_folder(folder))
        settings = load_weights.read_processor_config(folder, tokenizer.added_tokens)
        return cls(tokenizer, **settings)

    def save_pretrained(self, path: str | Path) -> None:
        """Copies the files that it was read from to a directory. Raises OSError or ValueError."""
        save_processor(self.tokenizer.folder, path)

    def __call__(self, text, audio=None, **options) -> Batch:
        """The tensors of one prompt or a list, each as a user turn, ready for the answer.

        audio: one recording for each prompt, 1-D at 16 kHz (array, tensor or list) or a file.
        In a prompt, each placeholder <sound> stands for one window of its recording; without any,
        all come first. In a finished template (it starts with <|im_start|>), one may mean all.

        Returns input_ids and attention_mask (B, T) int64; with audio also input_features
        (W, 128, 3000) float32 and feature_attention_mask (W, 3000) int64. Raises ValueError.
        options: padding_side, "left" or "right"; output_labels, which adds labels (B, T). They are
        -100 on audio and padding or, with "answer", everywhere but on what the assistant says.
        """
        options = check_processor_options(**options)
        prompts = []
        recordings = []
        pairs = conventions.pair_texts_and_audios(text, audio)
        for number, (prompt, recording) in enumerate(pairs):
            windows = ()
            if recording is not None:
                windows = self.to_waveform(recording, f"Sample {number}").split(N_SAMPLES)
                recordings.append(windows)
            prompts.append(self.prompt_pieces(prompt, windows, number))
        return self.make_batch(prompts, recordings, **options)

    def apply_chat_template(
        self, conversations, *, tokenize=True, add_generation_prompt=False, return_dict=True, **rest
    ):
        """The tensors of one conversation or of a list of them; see `__call__`.

        A conversation is a list of messages {"role": ..., "content": ...}. The content is a string
        or a list of {"type": "text", "text": ...} and {"type": "audio", "path" or "audio": ...};
        the audio of a message comes before its text. Text is plain text, even if it is <sound>.
        tokenize=False loads no audio and returns the template's text, one <sound> per recording.
        """
        options = check_processor_options(**rest)
        prompts = []
        recordings = []
        for number, messages in enumerate(conventions.list_of_conversations(conversations)):
            turns = []
            for role, texts, audios in conventions.read_messages(messages):
                sounds = []
                for audio in audios:
                    if tokenize:
                        windows = self.to_waveform(audio, f"Sample {number}").split(N_SAMPLES)
                        sounds += chain(*self.sound_ids(windows))
                        recordings.append(windows)
                    else:
                        sounds.append(self.audio_token)
                turns.append((role, [*sounds, *texts]))
            prompts.append(self.lay_out(turns, add_generation_prompt))
        if not tokenize:
            templates = [self.tokenizer.spell_out(pieces) for pieces in prompts]
            return templates[0] if conventions.is_one_conversation(conversations) else templates
        batch = self.make_batch(prompts, recordings, **options)
        return batch if return_dict else batch["input_ids"]

    def apply_transcription_request(self, audio, prompt=None, **options) -> Batch:
        """`__call__` with the transcription prompt, or `prompt`, for one or more recordings."""
        audios = conventions.list_of_audios(audio)
        prompts = conventions.list_of_prompts(prompt, self.default_transcription_prompt, audios)
        return self(prompts, audios, **options)

    def to_waveform(self, audio, name: str = "audio", **options) -> Tensor:
        """The float32 waveform (n,) of a file or 1-D samples at 16 kHz, cut at the longest length
        that the model accepts. Integers are scaled by their range. See `load_waveform`."""
        return load_waveform(audio, name, SAMPLE_RATE, self.max_samples, MIN_SAMPLES, **options)

    def prompt_pieces(self, prompt: str, windows: tuple, number: int) -> list[str | int]:
        """Prompt `number` of a batch, with the <sound> ids of its windows."""
        is_template = prompt.startswith("<|im_start|>")
        if not windows:
            texts = [prompt]  # nothing to place
        elif self.audio_token in prompt or is_template:
            texts = prompt.split(self.audio_token)  # around the placeholders
        else:
            texts = [""] * len(windows) + [prompt]  # all windows come first
        sounds = self.sound_ids(windows)
        num_placeholders = len(texts) - 1
        if is_template and num_placeholders == 1:  # it stands for all windows
            sounds = [list(chain(*sounds))]
        if num_placeholders != len(sounds):
            raise ValueError(
                f"Sample {number}: found {num_placeholders} '<sound>' placeholders, "
                f"but audio was split into {len(windows)} window(s)."
            )
        pieces = []
        for text, ids in zip(texts, [*sounds, []]):
            pieces += self.tokenizer.split_added_tokens(text) if is_template else [text]
            pieces += ids
        if is_template:
            return pieces
        return self.lay_out([("user", pieces)], add_generation_prompt=True)

    def sound_ids(self, windows: tuple) -> list[list[int]]:
        """For each window of a recording, one <sound> id per audio frame."""
        ids = [[self.audio_token_id] * audio_frame_count(window) for window in windows]
        return self.borders.around(ids)  # in Audio Flamingo 3, the same

    def lay_out(self, turns: list[tuple], add_generation_prompt: bool) -> list[str | int]:
        """Turns (role, pieces) in the chat template, after the default system turn if needed."""
        if not turns or turns[0][0] != "system":
            turns = [("system", [self.system_message]), *turns]
        pieces = []
        for role, content in turns:
            pieces += [self.start_id, f"{role}\n", *content, self.end_id, "\n"]
        if add_generation_prompt:
            pieces += [self.start_id, "assistant\n"]
        return pieces

    def make_batch(self, prompts, recordings, padding_side, output_labels) -> Batch:
        """The tensors of prompts, each in pieces, and of recordings, each in windows."""
        sequences = [torch.tensor(self.tokenizer.encode_pieces(pieces)) for pieces in prompts]
        real = [torch.ones_like(sequence) for sequence in sequences]
        padding = {"batch_first": True, "padding_side": padding_side}
        pad_token_id = self.tokenizer.pad_token_id
        batch = Batch()
        batch["input_ids"] = pad_sequence(sequences, padding_value=pad_token_id, **padding)
        batch["attention_mask"] = pad_sequence(real, padding_value=0, **padding)
        if recordings:
            windows = list(chain(*recordings))
            batch["input_features"], batch["feature_attention_mask"] = feature_batch(windows)
            batch |= self.borders.window_index(recordings)  # nothing in Audio Flamingo 3
        if output_labels:
            audio_ids = torch.tensor([self.audio_token_id, *self.borders.ids])
            ignored = torch.isin(batch["input_ids"], audio_ids) | (batch["attention_mask"] == 0)
            batch["labels"] = batch["input_ids"].masked_fill(ignored, -100)
        if output_labels == "answer":
            from extras.answer_labels import keep_answers

            keep_answers(batch, self)
        return batch

    @conventions.decodes_rows
    def decode(
        self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=False, strip_prefix=False
    ) -> str:
        """The text of ids (T,), or a list of texts for (B, T).

        strip_prefix removes "The transcription of the audio is" and quotes.
        clean_up_tokenization_spaces is for other tokenizers: byte-level text has no such spaces.
        """
        text = self.tokenizer.decode(ids, skip_special_tokens)
        if strip_prefix and not self.borders.ids:  # models with borders do not write it
            text = strip_transcription_prefix(text)
        return text

    batch_decode = decode  # as in transformers

    def stream_text(self, steps: Iterable[Tensor]) -> Iterator[str]:
        """The text that each step of `model.stream` adds to its first row, in whole characters."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for ids in steps:
            yield decoder.decode(self.tokenizer.decode_bytes(ids[:1], skip_special_tokens=True))
        yield decoder.decode(b"", final=True)


MusicFlamingoProcessor = AudioFlamingo3Processor  # its siblings

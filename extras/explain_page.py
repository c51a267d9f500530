"""How one recording is answered, as a page that needs only a browser.

    write_page("page.html", processor, model, waveform, "rain.wav", "What is this?", options={})

The page is extras/explain_page.html with the recording, the log-mel and everything else filled in.
It loads nothing else, and its Content-Security-Policy allows no script but its own.
"""

import base64
import hashlib
import html
import io
import json
import re
import struct
import wave
import zlib
from collections.abc import Sequence
from itertools import tee
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from af3 import AudioFlamingo3ForConditionalGeneration
from extras.alignment import UNCLEAR, Alignment, Head, Token, align
from extras.stage_trace import Journey, describe_frames, fold_prompt, follow
from plumbing import terminal
from plumbing.replace_file import replace_file
from plumbing.timeline import Gap, on_timeline
from processor import SAMPLE_RATE, AudioFlamingo3Processor, mel_edges

TEMPLATE = Path(__file__).with_suffix(".html")

MADE_BY = b"<!-- Made by extras/explain_page.py"  # near the beginning of every page

# The page of a minute of sound must be below 3 MB, of which the recording takes 2.6 MB.
PICTURE_COLUMNS = 1000  # of the log-mel, at most
ATTENTION_COLUMNS = 500  # of each word's attention, at most
ATTENTION_BYTES = 120_000  # of all heads; the worst heads are left out if there are more

# The colors of the log-mel, from quiet to loud, as (red, green, blue).
COLORS = [(8, 9, 32), (66, 20, 104), (176, 46, 104), (247, 140, 62), (255, 246, 196)]

CAUTION = (
    "This is attention: where the model looked when it was about to say a word. It is a good hint "
    "of where the word comes from, but not proof."
)


def write_page(
    path: str | Path,
    processor: AudioFlamingo3Processor,
    model: AudioFlamingo3ForConditionalGeneration,
    waveform: Tensor,
    name: str,
    prompt: str,
    options: dict,
    gaps: Sequence[Gap] = (),
) -> None:
    """Writes the page of a recording (n,) at 16 kHz called `name`; streams the answer to stdout.

    gaps: those of the film that the recording is the sound of; the page shows times in the film.
    Raises ValueError if the page's name does not end in .html, or its folder does not exist.
    """
    check_page_name(path)
    name = terminal.as_utf_8(name).encode(errors="backslashreplace").decode()
    journey = follow(processor, model, waveform, prompt, options)
    steps, steps_again = tee(journey.steps)
    terminal.print_as_it_comes(processor.stream_text(steps))
    alignment = align(processor, model, journey.inputs, torch.cat(list(steps_again)))
    contents = describe(processor, journey, alignment)
    contents |= {"name": name, "prompt": prompt, "seconds": len(waveform) / SAMPLE_RATE}
    contents["gaps"] = gaps
    for word in contents["words"]:
        word["film"] = on_timeline(word["begin"], word["end"], gaps)
    picture = png(log_mel_picture(journey))
    page = fill_template(name, contents, wav(waveform), picture)
    replace_file(path, page)


def check_page_name(path: str | Path) -> None:
    path = Path(path)
    if path.suffix.lower() != ".html":
        raise ValueError(f"{path}: the name of a page must end in .html.")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}; make it first.")
    if path.exists() and MADE_BY not in path.read_bytes()[:4000]:
        raise ValueError(f"{path}: not a page that this program wrote; choose another name.")


def fill_template(title: str, contents: dict, recording: bytes, picture: bytes) -> str:
    template = TEMPLATE.read_text(encoding="utf-8")
    values = {
        "policy": security_policy(template),
        "title": html.escape(f"What it heard in {title}"),
        "recording": data_url("audio/wav", recording),
        "log_mel": data_url("image/png", picture),
        # In a script element only "<" can begin markup, for example </script>.
        "data": json.dumps(contents).replace("<", "\\u003c"),
    }
    # All at once, so that {{...}} inside a value is not replaced.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def security_policy(template: str) -> str:
    """Forbids loading anything; allows only the template's own style and script."""
    style_hash = sha256(re.search(r"<style>(.*?)</style>", template, re.DOTALL)[1])
    script_hash = sha256(re.search(r"<script>(.*?)</script>", template, re.DOTALL)[1])
    return (
        f"default-src 'none'; img-src data:; media-src data:; style-src '{style_hash}'; "
        f"script-src '{script_hash}'; base-uri 'none'; form-action 'none'"
    )


def sha256(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ---- The data for the page's script, as JSON ----


def describe(processor: AudioFlamingo3Processor, journey: Journey, alignment: Alignment) -> dict:
    """The stages, the prompt, the words with their tokens' candidates, and the attention."""
    mel_frames = journey.inputs["feature_attention_mask"].sum(1).tolist()
    caution = CAUTION
    if alignment.words and not alignment.follows_sound:
        caution += f" Here {UNCLEAR}."
    words = []
    for word in alignment.words:
        tokens = [describe_token(alignment.tokens[place]) for place in word.tokens]
        words.append({**vars(word), "tokens": tokens})
    return {
        "words": words,
        "caution": caution,
        "stages": [vars(stage) for stage in journey.stages],
        "frames": [describe_frames(frames) for frames in sorted(set(mel_frames), reverse=True)],
        "prompt_tokens": fold_prompt(processor, journey.inputs["input_ids"][0]),
        "frequencies": frequency_heights(),
        **describe_attention(alignment),
    }


def describe_token(token: Token) -> dict:
    candidates = [(text, round(probability, 6)) for text, probability in token.candidates]
    return {"text": token.text, "candidates": candidates}


def describe_attention(alignment: Alignment) -> dict:
    """The attention of each word's first token, one byte for each column of time.

    "heads" contains the average of the best heads, then as many single heads as fit, best first.
    """
    first_tokens = [word.tokens[0] for word in alignment.words]
    words = max(1, len(first_tokens))
    frames = alignment.attention.shape[1]
    columns = min(frames, ATTENTION_COLUMNS, max(1, ATTENTION_BYTES // words))
    room = ATTENTION_BYTES // (words * columns)
    best = alignment.heads[: alignment.num_averaged]
    names = [head_name(head) for head in best]
    average = alignment.attention[first_tokens]
    described = [describe_head(f"best: {' and '.join(names)}", average, columns)]
    for head in alignment.heads[: room - 1]:
        name = f"{head_name(head)}, score {head.score:.2f}"
        described.append(describe_head(name, head.attention[first_tokens], columns))
    return {"columns": columns, "heads": described}


def head_name(head: Head) -> str:
    return f"layer {head.layer + 1}, head {head.head + 1}"


def describe_head(name: str, attention: Tensor, columns: int) -> dict:
    """attention: (words, audio frames)"""
    largest = attention.amax(1).clamp(min=1e-20)  # (words,)
    relative = attention / largest[:, None]
    if len(relative) > 0:
        relative = F.adaptive_max_pool1d(relative, columns)
    weights = (255 * relative).round().to(torch.uint8).numpy().tobytes()
    return {
        "name": name,
        "largest": [round(share, 4) for share in largest.tolist()],
        "weights": base64.b64encode(weights).decode(),
    }


def frequency_heights() -> list[tuple[int, float]]:
    """Round frequencies in Hz, and the height of each in the picture, from 0 to 1."""
    edges = mel_edges().numpy()
    frequencies = [100, 500, 1000, 2000, 4000, 8000]
    heights = np.interp(frequencies, edges, np.linspace(0, 1, len(edges)))
    return list(zip(frequencies, heights.round(4).tolist()))


# ---- Files inside the page ----


def wav(waveform: Tensor) -> bytes:
    """The waveform as a WAV file: 16 bits, mono, 16 kHz."""
    samples = (waveform.clamp(-1, 1) * 32767).round().short().numpy()
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        writer.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()


def log_mel_picture(journey: Journey) -> np.ndarray:
    """(128, columns) uint8: the real mel frames of all windows, low frequencies at the bottom."""
    features = journey.inputs["input_features"].float().cpu()
    mel_frames = journey.inputs["feature_attention_mask"].sum(1).tolist()
    windows = [window[:, :frames] for window, frames in zip(features, mel_frames)]
    mel = torch.cat(windows, dim=1)
    mel = F.adaptive_avg_pool1d(mel, min(mel.shape[1], PICTURE_COLUMNS)).flip(0)
    spread = (mel.max() - mel.min()).clamp(min=1e-6)
    return (255 * (mel - mel.min()) / spread).round().to(torch.uint8).numpy()


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of pixels (rows, columns) uint8: 0 is the first of COLORS, 255 the last."""
    rows, columns = pixels.shape
    places = np.linspace(0, 255, len(COLORS))
    channels = [np.interp(np.arange(256), places, channel) for channel in zip(*COLORS)]
    palette = np.stack(channels, axis=1).round().astype(np.uint8)
    # Eight bits per pixel, an index into the palette (color type 3).
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    no_filter = np.zeros((rows, 1), dtype=np.uint8)  # before each row
    content = zlib.compress(np.hstack([no_filter, pixels]).tobytes(), 9)
    parts = [
        png_chunk(b"IHDR", header),
        png_chunk(b"PLTE", palette.tobytes()),
        png_chunk(b"IDAT", content),
        png_chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    length = struct.pack(">I", len(content))
    return length + kind + content + struct.pack(">I", zlib.crc32(kind + content))

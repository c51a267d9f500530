"""Makes WAV files of every format."""

import struct

import numpy as np

PCM = 1
FLOAT = 3
EXTENSIBLE = 0xFFFE
EXTENSIBLE_SUFFIX = bytes.fromhex("000000001000800000aa00389b71")


def encode_samples(samples: np.ndarray, code: int, bits: int) -> bytes:
    """Encodes float samples (n, channels) in [-1, 1]."""
    if code == FLOAT:
        return samples.astype(f"<f{bits // 8}").tobytes()
    integers = np.round(samples * (2 ** (bits - 1) - 1)).astype("<i4")
    if bits == 8:
        return (integers + 128).astype("u1").tobytes()
    if bits == 24:
        return integers[..., None].view("u1")[..., :3].tobytes()
    return integers.astype(f"<i{bits // 8}").tobytes()


def wav_bytes(
    samples: np.ndarray,
    rate: int = 16000,
    code: int = PCM,
    bits: int = 16,
    extensible: bool = False,
) -> bytes:
    """Returns a WAV file of float samples (n, channels) in [-1, 1], with a chunk to be skipped."""
    channels = samples.shape[1]
    frame_bytes = channels * bits // 8
    header_code = EXTENSIBLE if extensible else code
    byte_rate = rate * frame_bytes
    header = struct.pack("<HHIIHH", header_code, channels, rate, byte_rate, frame_bytes, bits)
    if extensible:
        header += struct.pack("<HHIH", 22, bits, 0, code) + EXTENSIBLE_SUFFIX
    content = encode_samples(samples, code, bits)
    chunks = b"WAVE"
    chunks += b"fmt " + struct.pack("<I", len(header)) + header
    chunks += b"junk" + struct.pack("<I", 3) + b"abc\0"  # padded to an even size
    chunks += b"data" + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks

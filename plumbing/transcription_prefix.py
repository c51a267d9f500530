"""What the model says before a transcription."""

import re

PREFIX = re.compile(
    r"The (spoken content of the audio|transcription of the audio|content of the input audio) is\b"
)


def strip_transcription_prefix(text: str) -> str:
    """A transcription without its introduction, a final full stop and one pair of quotes.

    A text without such an introduction is returned as it is.
    """
    prefix = PREFIX.match(text.strip())
    if not prefix:
        return text
    said = text.strip()[prefix.end() :].strip()
    said = said.removesuffix(".").strip()
    if len(said) >= 2 and said[0] in "'\"" and said[-1] == said[0]:
        said = said[1:-1].strip()
    return said

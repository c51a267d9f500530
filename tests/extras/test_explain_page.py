"""--explain page.html: one file that fetches nothing and works in a browser by keyboard."""

import io
import json
import re
import struct
import wave
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from af3 import AudioFlamingo3ForConditionalGeneration
from browser import Browser, find_browser
from extras.explain_page import (
    TEMPLATE,
    check_page_name,
    png,
    sha256,
    wav,
    write_page,
)
from places import TINY
from plumbing.audio_file import load_audio
from plumbing.replace_file import replace_file
from processor import AudioFlamingo3Processor
from signals import sound

DIGITS = TINY / "samples" / "digits.wav"
HOSTILE = (
    "</script><script>window.broken = 1</script><img src=x onerror='broken = 1'>{{data}} &amp;"
)


@pytest.fixture(scope="module")
def tiny():
    processor = AudioFlamingo3Processor.from_pretrained(TINY)
    return processor, AudioFlamingo3ForConditionalGeneration.from_pretrained(TINY, "cpu")


@pytest.fixture(scope="module")
def page(tiny, tmp_path_factory):
    """The page of tiny/samples/digits.wav, whose words are seven, three and one."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    waveform = torch.from_numpy(load_audio(DIGITS))
    write_page(path, *tiny, waveform, "digits.wav", "Transcribe the input speech.", {})
    return path


@pytest.fixture(scope="module")
def browser():
    program = find_browser() or pytest.skip("no browser is installed (Debian: chromium)")
    browser = Browser(program)
    yield browser
    browser.close()


def write_hostile_page(path, tiny, monkeypatch):
    """A page on which file name, prompt and answer try to be markup."""
    processor, model = tiny
    ids = [*processor.tokenizer.encode(HOSTILE), processor.end_id]
    monkeypatch.setattr(model, "stream", lambda **_: iter(torch.tensor(ids)[:, None]))
    write_page(path, processor, model, torch.from_numpy(sound(16000)), HOSTILE, HOSTILE, {})
    return path


# ---- The file ----


def test_a_picture_is_a_png_file_of_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)
    content = png(pixels)[8:]
    chunks = {}
    while content:
        length, kind = struct.unpack(">I4s", content[:8])
        chunks[kind] = content[8 : 8 + length]
        (checksum,) = struct.unpack(">I", content[8 + length : 12 + length])
        assert checksum == zlib.crc32(kind + chunks[kind])
        content = content[12 + length :]
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (7, 5)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(5, 8)
    assert (rows[:, 1:] == pixels).all()


def test_the_recording_in_a_page_is_the_models_input():
    waveform = torch.from_numpy(sound(16000))
    with wave.open(io.BytesIO(wav(waveform))) as file:
        assert file.getparams()[:4] == (1, 2, 16000, 16000)
        samples = np.frombuffer(file.readframes(16000), "<i2") / 32767
    np.testing.assert_allclose(samples, waveform, atol=1e-4)


def test_a_page_has_no_urls_and_its_policy_allows_only_its_own_script_and_style(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|<link|<iframe", text)
    assert re.findall(r'src="(\w+:[\w/]+)', text) == ["data:audio/wav", "data:image/png"]
    assert text.count("<script>") == text.count("<style>") == 1
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none';")
    assert sha256(re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]) in policy
    assert sha256(re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]) in policy


def test_a_page_of_a_minute_and_many_words_is_smaller_than_3_mb(tiny, tmp_path, monkeypatch):
    processor, model = tiny
    noise = 0.1 * torch.randn(60 * 16000, generator=torch.Generator().manual_seed(0))
    ids = processor.tokenizer.encode(" seven" * 200)
    monkeypatch.setattr(model, "stream", lambda **_: iter(torch.tensor(ids)[:, None]))
    write_page(tmp_path / "page.html", processor, model, noise, "noise", "Hi", {})
    assert (tmp_path / "page.html").stat().st_size < 3_000_000


def test_outside_text_is_not_markup(tiny, tmp_path, monkeypatch):
    text = write_hostile_page(tmp_path / "page.html", tiny, monkeypatch).read_text("utf-8")
    assert text.count("<script") == 2
    assert "<img src=x" not in text
    assert "{{data}}" in text  # as it was given


# ---- The command line ----


def test_the_answer_is_printed_and_the_page_is_reported(run, tmp_path):
    path = tmp_path / "page.html"
    status, out, err = run("--explain", path, DIGITS, model=TINY)
    assert (status, out) == (0, "seven three one\n")
    assert err == f"{path}: open it in a browser\n"
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_recording_or_prompt_after_explain_is_not_a_page(run, clip):
    before = open(clip, "rb").read()
    status, out, _ = run("--explain", clip, "Hi", "--max-new-tokens", 2)
    assert status == 0
    assert out.startswith("stage ")
    status, out, _ = run(clip, "--explain", "Hi", "--max-new-tokens", 2)
    assert status == 0
    assert out.startswith("stage ")
    assert open(clip, "rb").read() == before


@pytest.mark.parametrize(
    "name, reason",
    [
        ("clip.wav", "the name of a page must end in .html"),
        ("gone/page.html", "there is no folder"),
    ],
)
def test_a_page_with_another_suffix_or_no_folder_is_refused(run, clip, tmp_path, name, reason):
    status, out, err = run(clip, f"--explain={tmp_path / name}")
    assert (status, out) == (2, "")
    assert reason in err


@pytest.mark.parametrize("name", ["caf\udce9.wav", "\ud83d.wav", "é.wav"])
def test_the_name_on_a_page_is_readable_whatever_it_is(tiny, tmp_path, name):
    path = tmp_path / "page.html"
    write_page(path, *tiny, torch.from_numpy(sound(8000)), name, "\ud83d", {"max_new_tokens": 1})
    text = path.read_text(encoding="utf-8")
    shown = name.encode(errors="backslashreplace").decode()
    assert f"<title>What it heard in {shown}</title>" in text
    assert f'"name": {json.dumps(shown)}, "prompt": "\\ud83d"' in text


# ---- In a browser ----


def span_in_seconds(browser):
    """Begin and end of what is highlighted in the picture."""
    return browser.evaluate(
        "['left', 'right'].map((side) => parseFloat(find('span').style[side]) / 100)"
        ".map((share, i) => data.seconds * (i ? 1 - share : share))"
    )


def test_a_word_is_chosen_by_keyboard_and_its_part_lights_up_and_plays(browser, page):
    browser.open(page)
    for event in ("play", "pause"):
        browser.evaluate(
            f"window.at_{event} = new Promise((resolve) => "
            f"{{ audio.on{event} = () => resolve([audio.currentTime, stopAt]); }}); 0"
        )
    browser.press("Tab")
    browser.press("ArrowRight")
    assert browser.evaluate("document.activeElement.id") == "word-1"
    assert span_in_seconds(browser) == pytest.approx([0.92, 1.32], abs=0.001)
    assert browser.evaluate("find('chosen').textContent").startswith("“three” looked at 0.92 to")
    candidates = browser.evaluate("find('candidates').innerText")
    assert candidates.split()[:2] == ["␣three", "99.8%"]
    at_play, stop_at = browser.evaluate("window.at_play")
    assert 0.92 <= at_play < 1.32  # on a busy machine, the event comes a little later
    assert stop_at == pytest.approx(1.32)
    assert browser.evaluate("window.at_pause")[0] >= 1.32
    assert browser.complaints() == []


def test_nothing_is_fetched(browser, page):
    browser.open(page)
    browser.press("Tab")
    browser.press(" ")
    addresses = {address.split(",")[0] for address in browser.requests()}
    own = {page.resolve().as_uri(), "data:audio/wav;base64", "data:image/png;base64"}
    assert page.resolve().as_uri() in addresses
    # The player's own buttons are pictures inside the browser.
    assert {a for a in addresses if not a.startswith("data:image/")} <= own
    assert browser.complaints() == []


def test_the_policy_blocks_fetches_and_foreign_scripts(browser, page):
    browser.open(page)
    fetched = browser.evaluate("fetch('data:,x').then(() => 'fetched', () => 'refused')")
    assert fetched == "refused"
    browser.evaluate("add(document.body, 'script', 'window.broken = 1'); 0")
    assert browser.evaluate("window.broken") is None


def test_hostile_text_is_shown_literally(browser, tiny, tmp_path, monkeypatch):
    browser.open(write_hostile_page(tmp_path / "page.html", tiny, monkeypatch))
    for name in ("name", "question"):
        assert browser.evaluate(f"find('{name}').textContent") == HOSTILE
    assert browser.evaluate("document.title") == f"What it heard in {HOSTILE}"
    words = browser.evaluate("data.words.map((word) => word.text).join(' ')")
    assert words == HOSTILE
    assert browser.evaluate("document.images.length") == 1
    assert browser.evaluate("window.broken") is None
    assert browser.complaints() == []


def test_moving_over_the_picture_shows_which_words_looked_there(browser, page):
    browser.open(page)
    box = browser.evaluate("find('picture').getBoundingClientRect().toJSON()")
    x = box["x"] + 1.2 / 1.9885 * box["width"]
    browser.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=box["y"] + 30)
    text = browser.evaluate("find('looked').textContent")
    assert re.match(r"At 1\.(19|20|21) s: words that looked here: “three” \(\d+\.\d%", text)


def test_choosing_another_head_shows_its_attention(browser, page):
    browser.open(page)
    names = browser.evaluate("[...find('head').options].map((option) => option.textContent)")
    assert names[0].startswith("best: layer 4, head 1")
    assert len(names) == 13  # and each of the 12 heads of tiny/
    before = browser.evaluate("find('map').toDataURL()")
    browser.evaluate("find('head').value = 9; find('head').dispatchEvent(new Event('change')); 0")
    assert browser.evaluate("find('map').toDataURL()") != before


@pytest.mark.parametrize("width", [360, 760, 1300])
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_fits_and_follows_the_color_scheme(browser, page, width, dark):
    browser.open(page, width=width, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    color = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(number) for number in re.findall(r"\d+", color)) / 3
    assert (brightness < 128) == dark


def test_elements_have_names_for_a_screen_reader(browser, page):
    """The names in the browser's accessibility tree."""
    browser.open(page)
    nodes = browser.command("Accessibility.getFullAXTree")["nodes"]
    names = {}
    for node in nodes:
        role = node.get("role", {}).get("value")
        names.setdefault(role, []).append(node.get("name", {}).get("value"))
    assert names["radio"][1] == "three 0.92 to 1.32 s, 99.8%"
    assert names["image"] == ["Log-mel spectrogram of 2.0 s, 0 to 8000 Hz."]
    assert names["Audio"] == ["The recording"]
    assert names["combobox"] == ["Attention of"]
    assert len(names["row"]) == 14


def test_the_shortest_recording_fits_too(browser, tiny, tmp_path):
    """Its only audio frame is twice as long as its sound."""
    path = tmp_path / "page.html"
    write_page(path, *tiny, torch.from_numpy(sound(321)), "a.wav", "What sound is this?", {})
    browser.open(path, width=900)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 900
    assert browser.complaints() == []


def test_an_empty_answer_has_a_page_too(browser, tiny, tmp_path, monkeypatch):
    processor, model = tiny
    monkeypatch.setattr(model, "stream", lambda **_: iter(torch.tensor([[processor.end_id]])))
    path = tmp_path / "page.html"
    write_page(path, processor, model, torch.from_numpy(sound(16000)), "a.wav", "Hi", {})
    browser.open(path)
    assert browser.evaluate("find('chosen').textContent") == "The model said nothing."
    assert browser.complaints() == []


def test_a_file_that_is_not_a_page_is_not_overwritten(tmp_path):
    path = tmp_path / "notes.html"
    path.write_text("mine")
    with pytest.raises(ValueError, match="notes.html: not a page that this program wrote"):
        check_page_name(path)
    path.write_text(TEMPLATE.read_text(encoding="utf-8"))
    check_page_name(path)


def test_a_full_disk_does_not_destroy_an_earlier_page(tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text("earlier")

    def fail(self, *_, **__):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError):
        replace_file(page, "new")
    assert page.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [page]

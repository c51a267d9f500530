"""Headless Chromium, driven through its DevTools protocol; or, as a program, a picture of a page.

    python tests/support/browser.py PAGE.html PICTURE.png [--width 900] [--height 700] [--dark]

The browser reads commands from one pipe and writes answers and events to another, as JSON with a
zero byte after each. So no port is opened, and no package is needed.
"""

import argparse
import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
from collections import deque
from contextlib import suppress
from pathlib import Path

HANGS = 120  # seconds without a message after which the browser counts as hung
READS = 3  # the file descriptors of the browser's two pipes
WRITES = 4

FLAGS = [
    *("--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio"),
]


def find_browser() -> str | None:
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if shutil.which(name):
            return shutil.which(name)
    return None


class Browser:
    """A browser with one tab. `events` are those received since the last `open`."""

    def __init__(self, program: str):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()

        def place_pipes() -> None:
            spare = os.dup(answers)  # `answers` may be 3 itself
            os.dup2(commands, READS)
            os.dup2(spare, WRITES)

        self.process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={self.profile.name}", "about:blank"],
            preexec_fn=place_pipes,
            pass_fds=(READS, WRITES),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self.unread = b""
        self.count = 0
        self.session = None
        self.events = deque()
        target = self.command("Target.createTarget", url="about:blank")["targetId"]
        attached = self.command("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.command(f"{domain}.enable")

    def close(self) -> None:
        with suppress(OSError, AssertionError, KeyError):
            self.session = None
            self.command("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.commands)
        os.close(self.answers)
        self.profile.cleanup()

    def read_message(self) -> dict:
        while b"\0" not in self.unread:
            readable, _, _ = select.select([self.answers], [], [], HANGS)
            assert readable, "the browser hangs"
            received = os.read(self.answers, 1 << 20)
            assert received, "the browser has ended"
            self.unread += received
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def command(self, method: str, **parameters) -> dict:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self.commands, content) :]
        while True:
            answer = self.read_message()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, event: str) -> None:
        """Waits for an event, unless it is already among `events`."""
        while not any(past["method"] == event for past in self.events):
            self.events.append(self.read_message())

    def open(self, path: Path, width: int = 900, height: int = 700, dark: bool = False) -> None:
        """Loads a page, and records all events from then on."""
        scheme = "dark" if dark else "light"
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", features=features)
        self.events.clear()
        self.command("Page.navigate", url=path.resolve().as_uri())
        self.wait_for("Page.loadEventFired")

    def evaluate(self, script: str):
        """The value of an expression; waits for a promise."""
        result = self.command(
            "Runtime.evaluate",
            expression=script,
            returnByValue=True,
            awaitPromise=True,
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str) -> None:
        codes = {"Tab": 9, "Enter": 13, " ": 32, "ArrowLeft": 37, "ArrowRight": 39}
        for kind in ("rawKeyDown", "keyUp"):
            self.command(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=codes[key],
            )

    def screenshot(self, whole: bool = True) -> bytes:
        """A PNG of the whole page, or of its visible part."""
        picture = self.command("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(picture["data"])

    def requests(self) -> list[str]:
        """The URLs that the page has requested since it was opened."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[dict]:
        """Script errors, console messages and violations of the page's policy."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        return [event["params"] for event in self.events if event["method"] in kinds]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=900)
    parser.add_argument("--height", type=int, default=700)
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    program = find_browser()
    if program is None:
        parser.error("no browser is installed (Debian: chromium)")
    browser = Browser(program)
    try:
        browser.open(args.page, args.width, args.height, args.dark)
        args.picture.write_bytes(browser.screenshot(whole=False))
    finally:
        browser.close()


if __name__ == "__main__":
    main()

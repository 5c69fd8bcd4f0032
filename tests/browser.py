"""A headless Chromium for tests, driven through the Chrome DevTools Protocol.

with Browser.started() as browser:
    await browser.open("http://127.0.0.1:7860")
    await browser.until("document.querySelector('video')")
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
START_SECONDS = 120
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio",
    "--no-first-run", "--disable-background-networking", "--autoplay-policy=no-user-gesture-required",
    "--remote-debugging-port=0", "--window-size=1360,1000",
)  # fmt: skip


def find_browser() -> str | None:
    """The path of a Chromium; None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def debugged_browser() -> Iterator[str]:
    """A running browser with a profile of its own; yields the address of its debugger."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        log = Path(profile) / "log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [find_browser(), *FLAGS, f"--user-data-dir={profile}", "about:blank"], stdout=output, stderr=output
            )
        try:
            end = time.monotonic() + START_SECONDS
            while not (address := re.search(r"DevTools listening on ws://([^/]+)/", log.read_text(errors="replace"))):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the browser did not start: {log.read_text(errors='replace')}")
                time.sleep(0.05)
            yield address[1]
        finally:
            process.kill()
            process.wait()


class Browser:
    """One tab. `requested`: the addresses that it asked for; `logged`: errors of the page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse):
        self.socket, self.next_id = socket, 0
        self.requested: list[str] = []
        self.logged: list[str] = []

    @classmethod
    @asynccontextmanager
    async def started(cls) -> AsyncIterator[Browser]:
        with debugged_browser() as address:
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://{address}/json/list") as response:
                    tab = next(tab for tab in await response.json() if tab["type"] == "page")
                async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    browser = cls(socket)
                    for domain in ("Page", "Runtime", "Network", "Log"):
                        await browser.call(f"{domain}.enable")
                    yield browser

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol. Events that arrive meanwhile are noted."""
        self.next_id += 1
        await self.socket.send_json({"id": self.next_id, "method": method, "params": parameters})
        while True:
            message = json.loads((await self.socket.receive(timeout=120)).data)
            if message.get("id") == self.next_id:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.note(message)

    def note(self, event: dict[str, Any]) -> None:
        name, values = event.get("method"), event.get("params", {})
        if name == "Network.requestWillBeSent":
            self.requested.append(values["request"]["url"])
        elif name == "Runtime.exceptionThrown":
            self.logged.append(str(values["exceptionDetails"].get("exception", values)))
        elif name == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.logged.append(f"{values['entry']['text']} {values['entry'].get('url', '')}")

    async def open(self, address: str) -> None:
        await self.call("Page.navigate", url=address)

    async def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, which is awaited if it is a promise."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def until(self, script: str, seconds: float = 120) -> None:
        """Returns as soon as an expression is true. Raises TimeoutError with the text of the page."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if await self.evaluate(f"Boolean({script})"):
                return
            await asyncio.sleep(0.1)
        text = await self.evaluate("document.body.innerText")
        raise TimeoutError(f"{script} is not true after {seconds} s; errors: {self.logged}; the page says:\n{text}")

    async def type(self, selector: str, text: str) -> None:
        """Replaces the text of a field as soon as it is there, as the keyboard would."""
        await self.until(f"document.querySelector({json.dumps(selector)})")
        await self.evaluate(f"(e => {{ e.focus(); e.select(); }})(document.querySelector({json.dumps(selector)}))")
        await self.call("Input.insertText", text=text)
        await self.evaluate("document.activeElement.blur()")

    async def click(self, selector: str) -> None:
        await self.until(f"document.querySelector({json.dumps(selector)})")
        await self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    async def give_file(self, selector: str, path: Path) -> None:
        """Chooses a file for an <input type=file>."""
        root = (await self.call("DOM.getDocument"))["root"]["nodeId"]
        node = (await self.call("DOM.querySelector", nodeId=root, selector=selector))["nodeId"]
        await self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    async def screenshot(self, path: Path, is_full: bool = False) -> None:
        image = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=is_full)
        path.write_bytes(base64.b64decode(image["data"]))

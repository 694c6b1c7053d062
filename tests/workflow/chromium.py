"""A real browser for tests: Chromium without a window, told what to do over its DevTools protocol."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MISSING = f"no browser: put Chromium or Chrome on the PATH as one of {', '.join(NAMES)} (apt install chromium)"
START_S = 120.0  # a busy machine takes its time


def found() -> str | None:
    """The path of the first of `NAMES` that is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def started(folder: Path):
    """A browser that keeps its profile in `folder`; a function that opens an address in a new tab, as a `Page`."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "--window-size=1400,1000"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([found(), *options, "about:blank"], stdout=log, stderr=log)
    try:
        told = folder / "DevToolsActivePort"
        wait(lambda: told.exists() and len(told.read_text().split()) == 2, START_S, "the browser starts")
        port = told.read_text().split()[0]

        @contextmanager
        def opened(address: str):
            request = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
            tab = json.load(urllib.request.urlopen(request))
            page = Page(tab["webSocketDebuggerUrl"])
            page.call("Page.navigate", url=address)
            yield page
            page.call("Page.close")
            page.socket.close()

        yield opened
    finally:
        process.terminate()
        process.wait()


def wait(condition, seconds: float, what: str) -> object:
    """The first true value of a function. Raises TimeoutError, which says what was waited for."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:g} s in vain until {what}")
        time.sleep(0.1)
    return value


class Page:
    """A tab. `faults` are exceptions of scripts that nothing caught."""

    def __init__(self, address: str) -> None:
        self.socket = websocket.create_connection(address, suppress_origin=True, timeout=600)
        self.number, self.faults = 0, []
        self.call("Page.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # as if this tab were in front
        self.call("Runtime.enable")

    def call(self, method: str, **parameters) -> dict:
        """Call a method of the protocol, and return its result. Raises RuntimeError where the browser refuses."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("method") == "Runtime.exceptionThrown":
                details = message["params"]["exceptionDetails"]
                self.faults.append(details.get("exception", {}).get("description") or details["text"])
            if message.get("id") == self.number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def value(self, script: str) -> object:
        """The value of an expression in JavaScript, awaited where it is a promise. Raises RuntimeError if it throws."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"].get("exception", {}).get("description", script))
        return done["result"].get("value")

    def wait(self, script: str, seconds: float = 60.0) -> object:
        """The first true value of an expression."""
        return wait(lambda: self.value(script), seconds, script)

    def press(self, key: str, code: int) -> None:
        """Press and release a key, which goes to the element that has the focus."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

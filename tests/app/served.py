"""The page as a user starts it, and a browser that looks at it: for the tests, and for the pictures of the docs."""

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers import ENVIRONMENT, ROOT

AXE = Path(__file__).with_name("node_modules") / "axe-core/axe.min.js"


@contextlib.contextmanager
def serving(logdir, *options):
    """Start `scripts/app.py`, and give its process and address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "scripts/app.py", "--port", str(port), "--logdir", str(logdir), *map(str, options)]
        server = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, text=True)
        try:
            for _ in range(1800):
                log.seek(0)
                said = log.read()
                if "Open http" in said:
                    break
                assert server.poll() is None, said
                time.sleep(0.1)
            yield server, f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(120)


class Visit:
    """The page in a tab of its own, and everything that went wrong there."""

    def __init__(self, browser, address, width=1280, **options):
        self.context = browser.new_context(viewport={"width": width, "height": 1000}, **options)
        self.address, self.problems, self.asked = address, [], []
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.page.on("console", lambda said: said.type == "error" and self.problems.append(said.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.open()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def open(self):
        """Load the page, or load it again."""
        self.page.goto(self.address)
        self.page.wait_for_selector("#draw")
        self.page.wait_for_selector("#reading dl")

    def tab(self, name):
        """Change to a tab."""
        self.page.get_by_role("tab", name=name).click()

    def field(self, label):
        """Return what can be typed into under a label of the tab that is shown."""
        return self.page.get_by_label(label).locator("visible=true").first

    def fill(self, **fields):
        """Type into fields by their labels, and leave them as Tab does."""
        for label, value in fields.items():
            field = self.field(label.replace("_", " ") if label != "T_a" else label)
            field.fill(str(value))
            field.press("Tab")

    def choose(self, box, text):
        """Choose an entry of a list."""
        self.page.locator(f"#{box} input").click()
        self.page.get_by_role("option", name=text).first.click()

    def text(self, place):
        """Return the text of a part of the page."""
        return self.page.locator(f"#{place}").inner_text()

    def draw(self):
        """Press Draw, and wait for the images: their number of pixels, once the browser has decoded them."""
        self.page.click("#draw")
        self.page.wait_for_function("!document.querySelector('#images [data-number]')")
        return self.drawn()

    def drawn(self):
        """Wait for the images of a drawing that has begun."""
        self.page.wait_for_selector("#images [data-number]")
        return self.page.eval_on_selector_all("#images img", "all => all.map(i => i.complete ? i.naturalWidth : 0)")

    def files(self):
        """Return the PNG files that the page offers: name -> bytes."""
        import base64

        links = self.page.eval_on_selector_all("#images a", "all => all.map(a => [a.download, a.href])")
        return {name: base64.b64decode(url.partition("base64,")[2]) for name, url in links}

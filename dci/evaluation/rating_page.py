"""A page on this machine alone that shows blind pairs one at a time and keeps each answer before it shows the next.

It speaks to 127.0.0.1 only and to pages that it made itself: every answer carries a secret token. Images
are asked for by number, never by path, and are sent as they were read, not as the files that they came from.
"""

import datetime
import io
import re
import secrets
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from jinja2 import Environment, FileSystemLoader

from dci.evaluation.answers import QUESTIONS, SIDES, THING, append_answer, check_writable, read_answers
from dci.evaluation.pairs import Pair, key_of
from ldm.errors import UserError
from ldm.images import read_image

HOST = "127.0.0.1"
_MOST = 4096  # bytes of an answer
_POLICY = "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'"


class Session:
    """The questions about some pairs, those that are answered, and the file that keeps the answers.

    Args:
        pairs: in the order in which they are shown; each is asked about in every question.
        answers: the CSV, which may hold answers already.
        rater: a name that goes with each answer.

    Raises:
        UserError: the file holds something else, or cannot be written.
    """

    def __init__(
        self, pairs: list[Pair], answers: str | Path, rater: str = "", questions: tuple[str, ...] = tuple(QUESTIONS)
    ):
        self.pairs, self.file, self.rater = pairs, Path(answers), rater
        self.token = secrets.token_urlsafe(16)
        self.asked = [(number, question) for number in range(len(pairs)) for question in questions]
        self._lock = threading.Lock()
        given = read_answers(self.file) if self.file.is_file() else []
        check_writable(self.file)  # before anybody answers
        self._answered = {key_of(answer) for answer in given if answer.rater == rater}

    def open(self) -> list[tuple[int, str]]:
        """Return (number of the pair, question) of what is not answered yet."""
        return [
            (number, question) for number, question in self.asked if self.pairs[number].key(question) not in self._answered
        ]

    def answer(self, number: int, question: str, side: str) -> None:
        """Keep an answer; a second one to the same question is left out."""
        pair, now = self.pairs[number], datetime.datetime.now().isoformat(timespec="seconds")
        with self._lock:
            if pair.key(question) not in self._answered:
                append_answer(self.file, pair.answer(question, side, self.rater, now))
                self._answered.add(pair.key(question))


def serve(session: Session, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of a session's page, bound to this machine; `serve_forever` runs it.

    Args:
        port: 0: one that is free.

    Raises:
        UserError: the port is taken.
    """
    handler = type("Handler", (_Handler,), {"session": session})
    try:
        return ThreadingHTTPServer((HOST, port), handler)
    except OSError as error:
        raise UserError(f"cannot serve on {HOST}:{port} ({error.strerror}): give another port, or none") from error


def address(server: ThreadingHTTPServer) -> str:
    """Return where a browser finds the page."""
    return f"http://{HOST}:{server.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: ThreadingHTTPServer
    session: Session
    server_version, sys_version = "dci", ""

    def do_GET(self) -> None:
        """Answer with the page or one of its images."""
        if not self._is_ours():
            return
        routes: list[tuple[str, Callable[..., None]]] = [
            (r"/", self._page),
            (r"/image/(\d{1,9})/(left|right)", self._image),
            (r"/reference/(\d{1,9})/(\d{1,3})", self._reference),
        ]
        for pattern, show in routes:
            if match := re.fullmatch(pattern, self.path):
                show(*match.groups())
                return
        self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        """Keep an answer, and lead to the next question."""
        length = self.headers.get("Content-Length", "")
        if not self._is_ours():
            return
        if self.path != "/answer" or not length.isdecimal() or int(length) > _MOST:
            self._refuse(HTTPStatus.BAD_REQUEST)
            return
        given = {
            name: values[0] for name, values in parse_qs(self.rfile.read(int(length)).decode("utf-8", "replace")).items()
        }
        number, question, side = (given.get(name, "") for name in ("number", "question", "answer"))
        if not secrets.compare_digest(given.get("token", "").encode(), self.session.token.encode()):
            self._refuse(HTTPStatus.FORBIDDEN)
        elif (
            not (number.isdecimal() and int(number) < len(self.session.pairs))
            or question not in QUESTIONS
            or side not in SIDES
        ):
            self._refuse(HTTPStatus.BAD_REQUEST)
        else:
            try:
                self.session.answer(int(number), question, side)
            except OSError as error:
                self._report(HTTPStatus.INTERNAL_SERVER_ERROR, f"{self.session.file} cannot be written ({error.strerror})")
                return
            self.send_response(HTTPStatus.SEE_OTHER)
            self.send_header("Location", "/")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _is_ours(self) -> bool:
        """Whether the browser asks for this address by its number; a name that was made to lead here is refused."""
        names = {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in names and (origin is None or origin.removeprefix("http://") in names):
            return True
        self._refuse(HTTPStatus.FORBIDDEN)
        return False

    def _page(self) -> None:
        waiting = self.session.open()
        facts: dict[str, Any] = {"done": len(self.session.asked) - len(waiting), "all": len(self.session.asked)}
        if waiting:
            number, question = waiting[0]
            pair = self.session.pairs[number]
            facts |= {"number": number, "question": question, "asked": QUESTIONS[question], "token": self.session.token}
            facts |= {"text": pair.left.text, "references": len(pair.left.references[:10]) if question == THING else 0}
        templates = FileSystemLoader(Path(__file__).resolve().parent / "templates")
        page = Environment(loader=templates, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(
            "rate.html.j2"
        )
        self._send(page.render(file=str(self.session.file), **facts).encode(), "text/html; charset=utf-8")

    def _image(self, number: str, side: str) -> None:
        if int(number) >= len(self.session.pairs):
            self._refuse(HTTPStatus.NOT_FOUND)
        else:
            self._send_image(getattr(self.session.pairs[int(number)], side).file)

    def _reference(self, number: str, index: str) -> None:
        pairs = self.session.pairs
        if int(number) >= len(pairs) or int(index) >= len(pairs[int(number)].left.references):
            self._refuse(HTTPStatus.NOT_FOUND)
        else:
            self._send_image(pairs[int(number)].left.references[int(index)])

    def _send_image(self, file: Path) -> None:
        content = io.BytesIO()
        try:
            read_image(file).save(content, "PNG")
        except (OSError, UserError) as error:
            self._report(HTTPStatus.NOT_FOUND, error if isinstance(error, UserError) else f"{file}: {error.strerror}")
            return
        self._send(content.getvalue(), "image/png")

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(content))),
            ("Content-Security-Policy", _POLICY),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "same-origin"),  # without a referrer browsers call a form's origin null
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: HTTPStatus) -> None:
        self.send_error(status)

    def _report(self, status: HTTPStatus, fault: object) -> None:
        """Say what went wrong, to the person on the page and in the terminal; the server goes on."""
        print(f"error: {fault}", file=sys.stderr, flush=True)
        self.send_error(status, explain=f"{fault}: mend it, and load this page again.")

    def log_message(self, *_: Any) -> None:
        """Print nothing: requests are of no interest in the terminal."""

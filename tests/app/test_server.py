"""What `dci app` refuses at its start, before anything is loaded."""

import socket

import pytest
from helpers import refused, run_here


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--host", "nowhere.invalid"], ["--host nowhere.invalid", "not an address of this machine"]),
        (["--host", "192.0.2.1"], ["--host 192.0.2.1", "not an address of this machine"]),
        (["--clip", "nope"], ["no encoder 'nope'"]),
        (["--clip", "dinov2:vits14"], ["reads no texts"]),
        (["--instance", "timm:nope"], ["timm has no model 'nope'"]),
        (["--logdir", __file__], ["--logdir", "is not a folder"]),
    ],
)
def test_mistakes_are_one_line_before_the_page_is_there(given, words, capfd):
    refused(run_here(capfd, "app.py", *given), *words)


def test_a_port_that_is_taken_is_named(capfd):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused(run_here(capfd, "app.py", "--port", port), f"--port {port}", "in use")

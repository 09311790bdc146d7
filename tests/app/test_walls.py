"""What the page's server answers, and what it does not, whatever stands behind it."""

import asyncio

import pytest

from dci.app.walls import Bounds, Walls, contents


async def echo(scope, receive, send):
    """An application that would answer anything."""
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-read", str(size).encode())]})
    await send({"type": "http.response.body", "body": b"secret"})


def ask(walls, path, method="GET", headers=(), body=()):
    """Status, headers and body of an answer."""
    sent, parts = [], list(body) or [b""]

    async def receive():
        return (
            {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
            if parts
            else {"type": "http.disconnect"}
        )

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method, "headers": [(b"host", b"127.0.0.1:7860"), *headers]}
    asyncio.run(walls(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


@pytest.fixture
def uploads(tmp_path):
    folder = tmp_path / "uploads"
    (folder / "a").mkdir(parents=True)
    (folder / "a/cat.png").write_bytes(b"cat")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.png").symlink_to(tmp_path / "secret.txt")
    (folder / "way").symlink_to(tmp_path)
    return folder


@pytest.fixture
def walls(uploads):
    return Walls(echo, uploads, ("127.0.0.1", "localhost"), Bounds(request=1000, folder=2000, files=5))


def test_uploaded_files_are_served(walls, uploads):
    assert ask(walls, f"/gradio_api/file={uploads}/a/cat.png")[0] == 200


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "/etc/../etc/passwd",
        "etc/passwd",
        "~/.bashrc",
        "",
        "/",
        "{uploads}",
        "{uploads}/a",
        "{uploads}/../secret.txt",
        "{uploads}/a/../../secret.txt",
        "{uploads}/%2e%2e/secret.txt",
        "{uploads}/..%2fsecret.txt",
        "{uploads}/link.png",
        "{uploads}/way/secret.txt",
        "{uploads}/a/cat.png\x00.txt",
        "file:///etc/passwd",
        "http://127.0.0.1:1/",
        "//etc/passwd",
        "{uploads}/missing.png",
        "{uploads}secret",
        "/proc/self/environ",
        "a" * 5000,
    ],
)
def test_no_other_file_is(walls, uploads, name):
    status, _, body = ask(walls, f"/gradio_api/file={name.format(uploads=uploads)}")
    assert status == 403 and b"secret" not in body


@pytest.mark.parametrize("path", ["/", "/config", "/theme.css", "/assets/index.js", "/gradio_api/queue/join"])
def test_the_page_is_served_and_a_browser_told_to_stay_here(walls, path):
    status, headers, _ = ask(walls, path)
    assert status == 200
    assert "connect-src 'self'" in headers[b"content-security-policy"].decode()


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/proxy=http://127.0.0.1/",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/docs",
        "/openapi.json",
        "/gradio_api/openapi.json",
        "/gradio_api/vibe-code",
        "/gradio_api/vibe-edit",
        "/monitoring",
        "/gradio_api/runs",
        "/gradio_api/component_server",
        "/gradio_api/call/_draw",
        "/gradio_api/run/draw",
        "/gradio_api/api/draw",
        "/gradio_api/process_recording",
        "/gradio_api/mcp",
        "/gradio_api/deep_link",
        "/gradio_api/stream/x/y/1/playlist.m3u8",
        "/static/../../secret.txt",
        "/assets/../config",
        "/gradio_api/custom_component/1/client/component/index.js",
        "/gradio_api/dev/reload",
        "/pwa_icon",
        "/login",
    ],
)
def test_what_the_page_does_not_need_is_not_there(walls, path):
    assert ask(walls, path)[0] == 404


def test_another_name_is_refused_for_a_page_of_this_machine(walls):
    status, _, _ = ask(walls, "/", headers=[(b"host", b"evil.example:7860")])
    assert status == 403  # of two hosts, the last one counts: another site's name that leads here


def upload(walls, length, body=(b"x",)):
    headers = [] if length is None else [(b"content-length", str(length).encode())]
    return ask(walls, "/gradio_api/upload", "POST", headers, body)


def test_uploads_are_bounded_in_size_and_number(walls, uploads):
    assert upload(walls, 10)[0] == 200
    assert upload(walls, None)[0] == 411
    assert upload(walls, 1001)[0] == 413
    (uploads / "large").write_bytes(b"x" * 1500)
    assert upload(walls, 900)[0] == 413  # with what is there it is too much
    assert upload(walls, 100)[0] == 200
    for i in range(5):
        (uploads / f"{i}.txt").write_text("")
    status, _, body = upload(walls, 1)
    assert status == 413 and b"restart" in body


def test_a_body_longer_than_it_says_is_cut_off(walls):
    status, headers, _ = upload(walls, 900, [b"x" * 600] * 4)
    assert status == 200 and int(headers[b"x-read"]) <= 1000


def test_contents_do_not_follow_links(uploads):
    files, size = contents(uploads)
    assert files == 2 and size < 200  # cat.png, and the link itself

"""The page in a real browser, as somebody uses it."""

import json
import os
import pickle
import re
import shlex
import threading
import urllib.error
import urllib.request

import pytest
from browser import MARKS, browsing
from helpers import ROOT, run_main
from served import AXE, Visit, serving

from dci.app.server import QUEUE

pytestmark = MARKS
DEMOS = sorted(file.stem for file in (ROOT / "data/demo").glob("*.safetensors"))
CAT = sorted(str(file) for file in (ROOT / "data/concepts/cat").glob("*.png"))


def arguments(line):
    """The arguments of a printed command, whichever way the program is started."""
    words = shlex.split(line)
    return words[words.index("--concept") :]


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    return tmp_path_factory.mktemp("served") / "logs"


@pytest.fixture(scope="module")
def served(logdir):
    with serving(logdir) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with browsing() as found:
        yield found


@pytest.fixture
def visit(served, browser):
    with Visit(browser, served[1]) as found:
        yield found
        assert not found.problems


def test_with_the_network_cut_off_nothing_is_missing(served, browser):
    """The browser's context is offline; what it asks of the page's own server is handed on by the test."""

    def hand_on(route):
        if "/heartbeat/" in route.request.url:
            route.fulfill(status=200, body="")
        elif route.request.url.startswith(served[1]):
            route.fulfill(response=route.fetch())
        else:
            route.abort()

    with _offline(browser, served[1], hand_on) as visit:
        for tab in ("Learn", "Compare", "Draw"):
            visit.tab(tab)
        foreign = [url for url in visit.asked if not url.startswith((served[1], "data:", "blob:"))]
        styled = visit.page.eval_on_selector("h1", "h => getComputedStyle(h).fontWeight")
        assert not foreign and not visit.problems
        assert int(styled) > 600  # the page's own style sheet is there
        assert not visit.page.eval_on_selector_all("img", "all => all.filter(i => !i.naturalWidth).length")


def _offline(browser, address, hand_on):
    class Offline(Visit):
        def open(self):
            self.context.set_offline(True)
            self.context.route("**/*", hand_on)
            super().open()

    return Offline(browser, address)


@pytest.mark.parametrize("name", DEMOS)
def test_each_demo_concept_draws_what_the_printed_command_does(visit, name, tmp_path, monkeypatch):
    visit.choose("concept", f"{name} (demo)")
    visit.fill(Steps=3)
    assert visit.draw() == [64, 64]
    if name == DEMOS[0]:
        visit.page.get_by_text("The same from a terminal and from Python").click()
        monkeypatch.chdir(ROOT)
        for side, box in (("dci", "command"), ("plain", "command-plain")):
            line = visit.page.locator(f"#{box} textarea").input_value()
            run_main("sample_dci.py", *arguments(line), "--outdir", tmp_path / side)
            [made] = (tmp_path / side / "samples").glob("*.png")
            assert visit.files()[f"{side}-seed0-00000.png"] == made.read_bytes()


def test_an_image_opens_by_keyboard_and_shows_both_branches_by_step_and_layer(visit):
    visit.fill(Steps=4, T_a=0.6)
    visit.draw()
    visit.page.locator("#images [data-number]").last.focus()
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector("#seen img")
    assert visit.page.locator("#seen img").count() == 4 and "Branch weights" in visit.text("seen")
    step = visit.page.get_by_label("range slider for Step", exact=True).locator("visible=true")
    step.focus()
    for _ in range(3):
        step.press("ArrowRight")
    visit.page.wait_for_function("document.querySelector('#seen').innerText.includes('runs alone')")


def test_cancel_ends_a_drawing_and_the_next_one_works(visit):
    visit.fill(Steps=200)
    visit.page.click("#draw")
    visit.page.wait_for_selector("#progress progress")
    visit.page.click("#cancel")
    visit.page.wait_for_function("document.querySelector('#progress').innerText.includes('Cancelled')")
    visit.fill(Steps=2)
    assert visit.draw() == [64, 64]


def test_a_wrong_prompt_is_told_as_it_is_typed_and_draws_nothing(visit):
    visit.fill(Prompt="a dog on the beach")
    visit.page.wait_for_selector("#reading [role=alert]")
    assert "does not name the concept" in visit.text("reading")
    visit.page.click("#draw")
    visit.page.wait_for_selector("#progress [role=alert]")
    assert "does not name the concept" in visit.text("progress")
    assert not visit.page.locator("#images img").count()
    visit.fill(Prompt="a V* in the snow")
    visit.page.wait_for_selector("#reading mark")


class Evil:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_uploads_a_concept_and_refuses_hostile_files(visit, concept_file, tmp_path):
    page, trace = visit.page, tmp_path / "trace"
    page.get_by_text("Use a concept file of your own").click()
    for name in ("evil.safetensors", "evil.pt"):
        (tmp_path / name).write_bytes(pickle.dumps({"state_dict": Evil(trace)}))
        page.set_input_files("#concept-file input[type=file]", tmp_path / name)
        page.wait_for_selector(f"#concept-file >> text={name.partition('.')[0]}")
        page.get_by_role("button", name="Add this file").click()
        page.wait_for_function(f"document.querySelector('#concept-said').innerText.includes({json.dumps(name)})")
        assert page.locator("#concept-said [role=alert]").count() and not trace.exists()
        page.get_by_role("button", name=re.compile("Clear|Remove")).locator("visible=true").first.click()
    own = tmp_path / "mine.safetensors"
    own.write_bytes(concept_file.read_bytes())
    page.set_input_files("#concept-file input[type=file]", own)
    page.wait_for_selector("#concept-file >> text=mine")
    page.get_by_role("button", name="Add this file").click()
    page.wait_for_function("document.querySelector('#concept-said').innerText.includes('is chosen')")
    visit.fill(Steps=2)
    assert visit.draw() == [64, 64]


def test_a_text_named_png_is_refused_by_its_name(visit, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    visit.tab("Learn")
    visit.page.set_input_files("#images-to-learn input[type=file]", [*CAT[:3], str(tmp_path / "notes.png")])
    visit.page.wait_for_selector("#squares [role=alert]")
    assert "notes.png is not a readable image" in visit.text("squares")


def test_learns_ten_steps_stops_goes_on_outlives_a_reload_and_draws(visit, served, browser):
    page = visit.page
    page.set_default_timeout(300_000)  # the training program starts twice
    visit.tab("Learn")
    page.set_input_files("#images-to-learn input[type=file]", CAT[:3])
    page.wait_for_selector("#squares img")
    assert page.locator("#squares img").count() == 3
    visit.fill(Class_noun="cat", Steps=10)
    page.click("#learn")
    page.wait_for_selector("#training .dci-curve")
    page.click("#stop")
    page.wait_for_function("document.querySelector('#training').innerText.includes('Stopped')")
    page.wait_for_function("document.querySelector('#unfinished input').value.includes('ico-cat')")
    page.click("#go-on")
    page.wait_for_function("document.querySelector('#training').innerText.includes('Training.')")
    visit.open()
    visit.tab("Learn")
    page.wait_for_selector("#training progress")
    with Visit(browser, served[1]) as other:  # somebody else sees it, too
        other.tab("Learn")
        other.page.wait_for_selector("#training progress")
    page.wait_for_selector("#use")
    assert "Step 10 of 10" in visit.text("training") and page.locator("#training figure img").count() == 1
    page.click("#use")
    visit.fill(Steps=2)
    assert visit.draw() == [64, 64]
    assert "ico-cat" in page.locator("#concept input").input_value()


def test_compares_settings_on_a_sheet_and_a_plane(visit):
    visit.tab("Compare")
    visit.fill(T_a="0.5", Lambda="0, 2", Steps=2)
    visit.page.click("#compare")
    visit.page.wait_for_selector("#plane svg")
    assert visit.page.locator("#sheet table img").count() == 2
    assert visit.page.locator("#sheet a[download]").count() == 1


def test_two_tabs_draw_at_once(visit, served, browser):
    with Visit(browser, served[1]) as other:
        for each, seed in ((visit, 1), (other, 2)):
            each.fill(Steps=3, Seed=seed)
            each.page.click("#draw")
        assert visit.drawn() == other.drawn() == [64, 64]
        assert visit.files().keys() == {"plain-seed1-00000.png", "dci-seed1-00000.png"}
        assert other.files().keys() == {"plain-seed2-00000.png", "dci-seed2-00000.png"}
        assert not other.problems


@pytest.mark.skipif(not AXE.is_file(), reason="no axe-core here: tests/app/install.sh installs it")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_labels_and_contrast_pass_axe(served, browser, scheme, width):
    with Visit(browser, served[1], width, color_scheme=scheme) as visit:
        visit.page.add_script_tag(content=AXE.read_text(encoding="utf-8"))
        found = {}
        for tab in ("Draw", "Learn", "Compare"):
            visit.tab(tab)
            result = visit.page.evaluate("axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']})")
            found |= {(tab, v["id"]): [node["html"][:200] for node in v["nodes"]] for v in result["violations"]}
            assert visit.page.evaluate(_UNNAMED) == []
            assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth + 1")
        assert not found


_UNNAMED = """
[...document.querySelectorAll('input, select, textarea, button')].filter(e => e.offsetParent && !(
    e.labels?.length || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.innerText?.trim()
    || e.title)).map(e => e.outerHTML.slice(0, 200))
"""


def ask(url, body=None, headers=()):
    """Status and text of an answer."""
    request = urllib.request.Request(url, body, dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode("utf-8", "replace")


def press(address, session, number, data):
    """Join the queue for an event as a browser does: status and text."""
    body = {"fn_index": number, "data": data, "session_hash": session, "event_data": None, "trigger_id": None}
    return ask(f"{address}/gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"})


def answers(address, session):
    """Everything that the queue sends to a session until it closes the stream."""
    return ask(f"{address}/gradio_api/queue/data?session_hash={session}")[1]


@pytest.fixture(scope="module")
def config(served):
    return json.loads(ask(f"{served[1]}/config")[1])


def events(config, elem_id):
    """Numbers of the events that take a component's value, and how many values each takes."""
    [component] = [c["id"] for c in config["components"] if c["props"].get("elem_id") == elem_id]
    found = [d for d in config["dependencies"] if component in d["inputs"]]
    return [(d["id"], d["inputs"].index(component), d["inputs"], d["queue"]) for d in found]


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/proc/self/environ",
        "{root}/README.md",
        "{root}/data/tiny/README.md",
        "{logs}/../secret.txt",
        "{root}/data/demo/../../README.md",
        "file:///etc/passwd",
        "%2e%2e/%2e%2e/etc/passwd",
        "{uploads}/../../etc/passwd",
    ],
)
def test_no_address_leads_to_a_file_elsewhere(served, logdir, path):
    named = path.format(root=ROOT, logs=logdir, uploads="/tmp")
    for way in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/gradio_api/proxy="):
        status, text = ask(served[1] + way + named.replace(" ", "%20"))
        assert status in (403, 404) and "root:" not in text and "PATH=" not in text, way


@pytest.mark.parametrize("elem_id", ["concept-file", "images-to-learn"])
def test_an_event_does_not_take_a_file_that_was_not_uploaded(served, config, logdir, tmp_path, elem_id):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"not for the page")
    (logdir.parent / "link.png").symlink_to("/etc/passwd")
    for path in ("/etc/passwd", str(secret), str(logdir.parent / "link.png"), "/tmp/../etc/passwd", "http://127.0.0.1:1/x"):
        for number, place, inputs, _ in events(config, elem_id):
            data = [""] * len(inputs)
            given = {"path": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
            data[place] = given if elem_id == "concept-file" else [given] * 3
            session = f"s{abs(hash((path, number)))}"
            status, text = press(served[1], session, number, data)
            said = text + (answers(served[1], session) if status == 200 else "")
            assert '"success":true' not in said.replace(" ", "") or 'role=\\"alert\\"' in said
            assert "root:" not in said and "not for the page" not in said
    (logdir.parent / "link.png").unlink()
    assert secret.exists()


def test_what_the_server_remembers_of_a_client_cannot_be_sent_by_it(served, config, logdir):
    """The folder of dropped images is the server's knowledge: another one in its place would be copied."""
    [number] = [d["id"] for d in config["dependencies"] if len(d["inputs"]) == 5 and len(d["outputs"]) == 1 and d["queue"]]
    status, _ = press(served[1], "liar", number, ["/etc", "cat", "ICO", 10, False])
    assert status == 200 and "drop 3 to 20 images first" in answers(served[1], "liar")
    assert not list(logdir.glob("references/*/passwd"))


def test_an_upload_stays_in_its_folder_whatever_its_name(served):
    for name in ("../../../../tmp/dci-escaped.png", "/tmp/dci-escaped.png", "..\\dci-escaped.png"):
        body = (
            f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
            "Content-Type: image/png\r\n\r\nhello\r\n--x--\r\n"
        ).encode()
        status, text = ask(f"{served[1]}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"})
        if status == 200:
            [place] = json.loads(text)
            assert "/dci-app-" in place and os.path.realpath(place).startswith(place.partition("/dci-app-")[0] + "/dci-app-")
            assert ask(f"{served[1]}/gradio_api/file={place}")[1] == "hello"
        assert not os.path.exists("/tmp/dci-escaped.png")


def test_twenty_clients_press_draw_and_the_queue_holds(served, config):
    server, address = served
    [number] = [d["id"] for d in config["dependencies"] if d["outputs"] and len(d["inputs"]) == 12]
    data = [None, f"demo:{DEMOS[0]}", None, "a V* on the beach", 0.3, 0, "", 6, 2, "ddim", 0, 1]
    press(address, "warm", number, data)
    answers(address, "warm")
    before = memory(server.pid)
    joined = [press(address, f"client{i}", number, data) for i in range(20)]
    accepted = [i for i, (status, _) in enumerate(joined) if status == 200]
    assert QUEUE <= len(accepted) <= QUEUE + 3
    assert all("full" in text.lower() for status, text in joined if status != 200)
    said = {}
    threads = [threading.Thread(target=lambda i=i: said.update({i: answers(address, f"client{i}")})) for i in accepted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all("Download PNG" in said[i] for i in accepted)
    assert memory(server.pid) - before < 400
    assert ask(f"{address}/config")[0] == 200


def memory(pid):
    """Megabytes that a process holds."""
    with open(f"/proc/{pid}/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1]) / 1024

"""The page of blind pairs in a real browser, with the mouse and with the keys."""

import json
import threading

import pytest
from browser import MARKS, browsing
from helpers import ROOT
from PIL import Image

from dci.evaluation.answers import read_answers
from dci.evaluation.pairs import images_of, make_pairs
from dci.evaluation.rating_page import Session, address, serve

pytestmark = MARKS


@pytest.fixture
def session(tmp_path):
    """Two pairs of two runs, asked two questions each; its page is served."""
    for name in ("plain", "dci"):
        samples = tmp_path / name / "samples"
        samples.mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), "red" if name == "dci" else "blue").save(samples / f"{i:05}.png")
        prompts = {f"{i:05}": {"prompt": "a <new1> cat", "seed": 0, "index": i} for i in range(2)}
        (tmp_path / name / "prompts.json").write_text(json.dumps(prompts))
    folders = {name: tmp_path / name for name in ("plain", "dci")}
    pairs = make_pairs(images_of(folders, [ROOT / "data/concepts/cat"]))
    return Session(pairs, tmp_path / "answers.csv", "ann")


def test_a_person_answers_all_questions(session):
    server, problems = serve(session), []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with browsing() as browser:
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.on("console", lambda said: said.type == "error" and problems.append(said.text))
        page.goto(address(server))
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for number, side in enumerate(("left", "right", "neither more than the other", "left")):
            assert page.get_by_text(f"{number} of 4 answered").is_visible()
            sizes = page.eval_on_selector_all("form img", "all => all.map(i => i.naturalWidth)")
            assert sizes == [8, 8]
            button = page.get_by_role("button", name=side)
            if number == 3:
                button.focus()
                page.keyboard.press("Enter")
            else:
                button.click()
            page.wait_for_selector(f"progress[value='{number + 1}']")
        assert page.get_by_text("All is answered").is_visible()
    server.shutdown()
    server.server_close()
    assert problems == []
    answers = read_answers(session.file)
    assert sorted(answer.answer for answer in answers) == ["left", "left", "neither", "right"]
    assert {answer.rater for answer in answers} == {"ann"}

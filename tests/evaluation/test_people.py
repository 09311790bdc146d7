"""What people say: blind pairs on a page of this machine, answers in a file, and how metrics are held against them."""

import csv
import json
import re
import threading
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
from helpers import ROOT, refused, run_here, run_main
from PIL import Image

from dci.evaluation.answers import Answer, agreements, append_answer, preferences, read_answers
from dci.evaluation.pairs import images_of, make_pairs
from dci.evaluation.rating_page import Session, address, serve
from dci.evaluation.ratings import with_ratings
from dci.evaluation.report import write_report
from dci.evaluation.scores import ImageScore, RunScores, Scores, summarize
from ldm.errors import UserError

REFERENCES = ROOT / "data/concepts/cat"


@pytest.fixture
def folders(tmp_path):
    """Two runs of two prompts and two noises; each image has a grey of its own."""
    for number, name in enumerate(("plain", "dci")):
        samples = tmp_path / name / "samples"
        samples.mkdir(parents=True)
        facts = {}
        for i in range(4):
            Image.new("RGB", (8, 8), (40 * number + 10 * i,) * 3).save(samples / f"{i:05}.png")
            facts[f"{i:05}"] = {"prompt": f"a <new1> cat {'at night' if i < 2 else 'in space'}", "seed": 0, "index": i % 2}
        (tmp_path / name / "prompts.json").write_text(json.dumps(facts))
    return {name: tmp_path / name for name in ("plain", "dci")}


def pairs_of(folders, **options):
    return make_pairs(images_of(folders, [REFERENCES]), **options)


def test_pairs_are_of_one_prompt_and_noise_and_blind(folders):
    pairs = pairs_of(folders)
    assert len(pairs) == 4
    for pair in pairs:
        assert (pair.left.prompt, pair.left.noise) == (pair.right.prompt, pair.right.noise)
        assert {pair.left.run, pair.right.run} == {"plain", "dci"}
    assert pairs == pairs_of(folders) and pairs_of(folders, most=2) == pairs[:2]
    lefts = {pair.left.run for seed in range(5) for pair in pairs_of(folders, seed=seed)}
    assert lefts == {"plain", "dci"}
    assert len({tuple(str(pair.left.file) for pair in pairs_of(folders, seed=seed)) for seed in range(5)}) > 1


def test_pairs_that_cannot_be_made(folders, tmp_path):
    with pytest.raises(UserError, match="two runs"):
        images_of({"dci": folders["dci"]}, [REFERENCES])
    (folders["dci"] / "prompts.json").write_text(json.dumps({f"{i:05}": "a cat" for i in range(4)}))
    with pytest.raises(UserError, match="same prompt and noise"):
        pairs_of(folders)


def test_pairs_of_a_grid_are_named_as_in_its_report(tmp_path):
    for setting in ("plain", "dci"):
        folder = tmp_path / "cells/cat/ico/0" / setting
        folder.mkdir(parents=True)
        row = {"file": str(REFERENCES / "00.png"), "prompt": "a {}", "text": "a cat", "noise": "0:0", "values": {}}
        place = {"concept": "cat", "method": "ico", "seed": 0, "setting": setting}
        metadata = {"references": [str(REFERENCES / "01.png")]}
        (folder / "result.json").write_text(json.dumps(place | {"rows": [row], "summary": {}, "metadata": metadata}))
    (pair,) = make_pairs(images_of({"tiny": tmp_path}))
    assert {pair.left.run, pair.right.run} == {"ico, plain", "ico, dci"} and pair.left.concept == "cat"
    assert [file.name for file in pair.left.references] == ["01.png"]
    with pytest.raises(UserError, match="give it alone"):
        images_of({"tiny": tmp_path, "other": tmp_path})


@pytest.fixture
def served(folders, tmp_path):
    """A session of four pairs, its page's address."""
    session = Session(pairs_of(folders), tmp_path / "answers.csv", "ann")
    server = serve(session)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield session, address(server)
    server.shutdown()
    server.server_close()
    thread.join()


def get(url, data=None, **headers):
    request = urllib.request.Request(url, data and urllib.parse.urlencode(data).encode(), headers)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.read(), answer.headers


def status(url, data=None, **headers):
    with pytest.raises(urllib.error.HTTPError) as error:
        get(url, data, **headers)
    return error.value.code


def hidden(page):
    return dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page))


def test_a_person_answers_all_and_nothing_is_asked_twice(served, folders, tmp_path):
    session, url = served
    assert url.startswith("http://127.0.0.1:")
    asked = []
    for _ in range(8):
        page, headers = get(url)
        text = page.decode()
        assert "default-src 'none'" in headers["Content-Security-Policy"] and "<script" not in text
        assert (
            not re.search(r"(src|href|action)=\"(?!/|data:,\")", text) and "plain" not in text and "dci" not in text
        )  # blind
        facts = hidden(text)
        images = re.findall(r'src="(/image/[^"]+)"', text)
        assert len(images) == 2
        assert ("the thing above" in text) == bool(re.search(r'src="/reference/\d+/4"', text))
        asked.append((facts["number"], facts["question"]))
        get(url + "answer", facts | {"answer": "left"}, Origin=url.rstrip("/"))
    assert "All is answered" in get(url)[0].decode() and len(set(asked)) == 8
    answers = read_answers(session.file)
    assert [(a.question, a.answer, a.rater) for a in answers] == [(q, "left", "ann") for _, q in asked]
    pair = session.pairs[int(asked[0][0])]
    assert (answers[0].left_run, answers[0].left_file) == (pair.left.run, str(pair.left.file))
    assert not Session(pairs_of(folders), session.file, "ann").open()
    assert not Session(pairs_of(folders, seed=3), session.file, "ann").open()  # whichever side they stand on
    assert len(Session(pairs_of(folders), session.file, "bob").open()) == 8


def test_images_are_sent_by_number_and_as_they_are_read(served):
    session, url = served
    content, headers = get(url + "image/0/left")
    (tmp := session.file.parent / "sent.png").write_bytes(content)
    assert headers["Content-Type"] == "image/png"
    assert np.array_equal(np.asarray(Image.open(tmp)), np.asarray(Image.open(session.pairs[0].left.file)))
    assert get(url + "reference/0/0")[0][:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "path",
    [
        "image/9/left",
        "image/0/other",
        "image/0/../left",
        "reference/0/99",
        "reference/0/-1",
        "etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "image/0/left?x",
        "answers.csv",
    ],
)
def test_other_addresses_lead_nowhere(served, path):
    assert status(served[1] + path) == 404


def test_an_image_or_a_file_that_is_gone_is_reported_and_the_page_goes_on(served, capfd):
    session, url = served
    image = session.pairs[0].left.file
    content = image.read_bytes()
    image.unlink()
    assert status(url + "image/0/left") == 404
    assert str(image) in capfd.readouterr().err
    image.write_bytes(content)
    assert get(url + "image/0/left")[0][:4] == b"\x89PNG"
    facts = {"token": session.token, "number": "0", "question": "thing", "answer": "left"}
    session.file.mkdir()
    assert status(url + "answer", facts) == 500
    said = capfd.readouterr().err
    assert f"{session.file} cannot be written (Is a directory)" in said and "Traceback" not in said
    session.file.rmdir()
    get(url + "answer", facts)
    assert [given.answer for given in read_answers(session.file)] == ["left"]


def test_a_file_that_cannot_keep_answers_is_refused_before_the_first(folders, tmp_path):
    with pytest.raises(UserError, match=r"cannot be written \(Is a directory\)"):
        Session(pairs_of(folders), tmp_path)
    Session(pairs_of(folders), tmp_path / "new" / "answers.csv")
    assert not (tmp_path / "new/answers.csv").exists()


def test_a_port_that_is_taken_is_named(served, folders, tmp_path):
    port = int(served[1].rsplit(":", 1)[1].rstrip("/"))
    with pytest.raises(UserError, match=f"cannot serve on 127.0.0.1:{port} .*give another port"):
        serve(Session(pairs_of(folders), tmp_path / "b.csv"), port)


def test_others_are_not_answered(served):
    session, url = served
    good = {"token": session.token, "number": "0", "question": "thing", "answer": "left"}
    assert status(url, Host="evil.example:80") == 403
    assert status(url + "answer", good, Origin="http://evil.example") == 403
    assert status(url + "answer", good | {"token": "guess"}) == 403
    assert status(url + "answer", good | {"number": "4"}) == 400
    assert status(url + "answer", good | {"answer": "both"}) == 400
    assert status(url + "answer", good | {"question": "x" * 5000}) == 400
    assert status(url + "other", good) == 400
    assert not session.file.exists()


def answer(side, question="thing", left="a", right="b", number=0, **more):
    return Answer(
        question, "cat", f"p{number}", "0:0", left, f"{left}{number}.png", right, f"{right}{number}.png", side, **more
    )


def test_answers_are_kept_one_by_one(tmp_path):
    file = tmp_path / "new/answers.csv"
    given = [answer("left", rater='a, "b"'), answer("neither", "prompt", number=1)]
    for one in given:
        append_answer(file, one)
    assert read_answers(file) == given
    with open(file, "a") as opened:
        opened.write("thing,cat,cut of")  # the machine stopped in the middle of a line
    assert read_answers(file) == given
    append_answer(file, answer("right", number=2))
    assert read_answers(file) == [*given, answer("right", number=2)]
    file.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="holds no answers"):
        read_answers(file)


def runs(values):
    """Runs a and b whose image of each prompt has such a DINO-I."""
    made = []
    for name, column in values.items():
        rows = tuple(
            ImageScore(f"{name}{i}.png", f"p{i}", "", "0:0", {"dino_i": v, "clip_t": 0.5}, "cat")
            for i, v in enumerate(column)
        )
        made.append(RunScores(name, Scores(rows, summarize(rows, 9))))
    return made


def test_agreement_is_the_share_of_answers_that_a_metric_gives_too():
    pair = runs({"a": [0.9, 0.1, 0.5, 0.9], "b": [0.1, 0.9, 0.5, 0.1]})
    given = [
        answer("left", number=0),  # the metric says a, too
        answer("left", number=1),  # it says b
        answer("right", number=2),  # it says neither
        answer("right", left="b", right="a", number=3),  # it says a, which stands on the right
        answer("neither", number=0),  # is not held against it
    ]
    (dino,) = [one for one in agreements(pair, given) if one.metric == "dino_i"]
    assert dino.question == "thing" and dino.share.mean == pytest.approx((1 + 0 + 0.5 + 1) / 4) and dino.share.n == 4
    assert 0 <= dino.share.low < dino.share.mean < dino.share.high <= 1
    (liked,) = preferences(given)
    assert liked[:3] == ("thing", "a", "b") and liked[3].mean == pytest.approx((1 + 1 + 0 + 1 + 0.5) / 5)
    with pytest.raises(UserError, match="'c', which the report does not have"):
        agreements(pair, [answer("left", left="c")])


def test_the_report_draws_agreement_and_shows_ratings(tmp_path):
    pair, picture = runs({"a": [0.9, 0.1], "b": [0.1, 0.9]}), REFERENCES / "00.png"
    given = []
    for run in pair:
        for i, row in enumerate(run.scores.rows):
            file = tmp_path / f"{run.name}{i}.png"
            file.write_bytes(picture.read_bytes())
            object.__setattr__(row, "file", str(file))
    for i in range(2):
        a, b = (run.scores.rows[i].file for run in pair)
        given.append(Answer("thing", "cat", f"p{i}", "0:0", "a", a, "b", b, "left", "ann"))
    table = tmp_path / "ratings.csv"
    with open(table, "w", newline="") as file:
        rows = [[run.name, row.file, 0, rating] for run in pair for row, rating in zip(run.scores.rows, (3, 4), strict=True)]
        csv.writer(file).writerows([["run", "file", "clip_t", "beauty"], *rows[:2], [*rows[2][:3], ""]])
    rated = with_ratings(pair, table)
    assert rated[0].scores.summary["rating: beauty"].mean == 3.5 and "rating: beauty" not in rated[1].scores.summary
    assert rated[0].scores.rows[0].values["clip_t"] == 0.5  # a report's own columns are no ratings
    page = write_report(tmp_path / "out", rated, "People", answers=given).read_text()
    assert page.count("<svg") == 5 and "What people answered" in page
    text = (tmp_path / "out/report.md").read_text()
    assert "rating: beauty" in text and "this project made none of them" in text
    assert re.search(r"\| Which is more the thing above\? \| DINO-I \| 50.0 % \[0.0, 100.0\] \| 2 \|", text)
    assert re.search(r"\| a \| b \| 100.0 % \[100.0, 100.0\] \| – \|", text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file,beauty\na0.png,nice\n", "line 2: beauty is 'nice'"),
        ("file,clip_t\na0.png,1\n", "columns of ratings"),
        ("image,beauty\na0.png,1\n", "a column 'file'"),
        ("file,beauty\nz.png,1\n", "which the report does not show"),
        ("", "a column 'file'"),
        ("file,beauty\n", "there is no rating in beauty"),
        ("file,beauty\na0.png,\n", "there is no rating in beauty"),
        ("file,beauty\na0.png,1\na0.png,2\n", "line 3: it rates an image twice"),
        ("file,beauty,beauty\na0.png,1,2\n", "columns of different names"),
        ("file,beauty\na0.png\n", "line 2: 1 cells, expected 2"),
        ("file,beauty\na0.png,1,2\n", "line 2: 3 cells, expected 2"),
        ("file,beauty\n,1\n", "line 2: it names no file"),
    ],
)
def test_ratings_that_cannot_be_used(content, message, tmp_path):
    (tmp_path / "r.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        with_ratings(runs({"a": [0.1]}), tmp_path / "r.csv")


def test_the_program_says_where_the_page_is(folders, tmp_path, monkeypatch, capfd):
    from http.server import ThreadingHTTPServer

    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", lambda server: None)
    given = [f"{name}={folder}" for name, folder in folders.items()]
    run_main("rate.py", *given, "--references", REFERENCES, "--answers", tmp_path / "a.csv", "--most", 3)
    out = capfd.readouterr().out
    assert "6 of 6 questions about 3 pairs are open" in out and "http://127.0.0.1:" in out


@pytest.mark.parametrize(
    ("runs_left_out", "args", "words"),
    [
        (1, [], "two runs"),
        (0, ["again={plain}/../plain"], "'plain' is this folder already"),
        (0, ["--port", "65536"], "expected a port"),
        (0, ["--answers", "{csv}"], "no answers"),
    ],
)
def test_a_page_that_cannot_be_served_is_refused(runs_left_out, args, words, folders, tmp_path, capfd):
    (tmp_path / "a.csv").write_text("x\n")
    args = [arg.format(plain=folders["plain"], csv=tmp_path / "a.csv") for arg in args]
    given = [f"{name}={folder}" for name, folder in folders.items()][: len(folders) - runs_left_out]
    refused(run_here(capfd, "rate.py", *given, *args, "--references", REFERENCES), words)

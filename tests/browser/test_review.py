"""The review page in a real browser: clips play, edits arrive, nobody's work is lost, nothing is asked of elsewhere."""

import base64
import http.server
import io
import itertools
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from data_tools import editing, review
from tests import odd_files
from tests.browser.chromium import chromium, complaints, requests

pytestmark = pytest.mark.slow

SHOTS = (12, 12, 12, 12)
HOSTILE = '<script>document.title = "hacked"</script><img src=x onerror="document.title = 1">"\'</textarea>&lt;'
WAIT_S = 60

PICTURE = """
const [video, time_s, done] = arguments;
video.pause();
video.onseeked = () => {
  const canvas = Object.assign(document.createElement("canvas"), {width: video.videoWidth, height: video.videoHeight});
  canvas.getContext("2d").drawImage(video, 0, 0);
  done(canvas.toDataURL());
};
video.currentTime = time_s;
"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        driver.set_script_timeout(WAIT_S)
        yield driver


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A film that browsers cannot play, of four shots of half a second, and a picture."""
    folder = tmp_path_factory.mktemp("media")
    odd_files.write_film(folder / "film.mpg", odd_files.film_of_shots(SHOTS), 24, "mpeg2video", b="8M")
    odd_files.make(folder, ["still.png"])
    return folder


@pytest.fixture
def serve(media, tmp_path):
    """Serve rows as a manifest: (the server, the manifest)."""
    ends = []

    def start(rows, **options):
        path = tmp_path / "manifest.jsonl"
        path.write_text("".join(json.dumps({"video": str(media / "film.mpg")} | row) + "\n" for row in rows))
        manifest = editing.Manifest(path)
        server = review.Review(manifest, tmp_path / "previews", 16, **{"trigger": "", "port": 0, "jobs": 2,
                                                                               "timeout_s": WAIT_S} | options)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()

        def end():
            server.shutdown()
            server.server_close()
            thread.join()

        ends.append(end)
        return server, path

    yield start
    for end in ends:
        end()


def until(browser, done, what):
    try:
        return WebDriverWait(browser, WAIT_S, 0.05).until(lambda _: done())
    except TimeoutException:
        raise AssertionError(f"not within {WAIT_S} s: {what}; the page says {texts(browser, 'main')}") from None


def texts(browser, selector):
    return [found.text for found in browser.find_elements(By.CSS_SELECTOR, selector)]


def fields(browser):
    return browser.find_elements(By.CSS_SELECTOR, "textarea")


def open_page(browser, server, num_cards):
    browser.get(server.address)
    until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, "article")) == num_cards, f"{num_cards} cards")


def leave(browser):
    """Go to an empty page, whatever is not saved."""
    browser.execute_script("rows = []")
    browser.get("about:blank")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def press(browser, *keys):
    browser.switch_to.active_element.send_keys(*keys)


def current(browser):
    [name] = texts(browser, "article.current .name")
    return name


def test_a_clip_plays_its_span_and_nothing_else_in_a_loop(browser, serve):
    server, _ = serve([{"start_s": 0.5, "end_s": 1.0, "caption": "a"}])
    open_page(browser, server, 1)
    video = until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "video"), "a video")[0]
    until(browser, lambda: video.get_property("videoWidth") == odd_files.WIDTH, "a picture of its width")
    assert video.get_property("duration") == pytest.approx(0.5, abs=0.01)
    assert [video.get_property(name) for name in ("muted", "loop", "paused")] == [True, True, False]
    assert "8 frames at 16 fps" in texts(browser, "figcaption")
    seen, began = [], time.monotonic()
    while not any(b < a for a, b in itertools.pairwise(seen)):
        seen.append(video.get_property("currentTime"))
        assert time.monotonic() - began < WAIT_S, "it does not come back to its start"
    assert len(set(seen)) > 2
    frames = odd_files.film_of_shots(SHOTS).astype(int)
    for time_s in (0.01, 0.25, 0.48):
        url = browser.execute_async_script(PICTURE, video, time_s)
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))
        nearest = int(np.argmin(np.abs(frames - shown).mean(axis=(1, 2, 3))))
        assert 12 <= nearest < 24, f"at {time_s} s it shows frame {nearest}"


def test_leaving_a_field_saves_it_and_nothing_else_changes(browser, serve, media):
    server, path = serve([{"caption": "one", "id": "a", "motion": 1.5, "end_s": 0.5},
                          {"caption": "two", "id": "b", "captions": ["zwei"], "end_s": 0.5},
                          {"video": str(media / "still.png"), "caption": "three", "id": "c"}])
    before = path.read_text().splitlines()
    open_page(browser, server, 3)
    fields(browser)[1].send_keys(" \u00fc")
    assert path.read_text().splitlines() == before
    fields(browser)[0].click()
    until(browser, lambda: texts(browser, ".state")[1] == "saved", "saved")
    after = path.read_text().splitlines()
    assert (after[0], after[2]) == (before[0], before[2])
    assert json.loads(after[1]) == json.loads(before[1]) | {"caption": "two \u00fc"}
    browser.find_elements(By.XPATH, "//button[text()='+ another caption']")[1].click()
    press(browser, "deux", Keys.CONTROL, "s")
    until(browser, lambda: rows_of(path)[1]["captions"] == ["zwei", "deux"], "a further caption by Ctrl S")
    fields(browser)[2].send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE)
    fields(browser)[0].click()
    until(browser, lambda: rows_of(path)[1]["captions"] == ["deux"], "an emptied caption is taken out")
    browser.refresh()
    until(browser, lambda: [f.get_property("value") for f in fields(browser)] == ["one", "two \u00fc", "deux", "three"],
          "all texts after loading the page again")
    browser.find_elements(By.CSS_SELECTOR, "article")[-1].click()
    browser.execute_script("arguments[0].scrollIntoView()", browser.find_elements(By.CSS_SELECTOR, "article")[-1])
    still = until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "img"), "the image")[0]
    until(browser, lambda: still.get_property("naturalWidth") == odd_files.WIDTH, "its size")


@pytest.mark.parametrize(("button", "expected"), [("take that", "theirs"), ("write mine over it", "one mine")])
def test_a_change_of_somebody_else_is_reported_and_not_overwritten(browser, serve, button, expected):
    server, path = serve([{"caption": "one", "end_s": 0.5}])
    open_page(browser, server, 1)
    path.write_text(path.read_text().replace('"one"', '"theirs", "sharp": 3'))
    theirs = path.read_bytes()
    fields(browser)[0].send_keys(" mine", Keys.ESCAPE)
    until(browser, lambda: texts(browser, ".conflict") != [""], "the conflict")
    assert "The manifest now says:\ntheirs" in texts(browser, ".conflict")[0]
    assert "not saved" in texts(browser, ".state")[0]
    assert "1 not saved" in texts(browser, "#counts")[0]
    assert fields(browser)[0].get_property("value") == "one mine"
    assert path.read_bytes() == theirs
    browser.find_element(By.XPATH, f"//button[text()='{button}']").click()
    until(browser, lambda: "not saved" not in texts(browser, "#counts")[0], "it is settled")
    assert fields(browser)[0].get_property("value") == expected
    assert (rows_of(path)[0]["caption"], rows_of(path)[0]["sharp"]) == (expected, 3)


def test_keys(browser, serve):
    server, path = serve([{"caption": f"number {i}", "id": f"clip {i}", "end_s": 0.5} for i in range(22)])
    open_page(browser, server, 20)
    assert current(browser) == "clip 0"
    press(browser, Keys.ARROW_DOWN)
    assert current(browser) == "clip 1"
    press(browser, "x")
    press(browser, Keys.ARROW_DOWN, "y")
    until(browser, lambda: [row.get("keep") for row in rows_of(path)][:4] == [None, 0, 1, None], "the marks")
    until(browser, lambda: texts(browser, "#counts") == ["22 clips, 0 empty, 1 kept, 1 dropped, 20 not marked"],
          "the counts")
    press(browser, Keys.ARROW_UP, "u")
    until(browser, lambda: "keep" not in rows_of(path)[1], "no mark")
    press(browser, Keys.ENTER, " x", Keys.CONTROL, Keys.ENTER)
    assert current(browser) == "clip 2"
    until(browser, lambda: (rows_of(path)[1]["caption"], rows_of(path)[1].get("keep")) == ("number 1 x", 1),
          "kept by Ctrl Enter")
    press(browser, Keys.ALT, Keys.ARROW_UP)
    assert current(browser) == "clip 1"
    assert browser.switch_to.active_element.get_property("value") == "number 1 x"
    press(browser, Keys.ESCAPE)
    for _ in range(19):
        press(browser, Keys.ARROW_DOWN)
    assert current(browser) == "clip 20"
    assert texts(browser, "#page") == ["21 to 22 of 22"]
    press(browser, Keys.ARROW_UP)
    assert current(browser) == "clip 19"


def test_filters_pages_and_previews_of_what_is_in_sight_only(browser, serve):
    rows = [{"caption": "sks, dog" if i % 2 else "", "id": f"clip {i}", "start_s": 0.01 * i} for i in range(60)]
    rows[7] |= {"caption": "A Cat", "keep": 0}
    server, path = serve(rows, trigger="sks")
    open_page(browser, server, 20)
    assert texts(browser, "#counts") == ["60 clips, 30 empty, 0 kept, 1 dropped, 59 not marked, 31 without trigger"]
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "video"), "a video")

    def shown(option):
        browser.find_element(By.CSS_SELECTOR, f"#filter option[value={option}]").click()
        return texts(browser, "#page")[0].rpartition(" ")[2]

    assert [shown(o) for o in ("empty", "untriggered", "out", "good", "unmarked", "unsaved", "all")] == [
        "30", "31", "1", "0", "59", "0", "60"]
    browser.find_element(By.ID, "search").send_keys("a cAT")
    assert texts(browser, "article .name") == ["clip 7"]
    press(browser, Keys.CONTROL, "a", Keys.NULL, Keys.DELETE)
    browser.find_element(By.ID, "on").click()
    assert texts(browser, "#page") == ["21 to 40 of 60"]
    browser.execute_script("window.confirm = () => true")
    browser.find_element(By.ID, "rest").click()
    until(browser, lambda: [row.get("keep") for row in rows_of(path)] == [0 if i == 7 else 1 for i in range(60)],
          "all others are kept")
    asked = {url for url in requests(browser) if url.startswith(f"{server.address}preview/")}
    assert 0 < len(asked) < 15
    assert len(list(server.previews.iterdir())) <= len(asked)


def test_a_hostile_caption_is_only_text(browser, serve):
    server, path = serve([{name: HOSTILE for name in ("caption", "id", "video", "note")} | {"captions": [HOSTILE]}])
    open_page(browser, server, 1)
    assert [field.get_property("value") for field in fields(browser)] == [HOSTILE, HOSTILE]
    assert texts(browser, "article .name") == [HOSTILE]
    assert HOSTILE in texts(browser, "article .about")[0]
    until(browser, lambda: "No such file" in texts(browser, "figcaption")[0], "its video is missing")
    path.write_text(json.dumps({"video": HOSTILE, "id": HOSTILE, "caption": HOSTILE * 2}))
    fields(browser)[0].send_keys("x", Keys.ESCAPE)
    until(browser, lambda: HOSTILE in texts(browser, ".conflict")[0], "the conflict")
    assert browser.title == "Captions"
    assert len(browser.find_elements(By.CSS_SELECTOR, "script, article img, article script")) == 1
    leave(browser)


def test_nothing_is_asked_of_elsewhere(browser, serve, media):
    requests(browser), complaints(browser)
    server, path = serve([{"caption": "one", "end_s": 0.5}, {"video": str(media / "still.png"), "caption": "two"}])
    open_page(browser, server, 2)
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "video") and browser.find_elements(
        By.CSS_SELECTOR, "img"), "both pictures")
    fields(browser)[0].send_keys(" more", Keys.ESCAPE)
    until(browser, lambda: rows_of(path)[0]["caption"] == "one more", "it is saved")
    asked = [url for url in requests(browser) if not url.startswith(("blob:http://127.0.0.1", "data:"))]
    assert len(asked) >= 5
    assert [url for url in asked if not url.startswith(server.address)] == []
    assert complaints(browser) == []
    assert browser.execute_async_script(
        "document.addEventListener('securitypolicyviolation', event => arguments[0](event.effectiveDirective));"
        "document.body.append(Object.assign(new Image(), {src: '/elsewhere.png'}))") == "img-src"


def test_a_server_that_is_gone_is_told_and_the_text_stays(browser, serve, monkeypatch):
    server, path = serve([{"caption": "one", "end_s": 0.5}])
    open_page(browser, server, 1)
    monkeypatch.setattr(server, "get_request", lambda: (_ for _ in ()).throw(OSError))
    server.socket.close()
    fields(browser)[0].send_keys(" mine", Keys.ESCAPE)
    until(browser, lambda: "not saved: the server does not answer" in texts(browser, ".state")[0], "the failure")
    assert "1 not saved" in texts(browser, "#counts")[0]
    assert fields(browser)[0].get_property("value") == "one mine"
    assert rows_of(path)[0]["caption"] == "one"
    leave(browser)


def test_a_failed_save_is_told_and_goes_well_later(browser, serve, monkeypatch):
    server, path = serve([{"caption": "one", "end_s": 0.5}])
    open_page(browser, server, 1)
    with monkeypatch.context() as patch:
        patch.setattr(review.Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        fields(browser)[0].send_keys(" mine", Keys.ESCAPE)
        until(browser, lambda: "not saved: could not write" in texts(browser, ".state")[0], "the failure")
        assert "No space left" in texts(browser, ".state")[0]
    press(browser, Keys.CONTROL, "s")
    until(browser, lambda: texts(browser, ".state") == ["saved"], "saved")
    assert rows_of(path)[0]["caption"] == "one mine"


def test_a_page_from_elsewhere_can_neither_read_nor_write(browser, serve):
    server, path = serve([{"caption": "one", "end_s": 0.5}])
    before = path.read_bytes()

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        browser.get(f"http://127.0.0.1:{other.server_port}/")
        [row] = server.rows()["rows"]
        edit = json.dumps([{"key": row["key"], "was": {"caption": "one"}, "now": {"caption": "theirs"}}])
        outcome = browser.execute_async_script("""
            const [address, body, done] = arguments;
            Promise.all([{}, {method: "POST", body}, {method: "POST", body, mode: "no-cors"}].map(options =>
              fetch(address + "rows", options).then(reply => reply.type, () => "refused"))).then(done);
            """, server.address, edit)
        other.shutdown()
    assert outcome == ["refused"] * 3
    assert path.read_bytes() == before

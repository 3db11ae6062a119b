"""The page of a run in a real browser: samples in step, keys, sliders, votes, many videos, a run that goes on."""

import json
import shutil
import threading
import time
from functools import partial

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests import run_folders
from tests.browser.chromium import chromium, complaints, requests
from wantrain import results
from wantrain.pages import live, run_page
from wantrain.results import Prompt, Video

pytestmark = pytest.mark.slow

WAIT_S = 30
HOSTILE = '<img src=x onerror="document.title = 1"></script><script>document.title = 1</script>'
SHOWN = """return [...document.querySelectorAll(arguments[0])].filter(v => v.readyState > 1).map(v => {
  const canvas = new OffscreenCanvas(8, 8), context = canvas.getContext("2d");
  context.drawImage(v, 0, 0, v.videoWidth, 8, 0, 0, 8, 8);
  return Math.round(context.getImageData(4, 4, 1, 1).data[0] / 10);
})"""
"""The number that each video's picture says of itself (tests.run_folders.frames)."""


@pytest.fixture(scope="module")
def browser():
    with chromium(1400, 1000) as driver:
        yield driver


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of two checkpoints, the later written first, at two strengths; one prompt and one name hold HTML."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    clips = run_folders.clips_in(run / "clips", 2)
    run_folders.write_training(run, [clip | {"name": HOSTILE} for clip in clips])
    run_folders.write_results(run / "report", steps=(200, 1000), seeds=(0,), prompts=[
        Prompt("a fox"), Prompt(HOSTILE)])
    return run


def until(done, what):
    limit = time.monotonic() + WAIT_S
    while not (found := done()):
        assert time.monotonic() < limit, f"not within {WAIT_S} s: {what}"
        time.sleep(0.1)
    return found


def texts(browser, selector):
    return browser.execute_script("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)",
                                  selector)


def frames(browser, selector):
    return browser.execute_script(SHOWN, selector)


def all_at(browser, frame):
    return set(frames(browser, "#stage video, #grid video")) == {frame}


def press(browser, *keys):
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def open_page(browser, address):
    browser.get(address)
    browser.execute_script("document.activeElement.blur(); document.querySelector('#samples').scrollIntoView()")
    until(lambda: len(frames(browser, "#stage video")) == 2, "the stage plays")


def test_samples_play_in_step_and_stand_at_the_same_frame(browser, run_dir):
    requests(browser), complaints(browser)
    path = run_page.write(run_dir)
    open_page(browser, path.as_uri())
    seen = set()
    until(lambda: len(seen.update(found := frames(browser, "#stage video, #grid video")) or seen) > 2
          and len(found) > 3 and max(found) - min(found) <= 2, "all play on, and in step")
    press(browser, " ", ".")
    told = browser.execute_script("return frameOf()")
    for key, step in ((".", 1), (".", 1), (",", -1)):
        press(browser, key)
        told = (told + step) % run_folders.NUM_FRAMES
        until(partial(all_at, browser, told), f"frame {told} in all")
        assert texts(browser, "#frames") == [f"frame {told + 1} of {run_folders.NUM_FRAMES}"]
    press(browser, "s", "s", " ")
    assert texts(browser, "#rate") == ["speed 0.25\u00d7"]
    until(lambda: browser.execute_script("return [...document.querySelectorAll('#stage video')].every("
                                         "v => v.playbackRate === 0.25 && !v.paused)"), "slow motion")
    asked = [url for url in requests(browser) if not url.startswith(("blob:", "data:"))]
    assert asked == [path.as_uri()]
    assert complaints(browser) == []


def test_keys_and_sliders(browser, run_dir):
    open_page(browser, run_page.write(run_dir).as_uri())
    assert texts(browser, "#grid thead th") == ["", "base", "step 200 x 1", "step 1000 x 1"]
    assert texts(browser, "#stage .label") == ["Abase", "Bstep 1000 x 1"], "the nearest to the best, step 700"
    press(browser, Keys.ARROW_LEFT)
    assert texts(browser, "#stage .label") == ["Abase", "Bstep 200 x 1"]
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.SHIFT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.NULL)
    assert texts(browser, "#stage .label") == ["Astep 1000 x 1", "Bstep 200 x 1", "basebase"], "the base beside them"
    press(browser, "b")
    assert len(texts(browser, "#stage .label")) == 2
    press(browser, "x")
    assert texts(browser, "#stage .label") == ["Astep 200 x 1", "Bstep 1000 x 1"]
    press(browser, Keys.ARROW_DOWN)
    assert texts(browser, "#prompt")[0].startswith(HOSTILE)
    assert texts(browser, "#stage .caption")[0] == f"mystyl style, {HOSTILE}"
    assert texts(browser, "#stage .numbers")[1].startswith("style distance 0.2")
    assert "wantrain sample --like step1000_1_1_0.mp4" in texts(browser, "#stage pre")
    press(browser, "v")
    visible = "return ['a', 'b'].map(p => getComputedStyle(document.querySelector(`.pane-${p} .shown`)).visibility)"
    assert browser.execute_script(visible) == ["visible", "hidden"]
    press(browser, "x")
    assert browser.execute_script(visible) == ["hidden", "visible"]
    press(browser, "v")
    browser.execute_script("const s = document.querySelector('#split'); s.value = 30; s.oninput({target: s})")
    assert browser.execute_script("return getComputedStyle(document.querySelector('.pane-b .shown')).clipPath") == \
        "inset(0px 0px 0px 30%)"
    strength = browser.find_element(By.ID, "strength")
    strength.send_keys(Keys.ARROW_LEFT)
    assert texts(browser, "#grid thead th") == ["", "base", "step 200 x 0.5", "step 1000 x 0.5"]
    assert texts(browser, "#stage .label")[1] == "Bstep 1000 x 0.5"
    for wanted, ground in (("light", "rgb(245, 245, 243)"), ("dark", "rgb(19, 20, 22)")):
        browser.find_element(By.ID, "theme").click()
        assert texts(browser, "#theme") == [wanted]
        assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == ground
    browser.find_element(By.ID, "theme").click()


def test_what_is_told_of_the_run_and_html_in_it_is_only_text(browser, run_dir):
    open_page(browser, run_page.write(run_dir).as_uri())
    assert browser.title == "mine"
    assert browser.execute_script("return document.querySelectorAll('main img, main script').length") == 0
    assert "Usable: steps 400 to 900." in texts(browser, "#verdict .card div")
    titles = texts(browser, ".chart h3")
    assert titles[:5] == ["Held-out loss", "LoRA minus base", "Gap", "By sigma", "Drift"]
    assert browser.execute_script("return document.querySelectorAll('.chart polygon').length") == 3, "the intervals"
    assert texts(browser, "#measures tbody th") == ["base", "step 200 x 0.5", "step 200 x 1", "step 1000 x 0.5",
                                                    "step 1000 x 1"]
    rows = browser.execute_script("return [...document.querySelectorAll('#measures tbody tr')].map("
                                  "r => r.cells[1].textContent)")
    assert rows == ["0.600 \u00b1 0.030", "0.420 \u00b1 0.030", "0.240 \u00b1 0.030", "0.400 \u00b1 0.030",
                    "\u25cf 0.200 \u00b1 0.030"] or rows[2].startswith("\u25cf"), "0.24 - 0.03 reaches 0.2 + 0.03"
    assert HOSTILE in texts(browser, "#clips figcaption div")
    browser.execute_script("document.querySelector('#clips').scrollIntoView()")
    until(lambda: len(frames(browser, "#clips video")) == 2, "the clips play")
    assert browser.execute_script("return [document.documentElement.scrollWidth <= innerWidth]") == [True]


def test_votes_are_blind_kept_and_counted(browser, run_dir):
    open_page(browser, run_page.write(run_dir).as_uri())
    browser.find_element(By.ID, "only-ab").click()
    browser.find_element(By.ID, "vote").click()
    lefts = []
    for choice in ("left", "neither", "right", "left"):
        until(lambda: len(frames(browser, "#ballot video")) == 2, "both samples")
        told = texts(browser, "#ballot")[0]
        assert "base" not in told
        assert "step" not in told
        ballot = browser.execute_script("const {left, right} = document.querySelector('#ballot').current;"
                                        "return {left, right}")
        lefts.append((choice, ballot))
        press(browser, {"left": "1", "neither": "0", "right": "2"}[choice])
    press(browser, Keys.ESCAPE)
    assert all(set(ballot.values()) == {"base", "step1000_1"} for _, ballot in lefts)
    wins = sum(ballot.get(choice) == "base" for choice, ballot in lefts)
    # Wilson's interval of 95 % for k of 3, from its formula, by hand
    told = {0: "0 % (0 to 56 %)", 1: "33 % (6 to 79 %)", 2: "67 % (21 to 94 %)", 3: "100 % (44 to 100 %)"}[wins]
    counts = ["base", str(wins), "step 1000 x 1", str(3 - wins), "1", told]
    assert texts(browser, "#counts td") == counts
    browser.refresh()
    assert texts(browser, "#counts td") == counts
    assert browser.find_element(By.ID, "download").is_displayed()


def test_three_hundred_videos_are_loaded_as_they_come_into_sight(browser, tmp_path):
    prompts = [Prompt(f"prompt {i}") for i in range(60)]
    run_folders.write_results(tmp_path / "report", steps=(2, 10, 100, 1000), strengths=(1.0,), prompts=prompts[:1],
                              seeds=(0,))
    found = results.read(tmp_path / "report")
    copies = []
    for video in found.videos:
        for p in range(60):
            file = f"{p}_{video.file}"
            shutil.copy(tmp_path / "report" / video.file, tmp_path / "report" / file)
            copies.append(Video(file, video.column, p, 0, prompts[p].text))
    results.write(tmp_path / "report", results.Results("many", "", 16, found.columns, prompts, copies))
    open_page(browser, run_page.write(tmp_path).as_uri())
    assert texts(browser, "#grid thead th") == ["", "base", *(f"step {step} x 1" for step in (2, 10, 100, 1000))]
    assert len(texts(browser, "#grid td")) == 300
    until(lambda: frames(browser, "#grid video"), "the first of the grid")
    assert browser.execute_script("return document.querySelectorAll('video').length") < 50
    browser.execute_script("document.querySelector('#grid tbody tr:last-child').scrollIntoView()")
    until(lambda: len(frames(browser, "#grid tbody tr:last-child video")) == 5, "the last row")
    until(lambda: not texts(browser, "#grid tbody tr:first-child video"), "the first row is let go")
    assert browser.execute_script("return document.querySelectorAll('video').length") < 50
    assert complaints(browser) == []


def test_the_live_page_follows_a_run(browser, tmp_path, monkeypatch):
    run = tmp_path / "growing"
    run_folders.write_training(run, done=300, lora={"rank": 16})
    run_folders.write_training(tmp_path / "other", done=400, lora={"rank": 32})
    monkeypatch.setattr(live.lock, "holder", lambda folder: "process 1" if folder == run else "")
    server = live.View(lambda: [run, tmp_path / "other"], "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        requests(browser), complaints(browser)
        browser.get(server.address)
        assert texts(browser, ".run") == ["growing", "other"]
        assert texts(browser, "#differs td") == ["lora.rank", "16", "32"]
        assert texts(browser, ".progress")[0].startswith("step 300 of 1000, 0.5 s a step, about 6 min left (")
        assert "step 300: validation loss" in texts(browser, ".log")[0]
        browser.find_element(By.CSS_SELECTOR, ".ask[value=sample]").click()
        until((run / "requests" / "sample").exists, "the request")
        run_folders.write_training(run, done=600, lora={"rank": 16})
        run_folders.write_results(run / "live", steps=(600,), strengths=(1.0,), seeds=(0,), prompts=[Prompt("a fox")])
        until(lambda: texts(browser, ".progress")[0].startswith("step 600"), "its progress")
        until(lambda: "Usable: steps 300 to 500." in texts(browser, "#verdict .card div"), "its verdict")
        browser.execute_script("document.querySelector('#samples').scrollIntoView()")
        until(lambda: len(frames(browser, "#stage video")) == 2, "its samples")
        browser.find_element(By.ID, "vote").click()
        browser.find_element(By.CSS_SELECTOR, "#ballot button[value=right]").click()
        until((run / "votes.jsonl").exists, "the vote")
        assert json.loads((run / "votes.jsonl").read_text())["choice"] == "right"
        asked = [url for url in requests(browser) if not url.startswith(("blob:", "data:"))]
        assert [url for url in asked if not url.startswith(server.address)] == []
        assert complaints(browser) == []
    finally:
        browser.get("about:blank")
        server.shutdown()
        server.server_close()
        thread.join()

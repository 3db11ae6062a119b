"""The data report in a real browser: its clips play from disk, and nothing is fetched."""

import time

import pytest

from tests.browser.chromium import chromium, complaints, requests
from wantrain import cli

pytestmark = pytest.mark.slow


def test_the_report_opens_from_disk_and_its_clips_play(arguments, tmp_path):
    more = ["data.num_frames=[1,5]", f"data.cache_dir={tmp_path / 'cache'}"]
    assert cli.main(["report", *arguments, *more]) == 0
    with chromium() as browser:
        browser.get((tmp_path / "run" / "report" / "data.html").as_uri())
        number = browser.execute_script("return document.querySelectorAll('video').length")
        for i in range(number):  # a browser plays what is in sight
            browser.execute_script("document.querySelectorAll('video')[arguments[0]].scrollIntoView()", i)
            until = time.monotonic() + 20
            while not (plays := browser.execute_script(
                    "return document.querySelectorAll('video')[arguments[0]].currentTime > 0", i)):
                assert time.monotonic() < until, f"clip {i} does not play"
                time.sleep(0.1)
            assert plays
        widths = browser.execute_script("return [...document.querySelectorAll('video')].map(v => v.videoWidth)")
        assert widths == [48] * 8
        asked = [url for url in requests(browser) if not url.startswith("data:")]
        assert [url.rpartition("/")[2] for url in asked] == ["data.html"]
        assert complaints(browser) == []
        box = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert box[0] <= box[1]

"""The page of a run: what of a folder is in it, what cannot get out of its data, what its server refuses."""

import http.client
import json
import math
import re
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from tests import run_folders
from wantrain import cli, lock, results
from wantrain.pages import live, run_page
from wantrain.results import Prompt
from wantrain.stages import view
from wantrain.terms import UserError

HOSTILE = '</script><script>document.title = "hacked"</script><!-- MEDIA --> NONCE <img src=x onerror=alert(1)>'
VOTE = {"set": "evaluated", "prompt": "a fox", "seed": 0, "left": "base", "right": "step100_1", "choice": "left",
        "at": "2026-11-29T12:00:00Z"}


def few(folder, **more):
    return run_folders.write_results(folder, **{"steps": (100,), "strengths": (1.0,), "seeds": (0,),
                                                "prompts": [Prompt("a fox")]} | more)


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_holds_all_of_the_folder_and_asks_for_nothing(tmp_path):
    run_folders.write_training(tmp_path, run_folders.clips_in(tmp_path / "clips", 2), lora={"rank": 16})
    found = few(tmp_path / "report")
    path = run_page.write(tmp_path)
    assert path == tmp_path / "report" / "report.html"
    page = path.read_text()
    [run] = data_of(page)["runs"]
    [shown] = run["sets"]
    assert [shown["columns"][0]["label"], shown["fps"], shown["title"]] == ["step 100 x 1", 16, "evaluated"]
    assert shown["metrics"][0]["columns"]["base"] == list(found.metrics[0].columns["base"])
    assert run["trainings"][0]["judgement"] == json.loads((tmp_path / "judgement.json").read_text()) | {
        "clips": run["trainings"][0]["judgement"]["clips"]}
    assert run["trainings"][0]["config"] == {"train.num_steps": 1000, "lora.rank": 16}
    assert (run["trainings"][0]["step"], run["trainings"][0]["step_s"]) == (1000, 0.5)
    assert run["settings"] == found.settings
    assert run["provenance"] == found.provenance | {"training": {"wantrain": "0.0", "base_digest": "0123abcd"}}
    held = set(re.findall(r'<script type="text/plain" id="(\w+)">', page))
    clips = {clip["key"] for clip in run["trainings"][0]["judgement"]["clips"]}
    assert held == {video["key"] for video in shown["videos"]} | clips
    assert len(held) == 4
    assert not re.search(r"(url\(|@import|\bsrc=|https?://(?!www\.w3\.org/2000/svg))", page.replace("data:,", ""))
    assert "connect-src" not in page
    assert "default-src 'none'" in page


def test_no_text_of_a_run_ends_the_data_or_gets_the_right_to_run(tmp_path):
    few(tmp_path / "report", prompts=[Prompt(HOSTILE)], name=HOSTILE)
    page = run_page.write(tmp_path).read_text()
    [run] = data_of(page)["runs"]
    assert run["sets"][0]["prompts"][0]["text"] == run["sets"][0]["name"] == HOSTILE
    assert page.count("<script") == 2 + 2, "the data, the page's own, two videos"
    [nonce] = set(re.findall(r'nonce="([^"]+)"', page))
    assert nonce != "NONCE"
    assert page.count(nonce) == 4, "style, script, and both in the policy"


def test_numbers_that_json_lacks_are_null():
    assert run_page.json_text({"a": [math.nan, (1.0, math.inf)], "b": -math.inf}) == \
        '{"a": [null, [1.0, null]], "b": null}'


def test_long_curves_are_means_of_neighbours(monkeypatch):
    monkeypatch.setattr(run_page, "NUM_POINTS", 2)
    assert run_page.thinned([(1, 1.0), (2, 3.0), (3, 8.0)]) == [(2, 2.0), (3, 8.0)]
    assert run_page.thinned([(1, 1.0), (2, 3.0)]) == [(1, 1.0), (2, 3.0)]
    assert run_page.thinned([]) == []


def test_of_many_clips_the_highest_and_the_lowest_losses_are_shown(monkeypatch):
    monkeypatch.setattr(run_page, "NUM_CLIPS", 2)
    clips = [{"name": str(i), "set": "heldout", "loss": [i, i + 1.0]} for i in range(7)]
    assert [clip["name"] for clip in run_page._extremes(clips)] == ["0", "1", "5", "6"]
    assert [clip["name"] for clip in run_page._extremes(clips[:3])] == ["0", "1", "2"]


def test_both_experts_and_their_samples(tmp_path):
    for expert in ("high", "low"):
        run_folders.write_training(tmp_path / expert)
        few(tmp_path / expert / "live")
    shown = run_page.gathered(tmp_path).shown
    assert [one["title"] for one in shown["sets"]] == ["in training high", "in training low"]
    assert [one["expert"] for one in shown["trainings"]] == ["high", "low"]
    assert set(shown["provenance"]) == {"LoRA", "training high", "training low"}


def test_what_is_missing_or_elsewhere_is_not_taken_in(tmp_path):
    found = few(tmp_path / "report")
    (tmp_path / "secret.mp4").write_bytes(b"not for the page")
    odd = [replace(found.videos[0], file="../secret.mp4"), replace(found.videos[1], file="gone.mp4")]
    results.write(tmp_path / "report", replace(found, videos=odd))
    gathered = run_page.gathered(tmp_path)
    assert [video["key"] for video in gathered.shown["sets"][0]["videos"]] == ["", ""]
    assert gathered.media == {}
    (tmp_path / "report" / results.NAME).write_text("{}")
    assert "cannot be read" in run_page.gathered(tmp_path).shown["sets"][0]["fault"]


def test_a_folder_with_nothing_to_show_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a training nor samples"):
        run_page.write(tmp_path)


@pytest.fixture
def served(tmp_path):
    """Serve the page of a run: (its server, its folder)."""
    run = tmp_path / "run"
    run_folders.write_training(run, run_folders.clips_in(tmp_path / "clips", 1))
    few(run / "report")
    server = live.View(lambda: view.listed([str(run)]), "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server, run
    server.shutdown()
    server.server_close()
    thread.join()


def ask(server, name, body=None, secret=None, **headers):
    """(status, body) of a request as the page sends it, but for what is given."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    own = {"Host": f"127.0.0.1:{server.server_port}"}
    if body is not None:
        own["Origin"] = f"http://127.0.0.1:{server.server_port}"
    sent = {key: value for key, value in (own | headers).items() if value is not None}
    connection.request("GET" if body is None else "POST", f"/{secret or server.secret}/{name}",
                       None if body is None else json.dumps(body), sent)
    reply = connection.getresponse()
    return reply.status, reply.read()


def test_the_server_shows_the_run_and_its_files(served):
    server, run = served
    status, page = ask(server, "")
    assert status == 200
    assert data_of(page.decode())["is_live"] is True
    state = json.loads(ask(server, "state")[1])
    [shown] = state["runs"]
    assert shown["status"] == {"is_training": False, "told": "does not train now", "log": [
        "validation: 8 held-out clips", "step 1000: validation loss 0.62"]}
    for video in shown["sets"][0]["videos"]:
        assert ask(server, f"media/{video['key']}") == (200, (run / "report" / video["file"]).read_bytes())
    [clip] = shown["trainings"][0]["judgement"]["clips"]
    status, small = ask(server, f"media/{clip['key']}")
    assert status == 200
    assert small[4:8] == b"ftyp"
    run_folders.write_training(run, done=400)
    assert json.loads(ask(server, "state")[1])["runs"][0]["trainings"][0]["step"] == 400


def test_the_server_gives_nothing_else_and_only_the_page_itself_may_write(served):
    server, run = served
    for name in ("secret.txt", "media/../run/config.yaml", "media/", "run.json", "state/x", "media/m0"):
        assert ask(server, name)[0] in (404, 422), name
    for changes in ({"Host": "elsewhere:80"}, {"secret": "guess"}, {"Origin": "http://elsewhere"}, {"Origin": None}):
        assert ask(server, "votes", {"run": str(run), "vote": VOTE}, **changes)[0] == 403
        assert "Origin" in changes or ask(server, "state", **changes)[0] == 403
    assert not (run / "votes.jsonl").exists()


def test_votes_are_kept_in_the_run_and_nothing_else_is(served):
    server, run = served
    assert ask(server, "votes", {"run": str(run), "vote": VOTE})[0] == 200
    for odd in ({"run": str(run), "vote": VOTE | {"choice": "both"}}, {"run": str(run), "vote": {**VOTE, "more": 1}},
                {"run": str(run.parent), "vote": VOTE}, {"run": str(run)}, [], {"run": str(run), "vote": "x"}):
        assert ask(server, "votes", odd)[0] == 400
    assert [json.loads(line) for line in (run / "votes.jsonl").read_text().splitlines()] == [VOTE]
    assert json.loads(ask(server, "state")[1])["runs"][0]["votes"] == [VOTE]


def test_requests_reach_a_run_that_trains_and_no_other(served, holding):
    server, run = served
    body = {"run": str(run), "what": "save"}
    status, said = ask(server, "ask", body)
    assert (status, b"nothing trains" in said) == (422, True)
    holding(run)
    assert ask(server, "ask", body)[0] == 200
    assert [path.name for path in (run / "requests").iterdir()] == ["save"]
    [shown] = json.loads(ask(server, "state")[1])["runs"]
    assert shown["status"]["is_training"] is True
    assert shown["status"]["told"].endswith("asked for: save")
    assert ask(server, "ask", body | {"what": "../x"})[0] == 422


def test_other_machines_need_the_secret_and_any_name_of_this_one(tmp_path):
    few(tmp_path / "report")
    with live.View(lambda: [tmp_path], "0.0.0.0", 0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        assert ask(server, "state", Host="gpu-machine.lan:80")[0] == 200
        assert ask(server, "state", Host="gpu-machine.lan:80", secret="guess")[0] == 403
        server.shutdown()


def test_view_prints_its_address_and_ends_well_by_ctrl_c(tmp_path, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(live.View, "serve_forever", interrupted)
    run_folders.write_training(tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    for names in ([], ["mine"], ["runs"], [str(tmp_path / "runs" / "mine")]):
        assert cli.main(["view", *names]) == 0
        assert capsys.readouterr().out.startswith("http://127.0.0.1:")
    assert cli.main(["view", "other"]) == 2
    assert "there is no run other" in capsys.readouterr().err
    assert cli.main(["view", "--port", "99999"]) == 2
    assert "--port 99999" in capsys.readouterr().err


def test_the_newest_run_comes_first(tmp_path):
    for name in ("old", "new"):
        run_folders.write_training(tmp_path / name)
    (tmp_path / "old" / lock.NAME).write_text("")
    assert [folder.name for folder in view.listed([str(tmp_path)])] == ["old", "new"]


def test_the_page_comes_without_torch():
    program = "import sys, wantrain.stages.view; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

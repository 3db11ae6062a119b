"""Model ids in place of paths, against the real huggingface_hub and a local server that answers like the hub."""

from __future__ import annotations

import errno
import json
import shlex
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from huggingface_hub import constants, file_download

from wantrain.models import hub
from wantrain.terms import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "model_index.json": b"{}", "transformer/config.json": b"{}", "transformer/a.safetensors": b"weights",
    "transformer_2/a.safetensors": b"more", "vae/[x] y.safetensors": b"vae", "README.md": b"#", "assets/logo.svg": b"<",
    "examples/girl.jpg": b"jpg", "transformer/loss.png": b"png",
}
NEEDED = {name for name in FILES if not name.endswith((".md", ".svg", ".jpg", ".png"))}


class Hub(ThreadingHTTPServer):
    """The part of the hub's API that a download uses; `refusal` is (status, X-Error-Code) for every API answer, or
    with `gated` set for the files alone. `bodies` answer for the paths with these words in them; paths with `silent` in
    them are never answered, of those with `cut` a part comes.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str] = []
        self.refusal: tuple[int, str] | None = None
        self.gated = False
        self.bodies: dict[str, bytes] = {}
        self.silent = self.cut = ""
        self.ended = threading.Event()

    def shutdown(self) -> None:
        self.ended.set()
        super().shutdown()


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        is_api = self.path.startswith("/api/models/some/model")
        name = self.path.partition("/resolve/")[2].partition("/")[2].replace("%5Bx%5D%20", "[x] ")
        if self.server.silent and self.server.silent in self.path:
            self.server.ended.wait(20)
        if bodies := [body for word, body in self.server.bodies.items() if word in self.path]:
            return self.answer(bodies[0])
        if self.server.refusal and is_api != self.server.gated:
            status, code = self.server.refusal
            return self.answer(b"<html>", status, {"X-Error-Code": code})
        if is_api and "/tree/" in self.path:
            return self.answer(json.dumps([{"type": "file", "path": name, "size": len(data), "oid": name.encode().hex()}
                                           for name, data in FILES.items()]).encode())
        if is_api:
            return self.answer(json.dumps({"id": "some/model", "sha": COMMIT}).encode())
        if name in FILES:
            return self.answer(FILES[name], headers={"ETag": f'"{name.encode().hex()}"', "X-Repo-Commit": COMMIT})
        return self.answer(b"", 404)

    do_HEAD = do_GET

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        if self.server.cut and self.server.cut in self.path and self.command == "GET":
            body, self.close_connection = body[:1], True
            headers = {**(headers or {}), "Content-Length": "100"}
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body * (self.command == "GET"))

    def log_message(self, *_: object) -> None:
        pass


def point_at(monkeypatch, url):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, an empty current folder, and no network."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    point_at(monkeypatch, "http://127.0.0.1:9")
    return tmp_path / "cache"


@pytest.fixture
def server(monkeypatch):
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        point_at(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


def fill(cache, names=tuple(FILES), listed=False, revision="main"):
    """A cached snapshot in huggingface_hub's layout, with its list of files if `listed`."""
    repo = cache / "models--some--model"
    for number, name in enumerate(names):
        blob, link = repo / "blobs" / f"{number:040x}", repo / "snapshots" / COMMIT / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(FILES[name])
        link.symlink_to(blob)
    (repo / "refs").mkdir()
    (repo / "refs" / revision).write_text(COMMIT)
    if listed:
        (repo / "trees").mkdir()
        (repo / "trees" / f"{COMMIT}.json").write_text(json.dumps({
            "format_version": 1, "files": {name: {"size": 1, "blob_id": "0" * 40} for name in FILES}}))
    return repo / "snapshots" / COMMIT


def held(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def refusal(where, whole=None):
    with pytest.raises(UserError) as caught:
        hub.local(where, whole)
    assert where in caught.value.message
    return caught.value


def test_a_local_path_wins_over_an_id(cache, monkeypatch):
    fill(cache)
    Path("some/model").mkdir(parents=True)
    assert hub.local("some/model") == Path("some/model")
    monkeypatch.setenv("HOME", str(Path.cwd()))
    assert hub.local("~/some/model") == Path.cwd() / "some/model"


@pytest.mark.parametrize("where", [
    "~/some/model", "~nobody-here/model", "/some/model", "./some/model", "../some/model", "model", "some/",
    "some/lora.safetensors", "my/lora.pth", "some/model/../other", "some/mo--del", "some/model.git", "git:some/model",
    "https://some/model", "some/model@", "some model/x", "söme/model", "some/lora.safetensors@main",
    "models/model", "models/some/model", "datasets/some/model", "some/model//x", "hf:/some/model",
])
def test_what_is_no_id_is_a_path_that_does_not_exist(cache, server, where):
    fill(cache)
    error = refusal(where)
    assert "does not exist" in error.message
    assert "owner/name" in error.next_step
    assert not server.asked


@pytest.mark.parametrize(("where", "inside"), [
    ("some/model", ""), ("hf:some/model", ""), ("some/model/", ""), ("some/model@main", ""),
    (f"some/model@{COMMIT}", ""), ("some/model/vae", "vae"),
    ("some/model/vae/[x] y.safetensors", "vae/[x] y.safetensors"), ("hf:some/model@main/vae/", "vae"),
])
@pytest.mark.parametrize("listed", [False, True])
def test_the_cache_answers_without_a_network(cache, where, inside, listed):
    folder = fill(cache, listed=listed)
    assert hub.local(where) == folder / inside


def test_a_revision_is_looked_up_in_the_cache(cache):
    folder = fill(cache, revision="v2")
    assert hub.local("some/model@v2") == folder
    refusal("some/model")


def test_a_whole_repository_is_downloaded_without_what_no_trainer_needs(cache, server):
    folder = hub.local("some/model")
    assert folder == cache / "models--some--model" / "snapshots" / COMMIT
    assert held(folder) == NEEDED
    assert (folder / "transformer/a.safetensors").read_bytes() == b"weights"
    server.asked.clear()
    assert hub.local("some/model") == folder
    assert not server.asked


@pytest.mark.parametrize(("where", "inside", "got"), [
    ("some/model/transformer", "transformer", {name for name in FILES if name.startswith("transformer/")}),
    ("some/model/vae/[x] y.safetensors", "vae/[x] y.safetensors", {"vae/[x] y.safetensors"}),
])
def test_only_the_part_asked_for_is_downloaded(server, where, inside, got):
    path = hub.local(where)
    assert str(path).endswith(inside)
    assert held(path.parents[inside.count("/")]) == got
    server.asked.clear()
    assert hub.local(where) == path
    assert not server.asked


def test_the_revision_is_the_one_asked_for(cache, server):
    hub.local("some/model@v2/vae")
    assert {asked for asked in server.asked if asked.startswith("/api/") and "/tree/" not in asked} == {
        "/api/models/some/model/revision/v2"}
    assert (cache / "models--some--model" / "refs" / "v2").read_text() == COMMIT


@pytest.mark.parametrize(("listed", "whole"), [
    (True, None), (False, lambda folder: (folder / "transformer/a.safetensors").exists()),
])
def test_an_incomplete_snapshot_goes_on_to_download(cache, server, listed, whole):
    folder = fill(cache, ["model_index.json", "README.md"], listed)
    assert hub.local("some/model", whole) == folder
    assert held(folder) == NEEDED | {"README.md"}


def test_a_part_that_the_cached_snapshot_lacks_goes_on_to_download(cache, server):
    folder = fill(cache, ["model_index.json"])
    assert hub.local("some/model/vae") == folder / "vae"
    assert (folder / "vae").is_dir()


def test_a_snapshot_with_all_that_is_needed_is_whole(cache, server):
    folder = fill(cache, ["vae/[x] y.safetensors"], listed=True)
    assert hub.local("some/model", lambda folder: (folder / "vae").exists()) == folder
    assert not server.asked


def test_a_part_that_the_repository_lacks(server):
    assert "some/model holds no gone.safetensors" in refusal("some/model/gone.safetensors").message


@pytest.mark.parametrize("listed", [False, True])
def test_without_a_network_it_says_what_to_download_by_hand(cache, listed):
    fill(cache, ["model_index.json"], listed)
    error = refusal("some/model@v1", lambda folder: False)
    for said in ("no local path", str(cache), "Hugging Face cannot be reached", "Connection refused"):
        assert said in error.message
    assert "`hf download some/model --revision v1 --local-dir models/model`" in error.next_step
    assert "write models/model instead" in error.next_step


@pytest.mark.parametrize(("inside", "told"), [
    ("vae/[x] y.safetensors", ["vae/[x] y.safetensors"]), ("vae", ["--include", "vae/*"]),
    ("vae/Wan2.1", ["--include", "vae/Wan2.1/*"]),
])
def test_the_command_to_run_by_hand_takes_only_the_part_asked_for(inside, told):
    step = refusal(f"some/model/{inside}").next_step
    assert shlex.split(step.split("`")[1]) == ["hf", "download", "some/model", *told, "--local-dir", "models/model"]
    assert f"models/model/{inside} instead" in step


def test_offline_mode(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refusal("some/model")
    assert "HF_HUB_OFFLINE" in error.message
    assert "unset HF_HUB_OFFLINE, or run `hf download" in error.next_step
    assert not server.asked


@pytest.mark.parametrize(("answer", "said", "step"), [
    ((404, "RepoNotFound"), "no such repository", "check the name"),
    ((404, "RevisionNotFound"), "no such repository or revision", "check the name"),
    ((401, "RepoNotFound"), "private, or its name is wrong", "`hf auth login`"),
    ((403, "GatedRepo"), "gated", "`hf auth login`"), ((403, ""), "gated", "`hf auth login`"),
    ((503, ""), "answers 503", "again later, or run `hf download"),
    ((200, ""), "is not Hugging Face", "HF_ENDPOINT"),
])
def test_what_the_hub_refuses(cache, server, answer, said, step):
    fill(cache, ["model_index.json"])
    server.refusal = answer
    error = refusal("some/model", lambda folder: False)
    assert said in error.message
    assert step in error.next_step


@pytest.mark.parametrize("is_tree", [False, True])
@pytest.mark.parametrize("body", [b"[]", b"[1]", b"{}", b"null", b'{"id": 1}', b'{"id": "some/model", "sha": 1}',
                                  b'[{"type": "file"}]', b"\xff", b"<html>"])
def test_what_answers_in_the_place_of_the_hub(cache, server, is_tree, body):
    if is_tree and body in (b"[]", b"{}"):
        pytest.skip("an empty list of files is one")
    server.bodies["/tree/" if is_tree else "/revision/"] = body
    for _ in range(2):
        error = refusal("some/model@v2")
        assert "is not Hugging Face" in error.message
        assert "HF_ENDPOINT" in error.next_step
        assert "run `hf download" in error.next_step
    assert not held(cache)


def test_a_page_in_the_place_of_a_file(cache, server):
    server.bodies["/resolve/"] = b"<html>"
    for _ in range(2):
        assert "is not Hugging Face" in refusal("some/model").message
    assert not list(cache.rglob("snapshots/*/*"))


@pytest.mark.parametrize("place", ["/api/models/some/model", "/tree/"])
def test_a_hub_that_never_answers(cache, server, monkeypatch, place):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    monkeypatch.setattr("time.sleep", lambda _: None)
    server.silent = place
    error = refusal("some/model")
    assert "cannot be reached" in error.message
    assert "timed out" in error.message
    assert "run `hf download" in error.next_step


def test_a_download_that_is_cut_off_is_not_taken_for_whole(cache, server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    server.cut = "transformer/a.safetensors"
    assert "cannot be reached" in refusal("some/model").message
    point_at(monkeypatch, "http://127.0.0.1:9")
    assert "Connection refused" in refusal("some/model").message
    assert not list(cache.rglob("snapshots/*/transformer/a.safetensors"))


@pytest.mark.parametrize(("file", "content"), [
    ("refs/main", b"\xff"), (f"trees/{COMMIT}.json", b"[]"),
    (f"trees/{COMMIT}.json", b'{"format_version": 1, "files": 3}'),
    (f"trees/{COMMIT}.json", b"[" * 9000),
])
def test_a_cache_that_cannot_be_read_is_not_there(cache, file, content):
    fill(cache, listed=True)
    (cache / "models--some--model" / file).write_bytes(content)
    error = refusal("some/model")
    assert "does not hold it whole" in error.message
    assert "run `hf download" in error.next_step


def test_an_endpoint_that_is_no_address(monkeypatch):
    point_at(monkeypatch, "http://some\0where")
    error = refusal("some/model")
    assert "InvalidURL" in error.message
    assert "HF_ENDPOINT" in error.next_step


@pytest.mark.parametrize("code", ["GatedRepo", ""])
def test_a_gated_repository_whose_list_is_public(server, code):
    server.refusal, server.gated = (403, code), True
    assert "`hf auth login`" in refusal("some/model").next_step


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   RuntimeError("I/O error: No space left on device (os error 28)")])
def test_a_full_disk(cache, server, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(file_download, "http_get", fail)
    refused = refusal("some/model")
    assert f"cache {cache} " in refused.message
    assert "No space left" in refused.message
    assert "HF_HUB_CACHE" in refused.next_step


def test_a_cache_that_cannot_be_written(cache, server):
    cache.write_text("a file")
    assert "cannot be written" in refusal("some/model").message


@pytest.fixture
def modelscope(tmp_path, monkeypatch):
    """A stand-in for modelscope 1.40: its cache layout, its errors, and `calls`."""
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    errors = ModuleType("modelscope.hub.errors")
    errors.HubError = type("HubError", (Exception,), {})
    stand_in = SimpleNamespace(calls=[], error=None, error_type=errors.HubError)

    def snapshot_download(repo, *, revision, local_files_only, **patterns):
        stand_in.calls.append((repo, revision, local_files_only, patterns))
        folder = tmp_path / "ms" / "models" / repo.replace("/", "--") / "snapshots" / (revision or "master")
        if local_files_only and not folder.exists():
            raise errors.HubError("[E1022] Cannot find cached snapshot")
        if not local_files_only and stand_in.error:
            raise stand_in.error
        (folder / "vae").mkdir(parents=True, exist_ok=True)
        return str(folder)

    module = ModuleType("modelscope.hub.snapshot_download")
    module.snapshot_download = snapshot_download
    for name in ("modelscope", "modelscope.hub"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, errors.__name__, errors)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return stand_in


def test_modelscope_downloads_once(modelscope, tmp_path):
    folder = tmp_path / "ms/models/some--model/snapshots/v2"
    patterns = {"allow_patterns": ["vae", "vae/*"]}
    for _ in range(2):
        assert hub.local("modelscope:some/model@v2/vae") == folder / "vae"
    assert modelscope.calls == [("some/model", "v2", local, patterns) for local in (True, False, True)]


@pytest.mark.parametrize(("status", "said", "step"), [
    (404, "ModelScope has no such", "check the name"), (403, "ModelScope refuses it (403)", "`modelscope login`"),
    (None, "ModelScope cannot be reached: is there a network? (HubError: no)",
     "run `modelscope download some/model --local-dir models/model`"),
])
def test_what_modelscope_refuses(modelscope, tmp_path, status, said, step):
    modelscope.error = OSError("HTTPError")  # requests' error, raised from modelscope's own
    modelscope.error.__cause__ = modelscope.error_type("no")
    modelscope.error.__cause__.status_code = status
    error = refusal("modelscope:some/model")
    assert said in error.message
    assert str(tmp_path / "ms") in error.message
    assert step in error.next_step


@pytest.mark.parametrize("error", [KeyError("Data"), TypeError("not a mapping"), AttributeError("get"), SystemExit(1)])
def test_what_modelscope_does_not_understand(modelscope, error):
    modelscope.error = error
    refused = refusal("modelscope:some/model")
    assert "is not ModelScope" in refused.message
    assert "run `modelscope download" in refused.next_step


def test_a_modelscope_file_that_finds_the_disk_full(modelscope):
    modelscope.error = modelscope.error_type("1 of 2 file(s) failed")
    modelscope.error.failed_files = {"a": OSError(errno.ENOSPC, "No space left on device")}
    assert "MODELSCOPE_CACHE" in refusal("modelscope:some/model").next_step


def test_modelscope_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    assert refusal("modelscope:some/model").next_step == 'pip install "wantrain[modelscope]"'


def test_the_real_modelscope_finds_its_cache(tmp_path):
    own = pytest.importorskip("modelscope_hub", reason="modelscope is an optional extra")
    before = own.get_default_config()
    own.set_default_config(own.HubConfig(cache_dir=tmp_path))
    try:
        (tmp_path / "models/some--model/snapshots/master/vae").mkdir(parents=True)
        assert hub.local("modelscope:some/model/vae") == tmp_path / "models/some--model/snapshots/master/vae"
    finally:
        own.set_default_config(before)


def test_before_a_download_its_size_and_place_are_told_once(cache, server, capsys, monkeypatch):
    monkeypatch.setitem(FILES, "transformer/a.safetensors", b"w" * 60_000_000)
    hub.local("some/model")
    said = capsys.readouterr().err
    assert f"note: some/model is not here: {len(NEEDED)} files, 0.1 GB, are downloaded into {cache}\n" in said
    hub.local("some/model")
    assert "note:" not in capsys.readouterr().err


def test_what_is_here_is_found_without_asking_the_hub(cache, server):
    assert hub.here("some/model") is None
    assert hub.here("some/model/vae") is None
    fill(cache, listed=True)
    assert hub.here("some/model") == cache / "models--some--model/snapshots" / COMMIT
    assert server.asked == []
    assert hub.download_command("some/model@v1/vae") == "hf download some/model --include 'vae/*' --revision v1"

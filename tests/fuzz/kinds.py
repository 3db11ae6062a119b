"""The kinds of inputs that are mutated, a function each, and the cases that once failed."""

from __future__ import annotations

import csv
import importlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.fuzz.harness import Kind, made

ROWS: list[dict[str, object]] = [
    {"video": "a.mp4", "caption": "sks, a cat é\u2028", "start_s": 0.5, "end_s": 2.25, "id": "a#1", "motion": 0.25},
    {"video": "b.png", "caption": "a house", "captions": ["one", "two"], "id": 7, "control": "a.mp4", "keep": 1},
    {"video": "b.png", "caption": "again", "duplicate_of": "a#1", "start_s": 0, "luma": None}]


def manifests() -> Kind:
    """.jsonl, .csv and .parquet, through the reader of training and those of the data tools."""
    import pyarrow
    from pyarrow import parquet

    from data_tools import editing, rows, split
    from data_tools import filter as measuring
    from wantrain.data import manifest

    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(dict.fromkeys(column for row in ROWS for column in row)))
    writer.writeheader()
    writer.writerows(ROWS)
    columns = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist([row | {"id": str(row.get("id", "c"))} for row in ROWS]), columns)
    inputs = {"m.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode(),
              "m.csv": table.getvalue().encode(), "m.parquet": columns.getvalue().to_pybytes()}

    def attempt(path: Path) -> None:
        for name in ("a.mp4", "b.png"):
            (path.parent / name).touch()
        readers: list[Callable[[], object]] = [
            lambda: manifest.read(manifest.ClipSource("fuzz", str(path), fetched=path.parent / "fetched")),
            lambda: [(entry.id, entry.clip, entry.captions) for entry in rows.read_entries(path)[0]]]
        if path.suffix != ".parquet":
            readers += [lambda: measuring.read(path), lambda: editing.Manifest(path).content()]
        if path.suffix == ".jsonl":
            readers += [lambda: split._merged(path, {"a.mp4"}, [])]
        all_of(readers)

    return Kind(inputs, attempt)


def shards() -> Kind:
    """WebDataset tars."""
    from wantrain.data import manifest

    members = {"s/a.mp4": b"film", "s/a.txt": b"a cat", "s/a.1.txt": b"another", "s/b.png": b"picture",
               "s/b.json": json.dumps({"caption": "a house", "start_s": 0, "luma": 0.5}).encode(),
               "s/b.control.mp4": b"x",
               "s/" + "long/" * 30 + "c.mp4": b"film"}

    def packed(form: int) -> bytes:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return file.getvalue()

    return Kind({"gnu.tar": packed(tarfile.GNU_FORMAT), "pax.tar": packed(tarfile.PAX_FORMAT)},
                lambda path: all_of([lambda: manifest.read(manifest.ClipSource("fuzz", str(path)))]))


def captions() -> Kind:
    """Sidecars of a folder, journals of answers, and what a model says."""
    from data_tools import caption, captioner, split
    from data_tools import filter as measuring
    from data_tools import manifest as tool
    from wantrain.data import manifest

    answer = "<think>it is\na cat</think> **Sure, here is the caption:** \"A cat walks. It sits.\"\n"

    journals = (caption.journal_of, measuring.journal_of, split.journal_of)

    def attempt(path: Path) -> None:
        (path.parent / "a.mp4").write_bytes(b"film\0")
        text = path.read_bytes().decode("utf-8", "replace")
        all_of([lambda: manifest.read(manifest.ClipSource("fuzz", str(path.parent))),
                lambda: tool.build([path.parent], path.parent / "m.jsonl", None, {}),
                lambda: caption.gather(path.parent, path.parent / "n.jsonl"),
                *(lambda of=of: replace(of(path), path=path).read() for of in journals),
                lambda: captioner.judge(captioner.Answer(text), 250), lambda: caption.readable(text)])

    journal = json.dumps({"key": "k", "text": answer, "is_finished": True, "fault": ""}) + "\n"
    return Kind({"a.txt": answer.encode(), "a.1.txt": "été\u2028".encode("utf-16"),
                 "a.mp4.journal": journal.encode()}, attempt)


def all_of(readers: list[Callable[[], object]]) -> None:
    """Each of the readers, of which none is spared by what another refuses."""
    from wantrain.terms import UserError

    for read in readers:
        try:
            read()
        except UserError:
            continue


def _of_module(name: str) -> Callable[[], Kind]:
    return lambda: made(importlib.import_module(f"tests.fuzz.{name}").one)


KINDS: dict[str, Callable[[], Kind]] = {
    "manifests": manifests, "shards": shards, "captions": captions,
    **{name: _of_module(name) for name in ("lora_files", "command_lines", "checkpoints")}}

KEPT: dict[str, list[tuple[int, int]]] = {
    "manifests": [(0, 3), (0, 23), (2, 357), (5, 16), (1301, 22903), (1302, 5887)],
    "command_lines": [(1301, 1601)]}
"""(seed, number) of cases that found something, by kind: they are tried first."""

"""Manifests as others write them: the same two clips in every form."""

import json

from wantrain.data import manifest

ROWS = [("clips/a.mp4", "red, drifting"), ("clips/b.mp4", "blue café")]


def read(path, **settings):
    return manifest.read(manifest.ClipSource("s", str(path), **settings))


def as_csv(head="video,caption", separator=","):
    return f"{head}\n" + "".join(f'{video}{separator}"{caption}"\n' for video, caption in ROWS)


OBJECTS = [{"video": video, "caption": caption} for video, caption in ROWS]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in OBJECTS)
FORMS = {
    "semicolons": ("m.csv", as_csv("video;caption", ";"), "utf-8"),
    "tabs": ("m.csv", as_csv("video\tcaption", "\t"), "utf-8"),
    "tsv": ("m.tsv", as_csv("video\tcaption", "\t"), "utf-8"),
    "sep= of spreadsheets": ("m.csv", "sep=;\r\n" + as_csv("video;caption", ";"), "utf-8"),
    "utf-16": ("m.csv", as_csv("video;caption", ";"), "utf-16"),
    "utf-16 without a mark": ("m.csv", as_csv(), "utf-16-le"),
    "utf-16 jsonl": ("m.jsonl", JSONL, "utf-16"),
    "cp1252": ("m.csv", as_csv(), "cp1252"),
    "two marks": ("m.csv", "\ufeff\ufeff" + as_csv(), "utf-8"),
    "capitals": ("M.CSV", as_csv("Video,Caption"), "utf-8"),
    "hub": ("metadata.csv", as_csv("file_name,text"), "utf-8"),
    "hub, jsonl": ("metadata.jsonl", JSONL.replace("video", "file_name").replace("caption", "text"), "utf-8"),
    "musubi": ("m.jsonl", JSONL.replace('"video"', '"video_path"'), "utf-8"),
    "array": ("m.jsonl", json.dumps(OBJECTS), "utf-8"),
    "array over lines": ("m.json", json.dumps(OBJECTS, indent=1), "utf-8"),
    "objects over lines": ("m.jsonl", "\n".join(json.dumps(row, indent=1) for row in OBJECTS), "utf-8"),
    "trailing commas": ("m.jsonl", JSONL.replace("}\n", "},\n"), "utf-8"),
    "array with a trailing comma": ("m.json", f"[{JSONL.replace('}', '},')}]", "utf-8"),
    "names": ("captions.json", json.dumps(dict(ROWS)), "utf-8"),
    "CRLF": ("m.jsonl", JSONL.replace("\n", "\r\n"), "utf-8"),
    "CR": ("m.csv", as_csv().replace("\n", "\r"), "utf-8"),
    "joined by cat": ("m.jsonl", "\ufeff" + JSONL.replace("\n", "\n\ufeff", 1), "utf-8"),
    "backslashes": ("m.csv", as_csv().replace("/", "\\"), "utf-8"),
    "blanks": ("m.csv", as_csv(" video , caption ", " , ").replace("clips", "  clips"), "utf-8"),
    "an index and empty columns": ("m.csv", ",video,caption,\n" + "".join(
        f'{i},{v},"{c}",\n' for i, (v, c) in enumerate(ROWS)) + ",,,\n", "utf-8"),
}

"""The digest of clips and captions that a resume compares."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

from wantrain.recipe.clips import manifest_digest
from wantrain.terms import Bucket, Clip, MediaInfo, PlannedClip

WINDOW = PlannedClip(Clip("id", Path("x.mp4"), "a cat", "style", 2.0), Bucket(17, 32, 48), MediaInfo("d0"), 16.0, 0.5)


def digest(*captions: str, **fields: object) -> str:
    clip = replace(WINDOW.clip, caption=captions[0], more_captions=captions[1:])
    return manifest_digest(SimpleNamespace(planned=[WINDOW, replace(WINDOW, clip=clip, **fields)]))


def test_no_two_lists_of_captions_share_a_digest():
    rest = "0.5 None 16.0 2.0 17f 32x48"
    lists = [("a b c",), ("a b", "c"), ("a", "b c"), ("a", "b", "c"), ("a",), ("a", ""), ("a ", ""), ("a b", "c 1 1"),
             (f"a {rest}",), (f"a {rest} 1",), ("a 5",), ("a", "5"), (f"a b {rest} 1 1",)]
    for one, other in combinations(lists, 2):
        assert digest(*one) != digest(*other), (one, other)
    controlled = {"control": replace(WINDOW, found=MediaInfo("d1"))}
    assert digest("a", "b", partners=controlled) != digest("a", "b")


def test_one_caption_digests_as_in_the_versions_before():
    """The constants are of version 0.1.0 at ffc7133: a run begun there goes on."""
    controlled = {"control": replace(WINDOW, found=MediaInfo("d1"))}
    assert digest("a cat walks") == "b509e6df21c3ba88a273bd2c3f78e35d"
    assert digest("a cat walks", partners=controlled) == "84b84d1adfd8df4893c83eb3691c110d"

"""What a training has to compute, in transformer tokens."""

from __future__ import annotations

from collections.abc import Iterable

from wantrain.terms import Bucket


def largest_bucket(buckets: Iterable[Bucket], multiple_px: int) -> Bucket:
    """The bucket whose samples have most transformer tokens."""
    return max(buckets, key=lambda bucket: bucket.num_tokens(multiple_px))


def sequence_length(shape_THW: tuple[int, int, int], has_reference: bool) -> int:
    """The tokens that the transformer sees of latents of this shape, in patches of 2 x 2, a reference before them
    included.
    """
    t, h, w = shape_THW
    return (t + has_reference) * h * w // 4

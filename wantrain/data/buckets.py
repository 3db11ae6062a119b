"""The sizes that clips may be brought to: every length at every resolution, within a budget of tokens. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from wantrain.terms import Bucket, UserError


def buckets(num_frames: Sequence[int], resolutions: Sequence[Sequence[int]], multiple_px: int,
            max_tokens: int | None = None) -> list[Bucket]:
    """Every length at every resolution. Heights and widths must be multiples of `multiple_px`.

    With `max_tokens`, a longer clip gets a smaller picture: each resolution shrinks, its aspect kept as nearly as
    multiples allow, until the clip has no more tokens than that.
    """
    for height, width in resolutions:
        if height % multiple_px or width % multiple_px:
            fixed = [max(multiple_px, round(x / multiple_px) * multiple_px) for x in (height, width)]
            raise UserError(f"data.resolutions: [{height}, {width}] is not a multiple of {multiple_px} px, which this "
                            "model's VAE and patches need", f"use {fixed}")
    made = [_within(Bucket(f, h, w), multiple_px, max_tokens) for f in sorted(num_frames) for h, w in resolutions]
    return list(dict.fromkeys(made))


def _within(bucket: Bucket, multiple_px: int, max_tokens: int | None) -> Bucket:
    if max_tokens is None or bucket.num_tokens(multiple_px) <= max_tokens:
        return bucket
    budget = max_tokens // (1 + (bucket.num_frames - 1) // 4)
    if not budget:
        raise UserError(f"data.max_tokens_per_clip = {max_tokens} is less than a clip of {bucket.num_frames} frames "
                        "has at the smallest size", "raise it or take that length out of data.num_frames")
    rows, columns = bucket.height // multiple_px, bucket.width // multiple_px
    # of all sizes within the budget and the resolution: the largest whose aspect is nearest
    sizes = [(r, min(columns, budget // r)) for r in range(1, min(rows, budget) + 1)]

    def fitness(size: tuple[int, int]) -> float:
        r, c = size
        return math.log(r * c) - 4 * abs(math.log((r / c) / (rows / columns)))

    r, c = max(sizes, key=fitness)
    return Bucket(bucket.num_frames, r * multiple_px, c * multiple_px)


def batch_factors(buckets: Iterable[Bucket], global_batch_size: int, max_tokens: int | None, multiple_px: int
                  ) -> dict[Bucket, int]:
    """How many times global_batch_size samples of each bucket fit into a step of `max_tokens` transformer tokens.

    Whole multiples, so that any split over processes and accumulation stays even. UserError where once is too much.
    """
    if max_tokens is None:
        return {}
    factors = {b: max_tokens // (global_batch_size * b.num_tokens(multiple_px)) for b in buckets}
    if too_large := [b for b, factor in factors.items() if not factor]:
        needed = max(global_batch_size * b.num_tokens(multiple_px) for b in too_large)
        raise UserError(f"data.max_tokens_per_batch = {max_tokens}, but data.batch_size = {global_batch_size} of "
                        f"bucket {too_large[0]} has {global_batch_size * too_large[0].num_tokens(multiple_px)} tokens",
                        f"data.max_tokens_per_batch={needed} or more, or a smaller data.batch_size")
    return factors

"""Pages of features for a film in one HTML file: as many as fit into a number of bytes."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lib_lightning.plots.palette import THEME
from lib_lightning.viewer.json_text import dump, object_
from lib_lightning.viewer.run_view import NotFoundError, RunView

# At most this share of a page, and at most this many bytes, are for features.
_SHARE, _BYTES = 4, 5_000_000
# Features of each node layer: those that a film shows at first, and fewer if even those of one snapshot do not fit.
_LIMITS = tuple(THEME["column"]["max_features"] // divisor for divisor in (1, 2, 4, 8))


@dataclass(frozen=True)
class EmbeddedFeatures:
    """The pages of features of one run, compressed.

    Attributes:
        run: What belongs to the whole run: numbers over the run, how samples look, notes, and what is included.
        snapshots: Pages of each included snapshot, by step.
    """

    run: str
    snapshots: dict[int, str]

    def size(self) -> int:
        """Size in bytes."""
        return len(self.run) + sum(map(len, self.snapshots.values()))


def budget(max_bytes: int) -> int:
    """Bytes of a page that are for features.

    Args:
        max_bytes: Size of the page.

    Returns:
        A quarter of it, up to 5 MB.

    Example:
        >>> budget(20_000_000), budget(1_000_000)
        (5000000, 250000)
    """
    return min(_BYTES, max_bytes // _SHARE)


def embed_features(run: RunView, steps: Sequence[int], max_bytes: int) -> EmbeddedFeatures:
    """Compress the pages of the features that a film shows, in as many of its snapshots as fit.

    Args:
        run: The run.
        steps: Steps of the snapshots in the film.
        max_bytes: Maximum size.

    Returns:
        The pages of the last snapshot, the first, the one in the middle, and of those in between in turn. Fewer
        features of each node layer if not even those of the last snapshot fit, or none.
    """
    for limit in _LIMITS:
        found = _with_limit(run, steps, max_bytes, limit)
        if found.snapshots:
            break
    return found


def _with_limit(run: RunView, steps: Sequence[int], max_bytes: int, limit: int) -> EmbeddedFeatures:
    texts: dict[int, str] = {}
    histories: dict[str, str] = {}
    renderings: dict[str, dict[str, str]] = {}
    size = len(compressed(dump(run.notes())))
    for step in _in_turn(steps):
        try:
            pages = run.feature_pages(step, limit)
        except NotFoundError:
            continue
        if not pages:
            continue
        text = compressed(object_({page.id: object_(page.entries) for page in pages}))
        new = {page.id: dump(run.feature_history(page.id)) for page in pages if page.id not in histories}
        known = renderings.get(pages[0].of, {})
        wanted = (sample for page in pages for sample in page.samples if str(sample) not in known)
        looks = run.renderings(wanted, pages[0].of)
        # Compressed with those of the other snapshots, it is smaller.
        size += len(text) + len(compressed(object_(new))) + len(compressed(object_(looks)))
        if size > max_bytes:
            break
        texts[step] = text
        histories |= new
        renderings[pages[0].of] = known | looks
    return EmbeddedFeatures(
        compressed(_of_run(run, histories, renderings, sorted(texts), limit)), dict(sorted(texts.items()))
    )


def _of_run(
    run: RunView, histories: dict[str, str], renderings: dict[str, dict[str, str]], steps: Sequence[int], limit: int
) -> str:
    return object_(
        {
            "steps": dump(list(steps)),
            "limit": dump(limit),
            "history": object_(histories),
            "renderings": object_({of: object_(found) for of, found in renderings.items()}),
            "notes": dump(run.notes()),
            "final_since": dump({name: step for name, step in run.final_forms().items() if name in histories}),
        }
    )


def _in_turn(steps: Sequence[int]) -> Iterator[int]:
    """The last step, the first, the one in the middle, then those in the middle of what is left."""
    if not steps:
        return
    yield steps[-1]
    if len(steps) == 1:
        return
    yield steps[0]
    gaps = [(0, len(steps) - 1)]
    while gaps:
        first, last = gaps.pop(0)
        if last - first > 1:
            middle = (first + last) // 2
            yield steps[middle]
            gaps += [(first, middle), (middle, last)]


def compressed(json: str) -> str:
    """Compress JSON for a script element: gzip, as text."""
    # Without a timestamp, so that the same run gives the same file.
    return base64.b64encode(gzip.compress(json.encode(), compresslevel=6, mtime=0)).decode()

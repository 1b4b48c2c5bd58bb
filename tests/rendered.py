"""Whether the renderings of a run are those of the samples that its snapshots were computed on."""

from __future__ import annotations

from pathlib import Path

import torch

from lib_lightning import InteractionGraph
from lib_lightning.features.render import mentioned_samples
from lib_lightning.io.rendering_file import key_of, read_lines, read_renderings
from lib_lightning.io.run_layout import RunLayout


def check_rows(folder: Path, layer: str = "net.0:input") -> set[str]:
    """Check a run whose samples are rendered as rows of the activations of a node layer.

    Args:
        folder: The run folder.
        layer: The node layer.

    Returns:
        The hashes of the sets of samples that its snapshots were computed on.
    """
    layout = RunLayout(folder)
    keys = [key_of(line) for line in read_lines(layout.renderings_file)]
    assert len(keys) == len(set(keys)), "each sample is rendered once"
    hashes = set()
    for file in layout.basis_files().values():
        graph = InteractionGraph.load(file)
        hashes.add(graph.info["samples"])
        rows = read_renderings(layout.renderings_file)[graph.info["samples"]]
        assert set(mentioned_samples(graph)) <= set(rows)
        examples, basis = graph.examples[layer], graph.bases[layer]
        for samples, values, column in zip(examples.samples, examples.values, basis.to_features.T, strict=True):
            known = samples >= 0
            a = torch.tensor([rows[int(i)]["values"] for i in samples[known]]).to(basis.mean)
            torch.testing.assert_close((a - basis.mean) @ column, values[known].to(a), rtol=2e-3, atol=2e-3)
    assert hashes
    return hashes

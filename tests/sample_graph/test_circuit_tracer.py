"""Files for circuit-tracer's viewer: its format, and the same graph when its own reader reads them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lib_lightning.algorithm.examples import FeatureExamples
from lib_lightning.errors import LIBError, SettingError, SettingTypeError
from lib_lightning.features import TokenRenderer, render_samples
from lib_lightning.graph import OutputEffects
from lib_lightning.io.rendering_file import append_lines, rendering_line
from lib_lightning.sample_graph.prune import prune
from tests.sample_graph.test_sample_graph import cnn, computed, gpt2, llama, mlp, one_of


class Letters:
    """A tokenizer."""

    def decode(self, numbers: list[int]) -> str:
        return "".join('abcdefghij"'[number] for number in numbers)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# What circuit-tracer's models of pydantic demand: name, type, and whether None may take its place.
NODE = {
    "node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str, "token_prob": float,
    "is_target_logit": bool, "run_idx": int, "reverse_ctx_idx": int, "jsNodeId": str, "clerp": str,
}  # fmt: skip
METADATA = {"slug": str, "scan": str, "transcoder_list": list, "prompt_tokens": list, "prompt": str}
QPARAMS = {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str}


def check(document: Any) -> None:
    for found, fields in ((document["metadata"], METADATA), (document["qParams"], QPARAMS)):
        assert {name: type(found[name]) for name in fields} == fields
    ids = set()
    tokens = document["metadata"]["prompt_tokens"]
    last = max(int(node["layer"]) for node in document["nodes"] if node["feature_type"] != "embedding")
    assert len(tokens) > 1  # its viewer takes nodes of a single position for the same feature everywhere
    for node in document["nodes"]:
        assert {name: type(node[name]) for name in NODE} == NODE
        assert tokens[node["ctx_idx"]]
        assert node["node_id"].split("_")[0] == node["layer"]
        assert node["influence"] is None or 0 <= node["influence"] <= document["metadata"]["node_threshold"]
        if node["feature_type"] == "cross layer transcoder":  # its viewer finds layer and number in the feature
            z = node["feature"]
            w = int(((8 * z + 1) ** 0.5 - 1) // 2)
            number = z - w * (w + 1) // 2
            assert node["node_id"] == f"{w - number}_{number}_{node['ctx_idx']}"
        if node["feature_type"] == "logit":
            assert int(node["layer"]) == last
            assert float(node["clerp"].split("(p=")[1].split(")")[0]) == pytest.approx(node["token_prob"], abs=1e-3)
        ids.add(node["node_id"])
    assert (
        len(ids)
        == len(document["nodes"])
        == len({node["jsNodeId"] for node in document["nodes"]} | ids)
        - len({node["jsNodeId"] for node in document["nodes"]} - ids)
    )
    for link in document["links"]:
        assert {link["source"], link["target"]} <= ids
        assert isinstance(link["weight"], float)
    assert document["qParams"]["clickedId"] in ids


@pytest.mark.parametrize("make", [mlp, cnn, gpt2, llama], ids=lambda make: make.__name__)
def test_format(make: Any, tmp_path: Path) -> None:
    model, batch, graph = computed(make)
    written = graph.to_circuit_tracer(tmp_path / "one.json", one_of(batch, 2), model, node_threshold=1)
    document = read(tmp_path / "one.json")
    check(document)
    assert len(document["nodes"]) == len(written.nodes)
    assert len(document["links"]) == len(written.weights)
    assert sum(link["weight"] for link in document["links"]) == pytest.approx(float(written.weights.sum()))
    for node, found in zip(written.nodes, document["nodes"], strict=True):
        assert (found["activation"], found["clerp"]) == (node.value, node.id) or node.kind != "feature"
    # Several graphs in one folder.
    graph.to_circuit_tracer(tmp_path / "two.json", written)
    graph.to_circuit_tracer(tmp_path / "one.json", written)
    assert [entry["slug"] for entry in read(tmp_path / "graph-metadata.json")["graphs"]] == ["two", "one"]


def test_texts_and_what_is_known_of_features(tmp_path: Path) -> None:
    model, batch, graph = computed(gpt2)
    layer = graph.node_layers[1]
    r = graph.bases[layer].n_features
    fields = dict(vars(graph))
    fields["labels"] = {layer: ["vowels", *[""] * (r - 1)]}
    fields["output_effects"] = {
        layer: OutputEffects(torch.tensor([[1, 2, 3, -1]] * r), torch.ones(r, 4), torch.ones(r, 4))
    }
    histogram, none = torch.zeros(r, 64, dtype=torch.int32), torch.zeros(r, 0)
    histogram[:, 30] = 10
    width = torch.full((r,), 0.5)
    fields["examples"] = {layer: FeatureExamples(none, none, none, (0, 0, 0), (4,), none, 0, histogram, width)}
    named = type(graph)(**fields)
    sample = one_of(batch, 2)
    written = named.to_circuit_tracer(
        tmp_path / "x.json", sample, model, Letters(), node_threshold=1, edge_threshold=1, outputs=range(11)
    )
    document = read(tmp_path / "x.json")
    check(document)
    text = Letters().decode(sample["input_ids"][0].tolist())
    assert document["metadata"]["prompt"] == text
    assert document["metadata"]["prompt_tokens"] == list(text)
    clerps = {node["clerp"] for node in document["nodes"]}
    assert f"vowels ({layer}/0)" in clerps
    outputs = [node for node in document["nodes"] if node["feature_type"] == "logit"]
    assert {node["clerp"].split('"')[1] for node in outputs} == set("abcdefghij'")  # the viewer splits at quotes
    number = next(n["feature"] for n, m in zip(document["nodes"], written.nodes, strict=True) if m.label == "vowels")
    known = read(tmp_path / "x" / f"{number}.json")
    assert (known["top_logits"], known["bottom_logits"]) == (["b", "c"], ["d"])
    assert (known["act_min"], known["act_max"], sum(known["histogram"])) == (-16.0, 16.0, 10)
    assert set(known["quantile_values"]) == {-0.5}
    # Names that a run has given, of all outputs or of some, come first; any renderer of tokens will do.
    named.info = {**graph.info, "output_names": {"1": "one"}}
    named.to_circuit_tracer(tmp_path / "y.json", sample, model, TokenRenderer(list("ABCDEFGHIJK")), outputs=[0, 1])
    found = [n["clerp"].split('"')[1] for n in read(tmp_path / "y.json")["nodes"] if n["feature_type"] == "logit"]
    assert found == ["A", "one"]
    features = {node["feature"] for node in document["nodes"] if node["feature_type"] == "cross layer transcoder"}
    assert {int(path.stem) for path in (tmp_path / "x").iterdir()} == features


# What circuit-tracer's model of an example demands.
EXAMPLE = {"tokens": list, "tokens_acts_list": list, "train_token_ind": int, "is_repeated_datapoint": bool}


def test_examples_are_those_of_the_graph(tmp_path: Path) -> None:
    model, batch, graph = computed(gpt2)
    ids = batch["input_ids"]
    renderings = render_samples(graph, [batch], TokenRenderer(list("abcdefghijk")), model)
    written = graph.to_circuit_tracer(tmp_path / "x.json", one_of(batch, 2), model, renderings=renderings)
    features = [n for n in written.nodes if n.kind == "feature"]
    numbers = [
        n["feature"] for n in read(tmp_path / "x.json")["nodes"] if n["feature_type"] == "cross layer transcoder"
    ]
    for node, number in zip(features, numbers, strict=True):
        examples = graph.examples[node.layer]
        lists = read(tmp_path / "x" / f"{number}.json")["examples_quantiles"]
        assert [one["quantile_name"].split()[0].lower() for one in lists] == ["largest", "smallest", "spread"]
        found = [example for one in lists for example in one["examples"]]
        known = (examples.samples[node.index] >= 0).nonzero().flatten().tolist()
        assert len(found) == len(known)
        for example, k in zip(found, known, strict=True):
            assert {name: type(value) for name, value in example.items()} == EXAMPLE
            sample, place = int(examples.samples[node.index, k]), int(examples.positions[node.index, k])
            context = dict(enumerate(examples.context[node.index, k].tolist(), place - examples.before))
            around = {p: x for p, x in context.items() if x == x}
            assert example["tokens"] == ["abcdefghijk"[ids[sample, p]] for p in around]
            assert example["tokens_acts_list"] == pytest.approx(list(around.values()), abs=1e-2, rel=1e-2)
            at = example["train_token_ind"]
            assert list(around)[at] == place
            assert example["tokens_acts_list"][at] == float(examples.values[node.index, k])
    # The same from the folder of a run.
    graph = copy.copy(graph)
    graph.info = {**graph.info, "samples": "5ee4"}
    append_lines(
        tmp_path / "lib" / "samples.jsonl", [rendering_line(i, "5ee4", look) for i, look in renderings.items()]
    )
    graph.to_circuit_tracer(tmp_path / "y.json", written, renderings=tmp_path / "lib")
    for path in (tmp_path / "y").iterdir():
        assert read(path)["examples_quantiles"] == read(tmp_path / "x" / path.name)["examples_quantiles"] != []
    graph.info["samples"] = "other"
    with pytest.raises(LIBError, match="none of the samples of this graph"):
        graph.to_circuit_tracer(tmp_path / "z.json", written, renderings=tmp_path / "lib")
    with pytest.raises(LIBError, match=r"no file '.*samples\.jsonl'"):
        graph.to_circuit_tracer(tmp_path / "z.json", written, renderings=tmp_path)


@pytest.mark.parametrize("make", [mlp, cnn], ids=lambda make: make.__name__)
def test_examples_that_are_no_texts_are_shown_in_words(make: Any, tmp_path: Path) -> None:
    model, batch, graph = computed(make)
    written = graph.to_circuit_tracer(
        tmp_path / "x.json", batch, model, index=2, renderings=render_samples(graph, [batch], model=model)
    )
    assert written.nodes
    for path in (tmp_path / "x").iterdir():
        for one in read(path)["examples_quantiles"]:
            for example in one["examples"]:
                assert len(example["tokens"]) == len(example["tokens_acts_list"]) == 1
                assert "0: " in example["tokens"][0] or example["tokens"][0].startswith("sample ")


def test_errors(tmp_path: Path) -> None:
    model, batch, graph = computed(gpt2)
    sample = one_of(batch, 0)
    with pytest.raises(SettingError, match=r"end in \.json, such as graphs/one\.json"):
        graph.to_circuit_tracer(tmp_path / "one", sample, model)
    with pytest.raises(SettingError, match="There are 2 texts for 4 positions"):
        graph.to_circuit_tracer(tmp_path / "one.json", sample, model, ["a", "b"])
    with pytest.raises(SettingTypeError, match="tokens is a list of texts or a tokenizer; got int"):
        graph.to_circuit_tracer(tmp_path / "one.json", sample, model, 5)
    with pytest.raises(SettingError, match=r"no argument 'max_feature'. Did you mean 'max_features'"):
        graph.to_circuit_tracer(tmp_path / "one.json", sample, model, max_feature=5)
    with pytest.raises(SettingError, match="node_threshold is a share from 0 to 1; got 80"):
        graph.to_circuit_tracer(tmp_path / "one.json", sample, model, node_threshold=80)
    model, batch, other = computed(mlp)
    with pytest.raises(LIBError, match="no numbers of tokens"):
        other.to_circuit_tracer(tmp_path / "one.json", batch[:1], model, Letters())
    assert not list(tmp_path.iterdir())
    (tmp_path / "graph-metadata.json").write_text("[]")
    with pytest.raises(LIBError, match="is no list of graphs of circuit-tracer"):
        other.to_circuit_tracer(tmp_path / "one.json", batch[:1], model)


@pytest.mark.parametrize("make", [mlp, cnn, gpt2, llama], ids=lambda make: make.__name__)
def test_circuit_tracer_reads_the_same_graph(make: Any, tmp_path: Path) -> None:
    models = pytest.importorskip("circuit_tracer.frontend.graph_models")
    model, batch, graph = computed(make)
    looks = render_samples(graph, [batch], model=model)
    written = graph.to_circuit_tracer(tmp_path / "one.json", batch, model, index=2, renderings=looks)
    found = models.Model.model_validate_json((tmp_path / "one.json").read_text())
    assert len(found.nodes) == len({node.node_id for node in found.nodes}) == len(written.nodes)
    assert len(found.links) == len([models.Link(**link) for link in found.links]) == len(written.weights)
    features = pytest.importorskip("circuit_tracer.frontend.feature_models")
    for path in (tmp_path / "one").iterdir():
        assert features.Model.model_fields.keys() >= read(path).keys()
        for one in read(path)["examples_quantiles"]:
            assert features.ExamplesQuantile.model_validate(one).examples


@pytest.mark.parametrize("make", [mlp, cnn, gpt2, llama], ids=lambda make: make.__name__)
def test_circuit_tracer_prunes_to_the_same_graph(make: Any) -> None:
    pytest.importorskip("circuit_tracer")
    theirs = pytest.importorskip("circuit_tracer.graph")
    model, batch, graph = computed(make)
    full = graph.sample_graph(batch, model, index=2)
    order = [i for kind in ("feature", "error", "input", "output") for i, n in enumerate(full.nodes) if n.kind == kind]
    place = {i: k for k, i in enumerate(order)}
    A = torch.zeros(len(order), len(order), dtype=torch.float64)
    for s, t, w in zip(full.sources.tolist(), full.targets.tolist(), full.weights.tolist(), strict=True):
        A[place[t], place[s]] = w
    kinds = [n.kind for n in full.nodes]
    other = SimpleNamespace(
        adjacency_matrix=A,
        input_tokens=range(kinds.count("input")),
        logit_targets=range(kinds.count("output")),
        selected_features=range(kinds.count("feature")),
        logit_probabilities=torch.tensor([n.probability for n in full.nodes if n.kind == "output"]).double(),
    )
    with torch.random.fork_rng():
        torch.set_default_dtype(torch.float64)
        try:
            nodes, edges, _ = theirs.prune_graph(other, 0.8, 0.98)
        finally:
            torch.set_default_dtype(torch.float32)
    # Theirs counts errors, too.
    flat = full.flat()
    own_nodes, own_edges = prune(replace(flat, is_counted=torch.ones_like(flat.is_kept)), 0.8, 0.98)
    assert sorted(order[k] for k in nodes.nonzero()[:, 0].tolist()) == own_nodes.nonzero()[:, 0].tolist()
    assert int(edges.sum()) == int(own_edges.sum())

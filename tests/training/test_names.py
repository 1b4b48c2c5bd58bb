"""Names that could mean two things: of callbacks, of node layers in scalars, and of modules."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory
from weakref import WeakSet

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import lib_lightning.training.callback
from lib_lightning import InteractionGraph, LIBCallback, NodeLayer, compute_interaction_graph, list_node_layers
from lib_lightning.errors import LIBError, NodeLayerError, SettingError
from lib_lightning.io.run_layout import check_run_name
from lib_lightning.lineage.snapshot_tracker import SnapshotTracker
from lib_lightning.metrics.summary import scalar_keys
from lib_lightning.model.module_paths import as_in_model
from lib_lightning.model.node_layer import Tap, as_node_layer, split_tap, tap_name
from lib_lightning.training.writer import RunDirectory
from tests.tiny_training import NODE_LAYERS, Classifier, trainer_of

# Names that have a meaning somewhere, and the characters that join and divide them.
WORDS = st.sampled_from(
    ["input", "output", "total", "a", "b", "to", "-to-", "x y", "#", "#1", ":", ".", "/", "+", "0", "ü"]
)
NAMES = st.lists(WORDS, min_size=1, max_size=4).map("".join)
CHILDREN = NAMES.map(lambda name: name.replace(".", "_")).filter(lambda name: not hasattr(nn.Module, name))


class TestCallbackNames:
    @settings(deadline=None, max_examples=300)
    @given(
        name=st.one_of(
            st.text(max_size=12),
            st.lists(st.sampled_from(["..", ".", "/", "\\", "lib", "CON", "nul.txt", " ", "C:", "~", "\n", "é"])).map(
                "".join
            ),
            st.integers(190, 260).map(lambda n: "x" * n),
        )
    )
    @example("../lib")
    @example("/tmp/lib")
    @example("lib/../../x")
    @example("")
    @example("lpt1")
    @example("\U00012544" * 9)
    def test_a_run_never_writes_outside_its_folder(self, name: str) -> None:
        try:
            callback = LIBCallback(NODE_LAYERS, name=name, baselines=["pca", "neuron"], every_n_validations=1)
        except SettingError:
            with pytest.raises(SettingError, match=r"^name=.{0,90} cannot be the name of a folder in the log dir"):
                check_run_name(name)
            return
        with TemporaryDirectory() as folder:
            root = Path(os.path.realpath(folder)) / "logs"
            for part in RunDirectory(root, callback.computer.prefixes).folders.values():
                part.write_events(["{}"])
                written = Path(os.path.realpath(part.layout.events_file))
                assert root in written.parents
                assert written.parent != root
            assert [path.name for path in Path(folder).iterdir()] == ["logs"]
        assert not set(name) & set('<>:"|?*\\')

    def test_names_that_are_not_strings(self) -> None:
        for name in (None, 3, Path("lib")):
            with pytest.raises(SettingError, match="it is not a string"):
                LIBCallback(NODE_LAYERS, name=name, every_n_validations=1)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ({}, {}),
            ({}, {"name": "Lib"}),
            ({"baselines": ["pca"]}, {"name": "pca"}),
            ({"name": "a", "baselines": ["pca"]}, {"name": "a_pca"}),
            ({}, {"name": "lib/inner"}),
            ({"name": "a b"}, {"name": "a_b"}),
            ({"name": "e\u0301"}, {"name": "\u00e9"}),
        ],
    )
    def test_two_callbacks_of_one_name(self, first: dict[str, str], second: dict[str, str], tmp_path: Path) -> None:
        callbacks = [LIBCallback(NODE_LAYERS, **options) for options in (first, second)]  # type: ignore[arg-type]
        trainer = trainer_of(tmp_path, *callbacks)
        with pytest.raises(LIBError, match=r"^Two LIBCallbacks of this trainer would .*: give each a name=") as error:
            trainer.fit(Classifier())
        assert "\n" not in str(error.value)
        assert not list(tmp_path.rglob("*.safetensors"))

    def test_callbacks_of_one_name_in_two_trainers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # The second one is created before the first has been in a run: its checkpoint has the same key all the same.
        # Callbacks of other tests that have not been in a run and are not collected yet would be counted.
        monkeypatch.setattr(lib_lightning.training.callback, "_created", WeakSet())
        callbacks = [LIBCallback(NODE_LAYERS, every_n_validations=1), LIBCallback(NODE_LAYERS, every_n_validations=1)]
        trainers = [trainer_of(tmp_path / str(k), one, max_epochs=1) for k, one in enumerate(callbacks)]
        for trainer in trainers:
            trainer.fit(Classifier())
        assert (
            callbacks[0].state_key
            == callbacks[1].state_key
            == LIBCallback(NODE_LAYERS, every_n_validations=1).state_key
        )

    def test_names_with_several_parts(self, tmp_path: Path) -> None:
        callbacks = [
            LIBCallback(NODE_LAYERS, name=name, every_n_validations=1)
            for name in ("probes/lib", "probes/wide lib", "lib")
        ]
        trainer_of(tmp_path, *callbacks, max_epochs=1).fit(Classifier())
        assert all((tmp_path / one.name / "final.safetensors").exists() for one in callbacks)


class TestScalarNames:
    @settings(deadline=None, max_examples=200)
    @given(st.lists(NAMES, min_size=2, max_size=5, unique=True))
    @example(["a:input", "a.input"])
    @example(["a", "total"])
    @example(["a", "b-to-c", "a-to-b", "c"])
    @example(["a/total", "total/", "/total"])
    @example(["a b", "a_b", "a_b_2"])
    def test_every_part_of_a_graph_has_its_own_tags(self, names: list[str]) -> None:
        keys = [*scalar_keys(names), *scalar_keys(names, causal=True), *SnapshotTracker.keys("lib", names)]
        assert len({re.sub(r"[^-/\w.]", "_", key).strip("/") for key in keys}) == len(keys)
        metrics = [key.split("/")[0] for key in scalar_keys(names)]
        assert sum(key.endswith("/total") for key in scalar_keys(names)) == len(set(metrics))
        # Tags that could mean one thing only are those of version 0.1.
        if len({re.sub(r"[^-/\w.]", "_", name.replace(":", ".")).strip("/") for name in names}) == len(names):
            plain = [name.replace(":", ".") for name in names]
            own = [re.sub(r"[^-/\w.]", "_", key).strip("/").split("/")[-1] for key in plain]
            expected = [f"features/{key}" for key, end in zip(plain, own, strict=True) if end not in ("", "total")]
            assert set(expected) <= set(scalar_keys(names))

    @settings(deadline=None, max_examples=15)
    @given(names=st.lists(NAMES, min_size=2, max_size=3, unique=True))
    def test_a_file_has_every_node_layer(self, names: list[str]) -> None:
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        taps = ["input", "1", "output"][-len(names) :]
        layers = [NodeLayer([tap], name=name) for tap, name in zip(taps, names, strict=True)]
        graph = compute_interaction_graph(model, [torch.randn(20, 4)], layers)
        assert set(graph.measure()) == set(scalar_keys(names))
        with TemporaryDirectory() as folder:
            graph.save(f"{folder}/graph.safetensors")
            loaded = InteractionGraph.load(f"{folder}/graph.safetensors")
        assert loaded.node_layers == names
        assert all(torch.equal(loaded.bases[n].importance, graph.bases[n].importance) for n in names)
        loaded.plot()

    def test_values_of_a_module_called_total_reach_the_loggers(self, tmp_path: Path) -> None:
        class Model(Classifier):
            def __init__(self) -> None:
                super().__init__()
                self.total = nn.Linear(5, 5)
                self.a = nn.ModuleDict({"input": nn.Identity()})

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(self.a["input"](self.total(x)))

        loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path)]
        layers = ["total", NodeLayer(["net.4:input"], name="a:input"), NodeLayer(["output"], name="a.input")]
        callback = LIBCallback(layers, every_n_validations=1)
        trainer_of(tmp_path, callback, logger=loggers).fit(Model())
        assert callback.graph is not None
        scalars = callback.graph.measure()
        events = EventAccumulator(loggers[0].log_dir).Reload()
        for name, tag in zip(callback.graph.node_layers, ["total_2", "a.input_2", "a.input"], strict=True):
            features = callback.graph.bases[name].n_features
            assert scalars[f"features/{tag}"] == features
            assert events.Scalars(f"lib/features/{tag}")[-1].value == features
        total = sum(basis.n_features for basis in callback.graph.bases.values())
        assert events.Scalars("lib/features/total")[-1].value == total


class TestModuleNames:
    @settings(deadline=None, max_examples=500)
    @given(path=NAMES, side=st.sampled_from(["input", "output"]), call=st.one_of(st.none(), st.integers(0, 12)))
    def test_every_tap_has_a_spelling(self, path: str, side: str, call: int | None) -> None:
        tap = Tap(path, side, call)
        assert split_tap(tap_name(tap)) == tap

    @settings(deadline=None, max_examples=40)
    @given(st.lists(CHILDREN, min_size=3, max_size=4, unique=True))
    @example(["input", "act", "output"])
    @example(["a", "a:input", "a#1", "a#"])
    @example(["a", "b", "a+b"])
    @example(["+", "a+", "a|b"])
    def test_listed_names_are_the_tensors_that_they_name(self, children: list[str]) -> None:
        torch.manual_seed(0)
        widths = [4, 5, 6, 7, 8]
        modules = [nn.Linear(*widths[k : k + 2]) for k in range(len(children))]
        model = nn.Sequential(OrderedDict(zip(children, modules, strict=True)))
        x = torch.randn(30, 4)
        cuts = list_node_layers(model, x)
        assert [cut.features for cut in cuts] == widths[: len(children) + 1]
        names = [name for cut in cuts for name in (cut.tap, *cut.aliases)]
        assert len(set(names)) == len(names) == 2 * len(children) + 2
        plain = nn.Sequential(*modules)
        expected = compute_interaction_graph(plain, [x], ["input", *map(str, range(len(children)))])
        for spelled in ([cut.tap for cut in cuts], [(cut.tap, *cut.aliases)[-1] for cut in cuts]):
            graph = compute_interaction_graph(model, [x], spelled, final_basis="pca")
            for basis, reference in zip(graph.bases.values(), expected.bases.values(), strict=True):
                assert torch.equal(basis.importance, reference.importance)

    @settings(deadline=None, max_examples=200)
    @given(
        names=st.lists(st.text("ab+|", min_size=1, max_size=4), min_size=2, max_size=6, unique=True),
        chosen=st.lists(st.integers(0, 5), min_size=1, max_size=3), sign=st.sampled_from("+|"),
    )  # fmt: skip
    @example(["a+b", "c", "a"], [0, 1], "+")
    @example(["a", "a+b", "b+a", "b"], [1, 3], "+")
    @example(["a+", "b"], [0, 1], "+")
    def test_strings_that_join_modules_with_signs_in_their_names(
        self, names: list[str], chosen: list[int], sign: str
    ) -> None:
        """Of all lists of modules that give the same string, the shortest is meant."""
        model = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})
        text = sign.join(names[k % len(names)] for k in chosen)

        def lists_of(rest: str, join: str) -> list[tuple[str, ...]]:
            found = [(rest,)] if rest in names else []
            for name in names:
                if rest.startswith(name + join):
                    found += [(name, *taps) for taps in lists_of(rest[len(name) + 1 :], join)]
            return found

        lists = [*lists_of(text, "+"), *lists_of(text, "|")]
        shortest = [taps for taps in dict.fromkeys(lists) if len(taps) == min(map(len, lists))]
        layer = as_node_layer(text)
        if len(shortest) > 1:
            with pytest.raises(NodeLayerError, match=r"could join .* or .*Write it as one of these lists"):
                as_in_model(model, layer)
            return
        assert as_in_model(model, layer).taps == shortest[0]
        assert as_in_model(model, layer).name == text or len(shortest[0]) == 1
        as_list = as_node_layer(list(shortest[0]))
        assert as_in_model(model, as_list) is as_list

    def test_a_joined_module_with_a_sign_in_its_name(self) -> None:
        class Parallel(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.parts = nn.ModuleDict({"up+down": nn.Linear(4, 3), "left": nn.Linear(4, 2)})
                self.head = nn.Linear(5, 2)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.head(torch.cat([part(x) for part in self.parts.values()], -1))

        torch.manual_seed(0)
        model, x = Parallel(), torch.randn(20, 4)
        graphs = [
            compute_interaction_graph(model, [x], ["input", layer, "output"])
            for layer in ("parts.up+down+parts.left", ["parts.up+down", "parts.left"])
        ]
        assert graphs[0].node_layers == graphs[1].node_layers
        assert len(graphs[0].bases["parts.up+down+parts.left"].mean) == 5
        with pytest.raises(NodeLayerError, match=r"has no module 'parts.up'"):
            compute_interaction_graph(model, [x], ["input", "parts.up+parts.left", "output"])

    def test_errors_spell_out_names_that_mean_two_things(self) -> None:
        children = OrderedDict(first=nn.Linear(4, 4), input=nn.Linear(4, 3), output=nn.Linear(3, 2))
        model, x = nn.Sequential(children), torch.randn(20, 4)
        with pytest.raises(NodeLayerError, match="of its module 'input', write 'input:input' or 'input:output'"):
            compute_interaction_graph(model, [x], ["first", "input", "output"])
        graph = compute_interaction_graph(model, [x], ["first", "input:output", "output:output"])
        assert [len(basis.mean) for basis in graph.bases.values()] == [4, 3, 2]

    @pytest.mark.parametrize(
        ("wrong", "near"),
        [
            ("inputs", "'input'"),
            ("ouput", "'output'"),
            ("net.0.fc", "'model.net.0.fc'"),
            ("lit.model.net.0.fc", "'model.net.0.fc'"),
            ("fc", "'model.net.0.fc', 'model.net.1.fc'"),
            ("model.net.0.fx:input", "'model.net.0.fc:input'"),
            ("model.net.0.fc#0x", "is not a tap"),
            ("model.net.0.fc:imput", r"Did you mean 'model.net.0.fc:input'\?"),
            ("model.net", "did not run"),
        ],
    )
    def test_near_matches(self, wrong: str, near: str) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.fc(x).tanh()

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = nn.ModuleDict({"net": nn.ModuleList([Block(), Block()])})

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for block in self.model["net"]:  # type: ignore[union-attr]
                    x = block(x)
                return x

        with pytest.raises(NodeLayerError, match=near):
            compute_interaction_graph(Model(), [torch.randn(20, 4)], [wrong, "output"])

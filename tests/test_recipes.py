"""Every recipe runs as its README says, in a small setting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from lib_lightning import InteractionGraph
from lib_lightning.cli import main
from recipes.modular_addition import AllPairs, ModularAddition, ModularAdditionTransformer

RECIPES = Path(__file__).parents[1] / "recipes"
SMALL = {
    "modular_addition": ["--data.steps_per_epoch=60", "--trainer.val_check_interval=20"],
    "modular_addition_paper": [
        "--data.modulus=13", "--data.steps_per_epoch=3", "--trainer.max_epochs=2", "--trainer.accelerator=cpu",
    ],
}  # fmt: skip


def test_every_recipe_is_tried() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(SMALL)


@pytest.mark.recipe
@pytest.mark.parametrize("name", sorted(SMALL))
def test_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)
    main(["fit", "--config", f"recipes/{name}.yaml", f"--trainer.default_root_dir={tmp_path}", *SMALL[name]])
    (folder,) = (tmp_path / "lightning_logs").iterdir()
    final = InteractionGraph.load(folder / "lib" / "final.safetensors")
    assert final.node_layers == ["resid_pre", "resid_mid", "resid_post", "output"]
    snapshots = {path.stem for path in (folder / "lib" / "snapshots").iterdir()}
    assert snapshots == {path.stem for path in (folder / "lib" / "figures").iterdir()}
    assert "step-00000000" in snapshots
    assert len(list(folder.glob("events.*"))) == 1


@pytest.mark.recipe
def test_modular_addition_learns_what_it_is_taught(tmp_path: Path) -> None:
    # A small modulus and many pairs, so that a few hundred steps are enough to generalise.
    seed_everything(0, verbose=False)
    data = AllPairs(modulus=17, train_fraction=0.8, steps_per_epoch=800)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(ModularAddition(modulus=17), data)
    assert trainer.callback_metrics["accuracy/train"] == 1
    assert trainer.callback_metrics["accuracy/test"] > 0.9


def test_split_of_the_paper() -> None:
    data = AllPairs(modulus=113, train_fraction=0.3)
    order = torch.randperm(113**2, generator=torch.Generator().manual_seed(0))
    assert data.n_train == 3830
    assert torch.equal(data.tokens[:, 0] * 113 + data.tokens[:, 1], order)
    assert torch.equal(data.answers, (data.tokens[:, 0] + data.tokens[:, 1]) % 113)
    assert (data.tokens[:, 2] == 113).all()


def test_last_token_attention_is_causal_attention_at_the_last_token() -> None:
    model, tokens = ModularAdditionTransformer(11, 16, 2, 32), torch.randint(0, 11, (5, 3))
    x, attention = model.embed(tokens), model.attention
    q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (attention.query, attention.key, attention.value))
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.out(whole)[:, -1])

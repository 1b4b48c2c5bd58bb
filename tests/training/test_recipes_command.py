"""``lib-lightning recipe``: what is listed, and that what is copied runs in another folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lib_lightning.errors import LIBError
from lib_lightning.training.cli import main
from lib_lightning.training.recipes import copy_recipe, list_recipes, recipes_folder


def test_every_recipe_says_what_it_is() -> None:
    recipes = list_recipes()
    assert {"modular_addition", "digits_mlp", "language_model", "smollm2", "grokking"} <= {r.name for r in recipes}
    assert all(10 < len(recipe.summary) < 160 for recipe in recipes)
    assert len({recipe.name for recipe in recipes}) == len(recipes)


@pytest.mark.parametrize("name", [recipe.name for recipe in list_recipes()])
def test_a_copy_is_complete(name: str, tmp_path: Path) -> None:
    recipe = copy_recipe(name, tmp_path)
    copies = {file.relative_to(tmp_path / "recipes") for file in (tmp_path / "recipes").rglob("*") if file.is_file()}
    assert recipe.file.relative_to(recipes_folder()) in copies
    # Modules are found without the repository, although some import packages that may not be installed.
    modules = [".".join(("recipes", *file.with_suffix("").parts)) for file in copies if file.suffix == ".py"]
    program = (
        "import importlib.util as u, sys\n"
        "for name in sys.argv[1:]:\n"
        "    spec = u.find_spec(name)\n"
        "    tree = __import__('ast').parse(open(spec.origin, encoding='utf-8').read())\n"
        "    for node in __import__('ast').walk(tree):\n"
        "        if getattr(node, 'module', None) and node.module.startswith('recipes.'):\n"
        "            assert u.find_spec(node.module), node.module\n"
    )
    subprocess.run([sys.executable, "-c", program, *modules], cwd=tmp_path, check=True)


def test_the_page_of_recipes_has_those_that_are_listed() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| \[`recipes/(\w+)(?:\.\w+)?`\]", page, re.MULTILINE)
    assert sorted(table) == sorted(recipe.name for recipe in list_recipes())


def test_a_copied_recipe_trains_in_a_folder_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipe", "copy", "modular_addition", str(tmp_path)])
    said = capsys.readouterr().out
    assert "lib-lightning fit --config recipes/modular_addition.yaml" in said
    options = [
        "--data.modulus=7", "--data.steps_per_epoch=4", "--trainer.val_check_interval=2", "--model.d_model=16",
        "--model.d_mlp=16", "--trainer.limit_val_batches=1",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "lib_lightning", "fit", "--config", "recipes/modular_addition.yaml", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(recipes_folder().parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("final.safetensors"))
    # Only what the run has to say, and how to look at it last.
    assert "try installing" not in done.stderr
    assert "LeafSpec" not in done.stderr
    assert re.fullmatch(r"  open   .*tensorboard --logdir .*\(tab LIB\)", done.stderr.rstrip().splitlines()[-1])


def test_what_a_user_has_changed_is_kept(tmp_path: Path) -> None:
    copy_recipe("digits_mlp", tmp_path)
    changed = tmp_path / "recipes" / "digits_mlp.yaml"
    changed.write_text("seed_everything: 2\n")
    with pytest.raises(LIBError, match=r"digits_mlp\.yaml exists with another content"):
        copy_recipe("digits_mlp", tmp_path)
    assert changed.read_text() == "seed_everything: 2\n"
    copy_recipe("digits_mlp", tmp_path, replace=True)
    assert changed.read_bytes() == (recipes_folder() / "digits_mlp.yaml").read_bytes()


def test_a_misspelt_recipe_gets_a_short_answer(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"There is no recipe 'digit_mlp'\. Did you mean 'digits_mlp'\?"):
        main(["recipe", "copy", "digit_mlp", str(tmp_path)])

"Which recipe for which images: the rule, its limits, and that every choice can be trained"
import pytest
import torch

from self_supervised_bt.data import tensor_dls
from self_supervised_bt.defaults import batches_for, choice_for, chosen_recipe, view_size
from self_supervised_bt.folders import kept_size
from self_supervised_bt.recipes import RECIPES, bt_learner, get_recipe


@pytest.mark.parametrize("side, device, ranks, name", [
    (8, "cpu", 1, "cifar"), (48, "cuda", 8, "cifar"), (49, "cpu", 1, "laptop"), (1600, "cpu", 4, "laptop"),
    (1600, "mps", 1, "laptop"), (1600, "cuda", 1, "small-gpu"), (96, "cuda", 2, "paper")])
def test_recipe_by_size_and_machine(side, device, ranks, name):
    r, reason = chosen_recipe(5000, side, device, ranks)
    assert (r.name, r.arch, r.opt) == (name, RECIPES[name].arch, RECIPES[name].opt) and reason


@pytest.mark.parametrize("side", [8, 20, 32, 48, 64, 96, 128, 255, 256, 298, 400, 4000])
def test_views_are_three_quarters_of_the_images_and_images_are_not_enlarged(side):
    for device in ("cpu", "cuda"):
        r, _ = chosen_recipe(1000, side, device)
        assert r.size <= side and r.size % 4 == 0 and kept_size(r.size, side) <= side
        assert r.size == choice_for(side, device).largest or abs(r.size - .75*side) <= 2
    assert view_size(3, 64) == 8


@pytest.mark.parametrize("n", [2, 5, 40, 300, 511, 512, 513, 10_000, 10**7])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_batches_fit_the_images_and_divide_over_the_ranks(n, ranks):
    for device in ("cpu", "cuda"):
        for short in (False, True):
            r, _ = chosen_recipe(max(n, 4*ranks), 300, device, ranks, short)
            assert 2*ranks <= r.bs <= max(n, 4*ranks) and (r.bs % ranks == 0 or r.bs == RECIPES[r.name].bs)
            assert r.scale_lr == (r.bs >= 256) or ranks > 1
            assert 5 <= r.epochs <= 200


def test_epochs_follow_from_the_number_of_images():
    epochs = [chosen_recipe(n, 300)[0].epochs for n in (100, 5000, 10_000, 25_000, 10**6)]
    assert epochs == [100, 100, 50, 20, 10]
    assert [chosen_recipe(n, 300, short=True)[0].epochs for n in (100, 2000, 10**6)] == [60, 20, 5]
    assert chosen_recipe(100, 300, "cuda")[0].epochs == 200


def test_what_is_given_wins():
    r, _ = chosen_recipe(100, 300, bs=20, size=(64, 96), epochs=7, arch="resnet18")
    assert (r.bs, r.size, r.epochs, r.arch, r.arch_args, r.scale_lr) == (20, (64, 96), 7, "resnet18", {}, True)
    assert chosen_recipe(5000, 32, size=32)[0].pool_type is None        # the recipe's pooling is for another map
    assert chosen_recipe(5000, 32)[0].pool_type == "catavgmax" == chosen_recipe(5000, 32, size=24)[0].pool_type
    assert batches_for(10**6, get_recipe("paper"), 4) == dict(bs=1024)
    with pytest.raises(ValueError, match="side must be a positive int"): chosen_recipe(10, 0)
    with pytest.raises(ValueError, match="a recipe has no epoch"): chosen_recipe(10, 300, epoch=3)


@pytest.mark.parametrize("n, side", [(40, 32), (40, 20), (40, 96)])
def test_a_choice_trains(n, side):
    r, _ = chosen_recipe(n, side, epochs=1, hidden_size=16, projection_size=16)
    x = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)
    learn = bt_learner(tensor_dls(x, bs=r.bs, valid_pct=0, device="cpu"), recipe=r)
    with learn.no_logging(), learn.no_bar(): learn.fit_recipe()
    assert len(learn.recorder.losses) == 2

"""The search for masks on digits, but for the training."""

from benchmarks import mask_search
from spvit_jax import config as config_lib
from tests.benchmarks.test_experiments import config_of


def test_masks_by_chance_are_as_many_as_were_found():
    found = {"masked": [[0, 1, 2], [1], [], [0, 2]]}
    chosen = [mask_search.by_chance(found, seed) for seed in range(20)]
    assert {sum(map(len, heads)) for heads in chosen} == {6}
    assert len(set(map(str, chosen))) > 15
    run = mask_search.masked(found["masked"], seed=3)
    model = config_lib.model_settings(config_of(run), num_classes=10)
    assert model.masked_per_layer() == [(0, 1, 2), (1,), (), (0, 2)]

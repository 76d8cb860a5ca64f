"Checkpoint files of other projects: recognised, loaded strictly, reported; hostile and broken ones refused"
import warnings

import pytest
import torch
from layouts import LAYOUTS

from self_supervised_bt.formats import read_weights


def same(a, b): return torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def read(made, **kwargs):
    "The networks, without the warning about images of unknown normalisation"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="size and normalisation of the images")
        return read_weights(made.path, **({"source": made.source} if made.source else {}), **kwargs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_networks_of_a_layout_equal_those_of_its_source(layout, tmp_path):
    "Strictly loaded: representations, embeddings and logits as of the networks that were saved"
    made = LAYOUTS[layout](tmp_path)
    state = torch.get_rng_state()
    loaded = read(made)
    assert torch.equal(torch.get_rng_state(), state), "reading a file must not use random numbers"
    assert made.format in loaded.format and made.call.items() <= loaded.encoder.created_by.items()
    x = torch.rand(2, 3, 40, 40)
    with torch.no_grad():
        h = made.encoder(x)
        assert same(loaded.encoder(x), h) and not loaded.encoder.training
        for part, given in (("projector", h), ("head", h), ("predictor", torch.rand(2, 16))):
            theirs, ours = getattr(made, part), getattr(loaded, part)
            assert (theirs is None) == (ours is None)
            if theirs is not None: assert same(ours(given), theirs(given)) and not ours.training
    weights = loaded.report[loaded.report.part != "run"]
    assert weights["keys"].sum() == made.keys, str(loaded)
    assert weights[weights.use == "ignored"]["keys"].sum() == made.ignored, str(loaded)
    assert loaded.classes == made.classes
    sized, normalised = (list(loaded.encoder.clean_pipeline.fs) + [None, None])[:2]
    assert (sized.size if sized else None) == (made.size and (made.size, made.size))
    if made.stats: assert same(torch.stack([normalised.mean[0, 0], normalised.std[0, 0]]).flatten(),
                               torch.tensor(made.stats))

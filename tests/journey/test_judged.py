"""LoRAs of two styles on the embedded base: a sweep of strengths, and each told from the other by the numbers."""

import pytest

from wantrain import cli, results

pytestmark = [pytest.mark.slow, pytest.mark.long]
OTHER = {"anime": "architecture", "architecture": "anime"}
FEW = ["tracker=none", "train.num_steps=60", "train.save_every=60", "validation.every_steps=0",
       "~data.sources.regularisation", "data.num_frames=[5]", "data.resolutions=[[32,48]]", "data.batch_size=4",
       "train.micro_batch_size=4", "sampler.num_steps=8", "evaluate.combined=[]", "evaluate.unrelated=[]",
       "evaluate.prompts=['a red house on a meadow', 'a yellow tower at night', 'a blue boat by the sea']"]


STRENGTHS = "sampler.strengths=[0.1,0.2,0.35,1]"


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """By style: the metrics of its run, in which the other style's LoRA is a column, at four strengths."""
    folder = tmp_path_factory.mktemp("styles")
    own = {style: [f"recipe=demo_{style}", *FEW, f"run.dir={folder / style}", f"data.cache_dir={folder / 'cache'}"]
           for style in OTHER}
    for style in OTHER:
        for verb in ("cache", "train", "export"):
            assert cli.main([verb, *own[style]]) == 0
    found = {}
    for style, other in OTHER.items():
        lora = folder / other / "export" / f"demo_{other}.safetensors"
        assert cli.main(["evaluate", *own[style], f"sampler.compare=[{lora}]", STRENGTHS]) == 0
        metrics = results.read(folder / style / "report").metrics
        found[style] = {metric.name: {column: mean for column, (mean, _) in metric.columns.items()}
                        for metric in metrics}
    return found


@pytest.mark.parametrize("style", OTHER)
def test_a_strength_sweep_is_monotone_in_style_distance(judged, style):
    """It falls until the style is reached, from where more strength changes it by less than a tenth of the whole."""
    *rising, whole = (judged[style]["style"][column] for column in ("base", "strength_0.1", "strength_0.2",
                                                                    "strength_0.35", "strength_1"))
    assert rising == sorted(rising, reverse=True), rising
    assert whole < rising[-1] + 0.1 * rising[0]
    assert whole < 0.7 * rising[0]


@pytest.mark.parametrize("style", OTHER)
def test_a_lora_of_one_style_is_told_from_another(judged, style):
    """Nearer to its own clips in style, more like them to the encoder, and of less loss on held-out ones."""
    own, other = "strength_1", f"demo_{OTHER[style]}_strength_1"
    metrics = judged[style]
    assert metrics["style"][own] < 0.7 * metrics["style"][other]
    assert metrics["likeness"][own] > metrics["likeness"][other]
    assert metrics["heldout_loss"][own] < metrics["heldout_loss"]["base"] < metrics["heldout_loss"][other]

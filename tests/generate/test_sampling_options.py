"""One dataclass says how to sample: each of its fields is an option everywhere, and costs no further file."""

import argparse
import json
from dataclasses import fields, replace

import pytest
import torch
from truth.sampling_options import with_another
from truth.tiny_raphael import ROOT, write_pipeline

from raphael.base.config.params import GenerateConfig
from raphael.base.config.sampling import Sampling, own_sampling, told
from raphael.base.strict import ConfigError, load, to_dict
from raphael.cli.options import add_sampling, chosen_sampling
from raphael.evaluate.report.sections import sampling as in_words
from raphael.generate.pipeline import RaphaelPipeline
from raphael.generate.pipeline import chosen_sampling as of_the_model

OPTIONS = [pytest.param(field, id=field.name) for field in fields(Sampling)]
HOW_MANY = {"seed": 0, "batch_size": 50, "images_per_prompt": 1}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    torch.set_num_threads(1)
    return RaphaelPipeline.from_pretrained(write_pipeline(tmp_path_factory.mktemp("model") / "raphael"))


def asked(*words, defaults=None):
    parser = argparse.ArgumentParser()
    add_sampling(parser)
    parser.set_defaults(command="generate")
    return chosen_sampling(parser.parse_args(words), defaults or Sampling())


def as_words(settings):
    for name, value in settings.items():
        yield "--" + name.replace("_", "-")
        yield from map(str, value if isinstance(value, tuple) else [value])


@pytest.mark.parametrize("field", OPTIONS)
def test_an_option_is_one_of_the_settings_the_command_the_model_and_images_json(field):
    change = with_another(field)
    expected = replace(Sampling(), **change)
    assert getattr(expected, field.name) != field.default
    stated = {name: value for name, value in to_dict(expected).items() if value is not None}
    loaded = load(GenerateConfig, HOW_MANY | stated, "params.yaml", "generate")
    assert getattr(loaded, field.name) == getattr(expected, field.name)
    assert asked(*as_words(change)) == replace(expected, precision=expected.precision or "fp32")
    recorded = told(expected)
    if field.name == "precision":  # it is the machine's affair: told where it acts (tests/generate/test_command.py)
        assert "precision" not in recorded
        return
    assert load(Sampling, recorded, "images.json") == expected
    meta = {"sampling": json.loads(json.dumps(own_sampling({**recorded, **HOW_MANY})))}
    assert of_the_model(meta) == expected
    assert asked(defaults=expected) == replace(expected, precision="fp32")
    if field.metadata.get("later"):
        assert in_words(recorded) != in_words(told(replace(Sampling(), sampler=expected.sampler)))


def test_options_that_came_later_are_told_where_they_are_not_at_their_default():
    names = [
        "sampler", "steps", "guidance_scale", "eta", "guidance_interval", "threshold", "threshold_percentile",
        "threshold_bound",
    ]  # fmt: skip
    assert list(told(Sampling())) == names
    assert list(told(Sampling("ddpm", variance="beta"))) == [*names, "variance"]
    assert set(to_dict(load(GenerateConfig, HOW_MANY, "a file"))) == {*names, "precision", *HOW_MANY}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": 0.5}, "eta: got 0.5 with sampler dpmpp_2m, expected 0: only ddim has it"),
        ({"variance": "beta"}, "variance: got beta with sampler dpmpp_2m, expected posterior: only ddpm has it"),
        ({"guidance_interval": [0.5]}, "guidance_interval: got 0.5, expected two shares"),
        ({"guidance_rescale": 1.5}, "guidance_rescale: got 1.5, expected a number from 0 to 1"),
        ({"seed": 3}, "sampling: got seed, expected some of sampler, steps"),
        ({"sampler": "plms"}, "sampling.sampler: got 'plms', expected one of ddpm, ddim"),
    ],
)
def test_a_models_folder_that_says_nonsense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        of_the_model({"sampling": settings})


def test_the_command_refuses_what_does_not_fit_together_in_one_line():
    with pytest.raises(ConfigError, match="raphael generate: .*eta: got 0.5 with sampler euler"):
        asked("--sampler", "euler", "--eta", "0.5")
    with pytest.raises(ConfigError, match="raphael generate: steps: got 0, expected an integer at least 1"):
        asked("--steps", "0")


def test_a_call_takes_the_options_whole_or_changes_some_of_the_models_own(pipeline):
    how = Sampling("ddpm", 2, 3.0, variance="beta", guidance_rescale=0.5)
    whole = pipeline("a ring", sampling=how, output_type="np").images
    try:
        pipeline.defaults = how
        assert pipeline.sampler == "ddpm"
        own = pipeline("a ring", output_type="np").images
        fewer = pipeline("a ring", num_inference_steps=1, output_type="np").images
    finally:
        pipeline.defaults = Sampling()
    assert (whole == own).all() and (whole != fewer).any()
    for other in (replace(how, variance="posterior"), replace(how, guidance_rescale=0.0)):
        assert (pipeline("a ring", sampling=other, output_type="np").images != whole).any()


def test_an_option_costs_the_dataclass_and_the_code_that_acts_on_it():
    """Counted on one that came late: no other program file names it, but for the call with diffusers' arguments and
    the bodies of the HTTP API, whose names are a contract of their own."""
    files = [file for room in ("raphael", "data_pipeline", "flows") for file in sorted((ROOT / room).rglob("*.py"))]
    naming = [file.relative_to(ROOT).as_posix() for file in files if "guidance_rescale" in file.read_text()]
    assert set(naming) - {"raphael/systems/pipeline.py", "raphael/serve/bodies.py", "raphael/serve/info.py"} == {
        "raphael/base/config/sampling.py",
        "raphael/diffusion/sampling.py",
    }

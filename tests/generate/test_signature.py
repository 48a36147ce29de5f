"""What diffusers' users type, read from diffusers' own signatures: every name stands in one of the tables below."""

import inspect
import subprocess
import sys

import pytest
from truth.tiny_raphael import ROOT

from raphael import RaphaelPipeline

HERE = {  # of StableDiffusionPipeline.__call__, with its meaning
    "prompt", "height", "width", "num_inference_steps", "timesteps", "sigmas", "guidance_scale", "negative_prompt",
    "num_images_per_prompt", "eta", "generator", "latents", "prompt_embeds", "negative_prompt_embeds", "output_type",
    "return_dict", "guidance_rescale", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
}  # fmt: skip
NOT_HERE = {  # and why
    "ip_adapter_image": "no adapter of images is trained here",
    "ip_adapter_image_embeds": "no adapter of images is trained here",
    "cross_attention_kwargs": "hooks of attention are given in a Condition",
    "clip_skip": "the network was trained on the text encoder's last layer",
}
OURS = {
    "image", "strength",  # of StableDiffusionImg2ImgPipeline
    "sampling", "seed", "guidance_interval", "prompt_attention_mask", "negative_prompt_attention_mask", "collect",
    "progress", "callback", "guidance", "guidance_weight",  # the last two of gradients (raphael/systems/guides)
}  # fmt: skip
METHODS = {  # of DiffusionPipeline; a method's own arguments that are here
    "from_pretrained": {"pretrained_model_name_or_path"},
    "save_pretrained": {"save_directory", "safe_serialization"},
    "to": set(),  # (device, dtype) in either order
}
PROPERTIES = {"components", "device", "dtype"}
METHODS_NOT_HERE = {
    "enable_attention_slicing": "memory of attention is the fused kernel's", "disable_attention_slicing": "as above",
    "enable_model_cpu_offload": "the encoders are small; `to` moves all",
    "enable_sequential_cpu_offload": "as enable_model_cpu_offload", "set_progress_bar_config": "`progress` is called",
    "progress_bar": "`progress` is called", "from_pipe": "there is one pipeline", "download": "`from_pretrained` does",
}  # fmt: skip


def arguments(function) -> dict[str, inspect.Parameter]:
    named = inspect.signature(function).parameters.items()
    return {name: item for name, item in named if name != "self" and item.kind not in (item.VAR_KEYWORD,)}


def test_every_argument_of_diffusers_is_here_or_is_told_to_be_missing():
    from diffusers import StableDiffusionPipeline

    theirs, ours = arguments(StableDiffusionPipeline.__call__), arguments(RaphaelPipeline.__call__)
    assert set(theirs) == HERE | set(NOT_HERE) and not HERE & set(NOT_HERE)
    assert set(ours) == HERE | OURS
    assert not set(NOT_HERE) & set(ours)


def test_image_to_image_is_asked_for_as_in_diffusers_own_pipeline_of_it():
    from diffusers import StableDiffusionImg2ImgPipeline

    theirs, ours = arguments(StableDiffusionImg2ImgPipeline.__call__), arguments(RaphaelPipeline.__call__)
    for name in ("image", "strength"):
        assert ours[name].default == theirs[name].default, name


def test_arguments_that_diffusers_has_have_its_defaults_where_those_are_no_settings_of_a_model():
    from diffusers import StableDiffusionPipeline

    theirs, ours = arguments(StableDiffusionPipeline.__call__), arguments(RaphaelPipeline.__call__)
    of_the_model = {"num_inference_steps", "guidance_scale", "eta", "guidance_rescale"}  # None here: as its folder says
    for name in HERE - of_the_model:
        default = ours[name].default
        assert (list(default) if isinstance(default, tuple) else default) == theirs[name].default, name
    assert all(ours[name].default is None for name in of_the_model)


def test_properties_and_methods_of_diffusers_are_here():
    from diffusers import DiffusionPipeline

    for name in PROPERTIES:
        assert isinstance(getattr(DiffusionPipeline, name), property)
        assert isinstance(getattr(RaphaelPipeline, name), property), name
    for name, wanted in METHODS.items():
        theirs = set(inspect.signature(getattr(DiffusionPipeline, name)).parameters)
        ours = set(inspect.signature(getattr(RaphaelPipeline, name)).parameters)
        assert wanted <= theirs & ours, f"{name}: {wanted - ours}"
    assert not [name for name in METHODS_NOT_HERE if hasattr(RaphaelPipeline, name)]


def test_the_package_is_imported_without_torch_and_in_a_moment():
    code = (
        "import sys, time; start = time.perf_counter(); import raphael; spent = time.perf_counter() - start\n"
        "assert not {'torch', 'numpy', 'yaml', 'PIL'} & set(sys.modules), 'import raphael loads libraries'\n"
        "assert spent < 0.3, spent\n"
        "assert 'RaphaelPipeline' in dir(raphael)\n"
        "from raphael import RaphaelPipeline\n"
        "assert RaphaelPipeline.__module__.startswith('raphael.')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    import raphael

    with pytest.raises(AttributeError, match="module 'raphael' has no attribute 'StableDiffusionPipeline'"):
        raphael.StableDiffusionPipeline  # noqa: B018

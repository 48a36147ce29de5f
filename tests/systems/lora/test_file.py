"""Adapters' files: both forms against each other, against plain safetensors, and what is wrong with others'."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from truth.tiny_adapter import made_pairs
from truth.tiny_raphael import small_unet

from raphael.base.stage import StageError
from raphael.net.lora.sites import ALL, Site, owners
from raphael.net.moe.unet import RaphaelUNet
from raphael.systems.lora.file import PEFT_CONFIG, PEFT_FILE, Header, read_lora, write_lora
from raphael.systems.lora.names import fit

RANK = 2


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return RaphaelUNet(small_unet())


def made(targets, alpha=3.0):
    return made_pairs(targets, RANK, alpha)


KINDS = tuple(kind for kind in ALL if kind != "text_layers")  # the small network has none


@pytest.mark.parametrize(("form", "name"), [("kohya", "a.safetensors"), ("peft", PEFT_FILE)])
def test_what_is_written_is_read(tmp_path, net, form, name):
    pairs = made(KINDS)
    file = write_lora(tmp_path / name, pairs, Header("0123", RANK, 3.0), form)
    read = fit(read_lora(file), {"unet": net})
    assert read.keys() == pairs.keys()
    for site, pair in pairs.items():
        assert torch.equal(read[site].down, pair.down) and torch.equal(read[site].up, pair.up)
        assert read[site].alpha == pair.alpha == 3.0
    before = file.read_bytes()
    assert write_lora(file, pairs, Header("0123", RANK, 3.0), form).read_bytes() == before


def test_kohyas_keys_are_the_paths_with_underscores_and_pefts_the_paths(tmp_path):
    pairs = made(("attention", "experts"))
    kohya = load_file(write_lora(tmp_path / "a.safetensors", pairs, Header("", RANK, 3.0)))
    assert kohya["lora_unet_middle_self_attention_qkv.lora_down.weight"].shape == (RANK, 32)
    assert kohya["lora_unet_middle_self_attention_qkv.lora_up.weight"].shape == (96, RANK)
    assert kohya["lora_unet_middle_self_attention_qkv.alpha"] == 3.0
    assert kohya["lora_unet_middle_time_moe_experts_w2_1.lora_down.weight"].shape[0] == RANK
    peft = load_file(write_lora(tmp_path / PEFT_FILE, pairs, Header("", RANK, 3.0), "peft"))
    assert peft["base_model.model.middle.self_attention.qkv.lora_A.weight"].shape == (RANK, 32)
    said = json.loads((tmp_path / PEFT_CONFIG).read_text())
    assert said["peft_type"] == "LORA" and said["r"] == RANK and said["lora_alpha"] == 3.0


def test_the_file_holds_what_the_formula_counts(tmp_path, net):
    file = write_lora(tmp_path / "a.safetensors", made(("attention",)), Header("", RANK, 3.0))
    numbers = matrices = 0
    for _, module, _ in owners(net, ("attention",)):
        matrices += 1
        numbers += RANK * (module.in_features + module.out_features)
    tensors = load_file(file)
    assert len(tensors) == 3 * matrices
    assert sum(tensor.nbytes for tensor in tensors.values()) == 4 * numbers + 4 * matrices
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == header + 4 * numbers + 4 * matrices


def test_a_pairs_delta_is_pefts_on_the_same_tensors():
    """peft's LoraLayer: get_delta_weight = B A scaling, scaling = lora_alpha / r."""
    pair = made(("attention",), alpha=6.0)[Site("middle.self_attention.qkv.weight")]
    expected = torch.zeros(pair.shape, dtype=torch.float64)
    for row in range(pair.shape[0]):
        for component in range(RANK):
            expected[row] += pair.up[row, component].double() * pair.down[component].double() * (6.0 / RANK)
    assert torch.allclose(pair.delta().double(), expected, atol=1e-6)
    peft = pytest.importorskip("peft", reason="peft is not installed: the loop above is the truth")
    layer = torch.nn.Linear(pair.shape[1], pair.shape[0], bias=False)
    wanted = peft.LoraConfig(r=RANK, lora_alpha=6.0, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(layer), wanted)
    wrapped = model.base_model.model[0]
    with torch.no_grad():
        wrapped.lora_A["default"].weight.copy_(pair.down)
        wrapped.lora_B["default"].weight.copy_(pair.up)
    assert torch.equal(wrapped.get_delta_weight("default"), pair.delta())


def test_without_an_alpha_the_factor_is_one_and_a_convolution_may_be_a_matrix(tmp_path, net):
    down, up = torch.ones(RANK, 32), torch.ones(32, RANK)
    kernel = {"lora_unet_middle_out.lora_down.weight": down, "lora_unet_middle_out.lora_up.weight": up}
    save_file(kernel, tmp_path / "a.safetensors")
    (pair,) = fit(read_lora(tmp_path / "a.safetensors"), {"unet": net}).values()
    assert pair.alpha == RANK and pair.shape == (32, 32, 1, 1)
    assert torch.equal(pair.delta(), torch.full((32, 32, 1, 1), 2.0))


def test_diffusers_keys_and_the_alpha_in_its_header(tmp_path, net):
    path = "unet.middle.self_attention.out"
    tensors = {f"{path}.lora_A.weight": torch.ones(RANK, 32), f"{path}.lora_B.weight": torch.ones(32, RANK)}
    said = {"unet.r": RANK, "unet.lora_alpha": 8.0}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", {"lora_adapter_metadata": json.dumps(said)})
    read = fit(read_lora(tmp_path), {"unet": net})
    assert read[Site("middle.self_attention.out.weight")].alpha == 8.0


GOOD = {
    "lora_unet_middle_self_attention_out.lora_down.weight": torch.ones(RANK, 32),
    "lora_unet_middle_self_attention_out.lora_up.weight": torch.ones(32, RANK),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_unet_down_9_attn.lora_up.weight": torch.ones(4, 2), "lora_unet_down_9_attn.lora_down.weight":
          torch.ones(2, 4)}, r"made for another model: got lora_unet_down_9_attn\S+, expected names such as lora|down"),
        ({"lora_unet_middle_self_attention_out.lora_down.weight": torch.ones(RANK, 48)},
         r"made for another model: lora_unet_middle_self_attention_out\S+ adds to a matrix of \[32, 48\], expected"),
        ({"lora_unet_middle_self_attention_out.lora_up.weight": torch.full((32, RANK), torch.nan)}, "not finite"),
        ({"lora_unet_middle_self_attention_out.alpha": torch.tensor(float("nan"))}, "alpha: got numbers that are not"),
        ({"lora_unet_middle_self_attention_out.lora_up.weight": torch.ones(32, 3)}, r"got down \[2, 32\] and up"),
        ({"lora_unet_middle_self_attention_q.lora_up.weight": torch.ones(32, 2)}, "got it alone, expected down and up"),
        ({"lora_unet_middle.hada_w1_a": torch.ones(2, 2)}, "is LoHa, expected a plain LoRA"),
        ({"unet.conv_in.weight": torch.ones(2, 2)}, "got the key unet.conv_in.weight, expected a LoRA's"),
        ({"lora_te_text_model_final.lora_up.weight": torch.ones(2, 2), "lora_te_text_model_final.lora_down.weight":
          torch.ones(2, 2)}, "made for another model: got lora_te_text_model_final"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_that_names_the_first_key(tmp_path, net, changes, message):
    save_file({**GOOD, **changes}, tmp_path / "a.safetensors")
    with pytest.raises(StageError, match=message) as caught:
        fit(read_lora(tmp_path / "a.safetensors"), {"unet": net})
    assert "\n" not in str(caught.value)


def test_no_file_a_pickle_and_a_damaged_one(tmp_path):
    with pytest.raises(StageError, match="no such file, expected a LoRA"):
        read_lora(tmp_path / "none.safetensors")
    (tmp_path / "a.pt").write_bytes(b"x")
    with pytest.raises(StageError, match="got a pickle, which can run code"):
        read_lora(tmp_path / "a.pt")
    (tmp_path / "b.safetensors").write_bytes(b"xxxxxxxxxxxx")
    with pytest.raises(StageError, match="damaged, or no safetensors"):
        read_lora(tmp_path / "b.safetensors")
    with pytest.raises(StageError, match="holds none of lora.safetensors"):
        read_lora(tmp_path)

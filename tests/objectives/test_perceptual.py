import pytest
import torch

from raphael.objectives.perceptual import load_lpips


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """VGG-16 and heads with random weights, in the form of the published files; and torchvision's own network."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    folder, network = tmp_path_factory.mktemp("lpips"), vgg16(weights=None).eval()
    features = {name: value for name, value in network.state_dict().items() if name.startswith("features")}
    torch.save({**features, "classifier.6.bias": torch.zeros(1000)}, folder / "vgg16.pth")
    heads = {f"lin{k}.model.1.weight": torch.rand(1, w, 1, 1) for k, w in enumerate((64, 128, 256, 512, 512))}
    torch.save(heads, folder / "vgg.pth")
    return folder / "vgg16.pth", folder / "vgg.pth", network.features, list(heads.values())


def by_hand(features, heads, x, y):
    """Layer by layer, pixel by pixel, on torchvision's network."""
    total, f, g = 0.0, *((p - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) for p in (x, y))
    f, g = (p / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1) for p in (f, g))
    ends, level = (3, 8, 15, 22, 29), 0
    for number, layer in enumerate(features[:30]):
        f, g = layer(f), layer(g)
        if number in ends:
            pixels = [
                (heads[level].flatten() * (f[:, h, w] / f[:, h, w].norm() - g[:, h, w] / g[:, h, w].norm()) ** 2).sum()
                for h in range(f.shape[1])
                for w in range(f.shape[2])
            ]
            total, level = total + sum(pixels) / len(pixels), level + 1
    return total


def test_the_distance_is_the_formula_on_torchvisions_network(files):
    backbone, heads, features, lines = files
    lpips = load_lpips(backbone, heads)
    x, y = torch.rand(2, 2, 3, 18, 20) * 2 - 1
    got = lpips(x, y)
    for k in range(2):
        torch.testing.assert_close(got[k], by_hand(features, lines, x[k], y[k]), rtol=1e-4, atol=1e-6)


def test_equal_images_have_no_distance_and_a_gradient_leads_back_to_them(files):
    lpips = load_lpips(*files[:2])
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    assert float(lpips(x, x)) == 0
    y = (x + 0.3 * torch.randn_like(x)).requires_grad_()
    before = lpips(x, y)
    (gradient,) = torch.autograd.grad(before.sum(), y)
    assert float(lpips(x, (y - 0.05 * gradient / gradient.norm()).detach())) < float(before.detach())
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_the_published_heads_load(files, shared_data):
    lpips = load_lpips(files[0], shared_data / "weights/lpips/v0.1/vgg.pth")
    assert [len(head) for head in lpips.heads] == [64, 128, 256, 512, 512]
    assert all((head >= 0).all() for head in lpips.heads)


def test_files_that_are_something_else_are_refused_in_one_line(files, tmp_path):
    backbone, heads, _, _ = files
    (tmp_path / "text.pth").write_text("not weights")
    for arguments, line in (
        ((heads, heads), "got no VGG-16"),
        ((backbone, backbone), "got no heads of VGG-16"),
        ((tmp_path / "text.pth", heads), "cannot be read"),
        ((tmp_path / "absent.pth", heads), "cannot be read"),
    ):
        with pytest.raises(ValueError, match=line) as error:
            load_lpips(*arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="sides of at least 16"):
        load_lpips(backbone, heads)(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))

"""What a network predicts: the one place where its output becomes an estimate of x_0, and x_0 and noise its target.

All is told in variance-preserving coordinates, x_vp = signal x_0 + spread eps with signal^2 + spread^2 = 1, where every
formula but that of eps stays finite at pure noise (signal 0). sigma = spread / signal; x = x_vp / signal = x_0 + sigma
eps is what samplers hold. Each conversion goes with each noise (raphael/diffusion/noise.py).

| name | the network returns | source |
| eps | eps | arXiv 2006.11239, eq. 14 |
| v | signal eps - spread x_0 | arXiv 2202.00512, appendix D |
| x0 | x_0 | |
| flow | eps - x_0, of x_vp / (signal + spread) = (1 - time) x_0 + time eps | arXiv 2209.03003, eq. 1 |
| edm | (x_0 - c_skip x) / c_out, of c_in x | arXiv 2206.00364, eq. 7 and table 1 |
| residual | the same of x_0 less what a small picture already tells of it | `Residual`, ours |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from raphael.base.config.preset import DiffusionConfig
from raphael.diffusion.noise import CosineNoise
from raphael.diffusion.schedule import Noise
from raphael.net.condition import Condition

# Variance of white noise of variance 1 after bilinear enlarging by 2, whose weights along a side are 3/4 and 1/4. By 4
# it is 0.43, in the limit 4/9: a preconditioner that is 6 % off is none the worse.
ENLARGED_NOISE = (0.75**2 + 0.25**2) ** 2


class Prediction(Protocol):
    """Shapes: x_vp, x, x0, noise, output (B, ...); signal, spread, sigma (B, 1, ...), as broadcast; snr (B,)."""

    blind: bool  # whether pure noise leaves nothing to learn: such a prediction needs signal > 0

    def network_input(self, x_vp: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        """What the network is given for x_vp."""

    def target(self, x0: Tensor, noise: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        """What the network should have returned."""

    def estimate(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The x_0 that an output means, x = x_0 + sigma eps; where sigma is infinite, x is eps itself."""

    def error_of_x0(self, snr: Tensor) -> Tensor:
        """The square error of the output for a square error 1 of x_0, at SNR = 1 / sigma^2."""


class Eps:
    blind: ClassVar[bool] = True

    def network_input(self, x_vp: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        return x_vp

    def target(self, x0: Tensor, noise: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        return noise

    def estimate(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return x - sigma * output

    def error_of_x0(self, snr: Tensor) -> Tensor:
        return snr


class Velocity:
    blind: ClassVar[bool] = False

    def network_input(self, x_vp: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        return x_vp

    def target(self, x0: Tensor, noise: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        return signal * noise - spread * x0

    def estimate(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        pure = torch.isinf(sigma)  # there x_0 = -v, and the products would be 0 * inf
        scale = variance_preserving_scale(sigma)
        x_vp, spread = torch.where(pure, 0.0, x * scale), torch.where(pure, 1.0, sigma)
        return scale * (x_vp - spread * output)

    def error_of_x0(self, snr: Tensor) -> Tensor:
        return snr + 1


class Sample:
    blind: ClassVar[bool] = False

    def network_input(self, x_vp: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        return x_vp

    def target(self, x0: Tensor, noise: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        return x0

    def estimate(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return output.to(x)

    def error_of_x0(self, snr: Tensor) -> Tensor:
        return torch.ones_like(snr)


class Flow:
    """The velocity of the straight line from x_0 to eps. x_0 = (x_vp - spread u) / (signal + spread)."""

    blind: ClassVar[bool] = False

    def network_input(self, x_vp: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        return x_vp / (signal + spread)

    def target(self, x0: Tensor, noise: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        return noise - x0

    def estimate(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        x_vp, signal, spread = variance_preserving(x, sigma)
        return (x_vp - spread * output) / (signal + spread)

    def error_of_x0(self, snr: Tensor) -> Tensor:
        return (1 + snr.sqrt()) ** 2


@dataclass(frozen=True)
class Edm:
    """EDM's preconditioning: input and target of variance 1 for data of deviation sigma_data.

    With s = sigma_data and n^2 = spread^2 + s^2 signal^2: c_in x = x_vp / n, c_skip x = s^2 signal x_vp / n^2 and
    c_out = s spread / n, so the target is (spread x_0 - s^2 signal eps) / (s n). The mean square error of it is EDM's
    loss, whose weight is 1 / c_out^2. With s = 1 it is -v.
    """

    sigma_data: float | Tensor  # or one for each sample, (B, 1, ...)
    blind: ClassVar[bool] = False

    def network_input(self, x_vp: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        return x_vp / self._norm(signal, spread)

    def target(self, x0: Tensor, noise: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        s = self.sigma_data
        return (spread * x0 - s**2 * signal * noise) / (s * self._norm(signal, spread))

    def estimate(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        x_vp, signal, spread = variance_preserving(x, sigma)
        s, norm = self.sigma_data, self._norm(signal, spread)
        return s**2 * signal / norm**2 * x_vp + s * spread / norm * output

    def error_of_x0(self, snr: Tensor) -> Tensor:
        return snr + self.sigma_data**-2  # 1 / c_out^2

    def _norm(self, signal: Tensor, spread: Tensor) -> Tensor:
        return (spread**2 + (self.sigma_data * signal) ** 2).sqrt()


@dataclass(frozen=True)
class Residual:
    """EDM's preconditioning of an upsampler, about the picture that it is told: x_0 = mean + deviation r, r of
    variance 1.

    Told: z = alpha u + sigma e, u the small picture enlarged, of deviation s = sigma_data around 0; e the noise of its
    augmentation, whose variance k = ENLARGED_NOISE is left after enlarging. The linear estimate of u is mean = c z with
    c = alpha s^2 / (alpha^2 s^2 + k sigma^2), and what is left is

        deviation^2 = sigma_residual^2 + s^2 k sigma^2 / (alpha^2 s^2 + k sigma^2),

    sigma_residual that of x_0 - u. `Edm` of x_0 - mean then gives input and target variance 1 at every noise and level,
    and a network that returns 0 is the best linear estimate from x and z, no worse than z enlarged. Its loss counts in
    units of what z leaves open; in that of v the same is one part in a hundred.

    mean, deviation: of `about`; without them nothing can be converted.
    """

    sigma_data: float
    sigma_residual: float
    num_steps: int  # whose last timestep is the level 1
    mean: Tensor | None = None
    deviation: Tensor | None = None  # (B, 1, 1, 1)
    blind: ClassVar[bool] = False

    def about(self, condition: Condition) -> Residual:
        """Of samples that are told `condition`. Raises ValueError where it has no picture."""
        z, level = condition.picture, condition.level
        if z is None:
            raise ValueError(
                "prediction residual: got no picture, expected the small one, enlarged: it is an upsampler's"
            )
        level = torch.zeros(len(z), device=z.device) if level is None else level
        alpha, sigma = CosineNoise(self.num_steps, offset=0.0).roots(level, z)
        noise = ENLARGED_NOISE * sigma**2
        share = self.sigma_data**2 / (alpha**2 * self.sigma_data**2 + noise)
        return replace(self, mean=alpha * share * z, deviation=(self.sigma_residual**2 + share * noise).sqrt())

    def network_input(self, x_vp: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        return self._edm.network_input(x_vp - signal * self.mean.to(x_vp), signal, spread)

    def target(self, x0: Tensor, noise: Tensor, signal: Tensor, spread: Tensor) -> Tensor:
        return self._edm.target(x0 - self.mean.to(x0), noise, signal, spread)

    def estimate(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        mean = self.mean.to(x)
        return mean + self._edm.estimate(output, torch.where(torch.isinf(sigma), x, x - mean), sigma)

    def error_of_x0(self, snr: Tensor) -> Tensor:
        return snr + self._edm.sigma_data.flatten().to(snr) ** -2

    @property
    def _edm(self) -> Edm:
        if self.deviation is None:
            raise ValueError("prediction residual: got a network that is told no picture, expected an upsampler")
        return Edm(self.deviation)


def about(prediction: Prediction, condition: Condition) -> Prediction:
    """The prediction of samples that are told `condition`: of all but `Residual` the same."""
    return prediction.about(condition) if isinstance(prediction, Residual) else prediction


def prediction_of(config: DiffusionConfig) -> Prediction:
    if config.prediction == "edm":
        return Edm(config.sigma_data)
    if config.prediction == "residual":
        return Residual(config.sigma_data, config.sigma_residual, config.num_steps)
    return {"eps": Eps, "v": Velocity, "x0": Sample, "flow": Flow}[config.prediction]()


def training_pair(
    prediction: Prediction, schedule: Noise, x0: Tensor, noise: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """(the network's input, its target), each (B, ...), of x0 and noise (B, ...) at timesteps t (B,)."""
    signal, spread = schedule.roots(t, x0)
    x_vp = schedule.add_noise(x0, noise, t)
    return prediction.network_input(x_vp, signal, spread), prediction.target(x0, noise, signal, spread)


def variance_preserving_scale(sigma: Tensor) -> Tensor:
    """x_vp / x; 1 where sigma is infinite, as x is eps there."""
    return torch.where(torch.isinf(sigma), 1.0, (1 + sigma**2).rsqrt())


def variance_preserving(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x = x_0 + sigma eps (eps where sigma is infinite) -> (x_vp, signal, spread)."""
    pure, scale = torch.isinf(sigma), variance_preserving_scale(sigma)
    return x * scale, torch.where(pure, 0.0, scale), torch.where(pure, 1.0, sigma * scale)

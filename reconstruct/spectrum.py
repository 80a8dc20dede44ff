"""Point spread functions and their transfer functions: blur as a product in the frequency domain.

Any point spread function with a transfer function will do; the cost does not depend on the width, nothing is truncated,
and the derivative by the width is a product too. The Gaussian is the discrete one (Lindeberg 1990),
exp(t (cos w - 1)) per axis: positive, of variance exactly t, and the identity at t = 0, so that blur has a smooth
derivative through focus.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

PsfShape = Literal["disc", "gaussian"]

TAIL_SIGMAS = 4.5  # a Gaussian's reach: 7e-6 of its mass lies beyond
TOGETHER_BYTES = 2e6  # of spectra that a CPU transforms back at once: they stay in its cache
DISCS_BYTES = 48e6  # transfer functions of discs that are remembered for each size of image
WHOLE_DISC_BYTES = 4e5  # up to this size as they are used, else a quarter of them


@dataclass(frozen=True)
class Psf:
    """Shape of the blur of a point, as a function of the circle of confusion.

    Attributes:
        shape: `disc` is the uniform disc of the CoC's diameter, anti-aliased; `gaussian` has std = `gain` x diameter.
        gain: std of the Gaussian per px of CoC diameter. 1/4 has the disc's second moment, 0.27 matches real
            disc blur best (design section 2).
        floor_px: std of the Gaussian that sensor and diffraction add to every blur, in quadrature.
    """

    shape: PsfShape = "disc"
    gain: float = 0.27
    floor_px: float = 0.3

    def reach_px(self, coc_px: float) -> int:
        """Distance beyond which a point blurred to diameter `coc_px` leaves no light."""
        if self.shape == "disc":
            return math.ceil(coc_px / 2 + TAIL_SIGMAS * self.floor_px + 2)
        return math.ceil(TAIL_SIGMAS * math.hypot(self.gain * coc_px, self.floor_px) + 2)

    def gaussian_variance(self, coc_px: Tensor) -> Tensor:
        """Variance of the Gaussian in px^2."""
        return (self.gain * coc_px).square() + self.floor_px**2


def _fast_length(length: int) -> int:
    """Smallest even length >= `length` with no prime factor above 7: transforms of it are fast."""
    length += length % 2
    while True:
        rest = length
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 2


class Spectrum:
    """The frequencies of a real (height, width) transform, and the transfer functions on them.

    Spectra are kept as real tensors (..., h, w + 2), real and imaginary parts alternating: transfer functions are
    real here, and multiplying by them is then plain arithmetic.
    """

    def __init__(self, height: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.height, self.width = height, width
        self.dtype, self.device = dtype, device
        rows = torch.fft.fftfreq(height, dtype=torch.float64)
        columns = torch.fft.rfftfreq(width, dtype=torch.float64)
        # cos w - 1 per axis: half the discrete Laplacian
        self.bend_rows = (torch.cos(2 * math.pi * rows) - 1)[:, None].to(device, dtype)
        self.bend_columns = (torch.cos(2 * math.pi * columns) - 1).repeat_interleave(2)[None].to(device, dtype)
        # Parseval on half a spectrum: the inner columns stand for two
        twice = torch.full((columns.numel(),), 2.0, dtype=torch.float64)
        twice[0] = twice[-1] = 1.0
        self.parseval = (twice / (height * width)).repeat_interleave(2).to(device, dtype)
        self.cos_rows = _Cosines(rows[: height // 2 + 1].abs(), dtype, device)
        self.cos_columns = _Cosines(columns, dtype, device)
        # a refinement asks for the same discs again and again
        plane_bytes = height * (width + 2) * dtype.itemsize
        self.whole_discs = plane_bytes <= WHOLE_DISC_BYTES
        room = int(DISCS_BYTES / plane_bytes) * (1 if self.whole_discs else 4)
        self._remembered = lru_cache(maxsize=max(room, 1))(self._disc_transfer)

    def zeros(self, *leading: int) -> Tensor:
        """A spectrum of nothing, (*leading, h, w + 2)."""
        return torch.zeros((*leading, self.height, self.width + 2), dtype=self.dtype, device=self.device)

    def blank(self, channels: int) -> Tensor:
        """A black image of the full size, (channels, h, w)."""
        return torch.zeros((channels, self.height, self.width), dtype=self.dtype, device=self.device)

    def forward(self, image: Tensor, values: int | None = None) -> Tensor:
        """Spectrum of `image` (..., h, w), which is padded with zeros to the full size; the first `values` columns."""
        if values is None:
            return torch.view_as_real(torch.fft.rfft2(image, s=(self.height, self.width))).flatten(-2)
        lines = torch.fft.rfft(image, n=self.width)[..., : values // 2]
        return torch.view_as_real(torch.fft.fft(lines, n=self.height, dim=-2)).flatten(-2)

    def inverse(self, spectrum: Tensor, rows: slice, columns: slice) -> Tensor:
        """These rows and columns of the image (..., h, w) with this spectrum, whose last columns may be left out."""
        planes = torch.view_as_complex(spectrum.unflatten(-1, (-1, 2)))
        planes = planes.reshape(-1, *planes.shape[-2:])
        together = max(1, int(TOGETHER_BYTES / planes[0].nbytes)) if self.device.type == "cpu" else len(planes)
        if together >= len(planes):
            out = self._back(planes, rows, columns)
        else:
            out = spectrum.new_empty(len(planes), rows.stop - rows.start, columns.stop - columns.start)
            for part, target in zip(planes.split(together), out.split(together), strict=True):
                target.copy_(self._back(part, rows, columns))
        return out.view(*spectrum.shape[:-2], *out.shape[1:])

    def _back(self, planes: Tensor, rows: slice, columns: slice) -> Tensor:
        return torch.fft.irfft(torch.fft.ifft(planes, dim=-2)[:, rows], n=self.width)[..., columns]

    def transfer(self, coc_px: Tensor, psf: Psf) -> Tensor:
        """Transfer functions (n, h, w + 2) of blurs with CoC diameters `coc_px` (n,)."""
        if psf.shape == "gaussian":
            variance = psf.gaussian_variance(coc_px)[:, None, None]
            return torch.exp(variance * self.bend_rows) * torch.exp(variance * self.bend_columns)
        every = [self._remembered(coc, psf.floor_px) for coc in coc_px.tolist()]
        discs = every[0] if len(every) == 1 else torch.cat(every)
        return discs if self.whole_discs else self._spread(discs)

    def _disc_transfer(self, coc_px: float, floor_px: float) -> Tensor:
        """One disc's transfer function as it is remembered."""
        disc, _ = self._disc(torch.tensor([coc_px], dtype=self.dtype, device=self.device))
        upper = self._floored(disc, floor_px)
        return self._spread(upper) if self.whole_discs else upper

    def transfer_slope(self, coc_px: Tensor, psf: Psf) -> Tensor:
        """Derivative of `transfer` by the CoC diameter."""
        if psf.shape == "gaussian":
            by_variance = (self.bend_rows + self.bend_columns) * self.transfer(coc_px, psf)
            return by_variance.mul_((2 * psf.gain**2) * coc_px[:, None, None])
        slopes = [self._floored(self._disc(coc, slope=True)[1], psf.floor_px) for coc in coc_px.split(1)]
        return self._spread(torch.cat(slopes))

    def _disc(self, coc_px: Tensor, slope: bool = False) -> tuple[Tensor, Tensor]:
        """Transfer functions of anti-aliased discs on the upper rows, (n, h/2 + 1, w/2 + 1); perhaps their slopes.

        The disc is cut into chords at height y with half-length x, y = r sin a and x = r cos a. What falls between
        pixels is shared linearly by the nearest, so the transfer function of a point at y is that of the two pixels
        around it, and that of a chord the integral of the same. All radii share one number of chords, that of the
        largest; so each is asked for alone, or it would differ a little between frames, tiles and the way back.
        """
        radius, radius_slope = _disc_radius(coc_px)
        angle = _chord_angles(float(radius.max()), coc_px)
        height, half = radius[:, None] * angle.sin(), radius[:, None] * angle.cos()
        share = angle.cos()
        scale = 1 / (radius[:, None, None] * share.square().sum())
        point, point_slope = self.cos_rows.interpolated(height)
        chord, chord_slope = self.cos_columns.integrated(half)
        point_share = point * (share[:, None] * scale)
        disc = point_share.mT @ chord
        if not slope:
            return disc, disc
        grown = (point_slope * (share * angle.sin())[:, None] * scale).mT @ chord
        grown += point_share.mT @ (chord_slope * angle.cos()[:, None])
        return disc, grown.sub_(disc / radius[:, None, None]).mul_(radius_slope[:, None, None])

    def _floored(self, upper: Tensor, floor_px: float) -> Tensor:
        """Upper rows (n, h/2 + 1, w/2 + 1) times the floor's Gaussian."""
        upper = upper * torch.exp(floor_px**2 * self.bend_rows[: upper.shape[1]])
        return upper.mul_(torch.exp(floor_px**2 * self.bend_columns[:, ::2]))

    def _spread(self, upper: Tensor) -> Tensor:
        """The whole plane (n, h, w + 2) from its upper rows (n, h/2 + 1, w/2 + 1)."""
        whole = upper.new_empty(len(upper), self.height, self.width + 2)
        rows = upper.shape[1]
        whole[:, :rows, ::2] = upper
        whole[:, :rows, 1::2] = upper
        whole[:, rows:] = whole[:, 1 : self.height // 2].flip(1)
        return whole

    def gaussian(self, variance: float) -> Tensor:
        """Transfer function (h, n) of the Gaussian of one variance; the last columns, which round to 0, left out."""
        columns = torch.exp(variance * self.bend_columns)
        values = int((columns > torch.finfo(self.dtype).eps).sum())  # it falls from column to column
        return torch.exp(variance * self.bend_rows) * columns[:, :values]

    def gaussian_of_ones(self, variance: float, size: tuple[int, int], part: tuple[slice, slice]) -> Tensor:
        """Part of what the Gaussian makes of 1 in the first rows and columns, `size` of them, and 0 beyond, (h, w)."""
        rows, columns = (self.bend_rows.new_ones(length) for length in size)
        rows = torch.fft.fft(rows, n=self.height) * torch.exp(variance * self.bend_rows[:, 0])
        columns = torch.fft.rfft(columns, n=self.width) * torch.exp(variance * self.bend_columns[0, ::2])
        down, across = torch.fft.ifft(rows).real, torch.fft.irfft(columns, n=self.width)
        return down[part[0], None] * across[part[1]]


class _Cosines:
    """cos(2 pi f n) of whole pixels n, interpolated linearly between them and integrated from 0; for frequencies f."""

    def __init__(self, frequencies: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self.frequencies = frequencies
        self.dtype, self.device = dtype, device
        self.values = self.integral = torch.empty(0, 0)

    def _cover(self, pixels: int) -> None:
        if self.values.shape[0] < pixels:
            n = torch.arange(2 * pixels, dtype=torch.float64)
            values = torch.cos(2 * math.pi * n[:, None] * self.frequencies)
            trapezia = (values[1:] + values[:-1]) / 2
            integral = torch.cat([torch.zeros_like(values[:1]), trapezia.cumsum(0)])
            self.values = values.to(self.device, self.dtype)
            self.integral = integral.to(self.device, self.dtype)

    def interpolated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and slopes (n, m, f) at the distances `x` (n, m) in px."""
        self._cover(int(x.max()) + 2)
        cell = x.long()
        low = self.values[cell]
        slope = self.values[cell + 1] - low
        return low + slope * (x - cell)[..., None], slope

    def integrated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Integrals from 0 to `x` and the values there, (n, m, f) each."""
        self._cover(int(x.max()) + 2)
        cell = x.long()
        low = self.values[cell]
        within = (x - cell)[..., None]
        change = (self.values[cell + 1] - low).mul_(within)
        return self.integral[cell] + within * (low + change / 2), low + change


def _chord_angles(radius_px: float, like: Tensor) -> Tensor:
    """Midpoints of enough equal parts of a right angle to render a disc of this radius smoothly."""
    parts = 24 + 4 * math.ceil(radius_px)
    return (torch.arange(parts, dtype=like.dtype, device=like.device) + 0.5) * (math.pi / 2 / parts)


_RADIUS_TABLE_PX = 8.0


@lru_cache(maxsize=1)
def _radius_table() -> tuple[Tensor, Tensor]:
    """Variance per axis of anti-aliased discs of radius 0 to _RADIUS_TABLE_PX: that of the disc and of the sharing."""
    radius = torch.linspace(1e-6, _RADIUS_TABLE_PX, 1024, dtype=torch.float64)
    place = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    share = (1 - place**2).sqrt()  # length of the chord at `place` radii from the centre
    x = radius[:, None] * place
    within = x - x.floor()
    return radius, ((x * x + within * (1 - within)) * share).sum(1) / share.sum()


def _disc_radius(coc_px: Tensor) -> tuple[Tensor, Tensor]:
    """Radius whose anti-aliased disc has the variance of the ideal one, (CoC / 4)^2, and its slope by the CoC.

    Sharing light between whole pixels adds up to 1/6 px^2; without this, discs of a few pixels would look too wide
    and the smallest would have a cusp at c = 0.
    """
    radii, variances = _radius_table()
    radii, variances = radii.to(coc_px), variances.to(coc_px)
    wanted = coc_px.square() / 16
    cell = (torch.searchsorted(variances, wanted) - 1).clamp(0, len(radii) - 2)
    slope = (radii[cell + 1] - radii[cell]) / (variances[cell + 1] - variances[cell])
    radius = (radii[cell] + slope * (wanted - variances[cell])).clamp_min(1e-6)
    beyond = wanted > variances[-1]
    far = (radii[-1] ** 2 + 4 * (wanted - variances[-1]).clamp_min(0)).sqrt()
    radius, slope = torch.where(beyond, far, radius), torch.where(beyond, 2 / far, slope)
    return radius, slope * coc_px / 8


@lru_cache(maxsize=8)
def spectrum_of(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Spectrum:
    """The frequencies of images of at least this size, the same object again for the last few sizes."""
    return Spectrum(_fast_length(height), _fast_length(width), dtype, device)

"""DAIF-Net: a focal stack in, inverse depth with its spread and an all-in-focus image out.

Two presets share this file.

`DefaultNet` knows the optics. Everything it sees is in blur units: dioptre hypotheses are placed between the
focus settings of the stack and become signed CoC diameters in pixels, c = kappa (q_s - q). It never sees a
millimetre, so one set of weights serves every lens, spacing and number of frames. Frames are pooled by weights
that depend on c alone, so their order does not matter.

`PaperNet` is the network of "Fully Self-Supervised Depth Estimation from Defocus Clue" (arXiv 2303.10752) as its
authors coded it (notes/method.md section 2).

Letters: B batch, S frames, D hypotheses, (H, W) pixels, (h, w) = (H/2, W/2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reconstruct.plane_sweep import GREY, Evidence, Photometry, SweepConfig, conclude, gather_evidence, photometry


class NetworkOutput(NamedTuple):
    """What a network says about a batch of stacks.

    Attributes:
        inverse_depth_dpt: (B, 1, H, W), 1/m.
        std_dpt: (B, 1, H, W), one standard deviation of the above; not calibrated.
        aif: (B, 3, H, W) linear RGB, None if not asked for.
        logits: (B, D, h, w) log-weights of the hypotheses, None for `PaperNet`.
        opinion_dpt: (B, 1, H, W), their mean, from which and the plane sweep's answer `inverse_depth_dpt` is made.
    """

    inverse_depth_dpt: Tensor
    std_dpt: Tensor
    aif: Tensor | None
    logits: Tensor | None = None
    opinion_dpt: Tensor | None = None


# ---------------------------------------------------------------------------------------------- focus volume

SWEEP = SweepConfig()  # trained weights depend on it, and on everything else that the sweep does


class Hypotheses(NamedTuple):
    """Where depth may be: `dpt` (B, D) ascending, `step_px` (B,) their spacing in pixels of CoC diameter."""

    dpt: Tensor
    step_px: Tensor


def place_hypotheses(focus_dpt: Tensor, kappa: Tensor) -> Hypotheses:
    """The plane sweep's hypotheses for a batch: evenly over the swept range and 2 px of blur beyond.

    Blur is linear in dioptres, so even spacing here is even spacing in blur, whatever the lens.
    """
    count = SWEEP.hypotheses
    kappa_ref = kappa.mean(1)
    margin = SWEEP.beyond_px / kappa_ref
    low, high = focus_dpt.amin(1) - margin, focus_dpt.amax(1) + margin
    ramp = torch.linspace(0.0, 1.0, count, device=focus_dpt.device, dtype=focus_dpt.dtype)
    dpt = low[:, None] + (high - low)[:, None] * ramp
    return Hypotheses(dpt, kappa_ref * (high - low) / (count - 1))


class Prior(NamedTuple):
    """What the plane sweep knows of a batch.

    Attributes:
        cost, total: its evidence, (B, D, H, W).
        inverse_depth_dpt, error_px, sharp: what it makes of it, (B, 1, H, W).
        brightness: mean of all frames, (B, 1, 1, 1).
        noise: variance of the captured frames' pixel noise, as in `Photometry`, (B, 1, 1, 1).
    """

    cost: Tensor
    total: Tensor
    inverse_depth_dpt: Tensor
    error_px: Tensor
    sharp: Tensor
    brightness: Tensor
    noise: Tensor

    @property
    def maps(self) -> tuple[Tensor, ...]:
        """What has a value at every pixel."""
        return self[:-2]

    @property
    def scalars(self) -> tuple[Tensor, ...]:
        """What has one value a stack."""
        return self[-2:]


def sweep_prior(
    frames: Tensor,
    focus_dpt: Tensor,
    kappa: Tensor,
    valid: Tensor | None = None,
    *,
    context: Photometry | None = None,
    evidence: Evidence | None = None,
) -> Prior:
    """A batch of one; arguments as for `plane_sweep`, frames `quietened`."""
    context = context or photometry(frames, valid)
    evidence = evidence or gather_evidence(frames, focus_dpt, kappa, valid, SWEEP, context)
    swept = conclude(frames, focus_dpt, kappa, valid, evidence, SWEEP, context)
    volumes, maps = (x[None] for x in evidence), (x[None, None] for x in swept)
    scalars = (x.view(1, 1, 1, 1) for x in (context.brightness, context.noise))
    return Prior(*volumes, *maps, *scalars)


def mean_2x2(x: Tensor) -> Tensor:
    """(..., H, W) to (..., H/2, W/2)."""
    rows = x[..., ::2, :] + x[..., 1::2, :]  # several times faster on a CPU than avg_pool2d
    return (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)


# ------------------------------------------------------------------------------------------------- default net


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu_(self.first(x), 0.1)
        return F.leaky_relu_(x + self.second(x), 0.1)


class DefaultNet(nn.Module):
    """The `default` preset: an optics-aware focus volume, a U-Net over it, and what it changes about the plane sweep.

    1. *Evidence*: the plane sweep as it is: cost of each hypothesis, the same smoothed semi-globally, its answer and
       the error to expect of it (no weights).
    2. *Features*: a shared encoder sees each frame; per hypothesis the frames are averaged with weights that are a
       learned function of the signed CoC c alone. Any S, any order.
    3. A U-Net at half resolution reads all of it in context, and how much noise hides there.
    4. A distribution over hypotheses: softmax of the evidence plus a *bounded residual*. A softmax cannot die.
    5. Its mean, brought to full size by convex upsampling, is a second opinion. A few convolutions at full size decide
       pixel by pixel how far the plane sweep's answer moves towards it, and by some bounded pixels of CoC beyond.
       Untrained, it is next to the plane sweep's.
    6. The all-in-focus image is a weighting of the frames, by their blur at that depth, plus a bounded residual.
    """

    FEATURES, HEADS = 8, 4
    SATURATION = 2.0  # of the smoothed cost
    BOUND = 12.0  # largest change of a log-weight by the U-Net: more than half of temperature x saturation
    CONTEXT, FINE = 8, 16  # channels handed to full size, and of the convolutions there
    FINE_BOUND_PX = 4.0  # largest change of the answer at full size, CoC diameter
    bf16 = False  # for training: the U-Net's convolutions; elsewhere that cost a quarter of what fine-tuning gains

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        count = SWEEP.hypotheses
        w1, w2, w3, w4 = width, width * 3 // 2, width * 2, width * 3
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 16, 5, 2, 2),
            nn.LeakyReLU(0.1, True),
            nn.Conv2d(16, self.FEATURES, 3, 1, 1),
            nn.LeakyReLU(0.1, True),
        )
        self.profile = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, self.HEADS))
        self.mix = nn.Conv2d(count * (3 + self.HEADS), 64, 1)
        self.place = nn.Linear(count * 3, 64)
        self.stem = Block(64 + 2 * self.FEATURES + 4, w1)
        self.down2, self.down3, self.down4 = Block(w1, w2, 2), Block(w2, w3, 2), Block(w3, w4, 2)
        self.up3, self.up2, self.up1 = Block(w4 + w3, w3), Block(w3 + w2, w2), Block(w2 + w1, w1)
        self.logit = nn.Conv2d(w1, count, 3, 1, 1)
        self.temperature = nn.Parameter(torch.tensor(8.0))  # a clear minimum of the cost is a clear answer
        self.trust = nn.Parameter(torch.tensor(1.0))  # in the sweep's answer
        self.guide = nn.Conv2d(w1 + 4, 32, 3, 1, 1)
        self.detail = nn.Conv2d(32, 4 * (9 + self.CONTEXT), 1)
        self.fine = nn.Sequential(
            nn.Conv2d(self.CONTEXT + 12, self.FINE, 3, 1, 1),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(self.FINE, self.FINE, 3, 1, 2, dilation=2),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(self.FINE, self.FINE, 3, 1, 1),
            nn.LeakyReLU(0.1, inplace=True),
        )
        self.answer = nn.Conv2d(self.FINE, 3, 1)
        self.sharp = nn.Conv2d(self.FEATURES, 1, 1)
        self.sharp_gain = nn.Parameter(torch.tensor(0.5))
        self.touch = nn.Conv2d(self.FINE, 3, 1)
        for head in (self.logit, self.detail, self.answer, self.sharp, self.touch):
            nn.init.normal_(head.weight, std=1e-3)
            nn.init.constant_(head.bias, 0.0)  # type: ignore[arg-type]
        with torch.no_grad():
            self.answer.bias[0] = -1.0  # type: ignore[index]

    def forward(
        self,
        frames: Tensor,
        focus_dpt: Tensor,
        kappa: Tensor,
        valid: Tensor | None = None,
        prior: Prior | None = None,
        *,
        noise: Tensor | None = None,
        with_aif: bool = True,
    ) -> NetworkOutput:
        """Depth and all-in-focus image of a batch of stacks.

        Args:
            frames: linear RGB, `quietened`, (B, S, 3, H, W), S >= 2, H and W multiples of 16.
            focus_dpt: focus settings, (B, S).
            kappa: CoC pixels per dioptre, (B, S).
            valid: (B, S, H, W), False where a frame has no data (after alignment); None means everywhere.
            prior: what the plane sweep knows, if it was asked before; None asks it.
            noise: (B,), as in `Prior`, where there is none; None measures that of `frames`, which have less.
            with_aif: whether to make the all-in-focus image.
        """
        size_b, size_s, _, height, width = frames.shape
        half = (height // 2, width // 2)
        hypotheses = place_hypotheses(focus_dpt, kappa)
        tested = hypotheses.dpt[:, :, None, None]
        coc_px = kappa[:, None, :] * (focus_dpt[:, None, :] - hypotheses.dpt[:, :, None])  # (B, D, S)
        px_per_dpt = kappa.mean(1)[:, None, None, None]

        with torch.no_grad():
            if prior is None:
                valids = [None] * size_b if valid is None else list(valid)
                contexts = [photometry(*stack) for stack in zip(frames, valids, strict=True)]
                if noise is not None:
                    contexts = [c._replace(noise=n) for c, n in zip(contexts, noise, strict=True)]
                stacks = zip(frames, focus_dpt, kappa, valids, contexts, strict=True)
                priors = (sweep_prior(*stack, context=context) for *stack, context in stacks)
                prior = Prior(*map(torch.cat, zip(*priors, strict=True)))
            swept, swept_error_px = prior.inverse_depth_dpt, prior.error_px
            cost, smooth = mean_2x2(prior.cost), mean_2x2(prior.total)
            least, typical = cost.amin(1, keepdim=True), cost.mean(1, keepdim=True)
            cost.sub_(least).clamp_max_(4.0).div_(2)
            smooth.sub_(smooth.amin(1, keepdim=True))
            base = smooth / (smooth / -self.SATURATION).sub_(1.0)  # (B, D, h, w): a hypothesis is never ruled out
            error_px = swept_error_px[..., ::2, ::2]
            away = (tested - swept[..., ::2, ::2]).abs_().mul_(px_per_dpt / (error_px + 0.5))
            answer = away / (away / -4.0).sub_(1.0)
            local = F.avg_pool2d(frames.mean((1, 2))[:, None], (9, 1), 1, (4, 0), count_include_pad=False)
            local = F.avg_pool2d(local, (1, 9), 1, (0, 4), count_include_pad=False)
            local = local + 0.05 * prior.brightness
            edges = prior.sharp * (prior.brightness / GREY) / local - 1.0
            grain = (prior.noise / (prior.brightness * local)).sqrt()  # of shot noise in one pixel's contrast
            grain = (grain + 1e-3).log() + 4.0

        # local contrast, normalised alike in all frames of a stack
        contrast = (frames / local[:, :, None]).sub_(1.0).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        features = self.encoder(contrast).unflatten(0, (size_b, size_s))  # (B, S, heads * per_head, h, w)

        where = self.place(self._hypothesis_features(coc_px, hypotheses.step_px).flatten(1)) + self.mix.bias
        count = tested.shape[1]
        *weights, weight = self.mix.weight[:, :, 0, 0].t().split([count, count, count, count * self.HEADS])
        parts = [*zip((cost, base, answer), weights, strict=True)]
        parts.append(self._pooled(coc_px, features[:, :, : self.HEADS], valid, weight))
        mixed = where[:, None].repeat(1, half[0] * half[1], 1)  # (B, h w, 64)
        for part, weight in parts:
            mixed.baddbmm_(part.flatten(2).mT, weight.expand(size_b, -1, -1))
        del parts, part, cost
        mixed = F.leaky_relu_(mixed, 0.1).mT.unflatten(2, half)
        last = features.permute(0, 1, 3, 4, 2)  # over frames as they lie in memory: several times as fast
        pooled = [over(1).permute(0, 3, 1, 2) for over in (last.mean, last.amax)]
        signs = [least - 0.7, typical - 1.5, error_px.log(), grain[..., ::2, ::2]]
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bf16):
            x1 = self.stem(_beside(mixed, *pooled, *signs))
            x2 = self.down2(x1)
            x3 = self.down3(x2)
            x = self.down4(x3)
            x = self.up3(_beside(_twice(x), x3))
            x = self.up2(_beside(_twice(x), x2))
            x = self.up1(_beside(_twice(x), x1))
        x = x.float()

        change = self.BOUND * torch.tanh(self.logit(x).contiguous() / self.BOUND)
        logits = F.softplus(self.temperature) * base + F.softplus(self.trust) * answer + change
        probability = logits.softmax(1)
        mean = (probability * tested).sum(1, keepdim=True)  # (B, 1, h, w)
        variance = (probability * (tested - mean) ** 2).sum(1, keepdim=True)

        # full size
        guide = F.leaky_relu_(self.guide(_beside(x, F.pixel_unshuffle(edges, 2))), 0.1).permute(0, 2, 3, 1)
        for_each = [p.squeeze().split([36, 4 * self.CONTEXT]) for p in self.detail.parameters()]  # its weight and bias
        neighbours, context = (F.linear(guide, *part).permute(0, 3, 1, 2) for part in zip(*for_each, strict=True))
        neighbours = neighbours.contiguous().unflatten(1, (9, 4)).softmax(1)
        opinion = _convex_twice(mean, neighbours)
        spread_px = (_convex_twice(variance, neighbours).clamp_min(0.0).sqrt() * px_per_dpt + 0.1).log()
        away_px = (opinion - swept) * px_per_dpt
        signs = [edges, spread_px, swept_error_px.log(), torch.tanh(away_px), torch.tanh(away_px / 6)]
        around = self._cost_around(prior.cost, swept, opinion, hypotheses)
        fine = self.fine(_beside(F.pixel_shuffle(context, 2), *signs, *around.split(1, 1), grain))
        follow, beyond, doubt = self.answer(fine).contiguous().split(1, 1)
        inverse_depth = swept + torch.sigmoid(follow) * (opinion - swept)
        inverse_depth = inverse_depth + self.FINE_BOUND_PX * torch.tanh(beyond / self.FINE_BOUND_PX) / px_per_dpt
        std = (0.5 * (spread_px + swept_error_px.log()) + doubt.clamp(-4.0, 4.0)).exp() / px_per_dpt
        if not with_aif:
            return NetworkOutput(inverse_depth, std, None, logits, opinion)
        sharpness = self.sharp(features.flatten(0, 1)).unflatten(0, (size_b, size_s))[:, :, 0]  # (B, S, h, w)
        aif = self._fuse(frames, inverse_depth, focus_dpt, kappa, _twice(sharpness), valid)
        aif = aif + 0.3 * torch.tanh(self.touch(fine)) * local
        return NetworkOutput(inverse_depth, std, aif, logits, opinion)

    @staticmethod
    def _cost_around(cost: Tensor, swept: Tensor, opinion: Tensor, hypotheses: Hypotheses) -> Tensor:
        """What `cost` (B, D, H, W) says of two depths (B, 1, H, W): six channels, without a gradient.

        Of the first: the step to the minimum of a parabola, slope, bend and value; of the second its value over the
        first's; and the spacing of the hypotheses.
        """
        with torch.no_grad():
            last = cost.shape[1] - 1
            low, high = (hypotheses.dpt[:, i, None, None, None] for i in (0, -1))
            place, other = (((q - low) / (high - low) * last).nan_to_num() for q in (swept, opinion))
            middle = place.round().clamp(1, last - 1)
            left, centre, right = (cost.gather(1, (middle + o).long()) for o in (-1, 0, 1))
            there = cost.gather(1, other.round().clamp(0, last).long())
            bend, slope = left - 2 * centre + right, (right - left) / 2
            step = (-slope / bend.clamp_min(0.02)).clamp(-1.5, 1.5) - (place - middle).clamp(-1.5, 1.5)
            spacing = hypotheses.step_px.log()[:, None, None, None].expand_as(step) / 2
            signs = [step, slope.clamp(-2, 2), (1 + 8 * bend.clamp(0.0, 4.0)).log(), (centre - 0.7).clamp(-1, 3)]
            return torch.cat([*signs, (there - centre).clamp(-3, 3), spacing], 1)

    def _pooled(self, coc_px: Tensor, features: Tensor, valid: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What the mix gets of `features` (B, S, heads, h, w), (B, K, h, w), and the (B, K, 64) it is weighted with.

        For each hypothesis the frames are averaged; a frame's share is a function of its signed CoC only, and of where
        it holds data. `weight` (D heads, 64) is for these averages.
        """
        size = coc_px.abs()
        signs = [
            torch.tanh(coc_px / 2),
            torch.tanh(coc_px / 8),
            size / (size + 1),
            size / (size + 4),
            size / (size + 16),
            torch.tanh((size.amin(2, keepdim=True) - size) / 8),
        ]
        shares = self.profile(torch.stack(signs, -1)).softmax(2)  # (B, D, S, heads)
        weight = weight.unflatten(0, shares.shape[1::2])  # (D, heads, 64)
        if valid is None:  # shares are the same everywhere: rather average the weights
            return features.flatten(1, 2), torch.einsum("bdsj,djo->bsjo", shares, weight).flatten(1, 2)
        seen = F.interpolate(valid.to(shares.dtype), size=features.shape[3:], mode="area")[:, None] + 1e-4
        shares = shares.permute(0, 3, 1, 2)  # (B, heads, D, S)
        total, heard = (shares @ x.flatten(3) for x in (features.transpose(1, 2) * seen, seen))
        return (total / heard).flatten(1, 2), weight.transpose(0, 1).flatten(0, 1)[None]

    @staticmethod
    def _hypothesis_features(coc_px: Tensor, step_px: Tensor) -> Tensor:
        """Where a hypothesis lies among the frames: two nearest CoC and the step, squashed; (B, D, 3)."""
        near = coc_px.abs().sort(dim=2).values[:, :, :2]
        step = torch.log(step_px)[:, None, None].expand(-1, coc_px.shape[1], 1)
        return torch.cat([near / (near + 4.0), step / 2], 2)

    def _fuse(
        self,
        frames: Tensor,
        inverse_depth: Tensor,
        focus_dpt: Tensor,
        kappa: Tensor,
        sharpness: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        """`frames` (B, S, C, H, W) averaged with weights that fall with their blur at `inverse_depth`; (B, C, H, W)."""
        coc = (kappa[:, :, None, None] * (focus_dpt[:, :, None, None] - inverse_depth)).abs()
        logits = sharpness - F.softplus(self.sharp_gain) * coc
        if valid is not None:
            logits = logits + torch.log(valid.to(logits.dtype) + 1e-4)
        weights = logits.softmax(1)
        return torch.einsum("bshw,bschw->bchw", weights, frames)


def _beside(*maps: Tensor) -> Tensor:
    """Channels of all `maps` (B, C, H, W), stored last: convolutions of so few channels are a quarter faster so."""
    return torch.cat([x.permute(0, 2, 3, 1) for x in maps], 3).permute(0, 3, 1, 2)


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _convex_twice(x: Tensor, weights: Tensor) -> Tensor:
    """`x` (B, 1, h, w) at twice the size; each pixel is a convex mean of 3x3 neighbours, `weights` (B, 9, 4, h, w).

    The upsampling of RAFT (Teed and Deng, 2020): edges stay as sharp as the guide that made the weights.
    """
    patches = F.unfold(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3).unflatten(2, x.shape[2:])  # (B, 9, h, w)
    return F.pixel_shuffle((weights * patches[:, :, None]).sum(1), 2)


# --------------------------------------------------------------------------------------------------- paper net


class _TwoConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(_conv(inputs, outputs), nn.ReLU(), _conv(outputs, outputs), nn.ReLU())


class PaperNet(nn.Module):
    """The `paper` preset: DAIF-Net as its authors coded it, 1,963,332 parameters at W = 16, D = 4.

    Every frame passes the same encoder with a constant fourth channel, its focus distance in metres. At each level
    the frames' maximum is concatenated to each frame; decoder and skips see maxima only. 3x3 convolutions with
    ReLU, no normalisation; the last layer has a ReLU too, as published, although depth can die in it
    (notes/method.md section 7.6).

    Deviations, all outside the weights: sizes that are not multiples of 16 are padded by reflection by the caller and
    cropped back; colours are RGB, not OpenCV's BGR; the frames are in linear light, because blur is; a depth below
    `near_m` is reported as `near_m`, so that its inverse stays finite. It has no spread: `std_dpt` is NaN.

    Args:
        post: `clip` keeps metres, clamp(raw, 0, far); `norm` is the published default, raw / max(raw) scaled to
            near..far, which pins the farthest pixel of every image to `far_m`.
    """

    def __init__(
        self, width: int = 16, levels: int = 4, near_m: float = 0.1, far_m: float = 10.0, post: str = "clip"
    ) -> None:
        super().__init__()
        self.near_m, self.far_m, self.post, self.levels = near_m, far_m, post, levels
        widths = [width * 2**i for i in range(levels)]
        self.down = nn.ModuleList(_TwoConv(4 if i == 0 else w, w) for i, w in enumerate(widths))
        self.bottleneck = _conv(2 * widths[-1], 2 * widths[-1])
        self.up = nn.ModuleList(_conv(2 * w, w) for w in reversed(widths))
        self.joint = nn.ModuleList(_TwoConv(2 * w, w) for w in reversed(widths))
        self.out = nn.ModuleList([_conv(width, width), _conv(width, 4)])

    def raw(self, frames: Tensor, focus_distance_m: Tensor) -> Tensor:
        """The four output channels before any post-processing, (B, 4, H, W): RGB and depth, all >= 0."""
        size_b, size_s, _, height, width = frames.shape
        distance = focus_distance_m[:, :, None, None, None].expand(-1, -1, 1, height, width)
        x = torch.cat([frames, distance], 2).flatten(0, 1)
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x.unflatten(0, (size_b, size_s)).amax(1))
            own = F.max_pool2d(x, 2).unflatten(0, (size_b, size_s))
            x = torch.cat([own, own.amax(1, keepdim=True).expand_as(own)], 2).flatten(0, 1)
        x = F.relu(self.bottleneck(x)).unflatten(0, (size_b, size_s)).amax(1)
        for up, joint in zip(self.up, self.joint, strict=True):
            x = F.relu(up(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)))
            x = joint(torch.cat([x, skips.pop()], 1))
        return F.relu(self.out[1](F.relu(self.out[0](x))))

    def depth_m(self, raw: Tensor) -> Tensor:
        """Metres from the raw output, (B, 1, H, W), by the chosen post-operation."""
        depth = raw[:, 3:]
        if self.post == "norm":
            largest = depth.amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
            return depth / largest * (self.far_m - self.near_m) + self.near_m
        return depth.clamp(0.0, self.far_m)

    def forward(
        self,
        frames: Tensor,
        focus_dpt: Tensor,
        kappa: Tensor,
        valid: Tensor | None = None,
        prior: Prior | None = None,
        *,
        noise: Tensor | None = None,
        with_aif: bool = True,
    ) -> NetworkOutput:
        """As `DefaultNet.forward`; the last five are not used, the published network knows no optics."""
        raw = self.raw(frames, 1.0 / focus_dpt.clamp_min(1e-2))
        inverse_depth = 1.0 / self.depth_m(raw).clamp_min(self.near_m)
        return NetworkOutput(inverse_depth, torch.full_like(inverse_depth, torch.nan), raw[:, :3].clamp(0.0, 1.0))


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, 1, 1)


def build(preset: str) -> DefaultNet | PaperNet:
    """A freshly initialised network of `preset`, `default` or `paper`."""
    return {"default": DefaultNet, "paper": PaperNet}[preset]()

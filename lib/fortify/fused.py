"""A fused model to follow when crafting attacks: the same function in eval mode, in less time.

In eval mode the BatchNorm after a convolution is a fixed scale and shift of each channel: the fused model has
it in the convolution's weights. Its first convolution takes the one grey channel (:class:`GreyStem`), its
weights have no gradients, its tensors lie channels last, as convolutions like them. Its logits are the
model's to rounding: attacks follow its gradients, and the model itself says what they achieved.
"""

import contextlib
import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fortify.models import Guarded, Normalise
from fortify.runtime import eval_mode, float32_convolutions

# The exact types: a subclass or a parametrisation (spectral norm) may compute something else. timm's pad as
# TensorFlow does before the convolution, or apply the modules that they hold after the BatchNorm.
_SAME = "timm.layers.conv2d_same.Conv2dSame"
_CONVOLUTIONS = ("torch.nn.modules.conv.Conv2d", _SAME)
_NORMS = ("torch.nn.modules.batchnorm.BatchNorm2d", "timm.layers.norm_act.BatchNormAct2d")


class FusedModel:
    """``net`` computes what ``model`` does in eval mode; :meth:`refresh` takes over its present weights.

    ``examples`` (B, C, H, W) are images that the model takes, on its device, unlike each other: the two are
    compared on all of them; ``logits``, the model's on them in eval mode, spare it a pass. Where the fused
    net does not give these, as with a model that is random or uses its layers in another order than it lists
    them, and where a model cannot be copied, ``net`` is the model itself.
    ``autocast=True`` keeps the weights that autocast rounds to bfloat16 so rounded: it rounds those without
    gradients anew in every pass. Such a net is for use under that autocast alone, and gives the same there.
    ``compiled=True`` passes it through :func:`torch.compile`, for a GPU. That takes a C++ compiler,
    and its time for each of the few sizes of batch that it meets (:class:`Padded`).
    """

    @torch.inference_mode(False)  # its tensors are for gradients, wherever it is made
    def __init__(
        self,
        model: nn.Module,
        examples: Tensor,
        *,
        logits: Tensor | None = None,
        autocast: bool = False,
        compiled: bool = False,
    ) -> None:
        self.net, self._plain, self._fused, self._stems = model, [], [], []
        if isinstance(model, torch.jit.ScriptModule):
            return  # its code is fixed: there are no layers to change
        # Copied are the modules; the tensors are new and empty until _fuse fills them.
        room = {id(own): _room(own) for module in model.modules() for own in _tensors(module)}
        try:
            net = copy.deepcopy(model, room)
        except Exception:  # it holds what torch or Python cannot copy, and says so in many ways
            return
        both, absorbed = list(zip(model.modules(), net.modules(), strict=True)), set()
        for own_parent, parent in both:
            pairs = zip(_conv_then_batchnorm(own_parent), _conv_then_batchnorm(parent), strict=True)
            for (conv, norm, name), (target, target_norm, _) in pairs:
                if target.bias is None:
                    target.bias = nn.Parameter(torch.zeros_like(norm.running_mean), requires_grad=False)
                setattr(parent, name, nn.Sequential(*target_norm.children()))  # timm's hold an activation
                self._fused.append((target, conv, norm))
                absorbed |= {target, target_norm}
        for own, target in both:
            if target not in absorbed:
                self._plain += zip(_tensors(target), _tensors(own), strict=True)
        self._stems = [stem for parent in net.modules() for stem in _take_grey(parent)]
        net.eval()  # the new layers too
        if self._is_right(model, net, examples, logits):
            self.net = net
        else:
            self._plain, self._fused, self._stems = [], [], []
        if autocast and self.net is net:
            # Stems make their kernels of these convolutions' weights, which would else be rounded twice.
            apart = {stem.conv for stem in self._stems}
            for module in net.modules():
                # The exact types: a subclass may do more with its weights than what autocast rounds them for.
                plain = type(module) in (nn.Linear, GreyStem) or _named(module) in _CONVOLUTIONS
                if plain and module not in apart:
                    for tensor in _tensors(module):
                        tensor.data = tensor.data.bfloat16()
        if compiled and self.net is net:
            self.net = Padded(net)
        if autocast and self.net is not model:
            self.net = Guarded(self.net, dtype=torch.float32)  # autocast rounds what it takes, where it must

    def refresh(self) -> nn.Module:
        """Take over the weights and statistics that the model has now, and return ``net``."""
        self._fuse()
        return self.net

    def _is_right(self, model, net, examples, logits):
        """Whether the fused ``net`` gives the model's logits; leaves it fused of the present weights."""
        fresh = [norm for _, _, norm in self._fused if not norm.running_mean.any()]
        if fresh:  # untrained, a BatchNorm changes nothing and would fit anywhere: see what others would do
            with _other_statistics(fresh):
                self._fuse()
                if not _agree(model, net, examples, None):
                    return False
        self._fuse()
        return _agree(model, net, examples, logits)

    @torch.no_grad()
    def _fuse(self):
        for target, source in self._plain:
            target.copy_(source)
        for target, conv, norm in self._fused:
            weight, bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            target.weight.copy_(weight)
            target.bias.copy_(bias)
        for stem in self._stems:
            stem.refresh()


class Padded(nn.Module):
    """``net``, in eval mode, compiled; black images fill every batch up to a multiple of ``to``.

    Compiled code is of one shape. Batches of a training differ by an image, and so do an attack's parts of
    them: without the filling every size would be compiled, and after eight of them none any more. The eight
    are of the whole process: after as many sizes of batch and image new ones run as they are.
    """

    def __init__(self, net: nn.Module, *, to: int = 8) -> None:
        super().__init__()
        self.net, self.to = torch.compile(net, dynamic=False), to
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(F.pad(x, (0, 0) * (x.ndim - 1) + (0, -len(x) % self.to)))[: len(x)]


class GreyStem(nn.Module):
    """Normalise and the strided three-channel convolution after it, as one convolution of the grey image.

    The convolution is linear and its three inputs are one grey: its kernel is the sum of the three, each over
    its standard deviation. What the means contribute, and the border, where zero padding comes after the
    normalisation, is the convolution of a black image, an offset added to each. At stride 2 a pixel of each
    2 x 2 block becomes a channel, which convolves faster than an image of one channel.
    """

    def __init__(self, normalise: Normalise, conv: nn.Conv2d) -> None:
        super().__init__()
        self.normalise, self.conv, self.offsets = normalise, conv, {}
        size = conv.kernel_size[0]
        pad = (size - 2) // 2 if _named(conv) == _SAME else conv.padding[0]  # above and left, of even sides
        self.front, self.before = pad % 2, (pad + 1) // 2  # the kernel starts on an even pixel
        self.blocks = (size + self.front + 1) // 2
        self.register_buffer("kernel", self._kernel(), persistent=False)

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Whether ``conv`` is one that this can replace: square, of three channels, at stride 2."""
        square = len(set(conv.kernel_size)) == 1 and conv.padding in ((0, 0), (1, 1), (2, 2), (3, 3))
        plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
        known = _named(conv) in _CONVOLUTIONS
        return known and conv.in_channels == 3 and conv.stride == (2, 2) and square and plain

    def _kernel(self):
        grey = (self.conv.weight / self.normalise.std).sum(1)
        back = 2 * self.blocks - self.front - grey.shape[-1]
        grey = F.pad(grey, (self.front, back) * 2).unsqueeze(1)
        return F.pixel_unshuffle(grey, 2).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def refresh(self) -> nn.Module:
        """Take over the present weights of ``conv``."""
        self.kernel.copy_(self._kernel())
        for size in self.offsets:
            self.offsets[size].copy_(self._offset(size))

    @torch.no_grad()
    def _offset(self, size):
        return self.conv(self.normalise(self.kernel.new_zeros(1, 1, *size)))

    def forward(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[2:])
        if x.shape[1] != 1 or any(side % 2 for side in size):
            return self.conv(self.normalise(x))
        if size not in self.offsets:
            self.offsets[size] = self._offset(size)
        offset = self.offsets[size]
        # As many blocks beyond the far edge as the output needs.
        after = [
            out - side // 2 - self.before + self.blocks - 1
            for out, side in zip(offset.shape[2:], size, strict=True)
        ]
        blocks = F.pad(F.pixel_unshuffle(x, 2), (self.before, after[1], self.before, after[0]))
        convolved = F.conv2d(blocks.contiguous(memory_format=torch.channels_last), self.kernel)
        return convolved + offset.to(convolved.dtype)  # bfloat16 under its autocast


def _conv_then_batchnorm(parent):
    """[(convolution, the BatchNorm listed right after it, that one's name)] among a module's children."""
    children, found = list(parent.named_children()), []
    for (_, conv), (name, norm) in zip(children, children[1:], strict=False):
        if _named(conv) in _CONVOLUTIONS and _named(norm) in _NORMS and norm.track_running_stats:
            if conv.out_channels == norm.num_features and not (_hooked(conv) or _hooked(norm)):
                found.append((conv, norm, name))
    return found


def _take_grey(parent):
    """[the GreyStem] put into ``parent``, a Sequential that starts with grey Normalise; [] if none fits."""
    if not (isinstance(parent, nn.Sequential) and len(parent) > 1 and type(parent[0]) is Normalise):
        return []
    if parent[0].channels != 1:
        return []
    for owner in parent[1].modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.Conv2d):  # the first convolution
                if not GreyStem.fits(child) or _hooked(child) or _hooked(parent[0]):
                    return []
                stem = GreyStem(parent[0], child)
                setattr(owner, name, stem)
                parent[0] = nn.Identity()
                return [stem]
    return []


def _named(module):
    """The full name of a module's type, whose package need not be installed."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _hooked(module):
    return module._forward_hooks or module._forward_pre_hooks or module._backward_hooks


def _tensors(module):
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _room(tensor):
    """A tensor like it, channels last and without gradient, of any values."""
    layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
    room = torch.empty_like(tensor, memory_format=layout, requires_grad=False)
    return nn.Parameter(room, requires_grad=False) if isinstance(tensor, nn.Parameter) else room


@contextlib.contextmanager
@torch.no_grad()
def _other_statistics(norms):
    """The BatchNorms with random statistics, weights and biases inside the block; after it with their own."""
    generator = torch.Generator().manual_seed(0)
    tensors = [t for norm in norms for t in _tensors(norm) if t.is_floating_point()]
    own = [t.clone() for t in tensors]
    try:
        for tensor in tensors:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        yield
    finally:
        for tensor, value in zip(tensors, own, strict=True):
            tensor.copy_(value)


def _agree(model, net, examples, logits):
    with eval_mode(model), torch.no_grad(), float32_convolutions(examples.device):
        logits = Guarded.of(model)(examples) if logits is None else logits
        return same_logits(logits, Guarded.of(net)(examples))


def same_logits(logits: Tensor, others: Tensor) -> bool:
    """Whether two nets gave the same logits (B, classes) of the same images, to rounding. False for NaN."""
    return bool((logits - others).abs().max() <= 1e-3 * logits.abs().max())


def spread(n: int, most: int) -> Tensor:
    """Indices of at most ``most`` of ``n`` images, evenly spread: what a fused net is compared on."""
    return torch.linspace(0, n - 1, min(n, most)).round().long()

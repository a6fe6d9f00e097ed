"""Small reference networks: students and teachers that train in seconds, for examples, tests and first comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

Head = Literal["causal-lm", "sequence-classification", "image-classification", "encoder"]


class ConvNet1d(nn.Module):
    """Strided convolutions over a signal, then a linear head: the small student of MNIST-1D.

    Each block is convolution (kernel 5, stride 2), batch normalization and ReLU, and halves the length. The head
    reads all positions. Taps: ``blocks.0``, ``blocks.1``, … of shape ``(B, widths[i], length_i)``.

    Args:
        widths: Channels of each block, one block per entry; ``(24, 24, 24)`` has 7,306 parameters.
        classes: Number of outputs.
        channels: Input channels.
        length: Input length.

    Raises:
        ValueError: If a size is not positive or ``widths`` is empty.

    Example:
        >>> import torch
        >>> ConvNet1d()(torch.zeros(2, 1, 40)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, widths: Sequence[int] = (24, 24, 24), classes: int = 10, channels: int = 1, length: int = 40
    ) -> None:
        super().__init__()
        _check_positive(widths=widths, classes=[classes], channels=[channels], length=[length])
        self.blocks = nn.Sequential(*(_conv_block_1d(*pair) for pair in pairwise((channels, *widths))))
        for _ in widths:
            length = (length + 1) // 2
        self.head = nn.Linear(widths[-1] * length, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, classes)`` of signals ``(B, channels, length)``."""
        logits: Tensor = self.head(self.blocks(x).flatten(1))
        return logits


class ResNet1d(nn.Module):
    """Residual convolutions over a signal, then a linear head: the teacher of MNIST-1D.

    A stem of full length, then residual blocks of two convolutions, each halving the length. The head reads all
    positions. Taps: ``stem``, ``blocks.0``, ``blocks.1``, …, each ``(B, widths[i], length_i)``.

    Args:
        widths: Channels of each residual block; the default has 60,902 parameters.
        classes: Number of outputs.
        channels: Input channels.
        length: Input length.

    Raises:
        ValueError: If a size is not positive or ``widths`` is empty.

    Example:
        >>> import torch
        >>> ResNet1d()(torch.zeros(2, 1, 40)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, widths: Sequence[int] = (52, 52, 52), classes: int = 10, channels: int = 1, length: int = 40
    ) -> None:
        super().__init__()
        _check_positive(widths=widths, classes=[classes], channels=[channels], length=[length])
        self.stem = _conv_block_1d(channels, widths[0], kernel_size=5, stride=1)
        self.blocks = nn.Sequential(*(ResidualBlock1d(*pair) for pair in pairwise((widths[0], *widths))))
        for _ in widths:
            length = (length + 1) // 2
        self.head = nn.Linear(widths[-1] * length, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, classes)`` of signals ``(B, channels, length)``."""
        logits: Tensor = self.head(self.blocks(self.stem(x)).flatten(1))
        return logits


class ResidualBlock1d(nn.Module):
    """``relu(F(x) + shortcut(x))`` with two convolutions in ``F``; halves the length.

    Args:
        channels: Input channels.
        width: Output channels.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _conv_block_1d(channels, width, kernel_size=3, stride=2),
            nn.Conv1d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm1d(width),
        )
        self.shortcut = nn.Sequential(nn.Conv1d(channels, width, 1, stride=2, bias=False), nn.BatchNorm1d(width))
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Signals ``(B, width, ceil(length / 2))``."""
        out: Tensor = self.activation(self.residual(x) + self.shortcut(x))
        return out


class MLP(nn.Module):
    """Linear layers with ReLU between them. Inputs of any shape ``(B, ...)`` are flattened.

    Taps: ``blocks.0``, ``blocks.1``, … of shape ``(B, sizes[i + 1])`` and ``head``.

    Args:
        sizes: Number of inputs, of units of each hidden layer, and of outputs; ``(64, 10)`` is a linear classifier.

    Raises:
        ValueError: If there are fewer than two sizes, or one is not positive.

    Example:
        >>> import torch
        >>> MLP((64, 8, 10))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, sizes: Sequence[int] = (64, 64, 10)) -> None:
        super().__init__()
        _check_positive(sizes=sizes)
        if len(sizes) < 2:
            raise ValueError(f"`sizes` needs at least the number of inputs and of outputs, got {tuple(sizes)}.")
        hidden = pairwise(sizes[:-1])
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(n, m), nn.ReLU()) for n, m in hidden))
        self.head = nn.Linear(sizes[-2], sizes[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, sizes[-1])`` of inputs ``(B, ...)`` with ``sizes[0]`` values each."""
        logits: Tensor = self.head(self.blocks(x.flatten(1)))
        return logits


class ConvNet2d(nn.Module):
    """Convolutions over a small image, then a linear head: the teacher of the 8×8 digits.

    Each block is convolution (kernel 3, padding 1), batch normalization and ReLU; from the second block on stride 2.
    Taps: ``blocks.0``, ``blocks.1``, … of shape ``(B, widths[i], height_i, width_i)``.

    Args:
        widths: Channels of each block, one block per entry.
        classes: Number of outputs.
        channels: Input channels.
        size: Height and width of the images.

    Raises:
        ValueError: If a size is not positive or ``widths`` is empty.

    Example:
        >>> import torch
        >>> ConvNet2d()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, widths: Sequence[int] = (32, 64, 64), classes: int = 10, channels: int = 1, size: int = 8
    ) -> None:
        super().__init__()
        _check_positive(widths=widths, classes=[classes], channels=[channels], size=[size])
        pairs = pairwise((channels, *widths))
        self.blocks = nn.Sequential(*(_conv_block_2d(*pair, stride=1 if i == 0 else 2) for i, pair in enumerate(pairs)))
        for _ in widths[1:]:
            size = (size + 1) // 2
        self.head = nn.Linear(widths[-1] * size * size, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, classes)`` of images ``(B, channels, size, size)``."""
        logits: Tensor = self.head(self.blocks(x).flatten(1))
        return logits


class NoisyInput(nn.Module):
    """``network`` with Gaussian noise on its input in training, and without in evaluation.

    For a student whose teacher, its own average or past, is to see the inputs as they are.

    Args:
        network: Any network of one tensor.
        std: Standard deviation of the noise, not negative.

    Raises:
        ValueError: If ``std`` is negative.

    Example:
        >>> import torch
        >>> NoisyInput(MLP((4, 2)), std=0.1)(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(self, network: nn.Module, std: float = 0.1) -> None:
        super().__init__()
        if not std >= 0:
            raise ValueError(f"`std` must not be negative, got {std}.")
        self.network = network
        self.std = std

    def forward(self, x: Tensor) -> Tensor:
        """What ``network`` says of ``x``, of the shape that it takes."""
        if self.training and self.std > 0:
            x = x + self.std * torch.randn_like(x)
        said: Tensor = self.network(x)
        return said


def _conv_block_1d(channels: int, width: int, kernel_size: int = 5, stride: int = 2) -> nn.Sequential:
    convolution = nn.Conv1d(channels, width, kernel_size, stride=stride, padding=kernel_size // 2)
    return nn.Sequential(convolution, nn.BatchNorm1d(width), nn.ReLU())


def _conv_block_2d(channels: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.BatchNorm2d(width), nn.ReLU())


def _check_positive(**sizes: Sequence[int]) -> None:
    for name, values in sizes.items():
        if len(values) == 0 or not all(value >= 1 for value in values):
            got = values[0] if len(values) == 1 else tuple(values)
            raise ValueError(f"`{name}` must be positive, got {got}.")


def from_config(model_type: str, head: Head, config: Mapping[str, Any] | None = None) -> nn.Module:
    """A transformers model with random weights.

    Args:
        model_type: As transformers names it: ``"gpt2"``, ``"llama"``, ``"bert"``, ``"vit"`` …
        head: What it is for: ``"causal-lm"``, ``"sequence-classification"``, ``"image-classification"``, or
            ``"encoder"`` for no head (and no layer over the class token).
        config: Arguments of its configuration, such as ``{"vocab_size": 512, "n_layer": 2}``.

    Raises:
        ValueError: If ``head`` is unknown, or transformers has no such model.

    Example:
        >>> model = from_config("gpt2", "causal-lm", {"vocab_size": 300, "n_embd": 32, "n_layer": 1, "n_head": 2})
        >>> type(model).__name__
        'GPT2LMHeadModel'
    """
    import transformers

    classes = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "image-classification": transformers.AutoModelForImageClassification,
        "encoder": transformers.AutoModel,
    }
    if head not in classes:
        raise ValueError(f"`head` must be one of {', '.join(classes)}, got {head!r}.")
    configuration = transformers.AutoConfig.for_model(model_type, **(config or {}))
    build: Any = classes[head]
    model: nn.Module = build.from_config(configuration)
    if head == "encoder" and isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = None  # type: ignore[assignment]  # never trained: an average over the text does not use it
    return model.train()


def lora(
    base: nn.Module,
    r: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> nn.Module:
    """``base`` under a low-rank adapter (LoRA), which alone is trained.

    Args:
        base: Any network; frozen in place.
        r: Rank of the adapter, positive.
        alpha: Scale of the adapter: it adds ``alpha / r`` times its product.
        dropout: Of the adapter's input, in [0, 1).
        target_modules: Names, or endings of names, of the layers that get an adapter, or ``"all-linear"``; by default
            what peft knows of the architecture.
        modules_to_save: Names of layers that are trained whole (a new head).

    Raises:
        ValueError: If peft knows no layer of the names, or an argument is outside its range.

    Example:
        >>> network = lora(MLP((4, 5, 3)), r=2, target_modules=["head"])
        >>> sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
        16
    """
    import peft

    targets = target_modules if target_modules is None or isinstance(target_modules, str) else list(target_modules)
    kept = None if modules_to_save is None else list(modules_to_save)
    config = peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, modules_to_save=kept)
    network: nn.Module = peft.get_peft_model(base, config)
    return network


__all__ = ["MLP", "ConvNet1d", "ConvNet2d", "NoisyInput", "ResNet1d", "ResidualBlock1d", "from_config", "lora"]

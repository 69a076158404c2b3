"""Convolutional networks for ImageNet: a unit is the stem, a residual block or the head.

A batch norm belongs to its convolution's unit and counts two numbers a channel, its scale and shift, as the
published totals do. Accuracies are ImageNet-1K top-1.
"""

from slide_jax.profiles.layers import Layer, Profile, convolution, dense, layer, norm, positive_integers

CLASSES = 1000
IMAGE_SIZE = 224


def _halved(size: int) -> int:
    """Returns the width after a stride of 2 with the padding that keeps a stride of 1 at full width."""
    return -(-size // 2)


def bottleneck(name: str, inputs: int, width: int, size: int, stride: int) -> Layer:
    """Returns a residual block of 1x1, 3x3 and 1x1 convolutions with its shortcut.

    The stride is the 3x3 convolution's (ResNet v1.5, as in torchvision); the paper had it in the first 1x1.

    Args:
      name: of the layer.
      inputs: channels that come in; 4 `width` go out.
      width: channels between.
      size: width of the input [pixels].
      stride: 1 or 2.
    """
    outputs, output_size = 4 * width, _halved(size) if stride == 2 else size
    operations = [
        convolution(inputs, width, 1, size),
        norm(width),
        convolution(width, width, 3, output_size),
        norm(width),
        convolution(width, outputs, 1, output_size),
        norm(outputs),
    ]
    if inputs != outputs or stride != 1:
        operations += [convolution(inputs, outputs, 1, output_size), norm(outputs)]
    return layer(name, *operations)


def _resnet(name: str, depths: tuple[int, ...], image_size: int, accuracy: float) -> Profile:
    (image_size,) = positive_integers(image_size=image_size)
    size = _halved(image_size)
    layers = [layer("stem", convolution(3, 64, 7, size), norm(64))]
    size, channels = _halved(size), 64  # the max pooling
    for stage, depth in enumerate(depths):
        for index in range(depth):
            stride = 2 if stage > 0 and index == 0 else 1
            width = 64 * 2**stage
            layers.append(bottleneck(f"layer{stage + 1}.{index}", channels, width, size, stride))
            size, channels = _halved(size) if stride == 2 else size, 4 * width
    layers.append(layer("head", dense(channels, CLASSES)))
    return Profile(name, "vision", accuracy, tuple(layers))


def resnet50(image_size: int = IMAGE_SIZE, accuracy: float = 0.7613) -> Profile:
    """Returns ResNet-50 v1.5 (arXiv 1512.03385).

    Args:
      image_size: width of the square input [pixels].
      accuracy: default of torchvision's `ResNet50_Weights.IMAGENET1K_V1`.

    >>> resnet50().parameters
    25557032
    """
    return _resnet("resnet50", (3, 4, 6, 3), image_size, accuracy)


def resnet152(image_size: int = IMAGE_SIZE, accuracy: float = 0.78312) -> Profile:
    """Returns ResNet-152 v1.5 (arXiv 1512.03385).

    Args:
      image_size: width of the square input [pixels].
      accuracy: default of torchvision's `ResNet152_Weights.IMAGENET1K_V1`.
    """
    return _resnet("resnet152", (3, 8, 36, 3), image_size, accuracy)


def inverted_residual(
    name: str, inputs: int, outputs: int, expansion: int, kernel: int, size: int, stride: int
) -> Layer:
    """Returns a mobile inverted bottleneck without squeeze-and-excitation (arXiv 1801.04381).

    Args:
      name: of the layer.
      inputs, outputs: channels.
      expansion: channels of the depthwise convolution over the inputs; 1: no convolution expands them.
      kernel: width of the depthwise kernel.
      size: width of the input [pixels].
      stride: 1 or 2, of the depthwise convolution.
    """
    width, output_size = expansion * inputs, _halved(size) if stride == 2 else size
    expand = [convolution(inputs, width, 1, size), norm(width)] if expansion > 1 else []
    return layer(
        name,
        *expand,
        convolution(width, width, kernel, output_size, groups=width),
        norm(width),
        convolution(width, outputs, 1, output_size),
        norm(outputs),
    )


# Repeats, kernel, stride of the first, expansion, output channels (arXiv 1905.11946, table 1).
_EFFICIENTNET_B0_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def efficientnet_lite0(image_size: int = IMAGE_SIZE, accuracy: float = 0.751) -> Profile:
    """Returns EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excitation, with ReLU6.

    Args:
      image_size: width of the square input [pixels].
      accuracy: default of the float model in the table of tensorflow/tpu, models/official/efficientnet/lite.
    """
    (image_size,) = positive_integers(image_size=image_size)
    size, channels, layers = _halved(image_size), 32, []
    layers.append(layer("stem", convolution(3, channels, 3, size), norm(channels)))
    for repeats, kernel, first_stride, expansion, outputs in _EFFICIENTNET_B0_STAGES:
        for index in range(repeats):
            stride = first_stride if index == 0 else 1
            name = f"blocks.{len(layers) - 1}"
            layers.append(inverted_residual(name, channels, outputs, expansion, kernel, size, stride))
            size, channels = _halved(size) if stride == 2 else size, outputs
    layers.append(layer("features", convolution(channels, 1280, 1, size), norm(1280)))
    layers.append(layer("head", dense(1280, CLASSES)))
    return Profile("efficientnet_lite0", "vision", accuracy, tuple(layers))

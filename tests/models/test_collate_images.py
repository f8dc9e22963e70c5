"""The processor's images equal what the Hugging Face image processor makes of them, whatever they come as."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast, SiglipImageProcessor

from mmfuse.models import EncodedSample, MultimodalProcessor

SIZE = {"height": 16, "width": 24}
NORMAL: dict[str, Any] = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def siglip(**changes: Any) -> SiglipImageProcessor:
    return SiglipImageProcessor(**{"size": SIZE, "resample": 3, **NORMAL, **changes})


def processor_with(image_processor: Any) -> MultimodalProcessor:
    words = Tokenizer(WordLevel({"<pad>": 0, "<image>": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    return MultimodalProcessor(image_processor, tokenizer)


def sample(*images: Any, key: str = "sample") -> EncodedSample:
    return EncodedSample(np.zeros(1, np.int64), np.zeros((4, 1), np.int64), {"image": list(images)}, key=key)


def collated(image_processor: Any, images: list[Any]) -> torch.Tensor:
    pixels = processor_with(image_processor).collate([sample(*images[:2]), sample(*images[2:])])["pixel_values"]
    assert isinstance(pixels, torch.Tensor)
    return pixels


def plain(image_processor: Any, images: list[Any]) -> torch.Tensor:
    """One call for each image; grey arrays, which these processors refuse, as PIL images."""
    grey = [Image.fromarray(x) if isinstance(x, np.ndarray) and x.ndim == 2 else x for x in images]
    return torch.cat([image_processor([image], return_tensors="pt")["pixel_values"] for image in grey])


def picture(height: int, width: int, kind: str, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    rgb = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    alpha = rng.integers(0, 256, (height, width, 1), dtype=np.uint8)
    match kind:
        case "grey array":
            return rgb[..., 0].copy()
        case "rgb array":
            return rgb
        case "view":
            return np.concatenate([rgb, rgb], axis=1)[:, ::2]
        case "rgba array":
            return np.concatenate([rgb, alpha], axis=2)
        case "float array":
            return rgb.astype(np.float32)
        case "tensor":
            return torch.from_numpy(rgb).permute(2, 0, 1)
        case "RGBA":
            return Image.fromarray(np.concatenate([rgb, alpha], axis=2))
        case "transparent palette":
            image = Image.fromarray(rgb).quantize(16)
            image.info["transparency"] = 3
            return image
        case "transparent RGB":
            image = Image.fromarray(rgb // 64 * 64)
            image.info["transparency"] = (64, 0, 128)
            return image
        case "transparent L":
            image = Image.fromarray(rgb[..., 0] // 64 * 64)
            image.info["transparency"] = 128
            return image
        case _:
            return Image.fromarray(rgb).convert(kind)


KINDS = (
    "grey array",
    "rgb array",
    "view",
    "rgba array",
    "float array",
    "tensor",
    "RGB",
    "L",
    "LA",
    "1",
    "P",
    "CMYK",
    "RGBA",
    "transparent palette",
    "transparent RGB",
    "transparent L",
)


@pytest.mark.parametrize("size", [(16, 24), (31, 20)], ids=["the right size", "another size"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image(kind: str, size: tuple[int, int]):
    images = [picture(*size, kind, seed) for seed in range(3)]
    expected = plain(siglip(), images)
    assert expected.shape == (3, 3, 16, 24)
    pixels = collated(siglip(), images)
    assert torch.equal(pixels, expected)
    assert pixels.dtype == torch.float32


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from([(16, 24), (8, 8), (17, 40)]), st.sampled_from(KINDS), st.integers(0, 3)),
        min_size=1,
        max_size=9,
    ),
    st.sampled_from([0, 2, 3]),
)
def test_mixtures_come_back_in_order(choices: list[tuple[tuple[int, int], str, int]], resample: int):
    images = [picture(*size, kind, seed) for size, kind, seed in choices]
    image_processor = siglip(resample=resample)
    assert torch.equal(collated(image_processor, images), plain(image_processor, images))


@pytest.mark.parametrize(
    "image_processor",
    [
        siglip(do_resize=False),
        siglip(do_normalize=False),
        siglip(do_rescale=False),
        siglip(do_center_crop=True, crop_size={"height": 8, "width": 8}),
        siglip(do_pad=True, pad_size={"height": 32, "width": 32}),
        siglip(size={"shortest_edge": 12}),
        siglip(rescale_factor=1 / 127.5),
        CLIPImageProcessor(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}, **NORMAL),
    ],
    ids=["no resize", "no normalize", "no rescale", "crop", "pad", "shortest edge", "rescale factor", "CLIP"],
)
def test_other_steps_are_the_image_processors_own(image_processor: Any):
    images = [picture(16, 24, kind) for kind in ("rgb array", "grey array", "RGB", "L")]
    torch.testing.assert_close(collated(image_processor, images), plain(image_processor, images), atol=0, rtol=0)


class Inverting(SiglipImageProcessor):
    def _preprocess(self, images: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        return super()._preprocess([255 - image for image in images], *args, **kwargs)


def test_subclass_with_steps_of_its_own():
    image_processor, images = Inverting(size=SIZE, **NORMAL), [picture(16, 24, "rgb array")]
    pixels = collated(image_processor, images)
    assert torch.equal(pixels, plain(image_processor, images))
    assert not torch.allclose(pixels, collated(SiglipImageProcessor(size=SIZE, **NORMAL), images))


def test_after_saving_and_loading(tmp_path):
    siglip().save_pretrained(tmp_path)
    images = [picture(16, 24, "rgb array"), picture(9, 9, "L")]
    loaded = SiglipImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(collated(loaded, images), plain(siglip(), images))


def test_three_rows_are_no_channels():
    """An array `[H, W, 3]` of three rows is an image of three rows, as `EncodedSample` says."""
    image = picture(3, 40, "rgb array")
    assert torch.equal(collated(siglip(), [image]), plain(siglip(), [Image.fromarray(image)]))


def test_the_images_are_left_alone():
    images = [picture(16, 24, "rgb array"), picture(16, 24, "grey array")]
    before = [image.copy() for image in images]
    collated(siglip(), images)
    assert all(np.array_equal(image, old) for image, old in zip(images, before, strict=True))


def test_same_sized_images_are_processed_in_one_piece(monkeypatch: pytest.MonkeyPatch):
    shapes: list[tuple[int, ...]] = []
    resize = SiglipImageProcessor.resize

    def spy(self: SiglipImageProcessor, image: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append(tuple(image.shape))
        return resize(self, image, *args, **kwargs)

    monkeypatch.setattr(SiglipImageProcessor, "resize", spy)
    kinds = ("RGB", "L", "rgb array", "RGBA", "grey array", "view")
    collated(siglip(), [picture(16, 24, kind) for kind in kinds])
    assert shapes == [(4, 3, 16, 24), (2, 3, 16, 24)]


@pytest.mark.parametrize("wrong", ["photo.png", "https://example.com/photo.png", None, [1, 2]])
def test_what_is_no_image_is_refused_by_sample(wrong: Any):
    processor = processor_with(siglip())
    with pytest.raises(TypeError, match=r"000017: an image must be a PIL image, an array or a tensor, got \w+"):
        processor.collate([sample(wrong, key="000017")])


def test_no_images_no_pixels():
    assert "pixel_values" not in processor_with(siglip()).collate([sample()])

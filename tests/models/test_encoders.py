"""Encoders against the libraries that they come from: same layer, same tokens, same weights, nothing left over."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import nn
from transformers import CLIPVisionModel, Dinov2Model, DINOv3ViTModel, SiglipVisionModel, ViTModel

from mmfuse.errors import ConfigError
from mmfuse.models import MultimodalConfig, MultimodalLM
from mmfuse.models.encoders import Encoder, build_encoder
from mmfuse.testing import IMAGE_TOKEN_ID, VOCABULARY

LAYERS = 3
SMALL = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
TIMM = {"embed_dim": 32, "depth": LAYERS, "num_heads": 2}
OPEN_CLIP = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": LAYERS}

HF_FAMILIES: dict[str, tuple[type[nn.Module], str, dict[str, Any]]] = {
    "clip_vision_model": (CLIPVisionModel, "post_layernorm", {"intermediate_size": 48}),
    "siglip_vision_model": (SiglipVisionModel, "post_layernorm", {"intermediate_size": 48}),
    "dinov2": (Dinov2Model, "layernorm", {"mlp_ratio": 2}),
    "dinov3_vit": (DINOv3ViTModel, "norm", {"intermediate_size": 48, "num_register_tokens": 2}),
    "vit": (ViTModel, "layernorm", {"intermediate_size": 48}),
}
TIMM_MODELS = (
    "vit_tiny_patch16_224",
    "vit_base_patch16_siglip_224",  # pools by attention
    "vit_small_patch14_reg4_dinov2",  # register tokens
    "deit_tiny_distilled_patch16_224",  # two class tokens
    "eva02_tiny_patch14_224",  # rotary positions
    "vit_small_patch16_dinov3",
    "beit_base_patch16_224",  # relative positions; norm after pooling
)


def hf_spec(family: str, **more: Any) -> dict[str, Any]:
    return {"type": "hf", "config": {"model_type": family, **SMALL, **HF_FAMILIES[family][2]}, **more}


def timm_spec(model: str, **more: Any) -> dict[str, Any]:
    patch = 14 if "patch14" in model else 16
    return {"type": "timm", "model": model, "options": TIMM, "image_size": 2 * patch, **more}


OPEN_CLIP_SPECS: dict[str, dict[str, Any]] = {
    "open_clip": {"type": "open_clip", "vision_cfg": OPEN_CLIP},
    "open_clip-quick_gelu": {"type": "open_clip", "vision_cfg": OPEN_CLIP, "quick_gelu": True},
    "open_clip-sine": {"type": "open_clip", "vision_cfg": {**OPEN_CLIP, "pos_embed_type": "sin_cos_2d"}},
    "open_clip-timm": {"type": "open_clip", "vision_cfg": {"timm_model_name": "test_vit", "image_size": 32}},
}
SPECS: dict[str, dict[str, Any]] = {
    **{family: hf_spec(family) for family in HF_FAMILIES},
    **{model: timm_spec(model) for model in TIMM_MODELS},
    **OPEN_CLIP_SPECS,
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def build(spec: dict[str, Any]) -> Encoder:
    return lively(build_encoder(copy.deepcopy(spec)))


def lively(module: Any) -> Any:
    """Random values everywhere: with fresh ones, norms are identities and positions nearly nothing."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.2)
    return module.eval()


def take_weights(encoder: Encoder, library: nn.Module, norm: nn.Module | None) -> None:
    """Copy the library model's weights into the encoder, whose tower has the same names and no more."""
    theirs = library.state_dict()
    encoder.tower.load_state_dict({name: theirs[name] for name in encoder.tower.state_dict()})
    if norm is not None:
        encoder.norm.load_state_dict(norm.state_dict())
    else:
        assert isinstance(encoder.norm, nn.Identity)


def images(encoder: Encoder, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *encoder.image_size)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


# The selected layer and tokens are the library's own


@pytest.mark.parametrize("size", [None, 48, [16, 40]], ids=["native", "larger", "non-square"])
@pytest.mark.parametrize("layer", [-1, -2, -LAYERS])
@pytest.mark.parametrize("family", HF_FAMILIES)
def test_hf_layer(family: str, layer: int, size: int | list[int] | None):
    cls, norm_name, _ = HF_FAMILIES[family]
    encoder = build(hf_spec(family, layer=layer, image_size=size, tokens="all"))
    config = cls.config_class(**{k: v for k, v in hf_spec(family)["config"].items() if k != "model_type"})
    library = lively(cls(config))
    norm = library.get_submodule(norm_name)
    take_weights(encoder, library, norm if layer == -1 else None)
    pixels = images(encoder)
    resizes = (
        {"interpolate_pos_encoding": True} if family in ("clip_vision_model", "siglip_vision_model", "vit") else {}
    )
    out = library(pixels, output_hidden_states=True, **resizes)
    if layer != -1:
        expected = out.hidden_states[layer]
    elif family == "clip_vision_model":  # the library norms the pooled token only
        expected = norm(out.last_hidden_state)
    else:
        expected = out.last_hidden_state
    close(encoder(pixels), expected)


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("model", TIMM_MODELS)
def test_timm_layer(model: str, layer: int):
    side = (28, 56) if "patch14" in model else (32, 64)
    encoder = build(timm_spec(model, layer=layer, tokens="all") | {"image_size": list(side)})
    library = lively(timm.create_model(model, num_classes=0, img_size=side, **TIMM))
    norm = library.fc_norm if isinstance(library.norm, nn.Identity) else library.norm
    take_weights(encoder, library, norm if layer == -1 else None)
    pixels = images(encoder)
    [found] = library.forward_intermediates(
        pixels,
        indices=[LAYERS + layer],
        output_fmt="NLC",
        return_prefix_tokens=library.num_prefix_tokens > 0,
        intermediates_only=True,
    )
    expected = found if library.num_prefix_tokens == 0 else torch.cat([found[1], found[0]], dim=1)
    close(encoder(pixels), norm(expected) if layer == -1 else expected)
    if layer == -1 and norm is library.norm:
        close(encoder(pixels), library.forward_features(pixels))


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("name", OPEN_CLIP_SPECS)
def test_open_clip_layer(name: str, layer: int):
    spec = OPEN_CLIP_SPECS[name]
    encoder = build({**spec, "layer": layer})
    text = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1}
    visual = lively(open_clip.CLIP(16, spec["vision_cfg"], text, quick_gelu=spec.get("quick_gelu", False)).visual)
    if name == "open_clip-timm":
        visual.set_input_size(32)
        norm = visual.trunk.fc_norm if isinstance(visual.trunk.norm, nn.Identity) else visual.trunk.norm
        take_weights(encoder, visual.trunk, norm if layer == -1 else None)
        depth = len(visual.trunk.blocks)
    else:
        norm, depth = visual.ln_post, LAYERS
        take_weights(encoder, visual, norm if layer == -1 else None)
    pixels = images(encoder)
    [expected] = visual.forward_intermediates(
        pixels, indices=[depth + layer], intermediates_only=True, output_fmt="NLC", normalize_intermediates=False
    )["image_intermediates"]
    close(encoder(pixels), norm(expected) if layer == -1 else expected)


def test_open_clip_last_layer_equals_its_own_token_output():
    encoder = build(OPEN_CLIP_SPECS["open_clip"])
    text = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1}
    visual = lively(open_clip.CLIP(16, {**OPEN_CLIP, "output_tokens": True}, text).visual)
    take_weights(encoder, visual, visual.ln_post)
    pixels = images(encoder)
    close(encoder(pixels), visual(pixels)[1])


@every_spec
def test_tokens(spec: dict[str, Any]):
    every = build({**spec, "tokens": "all"})
    patches = build({**spec, "tokens": "patches"})
    patches.load_state_dict(every.state_dict())
    pixels = images(every)
    features = every(pixels)
    rows, columns = every.grid
    assert rows * columns == patches.num_tokens
    assert features.shape == (2, every.num_tokens, every.hidden_size)
    assert torch.equal(patches(pixels), features[:, -rows * columns :])
    if every.prefix_tokens:
        cls = build({**spec, "tokens": "cls"})
        cls.load_state_dict(every.state_dict())
        assert cls.num_tokens == 1
        assert torch.equal(cls(pixels), features[:, :1])
    else:
        with pytest.raises(ConfigError, match="this tower has no CLS token"):
            build({**spec, "tokens": "cls"})


@every_spec
def test_patches_are_row_major(spec: dict[str, Any]):
    """In the first layer's output a patch reacts most to its own pixels."""
    depth = 6 if spec is OPEN_CLIP_SPECS["open_clip-timm"] else LAYERS
    encoder = build({**spec, "layer": -depth})
    pixels = images(encoder, 1)
    before = encoder(pixels)
    (height, width), (rows, columns) = encoder.patch_size, encoder.grid
    for row, column in ((0, 0), (0, columns - 1), (rows - 1, 0)):
        changed = pixels.clone()
        changed[..., row * height : (row + 1) * height, column * width : (column + 1) * width] += 3
        moved = (encoder(changed) - before).norm(dim=-1)[0]
        assert int(moved.argmax()) == row * columns + column


# Frozen and tuned


@every_spec
def test_gradients_reach_every_parameter(spec: dict[str, Any]):
    encoder = build(spec).train()
    encoder(images(encoder)).square().sum().backward()
    without = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@every_spec
def test_frozen_tower_builds_no_graph_and_stays_in_evaluation_mode(spec: dict[str, Any]):
    encoder = build(spec).requires_grad_(False)
    assert not encoder.train().training
    assert not any(module.training for module in encoder.modules())
    pixels = images(encoder)
    assert not encoder(pixels).requires_grad
    assert encoder(pixels.requires_grad_()).requires_grad, "saliency needs the gradient of the pixels"
    encoder.requires_grad_(True)
    assert encoder.train().training
    assert encoder(pixels.detach()).requires_grad


def test_unfreezing_leaves_sine_tables_alone():
    encoder = build(OPEN_CLIP_SPECS["open_clip-sine"]).requires_grad_(True)
    assert "tower.positional_embedding" in dict(encoder.named_buffers())
    assert "tower.positional_embedding" in encoder.state_dict()


def test_dropout_is_off_in_a_frozen_tower():
    spec = hf_spec("vit")
    spec["config"] = {**spec["config"], "hidden_dropout_prob": 0.5}
    encoder = build(spec)
    pixels = images(encoder)
    assert not torch.equal(encoder.train()(pixels), encoder(pixels))
    encoder.requires_grad_(False).train()
    assert torch.equal(encoder(pixels), encoder(pixels))


def test_pixels_are_cast_to_the_towers_dtype():
    encoder = build(hf_spec("siglip_vision_model")).to(torch.bfloat16)
    assert encoder(images(encoder)).dtype == torch.bfloat16


# The spec, the meta device, the round trip


@every_spec
def test_spec_builds_the_same_architecture(spec: dict[str, Any]):
    encoder = build({**spec, "layer": -2, "tokens": "all"})
    stored = json.loads(json.dumps(encoder.spec))
    again = build(stored)
    assert again.spec == encoder.spec == stored
    assert "pretrained" not in stored
    again.load_state_dict(encoder.state_dict())
    pixels = images(encoder)
    assert torch.equal(again(pixels), encoder(pixels))
    for fact in ("image_mean", "image_std", "grid", "num_tokens", "hidden_size", "patch_size", "image_size"):
        assert getattr(again, fact) == getattr(encoder, fact)


@every_spec
def test_meta_device(spec: dict[str, Any]):
    with torch.device("meta"):
        outline = build_encoder(copy.deepcopy(spec))
    encoder = build(spec)
    assert all(p.is_meta for p in outline.parameters())
    assert {n: p.shape for n, p in outline.named_parameters()} == {n: p.shape for n, p in encoder.named_parameters()}
    assert outline.spec == encoder.spec


def test_pretrained_is_ignored_on_the_meta_device():
    with torch.device("meta"):
        encoder = build_encoder({**timm_spec("vit_tiny_patch16_224"), "pretrained": True})
    assert all(p.is_meta for p in encoder.parameters())


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that what nobody initialised cannot be right by luck."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", [*TIMM_MODELS, "open_clip-timm"])
def test_rebuild_buffers(name: str):
    encoder = build(SPECS[name])
    pixels = images(encoder)
    expected = encoder(pixels)
    saved = encoder.state_dict()
    for path, buffer in encoder.named_buffers():
        if path not in saved:
            buffer.fill_(torch.nan if buffer.is_floating_point() else 0)
    encoder.rebuild_buffers()
    assert torch.equal(encoder(pixels), expected)


def multimodal(spec: dict[str, Any]) -> MultimodalLM:
    config = MultimodalConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "initializer_range": 0.2,
        },
        encoders={"image": copy.deepcopy(spec)},
        connectors={"image": {"type": "linear"}},
        media_token_ids={"image": IMAGE_TOKEN_ID},
    )
    model = MultimodalLM(config).eval()
    lively(model.encoders)
    return model


def batch_for(model: MultimodalLM) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 6, *[IMAGE_TOKEN_ID] * model.visual_tokens(), 7, 8]])
    return {"input_ids": ids, "pixel_values": images(model.encoders["image"], 1)}


@every_spec
@pytest.mark.usefixtures("poisoned_memory")
def test_model_round_trip(spec: dict[str, Any], tmp_path: Path):
    model = multimodal(spec)
    batch = batch_for(model)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded, report = MultimodalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {kind: names for kind, names in report.items() if names} == {}
    close(loaded.eval()(**batch).logits, expected)
    assert not torch.allclose(loaded(**batch | {"pixel_values": -batch["pixel_values"]}).logits, expected, atol=1e-3)


@every_spec
@pytest.mark.usefixtures("poisoned_memory")
def test_tower_that_a_checkpoint_lacks_is_as_freshly_built(spec: dict[str, Any], tmp_path: Path):
    """A checkpoint of the decoder alone: the encoder must come out initialised, not as memory happened to be."""
    model = multimodal(spec)
    batch = batch_for(model)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("encoders.")}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = MultimodalLM.from_pretrained(tmp_path).eval()
    for name, value in (*loaded.encoders.named_parameters(), *loaded.encoders.named_buffers()):
        assert value.isfinite().all(), name
    fresh = build_encoder(copy.deepcopy(spec))
    for name, parameter in fresh.named_parameters():
        found = loaded.encoders["image"].get_parameter(name)
        if parameter.std() == 0 or parameter.numel() == 1:
            assert torch.equal(found, parameter), name
        else:
            assert 0.4 < found.std() / parameter.std() < 2.5, name
    assert loaded(**batch).logits.isfinite().all()


# Local checkpoints


@pytest.mark.parametrize("family", HF_FAMILIES)
def test_hf_pretrained_folder(family: str, tmp_path: Path):
    cls = HF_FAMILIES[family][0]
    config = cls.config_class(**{k: v for k, v in hf_spec(family)["config"].items() if k != "model_type"})
    library = lively(cls(config))
    library.save_pretrained(tmp_path)
    encoder = build_encoder({"type": "hf", "pretrained": str(tmp_path), "layer": -2})
    theirs = library.state_dict()
    for name, value in encoder.tower.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    assert "pretrained" not in encoder.spec
    assert encoder.spec["config"]["model_type"] == family
    assert build_encoder(encoder.spec).spec == encoder.spec


def test_hf_checkpoint_without_some_weights_is_refused(tmp_path: Path):
    config = {k: v for k, v in hf_spec("vit")["config"].items() if k != "model_type"}
    library = ViTModel(ViTModel.config_class(**config))
    state = {name: value for name, value in library.state_dict().items() if "layers.1." not in name}
    library.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ConfigError, match=r"lacks weights of the tower: layers\.1\."):
        build_encoder({"type": "hf", "pretrained": str(tmp_path)})


def test_timm_pretrained_file(tmp_path: Path):
    from safetensors.torch import save_file

    library = lively(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **TIMM))
    path = tmp_path / "vit.safetensors"
    save_file(library.state_dict(), path)
    encoder = build_encoder({**timm_spec("vit_tiny_patch16_224"), "pretrained": str(path)})
    for name, value in encoder.tower.state_dict().items():
        assert torch.equal(value, library.state_dict()[name]), name
    with pytest.raises(ConfigError, match=r"expected true or an existing \.safetensors file"):
        build_encoder({**timm_spec("vit_tiny_patch16_224"), "pretrained": str(tmp_path / "vit.pth")})


def test_open_clip_pretrained_folder(tmp_path: Path):
    from safetensors.torch import save_file

    text = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1}
    clip = lively(open_clip.CLIP(16, OPEN_CLIP, text, quick_gelu=True))
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    save_file(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    settings = {
        "model_cfg": {"embed_dim": 16, "quick_gelu": True, "vision_cfg": OPEN_CLIP, "text_cfg": text},
        "preprocess_cfg": {"mean": mean, "std": std},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    encoder = build_encoder({"type": "open_clip", "pretrained": f"local-dir:{tmp_path}"})
    for name, value in encoder.tower.state_dict().items():
        assert torch.equal(value, clip.visual.state_dict()[name]), name
    again = build_encoder(encoder.spec)
    assert str(tmp_path) not in json.dumps(encoder.spec)
    assert again.image_mean == encoder.image_mean == tuple(mean)
    assert again.image_std == encoder.image_std == tuple(std)
    again.load_state_dict(encoder.state_dict())
    pixels = images(encoder)
    close(again.eval()(pixels), encoder.eval()(pixels))


# Facts


@pytest.mark.parametrize(
    ("spec", "mean", "std"),
    [
        (hf_spec("clip_vision_model"), 0.48145466, 0.26862954),
        (hf_spec("siglip_vision_model"), 0.5, 0.5),
        (hf_spec("dinov2"), 0.485, 0.229),
        (timm_spec("vit_base_patch16_siglip_224"), 0.5, 0.5),
        (timm_spec("eva02_tiny_patch14_224"), 0.48145466, 0.26862954),
        (OPEN_CLIP_SPECS["open_clip"], 0.48145466, 0.26862954),
        ({**OPEN_CLIP_SPECS["open_clip"], "image_mean": [0.5] * 3, "image_std": [0.25] * 3}, 0.5, 0.25),
    ],
)
def test_normalisation(spec: dict[str, Any], mean: float, std: float):
    encoder = build_encoder(spec)
    assert (encoder.image_mean[0], encoder.image_std[0]) == (mean, std)


def test_siglip_so400m_of_aki():
    """Patch 14 at 384 pixels: the sides are no multiples of the patch, as published."""
    config = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304}
    config |= {"num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384, "patch_size": 14}
    with torch.device("meta"):
        encoder = build_encoder({"type": "hf", "config": config})
    assert (encoder.num_tokens, encoder.grid, encoder.hidden_size) == (729, (27, 27), 1152)
    assert encoder(torch.empty(1, 3, 384, 384, device="meta")).shape == (1, 729, 1152)


@pytest.mark.parametrize("model", ["MobileCLIP-B", "ViTamin-S"])
def test_convolutional_stem_counts_as_part_of_the_patch(model: str):
    with torch.device("meta"):
        encoder = build_encoder({"type": "open_clip", "model": model})
        features = encoder(torch.empty(1, 3, *encoder.image_size))
    assert encoder.patch_size == (16, 16)
    assert features.shape[1] == encoder.num_tokens == 196


# Mistakes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "an encoder spec needs `type`. Known: hf, open_clip, precomputed, timm"),
        ({"type": "tim"}, "unknown encoder 'tim': did you mean 'timm'?"),
        ({"type": "timm"}, "encoder 'timm' needs model"),
        ({"type": "timm", "name": "x"}, "unknown key in encoder 'timm' 'name'"),
        (
            timm_spec("vit_tiny_patch16_223"),
            "unknown timm model 'vit_tiny_patch16_223': did you mean 'vit_tiny_patch16",
        ),
        ({"type": "timm", "model": "resnet18"}, "'resnet18' is no plain vision transformer"),
        (timm_spec("vit_tiny_patch16_224") | {"options": {"dept": 2}}, "did you mean 'depth'?"),
        ({"type": "timm", "model": "levit_128", "options": {"embed_dim": 32}}, "cannot be built with options"),
        (timm_spec("vit_tiny_patch16_224") | {"options": {"img_size": 32}}, "unknown key in options of timm model"),
        ({"type": "hf"}, "an encoder of type 'hf' needs `config` (with `model_type`) or `pretrained`"),
        ({"type": "hf", "config": {}}, "encoder config has no `model_type`"),
        ({"type": "hf", "config": {"model_type": "siglip"}}, "Known: clip_vision_model, dinov2, "),
        ({"type": "hf", "config": {"model_type": "vit", "hiden_size": 8}}, "did you mean 'hidden_size'?"),
        (hf_spec("vit", tokens="patch"), "unknown tokens 'patch': did you mean 'patches'?"),
        (hf_spec("vit", layer=-4), "layer=-4: layers count from the end, -1 to -3 in this tower"),
        (hf_spec("vit", layer=1), "layer=1: layers count from the end"),
        (hf_spec("vit", image_size=[30, 32]), "nearest: [32, 32]"),
        (hf_spec("vit", image_size=0), "nearest: [8, 8]"),
        (hf_spec("vit", image_size=[32]), "expected one integer or [height, width]"),
        ({"type": "open_clip"}, "needs either `model` or `vision_cfg`"),
        ({"type": "open_clip", "model": "ViT-B-33"}, "unknown open_clip model 'ViT-B-33': did you mean 'ViT-B-32'"),
        ({"type": "open_clip", "model": "RN50"}, "only vision transformers have tokens"),
        ({"type": "open_clip", "model": "convnext_base"}, "is no plain vision transformer"),
        ({"type": "open_clip", "model": "ViT-B-32", "quick_gelu": True}, "`quick_gelu` belongs to `vision_cfg`"),
        ({"type": "open_clip", "model": "hf-hub:a/b"}, "give it as `pretrained`, and no `model`"),
        ({"type": "open_clip", "vision_cfg": OPEN_CLIP, "pretrained": "openai"}, "`pretrained` needs the name"),
        ({"type": "open_clip", "vision_cfg": {"widht": 8}}, "did you mean 'width'?"),
        ({"type": "open_clip", "vision_cfg": OPEN_CLIP, "image_mean": [0.5]}, "expected 3 numbers"),
        (
            {"type": "open_clip", "vision_cfg": {**OPEN_CLIP, "attentional_pool": True}},
            "layer=-1: this tower pools by attention before its final norm",
        ),
    ],
)
def test_mistakes_are_named(spec: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as error, torch.device("meta"):
        build_encoder(copy.deepcopy(spec))
    assert message in str(error.value)


@every_spec
def test_other_image_sizes_are_refused(spec: dict[str, Any]):
    encoder = build(spec)
    height, width = encoder.image_size
    for shape in ((2, 3, height, width + 1), (3, height, width)):
        with pytest.raises(ValueError, match="set `image_size` where it is built") as error:
            encoder(torch.zeros(shape))
        assert f"the encoder takes [N, 3, {height}, {width}]" in str(error.value)

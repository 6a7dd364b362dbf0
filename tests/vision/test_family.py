"""Families of encoders: the published arithmetic, everybody's checkpoints, one line of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from clover.core.config import EncoderConfig, family_files
from clover.core.errors import CloverError
from clover.vision.encoder import load_encoder
from clover.vision.family import clip, eva_clip
from clover.vision.family.known import register
from clover.vision.token_encoder import TokenEncoder, build_family, token_shape

EVA = EncoderConfig(kind="eva_clip", model="vit_tiny_14", image_size=56, licence="MIT")
CLIP = EVA.model_copy(update={"kind": "clip"})


def meta(config: EncoderConfig) -> tuple[EncoderConfig, nn.Module]:
    with torch.device("meta"):
        config, family = build_family(config)
    return config, family.network


def pixels(config: EncoderConfig = EVA) -> Tensor:
    size = config.image_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def lavis_eva() -> dict[str, Tensor]:
    """Random weights of the small EVA under LAVIS's names, with one block more than is run."""
    torch.manual_seed(3)
    shape = eva_clip.SHAPES["vit_tiny_14"]
    width, inner = shape.width, shape.inner
    state = {
        "cls_token": torch.randn(1, 1, width),
        "pos_embed": torch.randn(1, 17, width),
        "patch_embed.proj.weight": torch.randn(width, 3, 14, 14) * 0.05,
        "patch_embed.proj.bias": torch.randn(width),
    }
    for index in range(shape.depth + 1):
        block = {
            "norm1.weight": torch.randn(width),
            "norm1.bias": torch.randn(width),
            "norm2.weight": torch.randn(width),
            "norm2.bias": torch.randn(width),
            "attn.q_bias": torch.randn(width),
            "attn.v_bias": torch.randn(width),
            "attn.qkv.weight": torch.randn(3 * width, width) * 0.1,
            "attn.proj.weight": torch.randn(width, width) * 0.1,
            "attn.proj.bias": torch.randn(width),
            "mlp.fc1.weight": torch.randn(inner, width) * 0.1,
            "mlp.fc1.bias": torch.randn(inner),
            "mlp.fc2.weight": torch.randn(width, inner) * 0.1,
            "mlp.fc2.bias": torch.randn(width),
        }
        state |= {f"blocks.{index}.{name}": item for name, item in block.items()}
    return state


def naive_eva(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """SPEC 3.1, block by block and head by head."""
    shape = eva_clip.SHAPES["vit_tiny_14"]
    size = shape.width // shape.num_heads
    patches = F.conv2d(
        images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14
    )
    x = torch.cat(
        [state["cls_token"].expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1
    )
    x = x + state["pos_embed"]
    for index in range(shape.depth):
        block = {
            name.removeprefix(f"blocks.{index}."): item
            for name, item in state.items()
            if name.startswith(f"blocks.{index}.")
        }
        h = F.layer_norm(x, (shape.width,), block["norm1.weight"], block["norm1.bias"], eps=1e-6)
        q, k, v = (h @ block["attn.qkv.weight"].t()).chunk(3, dim=-1)
        q, v = (q + block["attn.q_bias"]) * size**-0.5, v + block["attn.v_bias"]
        heads = []
        for head in range(shape.num_heads):
            part = slice(head * size, (head + 1) * size)
            weights = (q[..., part] @ k[..., part].transpose(1, 2)).softmax(dim=-1)
            heads.append(weights @ v[..., part])
        x = x + F.linear(
            torch.cat(heads, dim=-1), block["attn.proj.weight"], block["attn.proj.bias"]
        )
        h = F.layer_norm(x, (shape.width,), block["norm2.weight"], block["norm2.bias"], eps=1e-6)
        h = F.gelu(F.linear(h, block["mlp.fc1.weight"], block["mlp.fc1.bias"]))
        x = x + F.linear(h, block["mlp.fc2.weight"], block["mlp.fc2.bias"])
    return x


@pytest.mark.parametrize("form", ["eva", "lavis", "module", "pth"])
def test_eva_is_the_published_arithmetic_from_every_form_of_checkpoint(
    tmp_path: Path, form: str
) -> None:
    state = lavis_eva()
    prefix = {"lavis": "visual_encoder.", "module": "module.visual_encoder."}.get(form, "")
    named = {prefix + name: item for name, item in state.items()}
    path = tmp_path / ("w.pth" if form == "pth" else "w.safetensors")
    if form == "pth":
        torch.save({"model": named, "epoch": 3}, path)
    else:
        save_file(named, str(path))
    encoder = load_encoder(EVA.model_copy(update={"weights": str(path)}))
    found = encoder.encode(pixels())
    assert found.shape == (2, encoder.num_tokens, encoder.width) == (2, 17, 48)
    torch.testing.assert_close(found, naive_eva(state, pixels()), atol=2e-5, rtol=1e-4)


def test_positions_of_another_image_size_are_interpolated_and_the_class_token_kept(
    tmp_path: Path,
) -> None:
    state = lavis_eva()
    save_file(state, str(tmp_path / "w.safetensors"))
    config = EVA.model_copy(update={"weights": str(tmp_path / "w.safetensors"), "image_size": 84})
    encoder = TokenEncoder(config)
    positions = encoder.network.get_parameter("positions")
    grid = state["pos_embed"][:, 1:].view(1, 4, 4, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    assert torch.equal(positions[:, :1], state["pos_embed"][:, :1])
    assert torch.equal(positions[:, 1:], expected.permute(0, 2, 3, 1).flatten(1, 2))


def blip2_vision(model: type, config_class: type) -> Any:
    shape = eva_clip.SHAPES["vit_tiny_14"]
    torch.manual_seed(5)
    config = config_class(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.num_heads,
        image_size=56,
        patch_size=14,
        layer_norm_eps=1e-6,
        initializer_range=0.2,
    )
    return model(config).eval()


def test_eva_agrees_with_transformers(tmp_path: Path) -> None:
    from transformers import Blip2VisionConfig, Blip2VisionModel

    theirs = blip2_vision(Blip2VisionModel, Blip2VisionConfig)
    nn.init.normal_(theirs.post_layernorm.weight)
    theirs.save_pretrained(tmp_path)
    ours = load_encoder(EVA.model_copy(update={"weights": str(tmp_path)}))
    expected = theirs(pixels()).last_hidden_state
    # transformers has one eps for both; ours normalises in the bridge, with the trained norm.
    found = theirs.post_layernorm(ours.encode(pixels()))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_clip_agrees_with_transformers_up_to_the_last_block_but_one(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    shape = clip.SHAPES["vit_tiny_14"]
    torch.manual_seed(5)
    config = CLIPVisionConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.depth + 1,
        num_attention_heads=shape.num_heads,
        image_size=56,
        patch_size=14,
    )
    theirs = CLIPVisionModel(config).eval()
    for item in theirs.parameters():
        nn.init.normal_(item, std=0.2)
    theirs.save_pretrained(tmp_path)
    ours = load_encoder(CLIP.model_copy(update={"weights": str(tmp_path)}))
    hidden = theirs(pixels(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(ours.encode(pixels()), hidden[shape.depth], atol=1e-4, rtol=1e-4)


def small_clip() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return random weights of the small CLIP under our names, and under OpenAI's."""
    shape = clip.SHAPES["vit_tiny_14"]
    network = meta(CLIP)[1]
    torch.manual_seed(2)
    ours = {name: torch.randn(item.shape) for name, item in network.state_dict().items()}
    top = {
        "class_token": "class_embedding",
        "positions": "positional_embedding",
        "patches.weight": "conv1.weight",
        "first_norm.weight": "ln_pre.weight",
        "first_norm.bias": "ln_pre.bias",
    }
    part = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "projection": "attn.out_proj",
        "inner": "mlp.c_fc",
        "outer": "mlp.c_proj",
    }
    named = {}
    for name, item in ours.items():
        if name in top:
            named[top[name]] = item.flatten() if name == "class_token" else item.squeeze(0)
            continue
        _, index, kind, last = name.split(".")
        theirs = f"attn.in_proj_{last}" if kind == "qkv" else f"{part[kind]}.{last}"
        named[f"transformer.resblocks.{index}.{theirs}"] = item
    assert len(named) == len(ours) and shape.depth == 3
    return ours, named


def test_openai_and_lavis_names_of_clip_give_the_same_network(tmp_path: Path) -> None:
    ours, named = small_clip()
    tokens = []
    for prefix in ("visual.", "visual_encoder."):
        path = tmp_path / f"{prefix}safetensors"
        save_file({prefix + name: item.contiguous() for name, item in named.items()}, str(path))
        encoder = TokenEncoder(CLIP.model_copy(update={"weights": str(path)}))
        assert all(torch.equal(encoder.network.state_dict()[k], v) for k, v in ours.items())
        tokens.append(encoder.encode(pixels()))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("is_text_first", [True, False])
@pytest.mark.parametrize("prefix", ["visual.", "module.visual."])
def test_of_a_whole_clip_the_image_tower_alone_is_read(
    tmp_path: Path, is_text_first: bool, prefix: str
) -> None:
    _, named = small_clip()
    start = prefix.removesuffix("visual.")
    image = {prefix + name: item for name, item in named.items()}
    # The text tower's names are those of an image tower by itself; its tensors fit, too.
    text = {start + name: item + 1 for name, item in named.items() if "transformer" in name}
    text[f"{start}positional_embedding"] = torch.randn(9, 48)
    both = text | image if is_text_first else image | text
    assert len(both) == len(image) + len(text) > 60
    tokens = []
    for name, state in {"both": both, "image": image}.items():
        torch.save(state, tmp_path / name)
        encoder = TokenEncoder(CLIP.model_copy(update={"weights": str(tmp_path / name)}))
        tokens.append(encoder.encode(pixels()))
    assert torch.equal(*tokens)


def test_a_whole_clip_of_open_clip_gives_its_own_tokens(tmp_path: Path) -> None:
    library = pytest.importorskip("open_clip", reason="the extra [open-clip] is not installed")
    config = EncoderConfig(kind="open_clip", model="ViT-S-16", image_size=32)
    model = library.create_model("ViT-S-16", pretrained=None, force_image_size=32).eval()
    state = model.state_dict()
    assert state["transformer.resblocks.0.ln_1.weight"].shape == (384,)
    pooled = model.visual(pixels(config))
    for order in (1, -1):
        torch.save(dict(list(state.items())[::order]), tmp_path / "open_clip_pytorch_model.bin")
        weights = str(tmp_path / "open_clip_pytorch_model.bin")
        encoder = TokenEncoder(config.model_copy(update={"weights": weights}))
        found = encoder.encode(pixels(config))[:, 0] @ model.visual.proj
        torch.testing.assert_close(found, pooled, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_of_two_encoders_is_refused(tmp_path: Path) -> None:
    state = lavis_eva()
    both = {prefix + name: item for name, item in state.items() for prefix in ("", "module.")}
    save_file({name: item.clone() for name, item in both.items()}, tmp_path / "w.safetensors")
    with pytest.raises(CloverError, match="of which only one can be this encoder's"):
        TokenEncoder(EVA.model_copy(update={"weights": str(tmp_path / "w.safetensors")}))


@pytest.mark.parametrize(
    ("model", "count"), [("eva-clip-g", 985_894_528), ("clip-l", None), ("uni2-h", None)]
)
def test_full_size_has_the_published_number_of_parameters(model: str, count: int | None) -> None:
    network = meta(EncoderConfig(kind="known", model=model))[1]
    found = sum(item.numel() for item in network.parameters())
    if model == "eva-clip-g":
        # SPEC, section 9; ours stores the key's bias too, which is 0 and no parameter there.
        found -= 39 * 1408
        assert found == count
    assert 290e6 < found < 1e9


@pytest.mark.parametrize("name", sorted(register()))
def test_the_register_states_what_the_network_gives(name: str) -> None:
    entry = register()[name]
    config, network = meta(EncoderConfig(kind="known", model=name))
    assert token_shape(network, config.image_size) == (entry["num_tokens"], entry["width"])
    if entry.get("licence_note"):
        assert "outputs" in config.licence_note and config.licence != "unknown"


def test_a_recipe_overrules_the_register() -> None:
    config = build_family_config(EncoderConfig(kind="known", model="virchow", image_size=112))
    assert (config.kind, config.image_size, config.licence) == ("timm_tokens", 112, "Apache-2.0")


def build_family_config(config: EncoderConfig) -> EncoderConfig:
    return meta(config)[0]


def test_timm_keeps_the_class_token_and_drops_registers() -> None:
    options = {"embed_dim": 24, "depth": 2, "num_heads": 2, "reg_tokens": 4, "patch_size": 16}
    config = EncoderConfig(
        kind="timm_tokens", model="vit_base_patch16_224", image_size=64, options=options
    )
    encoder = TokenEncoder(config)
    images = pixels(config)
    all_tokens = encoder.network.network.forward_features(images)  # type: ignore[operator,union-attr]
    assert all_tokens.shape[1] == 1 + 4 + 16 and encoder.num_tokens == 17
    expected = torch.cat([all_tokens[:, :1], all_tokens[:, 5:]], dim=1)
    torch.testing.assert_close(encoder.encode(images), expected)


def test_any_vision_model_of_transformers_is_a_folder(tmp_path: Path) -> None:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    shape = Dinov2WithRegistersConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    theirs = Dinov2WithRegistersModel(shape).eval()
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}'
    )
    config = EncoderConfig(kind="transformers_vision", weights=str(tmp_path), image_size=56)
    encoder = TokenEncoder(config)
    hidden = theirs(pixels()).last_hidden_state
    expected = torch.cat([hidden[:, :1], hidden[:, 5:]], dim=1)
    torch.testing.assert_close(encoder.encode(pixels()), expected, atol=1e-5, rtol=1e-5)
    white = encoder.prepare(Image.new("RGB", (9, 5), "white"))
    torch.testing.assert_close(
        white[:, 0, 0], torch.tensor([(1 - m) / s for m, s in ((0.1, 0.4), (0.2, 0.5), (0.3, 0.6))])
    )


def test_open_clip_gives_tokens_with_the_class_token_first() -> None:
    open_clip = pytest.importorskip("open_clip", reason="the extra [open-clip] is not installed")
    config = EncoderConfig(kind="open_clip", model="ViT-S-32-alt", image_size=64)
    if config.model not in open_clip.list_models():
        pytest.skip("this open_clip has no ViT-S-32-alt")
    encoder = TokenEncoder(config)
    tokens = encoder.encode(pixels(config))
    assert tokens.shape == (2, 5, encoder.width) and encoder.num_tokens == 5
    visual = encoder.network.visual
    pooled = visual(pixels(config))[0]  # type: ignore[operator,index]
    expected = tokens[:, 0] @ visual.proj  # type: ignore[union-attr]
    torch.testing.assert_close(expected, pooled, atol=1e-4, rtol=1e-4)


def test_another_revision_for_other_weights_options_or_pixels(tmp_path: Path) -> None:
    save_file(lavis_eva(), str(tmp_path / "w.safetensors"))
    changes: list[dict[str, Any]] = [
        {},
        {"weights": str(tmp_path / "w.safetensors")},
        {"image_size": 84},
        {"mean": (0.5, 0.5, 0.5)},
        {"numbers": "bfloat16"},
    ]
    revisions = {TokenEncoder(EVA.model_copy(update=change)).revision for change in changes}
    assert len(revisions) == len(changes)


def test_random_weights_are_the_same_everywhere() -> None:
    torch.manual_seed(1)
    first = TokenEncoder(EVA).encode(pixels())
    torch.manual_seed(2)
    assert torch.equal(first, TokenEncoder(EVA).encode(pixels()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "eva_klip"}, "did you mean 'eva_clip'"),
        ({"model": "vit_g_41"}, "did you mean 'vit_g_14'"),
        ({"kind": "known", "model": "uni2-g"}, "is not in the register; did you mean 'uni2-h'"),
        ({"kind": "timm_tokens", "model": "vit_bse_patch16_224"}, "timm knows no"),
        (
            {"kind": "timm_tokens", "model": "vit_tiny_patch16_224", "options": {"legs": 4}},
            "does not take encoder.options ['legs']",
        ),
        (
            {"kind": "timm_tokens", "model": "resnet18"},
            "does not take encoder.options",
        ),
        (
            {"kind": "transformers_vision", "options": {"model_type": "vitt"}},
            "transformers knows no model_type 'vitt'",
        ),
    ],
)
def test_an_unknown_architecture_is_one_line(changes: dict[str, object], words: str) -> None:
    with pytest.raises(CloverError) as error:
        load_encoder(EVA.model_copy(update=changes))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "2 of 40 tensors are missing, for instance blocks.1."),
        ("other width", "the architecture wants [48"),
        ("other network", "40 of 40 tensors are missing"),
        ("cut off", "is not a whole safetensors file"),
        ("code", "asks for"),
        ("absent", "no file"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(
    tmp_path: Path, damage: str, words: str
) -> None:
    state, path = lavis_eva(), tmp_path / "w.safetensors"
    if damage == "missing":
        state = {name: item for name, item in state.items() if "blocks.1.norm1" not in name}
    elif damage == "other width":
        state["blocks.0.mlp.fc1.weight"] = torch.zeros(5, 5)
        state["patch_embed.proj.bias"] = torch.zeros(7)
    elif damage == "other network":
        state = {"layer.weight": torch.zeros(3)}
    save_file(state, str(path))
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "absent":
        path.unlink()
    elif damage == "code":
        path = tmp_path / "w.pth"
        torch.save({"model": Evil()}, path)
    with pytest.raises(CloverError) as error:
        load_encoder(EVA.model_copy(update={"weights": str(path)}))
    assert words in str(error.value) and "\n" not in str(error.value)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('the pickle was run')",)


def test_all_families_are_files_of_one_folder() -> None:
    assert {"eva_clip", "clip", "timm_tokens", "open_clip", "transformers_vision", "known"} == set(
        family_files()
    )

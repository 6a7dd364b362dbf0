"""Weights move freely: everybody's checkpoints both ways, equal to the last bit."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from clover.cli import cli
from clover.convert.run import convert
from clover.core.config import LanguageConfig, PromptConfig, QFormerConfig, load_recipe
from clover.core.errors import CloverError
from clover.core.tensors import Entry, open_tensors, write_tensors
from clover.language import GenerationSettings, Prompt
from clover.language.decoder_only import DecoderOnly
from clover.language.encoder_decoder import EncoderDecoder
from clover.model import load_bridge
from clover.qformer.bridge import Bridge
from clover.vision.token_encoder import TokenEncoder

from .theirs import KINDS, QUERIES, WORDS, build


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    folder = tmp_path_factory.mktemp("theirs")
    return {kind: (folder / kind, build(kind, folder / kind)) for kind in KINDS}


def parameters(folder: Path) -> dict[str, Tensor]:
    return load_file(str(folder / "model.safetensors"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["clover", "lavis"])
def test_there_and_back_is_equal_bit_by_bit(
    theirs: dict[str, tuple[Path, Any]], tmp_path: Path, kind: str, way: str
) -> None:
    source = theirs[kind][0]
    middle = tmp_path / ("there" if way == "clover" else "there.pth")
    there = convert(source, middle, to=way)
    back = convert(middle, tmp_path / "back", to="transformers")
    for done in (there, back):
        assert done.parity is not None and done.parity.is_whole
        assert done.parity.num_equal == done.parity.num_shared > 100
        assert done.parity.largest <= 1e-4 and done.parity.differences
    wanted = "match_logits" if kind == "retrieval" else "logits"
    assert wanted in there.parity.differences  # type: ignore[union-attr]
    assert there.source.left_out == {}
    first, last = parameters(source), parameters(tmp_path / "back")
    assert first.keys() == last.keys()
    assert all(torch.equal(item, last[name]) for name, item in first.items())


def test_the_converted_folder_reads_back_in_transformers_own_class(
    theirs: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    from transformers import InstructBlipForConditionalGeneration

    source, model = theirs["instructblip-llama"]
    convert(source, tmp_path / "there", to="clover")
    convert(tmp_path / "there", tmp_path / "back", to="transformers")
    again, report = InstructBlipForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ours, old = again.config.to_dict(), model.config.to_dict()
    for part in ("vision_config", "qformer_config", "text_config"):
        for name in ("hidden_size", "num_attention_heads", "vocab_size", "layer_norm_eps"):
            assert ours[part].get(name) == old[part].get(name), (part, name)


class NoText:
    """A tokenizer for callers with their own ids."""

    eos_token_id = 2

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": []}


@pytest.mark.parametrize("kind", ["instructblip-llama", "instructblip-t5", "blip2-opt", "blip2-t5"])
def test_our_classes_give_the_same_logits_and_greedy_ids(
    theirs: dict[str, tuple[Path, Any]], tmp_path: Path, kind: str
) -> None:
    source, model = theirs[kind]
    convert(source, tmp_path / "ours", to="clover", has_check=False)
    recipe = load_recipe(tmp_path / "ours" / "recipe.yaml")
    encoder = TokenEncoder(recipe.encoder)
    bridge = Bridge(recipe.qformer, language_width=40).eval()
    load_bridge(bridge, tmp_path / "ours" / "bridge.safetensors")
    is_pair = recipe.language.kind == "encoder_decoder"
    torch.manual_seed(1)
    pixels, words = torch.randn(2, 3, 56, 56), torch.randint(5, 100, (2, 7))
    ids = torch.randint(4, 100, (2, 5))
    places = torch.full((2, QUERIES), WORDS - 1)
    inputs = {"pixel_values": pixels, "input_ids": torch.cat([places, ids], dim=1)}
    reads = recipe.tune.instruction_aware
    assert reads == kind.startswith("instruct")
    if reads:
        inputs["qformer_input_ids"] = words
    with torch.no_grad():
        keys = bridge.read_image(encoder.encode(pixels))
        visual = bridge.visual_prefix(keys, *((words, torch.ones_like(words)) if reads else ()))
        written = model.generate(**inputs, do_sample=False, max_new_tokens=8, min_new_tokens=8)
        # The language model's weights out of the converted folder, in our own classes.
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        family = AutoModelForSeq2SeqLM if is_pair else AutoModelForCausalLM
        inner = family.from_pretrained(tmp_path / "ours" / "language")
        build_language = EncoderDecoder if is_pair else DecoderOnly
        language = build_language(
            inner,
            NoText(),
            prompt=Prompt.from_config(PromptConfig()),
            config=LanguageConfig(kind=recipe.language.kind, weights="x"),
        )
        settings = GenerationSettings(max_tokens=8, min_tokens=8)
        ours = language.generate_from_ids(visual, ids.tolist(), settings)
        if isinstance(language, DecoderOnly):
            logits = language.logits_from_ids(visual, ids, torch.ones_like(ids))[:, QUERIES:]
            expected = model(**inputs).logits[:, QUERIES:]
        else:
            logits = language.logits_from_ids(visual, ids.tolist(), ids.tolist())[0]
            expected = model(**inputs, labels=ids).logits
    assert (logits - expected).abs().max() <= 1e-4
    assert [row[-8:] for row in written.tolist()] == ours


REFERENCES = {"stage1": "align", "stage2_llama": "bridge", "stage2_t5": "bridge"}


@pytest.mark.parametrize("name", REFERENCES)
def test_lavis_files_go_through_convert_and_agree_with_what_lavis_computed(
    shared: Path, tmp_path: Path, name: str
) -> None:
    golden = safe_open(shared / "reference" / f"{name}_seed0.safetensors", "pt")
    state = {k[3:]: golden.get_tensor(k) for k in golden.keys() if k.startswith("sd/")}  # noqa: SIM118
    # As the published files are: without the frozen language model, but with its aliases.
    kept = {
        f"module.{name}": item
        for name, item in state.items()
        if not name.startswith(("t5_model.", "llm_model.")) or name.endswith("embed_tokens.weight")
    }
    torch.save({"model": kept, "epoch": 3, "config": {"run": {"lr": 1e-4}}}, tmp_path / "l.pth")
    done = convert(tmp_path / "l.pth", tmp_path / "ours", to="clover", num_heads=4)
    assert done.written.stem == REFERENCES[name]
    assert "not understood" not in done.source.left_out.values()
    left = {key for key in kept if "_model." in key}
    assert {f"module.{key}" for key in done.source.left_out if "_model." in key} == left
    recipe = load_recipe(tmp_path / "ours" / "recipe.yaml")
    width = state["Qformer.bert.embeddings.LayerNorm.weight"].shape[0]
    projection = state.get("t5_proj.weight", state.get("llm_proj.weight"))
    bridge = Bridge(
        recipe.qformer.model_copy(update={"dropout": 0.0}),
        language_width=None if projection is None else projection.shape[0],
        has_alignment=name == "stage1",
    ).eval()
    load_bridge(bridge, done.written)
    image = bridge.read_image(golden.get_tensor("in/image_features_pre_ln"))
    if name == "stage1":
        hidden = bridge.qformer.encode_queries(image).hidden
        expected = golden.get_tensor("out/query_hidden")
        feats = bridge.alignment.embed_image(hidden)
        assert (feats - golden.get_tensor("out/image_feats")).abs().max() <= 1e-4
    else:
        ids = golden.get_tensor("in/qformer_input_ids")
        mask = golden.get_tensor("in/qformer_attention_mask")[:, -ids.shape[1] :]
        hidden = bridge.visual_prefix(image, ids, mask)
        expected = golden.get_tensor("out/visual_prefix")
    assert width == 64 and (hidden - expected).abs().max() <= 1e-4
    # And back: every tensor but the leftovers, to the last bit.
    convert(tmp_path / "ours", tmp_path / "back.pth", to="lavis", has_check=False)
    back = open_tensors(tmp_path / "back.pth")
    trained = {k: v for k, v in state.items() if "_model." not in k and "position_ids" not in k}
    assert set(back) == set(trained)
    assert all(torch.equal(back[name], item) for name, item in trained.items())


def test_the_command_says_what_it_did(theirs: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    source = str(theirs["retrieval"][0])
    done = CliRunner().invoke(cli, ["convert", source, str(tmp_path / "out"), "--to", "clover"])
    assert done.exit_code == 0, done.output
    assert "max abs difference of match_logits" in done.output
    assert "filled: temp (not in the source; starts at 0.07)" in done.output
    assert "equal bit by bit" in done.output
    note = json.loads((tmp_path / "out" / "convert.json").read_text())
    assert "Qformer.cls.predictions.bias" in note["filled"] and note["form"] == "transformers"


def stage_2(tmp_path: Path, theirs: dict[str, tuple[Path, Any]]) -> dict[str, Tensor]:
    convert(theirs["instructblip-llama"][0], tmp_path / "full.pth", to="lavis", has_check=False)
    return dict(open_tensors(tmp_path / "full.pth"))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('the pickle was run')",)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("absent", "no file"),
        ("code", "asks for"),
        ("cut off", "is torn, or holds more than tensors"),
        ("other", "is no BLIP-2 checkpoint: it begins with a.weight"),
        ("raw pickle", "nothing was run"),
        ("missing", "it lacks ln_vision.weight"),
        (
            "missing one",
            "tensors are missing, for instance Qformer.bert.encoder.layer.1.intermediate_query",
        ),
        ("missing vision", "missing, for instance visual_encoder.blocks.1.mlp.fc1.weight"),
        ("missing language", "missing, for instance language_model.model.layers.1.mlp.up_proj"),
        ("mis-shaped", "layer.1.intermediate_query.dense.weight is [3, 5], its other tensors want"),
        ("mis-shaped vision", "blocks.1.mlp.fc1.weight is [5, 7], its other tensors want [96, 48]"),
        ("mis-shaped language", "layers.1.mlp.up_proj.weight is [5, 7], its other tensors want"),
        ("architecture", "holds a GPT2LMHeadModel; convert reads InstructBlip"),
        ("shard", "model-00002-of-00002.safetensors is missing (1 of 2 files"),
        ("no encoder", "carries no image encoder"),
        ("no language", "carries no language model"),
    ],
)
def test_a_checkpoint_that_is_none_is_one_line(
    tmp_path: Path, theirs: dict[str, tuple[Path, Any]], damage: str, words: str
) -> None:
    path, to = tmp_path / "bad.pth", "clover"
    state = stage_2(tmp_path, theirs)
    if damage == "code":
        torch.save({"model": Evil()}, path)
    elif damage == "cut off":
        torch.save({"model": state}, path)
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "other":
        torch.save({"a.weight": torch.zeros(2)}, path)
    elif damage == "missing":
        torch.save({n: t for n, t in state.items() if n != "ln_vision.weight"}, path)
    elif damage == "raw pickle":
        path.write_bytes(pickle.dumps({"model": Evil()}))
    elif damage.startswith(("missing ", "mis-shaped")):
        name = {
            "vision": "visual_encoder.blocks.1.mlp.fc1.weight",
            "language": "llm_model.model.layers.1.mlp.up_proj.weight",
        }.get(damage.split()[-1], "Qformer.bert.encoder.layer.1.intermediate_query.dense.weight")
        if damage.startswith("missing"):
            del state[name]
        else:
            state[name] = torch.zeros(5, 7) if " " in damage else torch.zeros(3, 5)
        torch.save({"model": state}, path)
        shutil.copyfile(tmp_path / "full.pth.json", f"{path}.json")
    elif damage in ("architecture", "shard"):
        path = tmp_path / "folder"
        path.mkdir()
        name = "GPT2LMHeadModel" if damage == "architecture" else "Blip2ForImageTextRetrieval"
        tree = {"architectures": [name], "qformer_config": {}, "vision_config": {}}
        (path / "config.json").write_text(json.dumps(tree))
        parts = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        index = {"weight_map": {"a": parts[0], "b": parts[1]}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file({"a": torch.zeros(1)}, str(path / parts[0]))
    elif damage.startswith("no "):
        to = "transformers"
        part = "visual_encoder." if damage == "no encoder" else "llm_model."
        torch.save({n: t for n, t in state.items() if not n.startswith(part)}, path)
    arguments = ["convert", str(path), str(tmp_path / "out"), "--to", to]
    if damage in ("code", "raw pickle", "missing one"):
        # As a user sees it: torch has much to say of a pickle.
        done = subprocess.run(
            [sys.executable, "-m", "clover.cli", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        message = done.stderr.removesuffix("\n")
    else:
        tried = CliRunner().invoke(cli, arguments)
        assert isinstance(tried.exception, CloverError), tried.exception
        message = str(tried.exception)
    assert words in message and "\n" not in message
    assert not (tmp_path / "out" / "bridge.safetensors").exists()


def test_a_bridge_for_another_language_model_is_one_line(
    tmp_path: Path, theirs: dict[str, tuple[Path, Any]]
) -> None:
    convert(theirs["instructblip-llama"][0], tmp_path / "ours", to="clover", has_check=False)
    recipe = load_recipe(tmp_path / "ours" / "recipe.yaml")
    with pytest.raises(CloverError, match="trained for a language model 40 wide, this one is 64"):
        load_bridge(
            Bridge(recipe.qformer, language_width=64), tmp_path / "ours" / "bridge.safetensors"
        )


_LIMITED = """
import resource, sys
from pathlib import Path
from clover.convert.run import convert
from clover.convert import verify, write
import torch, transformers, clover.vision.family.eva_clip
limit = int(sys.argv[3]) + int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
convert(Path(sys.argv[1]), Path(sys.argv[2]), to=sys.argv[4], has_check=False)
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="the limit on a process's own memory is Linux's"
)
@pytest.mark.parametrize("to", ["clover", "lavis"])
def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, to: str) -> None:
    # 0.5 GiB in tensors of 16 MiB, but for one of 94 MiB, with leave to take 200 MiB: what counts
    # is the largest tensor. Of a 16 GB checkpoint that is a 32001 x 4096 embedding, 0.26 to 0.5 GB.
    with torch.device("meta"):
        bridge = Bridge(QFormerConfig(num_layers=1), language_width=4096)
    source = tmp_path / "big.safetensors"
    small = torch.zeros(1)

    def like(shape: tuple[int, ...]) -> Tensor:
        return small.expand(shape)

    from functools import partial

    from clover.qformer.convert import lavis_name_of

    entries = [
        Entry(str(lavis_name_of(name)), item.dtype, tuple(item.shape), partial(like, item.shape))
        for name, item in bridge.state_dict().items()
    ]
    words = (4096, 1024)
    entries += [
        Entry(f"llm_model.layers.{i}.weight", torch.float32, words, partial(like, words))
        for i in range(24)
    ]
    size = write_tensors(source, entries)
    assert size > 500 << 20
    target = tmp_path / ("out" if to == "clover" else "out.pth")
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, source, target, str(200 << 20), to],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]

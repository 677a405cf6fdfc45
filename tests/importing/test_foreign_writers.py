"""Checkpoints of other tools: written by their own packers where there are any, else from the published layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitdistiller_peft import import_model
from bitdistiller_peft.layers import quantized
from bitdistiller_peft.tuner import BitDistillerLayer
from tests.importing import foreign as f
from tests.tiny import load, save_base


def student_weights(source: Path, **settings: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer: the weight that an imported model multiplies by, and its codes."""
    model = import_model(source, **settings).base_model.model
    layers = {
        name: m.student("weight", "default") for name, m in model.named_modules() if isinstance(m, BitDistillerLayer)
    }
    assert layers.keys() == f.LAYERS.keys()
    return {name: (layer().detach(), quantized(layer, "weight")[0]) for name, layer in layers.items()}


@pytest.mark.parametrize(
    ("bits", "section", "zero"),
    [
        (2, {"checkpoint_format": "gptq_v2"}, None),
        (3, {}, None),
        (4, {"checkpoint_format": "gptq", "sym": True}, 8),
        (8, {"format": "gptq"}, None),
        (4, {"desc_act": True, "static_groups": True}, None),
    ],
    ids=["v2-2", "v1-3", "v1-4-symmetric", "v1-8", "static-groups"],
)
def test_gptq(bits: int, section: dict[str, Any], zero: int | None, base: Path, tmp_path: Path, generator) -> None:
    weights = {layer: f.draw(shape, bits, generator, zero=zero) for layer, shape in f.LAYERS.items()}
    folder = f.gptq_folder(base, tmp_path / "gptq", weights, bits, **section)
    for layer, (dense, codes) in student_weights(folder).items():
        assert torch.equal(dense, weights[layer].dense()), layer
        assert torch.equal(codes.long(), weights[layer].codes), layer


def test_gptq_with_layers_of_their_own_width(base: Path, tmp_path: Path, generator) -> None:
    widths = {layer: 4 if "down_proj" in layer else 2 for layer in f.LAYERS}
    weights = {layer: f.draw(shape, widths[layer], generator) for layer, shape in f.LAYERS.items()}
    section = {"quant_method": "gptq", "bits": 2, "dynamic": {r"+:.*down_proj": {"bits": 4}}}
    folder = f.write_folder(base, tmp_path / "gptq", section, lambda layer: f.gptq(weights[layer], widths[layer]))
    for layer, (dense, codes) in student_weights(folder).items():
        assert torch.equal(dense, weights[layer].dense()), layer
        assert int(codes.max()) == (1 << widths[layer]) - 1


def test_gptq_with_zero_biases_as_autogptq_writes_them(base: Path, tmp_path: Path, generator) -> None:
    weights = {layer: f.draw(shape, 4, generator) for layer, shape in f.LAYERS.items()}
    folder = f.gptq_folder(base, tmp_path / "gptq", weights, 4)
    zeros: dict[str, Tensor | None] = {
        f"{layer}.bias": torch.zeros(shape[0]).half() for layer, shape in f.LAYERS.items()
    }
    f.edit(folder, zeros | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    dense, _ = student_weights(folder)[f.DOWN]
    assert torch.equal(dense, weights[f.DOWN].dense())


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodels_own_packing(bits: int, base: Path, tmp_path: Path, generator) -> None:
    pytest.importorskip("gptqmodel", reason="GPTQModel pins another torch; install it without its dependencies")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    weights = {layer: f.draw(shape, bits, generator) for layer, shape in f.LAYERS.items()}

    def pack(layer: str) -> f.Tensors:
        weight, (out_features, in_features) = weights[layer], f.LAYERS[layer]
        linear = nn.Linear(in_features, out_features, bias=False)
        linear.weight.data = weight.dense()
        module = TorchLinear(
            bits=bits, group_size=32, sym=False, desc_act=False, in_features=in_features, out_features=out_features,
            bias=False, pack_dtype=torch.int32, register_buffers=True,
        )  # fmt: skip
        index = torch.arange(in_features, dtype=torch.int32) // 32
        module.pack_original(linear, weight.scale.float(), weight.zero_point.float(), index)
        return {name: getattr(module, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}

    section = {"quant_method": "gptq", "bits": bits, "checkpoint_format": "gptq_v2"}
    folder = f.write_folder(base, tmp_path / "gptq", section, pack)
    for layer, (dense, codes) in student_weights(folder).items():
        assert torch.equal(dense, weights[layer].dense()), layer
        assert torch.equal(codes.long(), weights[layer].codes), layer


@pytest.mark.parametrize("section", [{"version": "GEMM", "bits": 4}, {"version": "gemm", "w_bit": 4}], ids=str)
def test_awq(section: dict[str, Any], base: Path, tmp_path: Path, generator) -> None:
    weights = {layer: f.draw(shape, 4, generator) for layer, shape in f.LAYERS.items()}
    tiny = weights[f.DOWN].scale
    tiny[0] = 1e-5  # AutoAWQ's floor, subnormal in fp16
    section = {"quant_method": "awq", "zero_point": True, **section}
    folder = f.write_folder(base, tmp_path / "awq", section, lambda layer: f.awq(weights[layer]))
    for layer, (dense, codes) in student_weights(folder).items():
        assert torch.equal(dense, weights[layer].dense()), layer
        assert torch.equal(codes.long(), weights[layer].codes), layer


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_compressed_tensors_own_compressor(bits: int, symmetric: bool, base: Path, tmp_path: Path, generator) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    half, dense = 1 << (bits - 1), {}

    def compress(layer: str) -> f.Tensors:
        weight = f.draw(f.LAYERS[layer], bits, generator, zero=half if symmetric else None)
        signed = (weight.zero_point - half).to(torch.int8)
        dense[layer] = weight.dense()
        state = {"weight": weight.dense(), "weight_scale": weight.scale.float()}
        return compressor.compress(state if symmetric else state | {"weight_zero_point": signed}, scheme)

    section = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
        "ignore": ["lm_head"],
    }
    folder = f.write_folder(base, tmp_path / "ct", section, compress)
    for layer, (found, _) in student_weights(folder).items():
        assert torch.equal(found, dense[layer]), layer


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_bitsandbytes_own_nf4(double: bool, storage: torch.dtype, base: Path, tmp_path: Path) -> None:
    from bitsandbytes import functional

    original, dense = load(base), {}

    def compress(layer: str) -> f.Tensors:
        weight = original.get_submodule(layer).weight.detach().clone()
        weight[3, :64] = 0  # a block without a scale
        data, state = functional.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=double, quant_storage=storage
        )
        dense[layer] = functional.dequantize_4bit(data, state)
        return {"weight": data, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}

    section = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    folder = f.write_folder(base, tmp_path / "nf4", section, compress)
    for layer, (found, _) in student_weights(folder).items():
        assert torch.equal(found, dense[layer]), layer
    config = import_model(folder).peft_config["default"]
    assert (config.grid, config.bits, config.group_size, config.scale_dtype) == ("nf4", 4, 64, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_what_transformers_saves_with_bitsandbytes(double: bool, base: Path, tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    theirs = load(base, quantization_config=config, dtype=torch.float32, device_map="cpu")
    theirs.save_pretrained(tmp_path / "nf4")
    for layer, (found, _) in student_weights(tmp_path / "nf4").items():
        weight = theirs.get_submodule(layer).weight
        assert torch.equal(found, dequantize_4bit(weight.data, weight.quant_state)), layer


def write_gguf(base: Path, path: Path, kind: str, quantize: Callable[[np.ndarray], np.ndarray]) -> dict[str, Tensor]:
    """A tiny Llama as llama.cpp's converter lays it out; returns what the `gguf` package makes of its weights."""
    model = load(base)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    dense, quant = {}, gguf.GGMLQuantizationType[kind]
    for name, tensor in model.state_dict().items():
        array, theirs = tensor.numpy(), table.get_name(name, try_suffixes=(".weight",))
        for ending, heads in (
            ("q_proj.weight", config.num_attention_heads),
            ("k_proj.weight", config.num_key_value_heads),
        ):
            if name.endswith(ending):  # as llama.cpp's converter permutes rows
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if name.endswith("_proj.weight"):
            data = quantize(np.ascontiguousarray(array))
            back = gguf.quants.dequantize(data, quant)
            if "q_proj" in name or "k_proj" in name:
                heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                back = back.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
            dense[name.removesuffix(".weight")] = torch.from_numpy(back.copy())
            writer.add_tensor(theirs, data, raw_dtype=quant)
        else:
            writer.add_tensor(theirs, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


@pytest.mark.parametrize(
    ("kind", "arch", "grid", "bits"),
    [
        ("Q4_0", "llama", "int", 4),
        ("Q8_0", "llama", "int_sym", 8),
        ("TQ1_0", "wide", "ternary", 2),
        ("TQ2_0", "wide", "ternary", 2),
    ],
)
def test_ggufs_own_quantizers(
    kind: str, arch: str, grid: str, bits: int, bases: Path, tmp_path: Path, wide: Path
) -> None:
    quant = gguf.GGMLQuantizationType[kind]
    folder = wide if arch == "wide" else save_base("llama", bases)
    dense = write_gguf(folder, tmp_path / "model.gguf", kind, lambda array: gguf.quants.quantize(array, quant))
    found = student_weights(tmp_path / "model.gguf")
    for layer, weight in dense.items():
        assert torch.equal(found[layer][0], weight), layer
    student = import_model(tmp_path / "model.gguf", base=folder)  # whose embeddings and norms are the file's
    config = student.peft_config["default"]
    assert (config.grid, config.bits, config.group_size) == (grid, bits, gguf.GGML_QUANT_SIZES[quant][0])
    assert config.modules_to_save is None


def test_q4_1_whose_minima_are_whole_steps(base: Path, tmp_path: Path, generator) -> None:
    """Bytes made here: d and m in fp16, then 16 codes in the low halves of bytes and 16 in the high."""

    def quantize(array: np.ndarray) -> np.ndarray:
        blocks = (array.shape[0], array.shape[1] // 32)
        codes = torch.randint(0, 16, (*blocks, 32), generator=generator, dtype=torch.uint8)
        step = 2.0 ** torch.randint(-8, -3, blocks, generator=generator)
        minimum = -step * torch.randint(0, 16, blocks, generator=generator)
        numbers = torch.stack((step, minimum), dim=-1).half().view(torch.uint8)
        return torch.cat((numbers, codes[..., :16] | codes[..., 16:] << 4), dim=-1).flatten(1).numpy()

    dense = write_gguf(base, tmp_path / "model.gguf", "Q4_1", quantize)
    for layer, (found, _) in student_weights(tmp_path / "model.gguf").items():
        assert torch.equal(found, dense[layer]), layer


def test_a_mixture_with_other_types_leaves_those_layers_dequantized(base: Path, tmp_path: Path) -> None:
    """llama.cpp's Q5_0 has 32 levels in blocks; nothing here holds it as codes, but its values are known."""

    def quantize(array: np.ndarray) -> np.ndarray:
        return gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q5_0)

    from bitdistiller_peft.errors import ConfigError, ForeignModelError

    write_gguf(base, tmp_path / "model.gguf", "Q5_0", quantize)
    with pytest.raises(ForeignModelError, match=r"Q2_0, Q4_0, Q4_1, Q8_0, TQ1_0, TQ2_0.*got Q5_0.*exclude_modules"):
        import_model(tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match="`exclude_modules` must leave a layer"):
        import_model(tmp_path / "model.gguf", exclude_modules=r".*_proj")


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose widths are multiples of 256, as the ternary types want them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=128,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder := tmp_path_factory.mktemp("wide"))
    return folder

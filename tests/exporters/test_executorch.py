"""The ExecuTorch exporter, on its own runtime: integers, numbers, sizes, limits and how it fails."""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization import IntxUnpackedToInt8Tensor

from qaware.engines.base import QuantizedModel, QuantizedWeight, float_bytes
from qaware.engines.modules import ModulesEngine
from qaware.errors import QawareError
from qaware.exporters import get_exporter
from qaware.exporters.artifact import Artifact
from qaware.exporters.base import Runner
from qaware.exporters.check import check, require_legal
from qaware.exporters.executorch_limits import kernel_bits
from qaware.exporters.isolated import IsolatedRunner
from qaware.exporters.signature import Signature, TensorSpec
from qaware.parity import Parity, compare
from qaware.recipe import Recipe, Rule, recipe_names
from qaware.scheme import Scheme

sys.path.insert(0, str(Path(__file__).parent))
from tiny import SIGNATURE, TinyLM, quantize, tokens

pytest.importorskip("executorch.exir")

EXPORTER = get_exporter("executorch")
INT8 = {"bits": 8, "activation": "int8-dynamic"}
STATIC = {"bits": 8, "activation": "int8-static"}
INT4 = {"bits": 4, "group_size": 32, "activation": "int8-dynamic", "scale_dtype": "bfloat16"}
CHANNEL = {**INT4, "group_size": 0}
EXACT = 1e-6
"""Relative difference where no activation is rounded to the other step."""


class Made(NamedTuple):
    quantized: QuantizedModel
    artifact: Artifact
    run: Runner


def convert(model: nn.Module, recipe: str | dict | Recipe) -> QuantizedModel:
    work = copy.deepcopy(model).eval()
    plan = Recipe.load(recipe).match(work)
    engine = ModulesEngine()
    return engine.convert(engine.prepare(work, plan), plan)


def rules(linear: dict | None = None, embedding: dict | None = None) -> dict:
    given = {"Linear": linear, "Embedding": embedding}
    return {"rules": [{"type": t, "scheme": s} for t, s in given.items() if s is not None]}


def make(quantized: QuantizedModel, path: Path, signature: Signature, *example: Tensor) -> Made:
    artifact = EXPORTER.export(quantized, example, signature, path)
    return Made(quantized, artifact, EXPORTER.open(path, signature))


def distance(made: Made, *inputs: tuple[Tensor, ...], reference: nn.Module | None = None) -> Parity:
    module = reference or EXPORTER.reference(made.quantized)
    return compare(made.run, made.artifact.signature.wrap(module).eval(), inputs)


LOW = ["int3-weight", "int2-weight", "ternary-weight"]
LEGAL = ["int8-dynamic", "int8-dynamic-int4-weight", "float16", *LOW]


class Residual(nn.Module):
    """One embedding that is the head too, and a residual layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.norm = nn.RMSNorm(64)
        self.mix = nn.Linear(64, 64)
        self.lm_head = nn.Linear(64, 96, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.lm_head(x + F.silu(self.mix(self.norm(x))))


def converted(recipe: str | Recipe) -> QuantizedModel:
    """TinyLM; for the widths that only change what is stored, a model of fewer operators: each takes time to
    lower."""
    if recipe not in LEGAL[2:]:
        return quantize(recipe, tie=recipe != "int8-dynamic")
    torch.manual_seed(0)
    return convert(Residual(), recipe)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """Exports, one for each set of schemes: lowering takes about ten seconds."""
    folder = tmp_path_factory.mktemp("executorch")
    cache: dict[str, Made] = {}

    def get(recipe: str | Recipe) -> Made:
        quantized = converted(recipe)
        key = str([(d.module, d.scheme) for d in quantized.plan.decisions])
        if key not in cache:
            # The shortest legal example, which torch.export would take for a constant.
            cache[key] = make(quantized, folder / f"{len(cache)}.pte", SIGNATURE, tokens(1))
        return cache[key]

    return get


def single(layer: nn.Module, scheme: dict, path: Path, seed: int = 0) -> Made:
    """One quantized layer on five rows, or nine tokens of fifty."""
    generator = torch.Generator().manual_seed(seed)
    kind = type(layer).__name__
    quantized = convert(nn.Sequential(layer), {"rules": [{"type": kind, "scheme": scheme}]})
    if kind == "Embedding":
        example = torch.randint(0, layer.num_embeddings, (1, 9), generator=generator)
    else:
        example = torch.randn(5, layer.in_features, generator=generator)
    spec = TensorSpec("x", str(example.dtype).removeprefix("torch."), tuple(example.shape))
    return make(quantized, path / "layer.pte", Signature((spec,)), example)


# --- what is in the file ------------------------------------------------------------------------


def xnnpack_weights(path: Path, folder: Path) -> list[tuple[str, Tensor, Tensor | None]]:
    """Datatype, stored values (rows, width) and float32 scales of the fully connected layers, read from
    the file: ExecuTorch's container, then XNNPACK's own flatbuffer of each delegate."""
    import executorch.backends.xnnpack.serialization as schemas
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_decompile
    from executorch.exir._serialize._program import deserialize_pte_binary

    schema = Path(schemas.__path__[0]) / "schema.fbs"
    file = deserialize_pte_binary(path.read_bytes())
    blobs = {k: bytes(file.named_data.buffers[e.buffer_index]) for k, e in file.named_data.pte_data.items()}
    found = []
    for i, inline in enumerate(file.program.backend_delegate_data):
        payload = bytes(inline.data)
        header = XNNHeader.from_bytes(payload[:30])
        start = header.flatbuffer_offset
        (folder / f"{i}.bin").write_bytes(payload[start : start + header.flatbuffer_size])
        _flatc_decompile(str(folder), str(schema), str(folder / f"{i}.bin"), ["--raw-binary"])
        graph = json.loads((folder / f"{i}.json").read_text())
        keys = [c["named_key"] for c in graph["constant_data"]]
        values = {value_of(v)["id_out"]: v["xvalue_union"] for v in graph["xvalues"]}
        for node in graph["xnodes"]:
            if node["xnode_union_type"] == "XNNFullyConnected":
                found.append(unpack(values[node["xnode_union"]["filter_id"]], keys, blobs))
    return found


def value_of(value: dict) -> dict:
    union = value["xvalue_union"]
    return union.get("tensor_value", union)


def unpack(union: dict, keys: list[str], blobs: dict[str, bytes]) -> tuple[str, Tensor, Tensor | None]:
    tensor = union.get("tensor_value", union)
    kind = tensor["datatype"].removeprefix("xnn_datatype_")
    rows, width = tensor["dims"]
    data = bytearray(blobs[keys[tensor["constant_buffer_idx"]]])
    if kind == "fp16":
        return kind, torch.frombuffer(data, dtype=torch.float16).view(rows, width), None
    quant = union["quant_params"]
    scales = bytearray(blobs[keys[quant["scale_buffer_idx"]]])
    if kind == "qbint4":
        low_first = torch.frombuffer(data, dtype=torch.uint8).view(rows, -1)
        integers = torch.stack([low_first & 15, low_first >> 4], -1).view(rows, width).to(torch.int8) - 8
        assert quant["group_size"] * quant["num_scales"] == rows * width
        return kind, integers, torch.frombuffer(scales, dtype=torch.bfloat16).view(rows, -1).float()
    return (
        kind,
        torch.frombuffer(data, dtype=torch.int8).view(rows, width),
        torch.frombuffer(scales, dtype=torch.float32).view(rows, -1),
    )


def constants(path: Path) -> list[bytes]:
    """What portable kernels read: tables of embeddings and their scales."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    return [bytes(b.storage) for b in deserialize_pte_binary(path.read_bytes()).program.constant_buffer]


def packed_table(weight: QuantizedWeight) -> bytes:
    data = weight.data
    if weight.scheme.bits == 4:
        unsigned = (data + 8).to(torch.uint8)
        data = unsigned[:, ::2] << 4 | unsigned[:, 1::2]
    return bytes(data.contiguous().view(torch.uint8).flatten().tolist())


def missing_linears(weights: dict[str, QuantizedWeight], made: Made, folder: Path) -> list[str]:
    """Linear layers whose integers and scales are not in the file, bit for bit."""
    kinds = {4: "qbint4", 8: "qcint8", None: "fp16"}
    stored = xnnpack_weights(made.artifact.path, folder)

    def same(name: str, kind: str, data: Tensor, scale: Tensor | None) -> bool:
        weight = weights[name]
        if kind != kinds[kernel_bits(made.quantized.plan.layer(name))] or not torch.equal(data, weight.data):
            return False
        return weight.scale is None or torch.equal(scale, weight.scale)

    linears = [n for n, w in weights.items() if made.quantized.plan.layer(n).type == "Linear"]
    assert len(stored) == len(linears)
    return [n for n in linears if not any(same(n, *s) for s in stored)]


@pytest.mark.parametrize("recipe", LEGAL)
def test_the_file_holds_the_integers_and_scales_of_the_engine(
    exported: Callable[..., Made], recipe: str, tmp_path: Path
) -> None:
    made = exported(recipe)
    assert missing_linears(made.quantized.weights, made, tmp_path) == []
    table, stored = made.quantized.weights["embed"], constants(made.artifact.path)
    assert packed_table(table) in stored
    if table.scale is not None:
        assert packed_table(QuantizedWeight(table.scale, None, None, Scheme(8))) in stored


@pytest.mark.parametrize("recipe", LEGAL[:2])
def test_one_changed_integer_or_scale_is_seen(
    exported: Callable[..., Made], recipe: str, tmp_path: Path
) -> None:
    made = exported(recipe)
    for name in ("qkv", "down_proj", "lm_head"):
        for field, change in (("data", 1), ("scale", 2.0**-20)):
            weights = copy.deepcopy(made.quantized.weights)
            value = getattr(weights[name], field)
            value[3, 0] += -change if field == "data" and value[3, 0] > 0 else change
            assert missing_linears(weights, made, tmp_path) == [name]
    table = copy.deepcopy(made.quantized.weights["embed"])
    table.data[5, 7] ^= 1
    assert packed_table(table) not in constants(made.artifact.path)


def test_sizes_show_the_bits(exported: Callable[..., Made]) -> None:
    """Of 164 kB: 32 kB of graph; the tied weight twice, once for the embedding and once for the head."""
    size = {recipe: exported(recipe).artifact.bytes for recipe in LEGAL[:2]}
    whole = float_bytes(TinyLM())
    assert size["int8-dynamic"] / whole < 0.45
    assert size["int8-dynamic-int4-weight"] / whole < 0.32


@pytest.mark.parametrize(("scheme", "share"), [(INT4, 0.15), (INT8, 0.26), ({"bits": 16}, 0.51)])
def test_size_of_one_large_layer(tmp_path: Path, scheme: dict, share: float) -> None:
    """4.5, 8.1 and 16 of 32 bits a weight, and 3 kB of graph."""
    made = single(nn.Linear(512, 512, bias=False), scheme, tmp_path)
    assert share - 0.015 < made.artifact.bytes / (4 * 512 * 512) < share


# --- numbers ------------------------------------------------------------------------------------


# Static ones need another engine; test_static_int8.py has them. The grids of other roundings are among these.
@pytest.mark.parametrize(
    "recipe", [name for name in recipe_names() if "static" not in name and not Recipe.load(name).rounds]
)
def test_every_recipe_agrees_or_the_nearest_legal_one_does(
    exported: Callable[..., Made], recipe: str
) -> None:
    plan = Recipe.load(recipe).match(TinyLM(tie=True))
    problems = check(plan, [EXPORTER])
    assert bool(problems) is (recipe not in LEGAL)
    nearest = plan.recipe.prepend(*[Rule(p.nearest, name=p.layer) for p in problems])
    assert check(nearest.match(TinyLM(tie=True)), [EXPORTER]) == []
    made = exported(nearest if problems else recipe)
    parity = distance(made, *[(tokens(n, n),) for n in (1, 2, 17, 33, 64)])
    assert parity.within(EXPORTER.tolerance)
    # Measured 0.001 to 0.004; the tolerance leaves room for depth.
    assert parity.relative < 0.008
    assert parity.kl < 2e-5
    assert parity.top1 > 0.95


@pytest.mark.parametrize("recipe", LEGAL)
def test_every_length(exported: Callable[..., Made], recipe: str) -> None:
    made = exported(recipe)
    assert distance(made, *[(tokens(n, n),) for n in range(1, 65)]).within(EXPORTER.tolerance)


def test_outputs_are_float32_and_the_callers_own(exported: Callable[..., Made]) -> None:
    run = exported("float16").run
    first = run(tokens(9, 1))
    kept = first.clone()
    gc.collect()
    run(tokens(9, 2))
    assert torch.equal(first, kept)
    assert first.dtype == torch.float32


@pytest.mark.parametrize("recipe", LEGAL[:2])
def test_the_tolerance_sees_a_dropped_scale_and_exchanged_integers(
    exported: Callable[..., Made], recipe: str
) -> None:
    made = exported(recipe)
    for name, weight in made.quantized.weights.items():
        for what in ("scale", "integers"):
            other = copy.deepcopy(made.quantized.module)
            layer = other.get_submodule(name)
            if what == "scale":
                layer.weight.scale.fill_(1)
            else:  # as if the halves of each byte were read in the wrong order
                layer.weight.qdata.copy_(weight.data.view(-1, 2).flip(1).reshape(weight.data.shape))
            assert not distance(made, (tokens(64),), reference=other).within(EXPORTER.tolerance), (name, what)


def test_a_file_with_one_wrong_scale_does_not_pass(tmp_path: Path) -> None:
    torch.manual_seed(0)
    good = convert(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)), rules(INT4))
    wrong = copy.deepcopy(good)
    wrong.module[2].weight.scale.mul_(1.25)
    x = torch.randn(8, 64)
    made = make(wrong, tmp_path / "a.pte", Signature((TensorSpec("x", "float32", (8, 64)),)), x)
    assert distance(made, (x,)).relative < 0.01
    assert not distance(made, (x,), reference=good.module).within(EXPORTER.tolerance)


# --- limits -------------------------------------------------------------------------------------


REFUSED = [
    (nn.Linear(64, 8), {"bits": 8}, "weight-only int8", "int8 channel + int8-dynamic"),
    (nn.Linear(64, 8), {**INT4, "activation": "none"}, "weight-only int4", "int4 g32 + int8-dynamic"),
    (nn.Linear(64, 8), {**INT8, "symmetric": False}, "zero points", "int8 channel + int8-dynamic"),
    (nn.Linear(64, 8), {**INT4, "symmetric": False}, "zero points", "int4 g32 + int8-dynamic"),
    (nn.Linear(64, 8), {**INT4, "group_size": 16}, "multiple of 32", "int4 g32 + int8-dynamic"),
    (nn.Linear(172, 8), CHANNEL, "not 172", "int8 channel + int8-dynamic"),
    (nn.Linear(64, 8), {**INT4, "scale_dtype": "float32"}, "bfloat16", "int4 g32 + int8-dynamic"),
    (nn.Linear(64, 8), {**CHANNEL, "scale_dtype": "float16"}, "bfloat16", "int4 channel + int8-dynamic"),
    (nn.Linear(64, 8), {**INT8, "group_size": 32}, "no groups", "int8 channel + int8-dynamic"),
    (nn.Linear(64, 8), {**INT8, "bits": 6}, "int6 linear", "int8 channel + int8-dynamic"),
    (nn.Linear(64, 8), {**STATIC, "symmetric": False}, "zero points", "int8 channel + int8-static"),
    (nn.Embedding(50, 64), {"bits": 3}, "int3 embeddings", "int4 channel"),
    (nn.Embedding(50, 47), {"bits": 4}, "does not divide 47", "int8 channel"),
    (nn.Embedding(50, 66), {"bits": 2}, "does not divide 66", "int4 channel"),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "scheme", "why", "nearest"), REFUSED, ids=str)
def test_refusals_name_the_layer_and_the_nearest_choice(
    layer: nn.Module, scheme: dict, why: str, nearest: str
) -> None:
    plan = Recipe.load({"rules": [{"type": type(layer).__name__, "scheme": scheme}]}).match(
        nn.Sequential(layer)
    )
    (problem,) = check(plan, [EXPORTER])
    assert problem.layer == "0"
    assert why in problem.message
    assert problem.nearest.label == nearest
    with pytest.raises(QawareError, match=r"^recipe 'custom': 0: executorch: .*nearest legal: int"):
        require_legal(plan, [EXPORTER])


@pytest.mark.parametrize("case", [4, 8, 12], ids=lambda i: REFUSED[i][2])
def test_what_else_is_refused_cannot_be_lowered(tmp_path: Path, case: int) -> None:
    layer, scheme, *_ = REFUSED[case]
    with pytest.raises(QawareError, match=r"^executorch: export failed: [^\n]*$"):
        single(layer, scheme, tmp_path)
    assert list(tmp_path.iterdir()) == []


SIDES = {
    "row": (nn.Linear(64, 1), INT8),
    "odd": (nn.Linear(47, 5), {**INT8, "scale_dtype": "float16"}),
    "nobias": (nn.Linear(96, 8, bias=False), {**INT4, "group_size": 96}),
    "channel": (nn.Linear(64, 1), CHANNEL),
    "half": (nn.Linear(47, 3), {"bits": 16}),
    "only8": (nn.Linear(64, 8), {"bits": 8}),
    "only4": (nn.Linear(64, 8), {**INT4, "activation": "none"}),
    "scale32": (nn.Linear(64, 8), {**INT4, "scale_dtype": "float32"}),
    "scale16": (nn.Linear(64, 8), {**CHANNEL, "scale_dtype": "float16"}),
    "zero": (nn.Linear(64, 8), INT8),
}
"""Linear layers side by side, for one export in place of ten."""


class Sides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        for name, (layer, _) in SIDES.items():
            fresh = copy.deepcopy(layer)
            fresh.reset_parameters()  # by the seed above, not by what was drawn when tests were collected
            self.add_module(f"l_{name}", fresh)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x[:, : layer.in_features]) for layer in self.children()], -1)


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parity]:
    """How far each layer is from what was converted."""
    recipe = {"rules": [{"name": f"l_{n}", "scheme": s} for n, (_, s) in SIDES.items()]}
    quantized = convert(Sides(), recipe)
    quantized.module.l_zero.weight.zero_point.fill_(20)
    x = torch.randn(5, 96)
    signature = Signature((TensorSpec("x", "float32", (5, 96)),))
    made = make(quantized, tmp_path_factory.mktemp("sides") / "a.pte", signature, x)
    got, wanted = made.run(x), quantized.module(x)
    widths = [layer.out_features for layer, _ in SIDES.values()]
    pairs = zip(SIDES, got.split(widths, -1), wanted.split(widths, -1), strict=True)
    return {n: compare(lambda _, g=g: g, lambda _, w=w: w, [(x,)]) for n, g, w in pairs}


@pytest.mark.parametrize("name", SIDES)
def test_what_is_refused_for_silence_is_wrong_and_the_rest_is_exact(
    sides: dict[str, Parity], name: str
) -> None:
    refused = name in ("only8", "only4", "scale32", "scale16")
    layer, scheme = SIDES[name]
    plan = Recipe.load(rules(scheme)).match(nn.Sequential(layer))
    assert bool(check(plan, [EXPORTER])) is refused
    if refused or name == "zero":
        assert sides[name].relative > (1e-3 if name.startswith("scale") else 0.1)
    else:
        assert sides[name].relative < (1e-3 if name == "half" else EXACT)


class Tables(nn.Module):
    """Embeddings of every width and their options that concern training only; one is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.byte = nn.Embedding(50, 48, padding_idx=3)
        self.nibble = nn.Embedding(50, 48, sparse=True)
        self.pair = nn.Embedding(50, 48, scale_grad_by_freq=True)
        self.odd = nn.Embedding(50, 48)
        self.float16 = nn.Embedding(50, 48, padding_idx=0)

    def forward(self, ids: Tensor) -> Tensor:
        other = (ids + 1) % 50
        first = [self.byte(ids), self.nibble(ids), self.pair(ids), self.odd(ids), self.float16(ids)]
        return torch.cat([*first, self.nibble(other)], -1)


def test_embeddings_are_exact(tmp_path: Path) -> None:
    schemes = {
        "byte": {"bits": 8, "group_size": 16, "symmetric": False},
        "nibble": {"bits": 4, "group_size": 6},
        "pair": {"bits": 2, "group_size": 24, "scale_dtype": "bfloat16"},
        "odd": {"bits": 4, "group_size": 3, "symmetric": False},
        "float16": {"bits": 16},
    }
    quantized = convert(Tables(), {"rules": [{"name": n, "scheme": s} for n, s in schemes.items()]})
    assert check(quantized.plan, [EXPORTER]) == []
    signature = Signature((TensorSpec("ids", "int64", ("n",), 0, 49),), {"n": (1, 50)})
    made = make(quantized, tmp_path / "a.pte", signature, torch.arange(5))
    ids = torch.arange(50)
    assert torch.equal(made.run(ids), quantized.module(ids))


# --- models -------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A model of transformers, whose own mask is not exportable."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return self.model(input_ids=input_ids, use_cache=False).logits
        length = input_ids.shape[1]
        at = torch.arange(length)
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        return self.model(input_ids, attention_mask=mask, position_ids=at[None], use_cache=False).logits


def test_llama_with_grouped_query_attention(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,  # each takes ten seconds to lower; test_executorch_cache.py has two
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    quantized = convert(Wrapped(LlamaForCausalLM(config)), "int8-dynamic-int4-weight")
    made = make(quantized, tmp_path / "a.pte", SIGNATURE, tokens(3))
    parity = distance(made, *[(tokens(n, n),) for n in (1, 2, 17, 33, 64)])
    assert parity.within(EXPORTER.tolerance)
    assert parity.relative < 0.01
    assert missing_linears(made.quantized.weights, made, tmp_path) == []


class Keywords(nn.Module):
    """A quantized layer used twice, float ones, inputs that share axes, one by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 64)
        self.again = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.register_buffer("shift", torch.ones(64))

    def forward(self, x: Tensor, *, gain: Tensor) -> dict[str, Tensor]:
        y = self.norm(self.first(x)) + self.shift
        return {"y": self.again(self.again(y).relu()) * gain.unsqueeze(-1)}


@pytest.mark.parametrize(
    ("scheme", "dtype"), [(INT4, torch.bfloat16), ({"bits": 16}, torch.float32)], ids=str
)
def test_keywords_symbols_and_bfloat16(tmp_path: Path, scheme: dict, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    signature = Signature(
        (
            TensorSpec("x", "float32", ("b", "n", "c")),
            TensorSpec("gain", "float32", ("b", "n"), keyword="gain"),
        ),
        {"b": (1, 4), "n": (1, 20), "c": (3, 3)},
    )
    quantized = convert(Keywords().to(dtype), {"rules": [{"name": "again", "scheme": scheme}]})
    made = make(quantized, tmp_path / "a.pte", signature, torch.randn(1, 1, 3), torch.randn(1, 1))
    full = torch.randn(4, 20, 3), torch.randn(4, 20)
    assert distance(made, full, (torch.randn(1, 1, 3), torch.randn(1, 1))).relative < 0.01
    assert quantized.module.first.weight.dtype == dtype


# --- behaviour ----------------------------------------------------------------------------------


def test_the_callers_model_stays_as_it_is_and_trainable(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(50, 64, padding_idx=2, sparse=True), nn.Linear(64, 8), nn.Linear(8, 2))
    recipe = {"rules": [{"name": "2"}, *rules({"bits": 16}, {"bits": 4})["rules"]]}
    quantized = convert(model, recipe)
    quantized.module[2].requires_grad_(True).train()
    before = {n: (id(m), type(m), m.training) for n, m in quantized.module.named_modules()}
    state = {
        k: v.dequantize() if hasattr(v, "qdata") else v.clone()
        for k, v in quantized.module.state_dict().items()
    }
    signature = Signature((TensorSpec("ids", "int64", (1, 4), 0, 49),))
    make(quantized, tmp_path / "a.pte", signature, tokens(4) % 50)
    assert {n: (id(m), type(m), m.training) for n, m in quantized.module.named_modules()} == before
    assert quantized.module[0].padding_idx == 2
    assert quantized.module[0].sparse
    assert isinstance(quantized.module[0].weight, IntxUnpackedToInt8Tensor)
    for key, value in quantized.module.state_dict().items():
        assert torch.equal(value.dequantize() if hasattr(value, "qdata") else value, state[key])
    quantized.module(tokens(4) % 50).sum().backward()
    assert quantized.module[2].weight.grad is not None


def test_damaged_files_and_wrong_inputs_are_one_line(
    exported: Callable[..., Made], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = exported("float16")
    whole = made.artifact.path.read_bytes()
    # A short name: the runtime cuts what it says, and a long one would leave no room for the error's number.
    missing = Path("none.pte")
    for name, data in {
        "text": b"x" * 500,
        "empty": b"",
        "cut": whole[:-100],
        "half": whole[: len(whole) // 2],
    }.items():
        path = tmp_path / f"{name}.pte"
        path.write_bytes(data)
        with pytest.raises(QawareError, match=rf"^{name}\.pte: cannot be loaded: [^\n]*error 0x[^\n]*$"):
            EXPORTER.open(path, SIGNATURE)
    with pytest.raises(QawareError, match=r"truncated one .*; it said: .*too small"):
        EXPORTER.open(tmp_path / "cut.pte", SIGNATURE)
    with pytest.raises(QawareError, match=r"cannot be opened .*none.pte"):
        EXPORTER.open(missing, SIGNATURE)
    assert capfd.readouterr().err == ""
    with pytest.raises(QawareError, match=r"cannot run: an input has a size .* \(error 0x10\)"):
        made.run(tokens(65))
    with pytest.raises(QawareError, match=r"cannot run: an argument is not legal.* \(error 0x12\)"):
        made.run(tokens(8).float())
    assert made.run(tokens(64)).shape == (1, 64, 96)


def test_isolated_and_the_signature_speaks_first(exported: Callable[..., Made]) -> None:
    made = exported("int8-dynamic-int4-weight")
    with IsolatedRunner(Artifact.open(made.artifact.path)) as run:
        assert torch.equal(run(tokens(20)), made.run(tokens(20)))
        with pytest.raises(QawareError, match="input_ids: seq is 65, must be 1 to 64"):
            run(tokens(65))
        with pytest.raises(QawareError, match="input_ids: value 96 is outside 0 to 95"):
            run(torch.full((1, 4), 96))


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert EXPORTER.missing() is None
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name.startswith("executorch") else find(name, *a),
    )
    assert EXPORTER.missing().endswith("is not installed; pip install 'qaware[executorch]'")
    with pytest.raises(QawareError, match="executorch"):
        EXPORTER.export(quantize("int8-dynamic"), (tokens(4),), SIGNATURE, tmp_path / "a.pte")


QUIET = """
import logging
import sys
import torch
from pathlib import Path
from qaware.exporters import get_exporter
sys.path.insert(0, sys.argv[1])
from tiny import *

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(96, 64), nn.Linear(64, 96)
    def forward(self, ids):
        return self.head(self.embed(ids))

model = Small().eval()
plan = Recipe.load("int8-dynamic-int4-weight").match(model)
engine = ModulesEngine()
quantized = engine.convert(engine.prepare(model, plan), plan)
exporter = get_exporter("executorch")
assert "executorch" not in sys.modules
artifact = exporter.export(quantized, (tokens(4),), SIGNATURE, Path(sys.argv[2]) / "a.pte")
exporter.open(artifact.path, SIGNATURE)(tokens(7))
assert logging.getLogger().handlers == []
"""


def test_nothing_is_printed_and_nothing_imported_early(tmp_path: Path) -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(here), str(tmp_path)],
        cwd=here.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

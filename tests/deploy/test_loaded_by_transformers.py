"""Exported folders, loaded by transformers in one fresh process that cannot import this package.

Each beside a dense folder, which the unmodified model was saved to with its weights cast by `gws_compile.quantize`.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exports import cast_state, evaluated, hard_weight
from torch import nn

import gws_compile

DTYPES = ("float32", "bfloat16", "float16")

LOADER = """
import json, os, sys
sys.modules["gws_compile"] = None  # as if it was not installed
import torch, transformers, warnings
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, CompressedTensorsConfig
warnings.simplefilter("ignore")
transformers.logging.set_verbosity(60)
transformers.logging.disable_progress_bar()
torch.manual_seed(0)

def logits(model, tokens):
    with torch.no_grad():
        return model.eval()(tokens).logits

results = {}
for name, case in json.load(open("cases.json")).items():
    kind = getattr(transformers, case["kind"])
    tokens = torch.tensor(case["tokens"])
    for dtype in case["dtypes"]:
        asked = getattr(torch, dtype)
        how = dict(quantization_config=CompressedTensorsConfig(dequantize=True)) if case["dequantize"] else {}
        found = {"error": None}
        results[f"{name} {dtype}"] = found
        try:
            model = kind.from_pretrained(name, dtype=asked, **how)
            dense = kind.from_pretrained(f"{name}_dense", dtype=asked)
            got, wanted = logits(model, tokens), logits(dense, tokens)
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"
            continue
        state, expected = model.state_dict(), dense.state_dict()
        packed = set(case["packed"])
        rounded = getattr(torch, case["rounded"] or dtype)

        def same(name, a, b):
            a, b = a.to(asked), b.to(rounded).to(asked) if name in packed else b
            if case["signless"] and name in packed:
                a, b = a + 0.0, b + 0.0
            a, b = a.contiguous(), b.contiguous()
            return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))

        found["different"] = [n for n, v in expected.items() if n not in state or not same(n, state[n], v)]
        found["dtypes"] = sorted({str(v.dtype) for n, v in state.items() if n in expected})
        found["logits"] = torch.equal(got, wanted)
        if case["evaluation"] is not None and dtype == "float32":
            compiled = torch.load(case["evaluation"])
            found["near"] = bool(torch.allclose(got, compiled, rtol=1e-5, atol=1e-6))
json.dump(results, open("results.json", "w"))
"""


def llama(*, tie: bool = True, dtype: torch.dtype = torch.float32, kind: str = "LlamaForCausalLM") -> nn.Module:
    """Keys and values of 12 rows; weights that are hard to store in every layer."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=1, head_dim=12 if tie else 16, max_position_embeddings=64, tie_word_embeddings=tie,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    model = getattr(transformers, kind)(config)
    for number, (name, weight) in enumerate(model.named_parameters()):
        if name.endswith("proj.weight"):
            with torch.no_grad():
                weight.copy_(hard_weight(*weight.shape, seed=number) * 0.1)
    return model.to(dtype)


def qwen_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=96, hidden_size=64, intermediate_size=96, moe_intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
            decoder_sparse_step=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def phi() -> nn.Module:
    """Queries, keys and values in one layer, gate and up in another."""
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(
        Phi3Config(
            vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    from support.models import gpt2

    return gpt2().eval()


@dataclass
class Case:
    """An export.

    Attributes:
        model: makes the model.
        settings: of the backend.
        quantize: arguments of `gws_compile.quantize` for a weight by its name; None for one that stays as it is.
        dtypes: in which transformers is to load it exactly.
        rounded: the dtype that transformers decodes in, where that is another one.
        dequantize: whether it is loaded with ``dequantize=True``.
        signless: the container has no -0.
        format: of the export.
        prepare: called with backend and model before the evaluation.
    """

    model: Any
    settings: dict
    quantize: Any = None
    dtypes: tuple[str, ...] = DTYPES
    rounded: str | None = None
    dequantize: bool = True
    signless: bool = False
    format: str | None = None
    kind: str = "AutoModelForCausalLM"
    prepare: Any = None
    arguments: dict = field(default_factory=dict)


def rules_of(name: str) -> dict[str, Any]:
    if ".mlp." in name:
        return {"fmt": "mxfp4"}
    return {"fmt": "fp8_channel", "scale": "floor"} if "o_proj" in name else {"fmt": "mxfp8"}


def all_as(**arguments: Any) -> Any:
    return lambda name: arguments


def freeze(*, per_weight: bool) -> Any:
    """Widths of several formats, frozen."""

    def prepared(pqt: gws_compile.Backend, model: nn.Module, tokens: torch.Tensor) -> None:
        pqt.prepare(model, tokens)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in pqt.named_parameters():
            parameter.data = torch.rand(parameter.shape, generator=generator) * 2 - 0.5 * ("mlp" in name)
        pqt.freeze_bits(per_weight=per_weight)

    return prepared


FORMATS = ("fp4_e2m1", "fp6_e2m3", "fp8_e4m3")
LEARNED = {
    "fmt": "fp8_e4m3",
    "bits": gws_compile.LearnedBits(init=5.0, target=3.0, min=2.0, max=5.0, formats=FORMATS),
}

CASES = {
    "mxfp8": Case(llama, {"fmt": "mxfp8"}),
    "mxfp4": Case(llama, {"fmt": "mxfp4"}),
    "mxfp6": Case(llama, {"fmt": "mxfp6"}),
    "nvfp4_powers": Case(llama, {"fmt": "fp4_e2m1", "block": (16, 16)}, format="nvfp4"),
    "nvfp4": Case(llama, {"fmt": "nvfp4"}, rounded="bfloat16", dtypes=("float32", "bfloat16")),
    "fp8_channel": Case(llama, {"fmt": "fp8_channel"}),
    "fp8_tensor": Case(llama, {"fmt": "fp8_tensor"}),
    "fp8_block": Case(llama, {"fmt": "fp8_block"}),
    "int4": Case(llama, {"fmt": "int4_group", "block": (1, 32)}, signless=True),
    "int8": Case(llama, {"fmt": "int8_channel"}, signless=True),
    "e3m2": Case(llama, {"fmt": "fp6_e3m2"}),
    "rules": Case(
        llama,
        {"fmt": "mxfp8", "rules": [("*.mlp.*", "mxfp4"), ("*o_proj*", {"fmt": "fp8_channel", "scale": "floor"})]},
        rules_of,
        dtypes=("bfloat16",),
        dequantize=False,
    ),
    "untied": Case(llama, {"fmt": "mxfp8"}, arguments={"tie": False}),
    "head": Case(llama, {"fmt": "mxfp8", "include": "*", "exclude": ()}),
    "bf16": Case(llama, {"fmt": "mxfp8"}, arguments={"dtype": torch.bfloat16}),
    "bf16_channel": Case(llama, {"fmt": "fp8_channel"}, dtypes=("bfloat16",), arguments={"dtype": torch.bfloat16}),
    "bf16_nvfp4": Case(llama, {"fmt": "nvfp4"}, arguments={"dtype": torch.bfloat16}),
    "fp16": Case(llama, {"fmt": "mxfp4"}, arguments={"dtype": torch.float16}),
    "fp16_int4": Case(
        llama, {"fmt": "int4_group", "block": (1, 64)}, dtypes=("float16",), signless=True,
        arguments={"dtype": torch.float16},
    ),
    "odd_rows": Case(
        llama, {"fmt": "mxfp8", "exclude": ()}, kind="AutoModelForSequenceClassification",
        arguments={"kind": "LlamaForSequenceClassification"},
    ),
    "dense": Case(llama, {"fmt": "fp8_e5m2"}, dequantize=False, format="dense"),
    "experts_mxfp4": Case(qwen_moe, {"fmt": "mxfp4"}),
    "experts_fp8": Case(qwen_moe, {"fmt": "fp8_channel"}),
    "fused_qkv": Case(phi, {"fmt": "mxfp4"}),
    "gpt2": Case(gpt2, {"fmt": "mxfp4"}, dequantize=False, format="dense"),
    "frozen_weights": Case(
        llama, LEARNED, "learned", prepare=freeze(per_weight=True), format="mxfp8", dtypes=("float32", "bfloat16")
    ),
    "frozen_blocks": Case(llama, LEARNED, "learned", prepare=freeze(per_weight=False), dtypes=("float32", "bfloat16")),
}  # fmt: skip

FIRST = ("mxfp8", "nvfp4_powers", "nvfp4", "fp8_channel", "int4", "rules", "experts_mxfp4", "frozen_blocks", "head")
"""Those that the default tests look at."""

TOKENS = [[3, 14, 15, 92, 6, 5, 35, 89], [27, 18, 28, 18, 2, 84, 5, 90]]


def expected_state(case: Case, model: nn.Module, pqt: gws_compile.Backend) -> dict[str, torch.Tensor]:
    """The state of the model with its weights cast by the public reference, weight by weight."""
    rewritten = {record.name for record in pqt.report().rewritten}
    casts = {}
    for name in rewritten:
        if case.quantize == "learned":
            widths = pqt.bits()[name]
            casts[name] = lambda w, widths=widths: by_widths(w, widths)
            continue
        arguments = case.quantize(name) if case.quantize else case.settings
        accepted = {key: arguments[key] for key in ("fmt", "block", "scale") if key in arguments}
        casts[name] = lambda w, accepted=accepted: gws_compile.quantize(w, **accepted)
    return cast_state(model, casts)


def by_widths(w: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """Each block in the format that its width stands for, with widths of 3, 5 and more."""
    rows = torch.arange(w.shape[0]) // 32
    columns = torch.arange(w.shape[1]) // 32
    of_element = widths[rows[:, None], columns] if widths.ndim else widths.expand(w.shape)
    cast = torch.empty_like(w)
    for fmt, low, high in zip(FORMATS, (0, 3.01, 5.01), (3.01, 5.01, 99), strict=True):
        chosen = (of_element > low) & (of_element <= high)
        cast[chosen] = gws_compile.quantize(w, fmt)[chosen]
    return cast


def export(name: str, case: Case, folder: Path) -> dict[str, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = case.model(**case.arguments).eval()
    tokens = torch.tensor(TOKENS)
    pqt = gws_compile.backend(inner="eager", **case.settings)
    if case.prepare is not None:
        case.prepare(pqt, model, tokens)
    compiled, output = evaluated(pqt, model, tokens)
    torch.save(output.logits, folder / f"{name}.logits")
    report = pqt.export(compiled, folder / name, case.format)
    state = expected_state(case, model, pqt)
    dense = case.model(**case.arguments)
    if name == "head":  # the table is looked up as it is, the head that was tied to it is cast
        dense = case.model(**case.arguments, tie=True)
        dense.config.tie_word_embeddings = False
        dense.lm_head.weight = nn.Parameter(gws_compile.quantize(model.lm_head.weight.detach(), "mxfp8"))
        state = {**state, "model.embed_tokens.weight": model.model.embed_tokens.weight.detach()}
        state["lm_head.weight"] = dense.lm_head.weight.detach()
    dense.load_state_dict(state)
    dense.save_pretrained(folder / f"{name}_dense")
    return {
        "kind": case.kind,
        "tokens": TOKENS,
        "dtypes": case.dtypes,
        "rounded": case.rounded,
        "dequantize": case.dequantize,
        "signless": case.signless,
        "packed": [weight.name for weight in report.packed],
        "evaluation": f"{name}.logits" if case.arguments.get("dtype", torch.float32) == torch.float32 else None,
    }


def loaded(names: Iterable[str], folder: Path) -> dict[str, Any]:
    cases = {name: export(name, CASES[name], folder) for name in names}
    (folder / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run([sys.executable, "-c", LOADER], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return loaded(FIRST, tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return loaded(CASES.keys() - set(FIRST), tmp_path_factory.mktemp("exports"))


def loads_of(names: Iterable[str]) -> list[str]:
    return [f"{name} {dtype}" for name in names for dtype in CASES[name].dtypes]


@pytest.mark.parametrize("case", loads_of(FIRST))
def test_every_tensor_is_the_cast_weight(case, first):
    check(case, first[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", loads_of(name for name in CASES if name not in FIRST))
def test_every_tensor_is_the_cast_weight_in_more_models(case, others):
    check(case, others[case])


def check(case: str, found: dict[str, Any]) -> None:
    assert found["error"] is None
    assert found["different"] == []
    name, dtype = case.split()
    # transformers keeps experts that it decodes from MXFP4 in bfloat16.
    if CASES[name].rounded is None and (name != "experts_mxfp4" or dtype == "bfloat16"):
        assert found["dtypes"] == [f"torch.{dtype}"]
        assert found["logits"]
        assert found.get("near", True)

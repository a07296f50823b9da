"""Graphs: a decode step with a static cache and a mask, generate that compiles by itself, export with any batch."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from transformers import CompileConfig, StaticCache
from transformers.integrations.executorch import TorchExportableModuleWithStaticCache

from implicit_attention.hf import ImplicitAttentionForCausalLM, ImplicitAttentionForMaskedLM
from tests.hf import tiny

TIGHT = {"solver": {"name": "forward_substitution", "rtol": 1e-11, "atol": 1e-11}}
KINDS = {
    "implicit": {},
    "mixed": {"layer_types": ["attention", "implicit"], "num_kv_heads": 2},
    "window": {"window": 4, "layer_types": ["attention", "implicit"]},
    "alibi": {"positions": "alibi", "layer_types": ["implicit", "attention"]},
    "relative": {"positions": "relative", "layer_types": ["implicit", "attention"]},
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_compiled_steps_with_a_static_cache_and_a_mask(options):
    """One graph serves all steps: nothing in it is read on the host, and no shape depends on the step."""
    model, tokens = tiny.make(**options, **TIGHT), tiny.tokens()
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    expected = model(tokens, mask, output_attentions=True)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    step, cache = torch.compile(model, fullgraph=True, backend=backend), StaticCache(model.config, max_cache_len=12)
    model(tokens[:, :6], mask[:, :6], cache)
    whole = torch.nn.functional.pad(mask, (0, 3), value=1)
    for i in range(6, 9):
        out = step(tokens[:, i : i + 1], whole, cache, output_attentions=True)
        torch.testing.assert_close(out.logits[:, 0], expected.logits[:, i], rtol=0, atol=1e-8)
        for found, weights in zip(out.attentions, expected.attentions, strict=True):
            torch.testing.assert_close(found[:, :, 0, :9], weights[:, :, i], rtol=0, atol=1e-8)
            assert not found[..., 9:].any()
    assert len(graphs) == 1


@torch.no_grad()
def test_a_compiled_step_that_raises_adds_nothing():
    """What its first blocks have written is taken back when the next call begins."""
    model, tokens = tiny.make(layer_types=["attention", "implicit"], **TIGHT), tiny.tokens()
    step, cache = torch.compile(model, fullgraph=True, backend="eager"), StaticCache(model.config, max_cache_len=12)
    expected = model(tokens).logits
    model(tokens[:, :6], cache=cache)
    weight = model.model.layers[1].attention.W_K.weight
    held = weight.clone()
    weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or Inf"):
        step(tokens[:, 6:7], cache=cache)
    assert [int(layer.cumulative_length) for layer in cache.layers] == [7, 6]  # this is what the test is about
    weight.copy_(held)
    for i, call in ((6, step), (7, model), (8, step)):
        found = call(tokens[:, i : i + 1], cache=cache).logits[:, 0]
        torch.testing.assert_close(found, expected[:, i], rtol=0, atol=1e-8)


@pytest.mark.parametrize("options", [*KINDS.values(), {"is_causal": False, "max_gain": 0.9}], ids=[*KINDS, "no-mask"])
def test_what_looks_at_numbers_is_cut_out_of_cuda_graphs(options):
    """`generate` compiles a step with a static cache for CUDA graphs, which cannot wait for a number."""
    kind = ImplicitAttentionForCausalLM if options.get("is_causal", True) else ImplicitAttentionForMaskedLM
    model, tokens, graphs = tiny.make(kind, use_cache=False, **options), tiny.tokens(), []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    places = torch.arange(tokens.shape[1])[None]
    compiled(tokens, position_ids=places).logits.sum().backward()
    targets = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    ours = [target for target in targets if getattr(target, "namespace", "") == "implicit_attention"]
    assert {"require", "adjoint"} <= {target.__name__.split(".")[0].rsplit("_", 1)[-1] for target in ours}
    assert all(torch.Tag.cudagraph_unsafe in target.tags for target in ours)
    assert not any("effects" in str(target) for target in targets), "no tag is read from an operator in a wrapper"


@torch.no_grad()
def test_generate_compiles_by_itself():
    assert ImplicitAttentionForCausalLM._can_compile_fullgraph
    model, tokens = tiny.make(layer_types=["implicit", "attention"], pad_token_id=0), tiny.tokens(2, 5)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(tokens, disable_compile=True, **settings)
    compiled = CompileConfig(fullgraph=True, backend="eager")
    compiled._compile_all_devices = True
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(model.generate(tokens, compile_config=compiled, **settings), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ImplicitAttentionForCausalLM, {"use_cache": False, **TIGHT}),
        (ImplicitAttentionForCausalLM, {"use_cache": False, "layer_types": ["attention", "implicit"], **TIGHT}),
        (ImplicitAttentionForMaskedLM, {"is_causal": False}),
    ],
    ids=["causal", "mixed", "bidirectional"],
)
@torch.no_grad()
def test_export_with_any_batch_and_length(kind, options):
    model, dynamic = tiny.make(kind, **options), torch.export.Dim.DYNAMIC
    shapes = {"input_ids": {0: dynamic, 1: dynamic}}
    exported = torch.export.export(model, (), {"input_ids": tiny.tokens()}, dynamic_shapes=shapes).module()
    for batch, length in ((3, 5), (2, 12)):
        tokens = tiny.tokens(batch, length)
        torch.testing.assert_close(exported(input_ids=tokens).logits, model(tokens).logits, rtol=0, atol=1e-8)


@torch.no_grad()
def test_export_with_a_static_cache():
    """As transformers prepares models for ExecuTorch."""
    model, tokens = tiny.make(dtype=torch.float32, layer_types=["implicit", "attention"]), tiny.tokens(1, 4)
    model.generation_config.use_cache, model.generation_config.cache_implementation = True, "static"
    module = TorchExportableModuleWithStaticCache(model, batch_size=1, max_cache_len=8, device=torch.device("cpu"))
    given = {"input_ids": tokens[:, :1], "cache_position": torch.tensor([0])}
    exported = torch.export.export(module, (), given, strict=False).module()
    logits = [exported(input_ids=tokens[:, i : i + 1], cache_position=torch.tensor([i])) for i in range(4)]
    expected = model(tokens, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-3 * expected.abs().max().item())

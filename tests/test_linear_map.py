"""Whatever stands in the place of Omega_Q is honoured as if it were called in every iteration, or refused by name."""

import copy
import warnings

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.utils import parametrizations, parametrize, prune

from implicit_attention import (
    ForwardSubstitution,
    ImplicitQueryAttention,
    ImplicitQueryAttentionLinearV,
    diagnostics,
)
from implicit_attention.attention.linear_map import checked_against, linear_map
from implicit_attention.attention.map import merge_heads, rms_norm, split_heads
from tests.bridge import make_layer

F64 = torch.float64
EXACT = ForwardSubstitution(block=4, rtol=1e-14, atol=1e-13)


def make(bias=False, seed=0, **options):
    options = {"is_causal": True, "qk_norm": True, "solver": EXACT} | options
    return make_layer(8, 2, bias=bias, seed=seed, **options)


def inputs(n=6, batch=2, seed=1):
    return torch.randn(batch, n, 8, dtype=F64, generator=torch.Generator().manual_seed(seed))


def called(layer, x, steps=60):
    """The equilibrium by Picard's steps that call Omega_Q; the layers here contract by a third or better a step."""
    key, value = split_heads(layer.W_K(x), 2), split_heads(layer.Omega_V(x), 2)
    key = rms_norm(key) * layer.temperature[:, None, None]
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    y = merge_heads(value)
    for _ in range(steps):
        query = rms_norm(split_heads(layer.Omega_Q(y), 2))
        scores = (key @ query.mT * layer.scale).masked_fill(hidden, -torch.inf)
        y = merge_heads(scores.softmax(-1) @ value)
    return y


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def honoured(layer, x, tolerance=1e-9):
    """Compare values and all gradients with those of calls."""
    found = []
    wanted = [p for p in layer.parameters() if p.requires_grad]
    for solve in (layer, lambda x: called(layer, x)):
        y = solve(x)
        found.append((y, *torch.autograd.grad(y.sin().sum(), wanted, allow_unused=True)))
    for a, b in zip(*found, strict=True):
        close(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b, tolerance)
    assert any(g is not None and g.abs().max() > 1e-6 for g in found[0][1:])


SAME = {"target_modules": ["Omega_Q"]}
ADAPTERS = {
    "lora": lambda: peft.LoraConfig(r=2, init_lora_weights=False, **SAME),
    "lora-rs": lambda: peft.LoraConfig(r=2, init_lora_weights=False, use_rslora=True, **SAME),
    "dora": lambda: peft.LoraConfig(r=2, init_lora_weights=False, use_dora=True, **SAME),
    "loha": lambda: peft.LoHaConfig(r=2, init_weights=False, **SAME),
    "lokr": lambda: peft.LoKrConfig(r=2, init_weights=False, **SAME),
    "ia3": lambda: peft.IA3Config(init_ia3_weights=False, feedforward_modules=[], **SAME),
    "ia3-feedforward": lambda: peft.IA3Config(init_ia3_weights=False, feedforward_modules=["Omega_Q"], **SAME),
    "vera": lambda: peft.VeraConfig(r=2, init_weights=False, **SAME),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, init_weights=False, **SAME),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, init_weights=False, **SAME),
    "hra": lambda: peft.HRAConfig(r=2, init_weights=False, **SAME),
    "fourier": lambda: peft.FourierFTConfig(n_frequency=20, init_weights=True, **SAME),
    "adalora": lambda: peft.AdaLoraConfig(init_r=2, total_step=10, init_lora_weights=False, **SAME),
}


IN_FLOAT32 = {"fourier", "oft"}  # what they compute inside, whatever the dtype of the parameters


def adapted(config, bias=False):
    layer = make(bias)
    model = peft.get_peft_model(nn.Sequential(layer), config).to(F64)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=F64))
    return model, layer


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name, bias):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft has some
        _test_adapter(name, bias)


def _test_adapter(name, bias):
    model, layer = adapted(ADAPTERS[name](), bias)
    x, tolerance = inputs(), 1e-6 if name in IN_FLOAT32 else 1e-9
    model.eval()
    honoured(layer, x, tolerance)
    with torch.no_grad():
        y = model(x)
        with model.disable_adapter():
            plain = model(x)
        assert (y - plain).abs().max() > 1e-6
        close(plain, make(bias)(x))
        model.merge_adapter()
        close(model(x), y, tolerance)
        model.unmerge_adapter()
        close(model(x), y, tolerance)


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft: that merging is not possible
def test_an_adapter_with_a_bias_of_its_own():
    config = peft.LoraConfig(r=2, init_lora_weights=False, lora_bias=True, **SAME)
    for bias in (False, True):
        _model, layer = adapted(config, bias)
        honoured(layer, inputs())


def test_several_active_adapters():
    model, layer = adapted(ADAPTERS["lora"]())
    model.add_adapter("other", ADAPTERS["lora"]())
    model.base_model.set_adapter(["default", "other"])
    model.to(F64)
    honoured(layer, inputs())


def test_an_adapters_dropout_drops_input_features_for_all_tokens():
    config = peft.LoraConfig(r=2, init_lora_weights=False, lora_dropout=0.5, **SAME)
    _model, layer = adapted(config)
    x = inputs()
    with torch.no_grad():
        base = layer.Omega_Q.base_layer.weight
        delta = linear_map(layer.Omega_Q.eval(), "Omega_Q", x, 8).weight - base
        dropped = linear_map(layer.Omega_Q.train(), "Omega_Q", x, 8).weight - base
        for before, after in zip(delta.T, dropped.T, strict=True):
            assert after.abs().max() < 1e-12 or (after - 2 * before).abs().max() < 1e-12
        torch.manual_seed(3)
        y, other = layer(x), layer(x)
        assert not torch.equal(y, other)
        torch.manual_seed(3)
        close(layer(x), y)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x) + 1


def doubled(linear):
    module = Doubled(8, 8, bias=linear.bias is not None, dtype=F64)
    module.load_state_dict(linear.state_dict())
    return module


def patched(linear):
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x) + 1
    return linear


def hooked(linear, hook=lambda module, args, out: 2 * out + 1):
    linear.register_forward_hook(hook)
    return linear


def prehooked(linear):
    linear.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))
    return linear


class Doubling(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(linear):
    parametrize.register_parametrization(linear, "weight", Doubling())
    return linear


def old_weight_norm(linear):
    """Its length is not that of the weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(linear)
    with torch.no_grad():
        linear.weight_g.mul_(2)
    return linear


REPLACED = {
    "subclass": doubled,
    "patched": patched,
    "hook": hooked,
    "pre-hook": prehooked,
    "sequential": lambda linear: nn.Sequential(linear, nn.Linear(8, 8, dtype=F64)),
    "parametrized": parametrized,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm": parametrizations.weight_norm,
    "old_weight_norm": old_weight_norm,
    "pruned": lambda linear: prune.random_unstructured(linear, "weight", amount=0.5),
}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", REPLACED)
def test_what_stands_in_its_place(name, bias):
    layer = make(bias)
    before = layer(inputs())
    layer.Omega_Q = REPLACED[name](layer.Omega_Q)
    honoured(layer, inputs())
    if name != "weight_norm":
        assert (layer(inputs()) - before).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["old_weight_norm", "weight_norm", "pruned", "parametrized"])
@pytest.mark.parametrize("training", [True, False])
def test_after_loading(name, training):
    """Old hooks compute `weight` in a call: before it, the attribute is that of another state."""
    other, layer = make(seed=1), make(seed=2)
    for one in (other, layer):
        one.Omega_Q = REPLACED[name](one.Omega_Q)
    layer.load_state_dict(other.state_dict())
    layer.train(training)
    close(layer(inputs()), called(other, inputs()))


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["new", "old"])
def test_spectral_norm(norm):
    layer = make()
    layer.Omega_Q.weight.data.mul_(10)
    layer.Omega_Q = norm(layer.Omega_Q)
    x, alone = inputs(), copy.deepcopy(layer.Omega_Q)
    for _ in range(3):  # the power iteration advances once a call
        layer(x)
        alone(x)
    layer.eval(), alone.eval()
    close(linear_map(layer.Omega_Q, "Omega_Q", x, 8).weight, linear_map(alone, "Omega_Q", x, 8).weight, 1e-14)
    honoured(layer, x)
    other = norm(make(seed=5).Omega_Q)
    other.load_state_dict(layer.Omega_Q.state_dict())
    y = layer(x)
    layer.Omega_Q = other.eval()
    close(layer(x), y)


def test_hooks_run_once_a_call():
    layer, x = make(solver=ForwardSubstitution()), inputs(9)
    count = {}
    for name in ("Omega_Q", "W_K", "Omega_V"):
        count[name] = 0

        def hook(module, args, out, name=name):
            count[name] += 1

        getattr(layer, name).register_forward_hook(hook)
    cache = layer.make_cache(2, 9)
    with torch.no_grad():
        layer(x[:, :5], cache=cache)
        for i in range(5, 9):
            layer(x[:, i : i + 1], cache=cache)
    assert set(count.values()) == {5}


@pytest.mark.parametrize("kind", ["register_module_full_backward_hook", "register_module_full_backward_pre_hook"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # unit vectors require no gradient
def test_global_backward_hooks_see_every_map(kind):
    layer, x = make(), inputs()
    seen = []
    handle = getattr(nn.modules.module, kind)(lambda module, *_: seen.append(module))
    try:
        layer(x).sum().backward()
    finally:
        handle.remove()
    assert layer.Omega_Q in seen
    assert layer.W_K in seen


def test_a_plain_map_gives_its_parameters():
    linear = nn.Linear(3, 4)
    found = linear_map(linear, "Omega_Q", torch.zeros(1), 3)
    assert found.weight is linear.weight
    assert found.bias is linear.bias
    subclass = type("Linear", (nn.Linear,), {})(3, 4)  # without a forward of its own
    assert linear_map(subclass, "Omega_Q", torch.zeros(1), 3).weight is subclass.weight


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_a_called_map_gives_its_weight(size, dtype):
    linear = nn.Linear(size, 5, dtype=dtype)
    module = nn.Sequential(linear)
    weight, bias = linear_map(module, "Omega_Q", torch.zeros(1, dtype=dtype), size)
    assert weight.dtype == bias.dtype == dtype
    close(bias, linear.bias, 0)
    # 64 w + b is rounded once, so w is known to an eps of |w| + |b| / 64.
    close(weight, linear.weight, 2 * torch.finfo(dtype).eps * float(linear.weight.detach().abs().max()))


REFUSED = {
    "tanh": lambda module, args, out: out.tanh(),
    "relu-in": None,
    "position": lambda module, args, out: out * torch.arange(out.shape[1], dtype=out.dtype)[:, None],
    "first-token": lambda module, args, out: torch.cat([0 * out[:, :1], out[:, 1:]], 1),
    "centred": lambda module, args, out: out - out.mean(1, keepdim=True),
    "normed": lambda module, args, out: out / out.norm(dim=-1, keepdim=True),
    "small-adapter": lambda module, args, out: out + 0.2 * args[0].sin(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_affine_map_of_each_token_is_refused(name):
    layer = make()
    if name == "relu-in":
        layer.Omega_Q.register_forward_pre_hook(lambda module, args: (args[0].relu(),))
    else:
        hooked(layer.Omega_Q, REFUSED[name])
    with pytest.raises(ValueError, match="`Omega_Q` must be an affine map that treats every token alike"):
        layer(inputs())
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="the map gave NaN" if name == "normed" else "`Omega_Q` must be an affine map"):
        torch.compile(layer, backend="aot_eager")(inputs())


def test_adapters_by_sample_are_refused():
    model, _layer = adapted(ADAPTERS["lora"]())
    model.add_adapter("other", ADAPTERS["lora"]())
    model.to(F64).eval()
    for batch in (1, 2, 3):
        with pytest.raises(ValueError, match="`adapter_names` must be absent, since `Omega_Q` has an adapter"):
            model(inputs(batch=batch), adapter_names=["default", "other", "__base__"][:batch])
    other = peft.get_peft_model(nn.Sequential(make()), peft.LoraConfig(r=2, target_modules=["W_K"])).to(F64).eval()
    other(inputs(), adapter_names=["default", "__base__"])  # W_K is called


def test_nan_in_an_adapter_is_named():
    model, layer = adapted(ADAPTERS["lora"]())
    layer.Omega_Q.lora_A["default"].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="lora_A"):
        model(inputs())


@pytest.mark.parametrize("options", [{}, {"query_input": True}, {"bias": True}, {"qk_norm": False}])
def test_decoding(options):
    _model, layer = adapted(ADAPTERS["lora"]())
    layer = make(**options)
    layer.Omega_Q = hooked(layer.Omega_Q)
    x, cache = inputs(9), layer.make_cache(2, 9)
    with torch.no_grad():
        parts = [layer(x[:, :5], cache=cache), *(layer(x[:, i : i + 1], cache=cache) for i in range(5, 9))]
        close(torch.cat(parts, 1), layer(x))


def test_with_an_input_of_queries_a_bias_is_added():
    layer = make(query_input=True)
    plain = copy.deepcopy(layer)
    layer.Omega_Q = hooked(layer.Omega_Q)
    with torch.no_grad():
        plain.Omega_Q.weight.mul_(2)
        plain.W_Q.bias = nn.Parameter(torch.ones(8, dtype=F64))
        close(layer(inputs()), plain(inputs()))


def test_autocast():
    layer = ImplicitQueryAttention(8, 2, is_causal=True)
    net = peft.get_peft_model(nn.Sequential(layer), ADAPTERS["lora"]())
    with torch.autocast("cpu", torch.bfloat16):
        y = net(inputs().float())
        y.float().sum().backward()
        net.merge_adapter()
        merged = net(inputs().float())
    assert y.dtype == torch.bfloat16
    close(y, merged, 0.1)
    assert layer.Omega_Q.lora_A["default"].weight.grad.any()


@pytest.mark.parametrize("name", ["lora", "lora-rs", "ia3"])
def test_compiled(name):
    torch._dynamo.reset()
    _model, layer = adapted(ADAPTERS[name](), bias=True)
    layer.eval()
    found = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = call(inputs())
        wanted = [p for p in layer.parameters() if p.requires_grad]
        found.append((y, *torch.autograd.grad(y.sin().sum(), wanted)))
    for a, b in zip(*found, strict=True):
        close(a, b)


def test_functional_calls_and_transforms():
    _model, layer = adapted(ADAPTERS["lora"]())
    wanted = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}
    doubled_ = {n: 2 * p for n, p in wanted.items()}
    x = inputs()

    def loss(named):
        return torch.func.functional_call(layer, named, (x,)).sin().sum()

    found = torch.func.grad(loss)(doubled_)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name in doubled_:
                parameter.copy_(doubled_[name])
    y = called(layer, x)
    names = list(doubled_)
    right = torch.autograd.grad(y.sin().sum(), [dict(layer.named_parameters())[n] for n in names])
    for name, grad in zip(names, right, strict=True):
        close(found[name], grad, 1e-7)  # the fallback solver's tolerance


def test_the_seed():
    layer, x = ImplicitQueryAttentionLinearV(8).double(), inputs()
    plain = copy.deepcopy(layer)
    hooked(layer.Omega_Q, lambda module, args, out: 2 * out)
    plain.Omega_Q.weight.data.mul_(2)
    close(layer(x), plain(x), 1e-12)
    hooked(layer.Omega_Q, lambda module, args, out: out.tanh())
    with pytest.raises(ValueError, match="`Omega_Q` must be an affine map"):
        layer(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dynamically_quantised_maps():
    layer, x = ImplicitQueryAttention(64, 4, is_causal=True, qk_norm=True, bias=True), torch.randn(2, 9, 64)
    right = layer(x)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(layer), {nn.Linear})
    assert checked_against(quantised.Omega_Q) is None
    with torch.no_grad():
        y, cache = quantised(x), quantised.make_cache(2, 9)
        assert (y - right).norm() < 0.05 * right.norm()  # 8 bits: 1 / 127 per entry
        parts = [quantised(x[:, :8], cache=cache), quantised(x[:, 8:], cache=cache)]
        assert (torch.cat(parts, 1) - y).norm() < 0.05 * y.norm()


def test_weights_elsewhere():
    """accelerate's hooks bring weights to the device for a call; until then they are on the meta device."""
    accelerate = pytest.importorskip("accelerate")
    for positions in ("relative", "alibi", "rope"):
        layer, x = make(positions=positions), inputs()
        y = layer(x)
        accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
        assert layer.Omega_Q.weight.is_meta
        close(layer(x), y, 1e-12)


def test_weights_that_come_for_forward_alone_are_refused_elsewhere():
    accelerate = pytest.importorskip("accelerate")
    layer, x = make(), inputs()
    y = layer(x)
    accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    for call in (layer.solve, layer.equation, lambda x: diagnostics.spectral_radius(layer, x)):
        with pytest.raises(ValueError, match=r"offloaded \(accelerate\).*layer\(x, need_solution=True\)"):
            call(x)
    close(layer(x, need_solution=True)[2].value, y, 1e-12)
    cache = layer.make_cache(2, 6)
    assert cache.column.device.type == "cpu"
    close(layer(x, cache=cache), y, 1e-12)


def test_sharded_weights_are_refused_outside_forward():
    layer, x = make(), inputs()
    y = layer(x)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        for call in (layer.equation, lambda x: diagnostics.spectral_radius(layer, x)):
            with pytest.raises(ValueError, match=r"sharded \(FSDP2\).*layer.unshard\(\)"):
                call(x)
        with pytest.raises(
            ValueError, match=r'need_solution=True\), or .*register_fsdp_forward_method\(layer, "solve"'
        ):
            layer.solve(x)
        register_fsdp_forward_method(layer, "solve")
        close(layer.solve(x).value, y, 1e-12)
    finally:
        dist.destroy_process_group()


PLACES = ("Omega_Q", "Psi_V", "W_K", "W_Q", "Omega_V")


def with_all_maps():
    return make(is_causal=True, self_query="input", values="feedback", query_input=True, bias=True)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_a_map_of_another_size_is_refused(name, kernel):
    """Kernels take bare pointers: they would read past the end."""
    layer, x = with_all_maps(), inputs()
    layer.solver = ForwardSubstitution(kernel=kernel)
    size = x.shape[-1]
    for shape in ((size, size // 2), (size, 2 * size)):
        setattr(layer, name, nn.Linear(*shape, dtype=torch.float64))
        with pytest.raises(ValueError, match=f"`{name}` must be a map (with a weight of shape|to {size} features)"):
            layer(x)


@pytest.mark.parametrize("name", ["Omega_Q", "Psi_V"])
def test_a_bias_of_another_size_is_refused(name):
    layer, x = with_all_maps(), inputs()
    map_ = nn.Linear(x.shape[-1], x.shape[-1], dtype=torch.float64)
    map_.bias = nn.Parameter(torch.randn(3, dtype=torch.float64))
    setattr(layer, name, map_)
    with pytest.raises(ValueError, match=rf"`{name}` must be .* a bias of shape \(3,\)"):
        layer(x)


@pytest.mark.parametrize("name", PLACES)
def test_a_map_that_is_taken_away_is_missed(name):
    layer = with_all_maps()
    setattr(layer, name, None)
    with pytest.raises(ValueError, match=f"`{name}` must be a module, as the layer's settings ask for it"):
        layer(inputs())


def test_a_map_that_the_settings_do_not_know_is_refused():
    layer, x = make(is_causal=True), inputs()
    layer.Psi_V = nn.Linear(x.shape[-1], x.shape[-1], dtype=torch.float64)
    with pytest.raises(ValueError, match="`Psi_V` must be None, as the layer's settings say"):
        layer(x)

"""The operators of random programs, as text.

How a result relates to the arguments' exactness (`generate`): "same" is exact from exact, "loose" never is, "jump"
is applied to exact values alone.
"""

from __future__ import annotations

FLOAT_UNARY = (
    ("{0}.abs()", "same"), ("-{0}", "same"), ("torch.relu({0})", "same"), ("{0} * 2", "same"), ("{0} + 0.5", "same"),
    ("1 - {0}", "same"), ("{0} * 0.1", "loose"), ("{0} / 3", "loose"), ("torch.square({0})", "same"),
    ("{0}.clamp(-1.5, 2)", "same"), ("{0}.clamp(min=0.25)", "same"), ("{0}.clamp(max=1)", "same"),
    ("1.0 / ({0}.abs() + 1)", "same"), ("torch.sqrt({0}.abs())", "loose"), ("{0}.neg().clone()", "same"),
    ("torch.floor({0})", "jump"), ("torch.ceil({0})", "jump"), ("torch.round({0})", "jump"),
    ("torch.trunc({0})", "jump"), ("torch.sign({0})", "jump"), ("{0} > 0.25", "jump"), ("{0} <= 0", "jump"),
    ("{0} == 0.5", "jump"), ("0.5 < {0}", "jump"), ("torch.isnan({0})", "jump"), ("torch.isinf({0})", "jump"),
    ("{0}.logical_not()", "jump"), ("{0}.bool()", "jump"), ("torch.where({0} > 0, {0}, 0.5)", "jump"),
    ("torch.where({0} > 0, 1.0, {0})", "jump"), ("torch.remainder({0}, 1.5)", "jump"),
    ("torch.fmod({0}, 0.75)", "jump"), ("torch.floor_divide({0}, 0.5)", "jump"),
    ("F.threshold({0}, 0.25, -1.0)", "jump"), ("F.leaky_relu({0}, 0.1)", "loose"),
    ("F.hardtanh({0}, -1.0, 1.0)", "same"), ("{0}.masked_fill({0} < 0, 2.0)", "jump"),
    ("torch.nan_to_num({0}, 1.0, 2.0, -2.0)", "same"), ("torch.tanh({0})", "loose"), ("torch.sigmoid({0})", "loose"),
    ("torch.exp(-{0}.abs())", "loose"), ("torch.log1p({0}.abs())", "loose"), ("torch.erf({0})", "loose"),
    ("torch.sin({0})", "loose"), ("torch.cos({0})", "loose"), ("F.gelu({0})", "loose"),
    ("F.gelu({0}, approximate='tanh')", "loose"), ("F.silu({0})", "loose"), ("torch.rsqrt({0}.abs() + 1)", "loose"),
    ("torch.pow({0}.abs() + 0.5, 1.7)", "loose"), ("{0} ** 3", "loose"), ("F.softplus({0})", "loose"),
    ("F.elu({0})", "loose"), ("F.hardswish({0})", "loose"), ("torch.atan({0})", "loose"),
    ("{0}.clamp(-3, 3).exp()", "loose"), ("torch.log({0}.abs() + 1)", "loose"),
    ("torch.sinh({0}.clamp(-2, 2))", "loose"),
)  # fmt: skip

FLOAT_BINARY = (
    ("{0} + {1}", "same"), ("{0} - {1}", "same"), ("{0} * {1}", "same"), ("{0} * {1}", "same"), ("{0} + {1}", "same"),
    ("torch.maximum({0}, {1})", "same"), ("torch.minimum({0}, {1})", "same"), ("{0} / ({1}.abs() + 1)", "same"),
    ("torch.add({0}, {1}, alpha=2)", "loose"), ("torch.sub({0}, {1}, alpha=0.5)", "loose"),
    ("torch.lerp({0}, {1}, 0.3)", "loose"), ("torch.where({0} > {1}, {0}, {1})", "jump"), ("{0} < {1}", "jump"),
    ("{0} >= {1}", "jump"), ("{0} != {1}", "jump"), ("torch.atan2({0}, {1}.abs() + 1)", "loose"),
    ("torch.hypot({0}, {1})", "loose"), ("torch.fmax({0}, {1})", "same"),
    ("torch.pow({0}.abs() + 0.5, {1}.clamp(-2, 2))", "loose"), ("torch.remainder({0}, {1}.abs() + 0.5)", "jump"),
    ("torch.addcmul({0}, {1}, {1}, value=0.5)", "loose"), ("torch.addcdiv({0}, {0}, {1}.abs() + 1)", "loose"),
    ("F.mse_loss({0}, {1}, reduction='none')", "loose"), ("torch.logaddexp({0}, {1})", "loose"),
    ("torch.clamp({0}, {1} - 1, {1} + 1)", "same"), ("F.smooth_l1_loss({0}, {1}, reduction='none')", "loose"),
)  # fmt: skip

INT_UNARY = (
    "{0} + 3", "{0} * 5", "-{0}", "{0}.abs()", "~{0}", "{0} & 6", "{0} | 1", "{0} ^ 9", "{0} << 2", "{0} >> 1",
    "{0} // 3", "{0} % 5", "{0} // -3", "{0} % -4", "torch.div({0}, 3, rounding_mode='trunc')", "torch.fmod({0}, 4)",
    "{0} > 2", "{0} == 3", "{0}.clamp(-5, 9)", "{0} ** 2", "{0}.sign()", "{0}.bool()", "1 - {0}", "{0}.clamp(min=1)",
    "{0}.square()", "{0} < 2.5", "torch.relu({0})",
)  # fmt: skip

INT_BINARY = (
    "{0} + {1}", "{0} - {1}", "{0} * {1}", "{0} & {1}", "{0} | {1}", "{0} ^ {1}", "torch.maximum({0}, {1})",
    "torch.minimum({0}, {1})", "{0} // (({1} & 7) + 1)", "{0} % (({1} & 7) + 1)", "{0} // -(({1} & 7) + 2)",
    "{0} % -(({1} & 7) + 2)", "{0} < {1}", "{0} == {1}", "torch.where({0} > {1}, {0}, {1})", "{0} << ({1} & 15)",
    "{0} >> ({1} & 15)", "{0} << {1}", "{0} >> {1}", "torch.add({0}, {1}, alpha=3)",
    "torch.div({0}, ({1} & 3) + 1, rounding_mode='trunc')", "torch.div({0}, ({1} & 3) + 1, rounding_mode='floor')",
)  # fmt: skip

BOOL_UNARY = (
    "~{0}", "{0}.logical_not()", "{0} & True", "{0}.to(torch.int64) * 3", "{0}.to(torch.float32) - 0.5", "{0} + 1",
)  # fmt: skip

BOOL_BINARY = (
    "{0} & {1}", "{0} | {1}", "{0} ^ {1}", "{0} == {1}", "{0} < {1}", "{0} * {1}", "{0} + {1}",
    "torch.logical_xor({0}, {1})", "torch.maximum({0}, {1})",
)  # fmt: skip

# What eager may compute by a library with its own answers to NaN and infinities.
LIBRARY = frozenset(text for text, how in (*FLOAT_UNARY, *FLOAT_BINARY) if how == "loose")

# In the rest, $names are filled in: a dimension d, another e, a size n…
VIEWS = (
    "{0}.permute($order)", "{0}.transpose($d, $e)", "{0}.flatten()", "{0}.unsqueeze($d)", "{0}.flip($d)",
    "{0}.flip($both)", "{0}.squeeze()", "{0}.squeeze($d)", "{0}.select($d, -1)", "{0}.unsqueeze($d).expand($wide)",
    "{0}.reshape(-1)", "{0}.contiguous()", "{0}.roll(2, $d)", "{0}.narrow($d, 1, $n - 1)", "{0}.repeat($twice)",
    "{0}.movedim($d, $e)", "{0}.clone()", "torch.slice_copy({0}, $d, 1, None, 2)",
)  # fmt: skip
VIEWS_OF_MATRICES = (
    "{0}.flatten($k, $l)", "{0}.reshape($merged)", "{0}.transpose($d, $e).reshape($merged)", "{0}.mT",
    "{0}.diagonal($diagonal, $d, $e)", "{0}.tril($diagonal)", "{0}.triu()",
)  # fmt: skip
REDUCE_FLOATS = (
    ("torch.sum({0}, $dims, keepdim=$keep)", "loose", 1),
    ("torch.mean({0}, $dims, keepdim=$keep)", "loose", 1),
    ("torch.amax({0}, $dims, keepdim=$keep)", "same", 1),
    ("torch.amin({0}, $dims, keepdim=$keep)", "same", 1),
    ("{0}.sum()", "loose", 1),
    ("{0}.max()", "same", 1),
    ("torch.var({0}, $dims, correction=1, keepdim=$keep)", "loose", 1),
    ("torch.var_mean({0}, $dims, correction=0, keepdim=$keep)", "loose", 2),
    ("torch.std({0}, $dims, keepdim=$keep)", "loose", 1),
    ("torch.max({0}, $dim, keepdim=$keep)", "jump", 2),
    ("torch.min({0}, $dim, keepdim=$keep)", "jump", 2),
    ("torch.argmax({0}, $dim, keepdim=$keep)", "jump", 1),
    ("torch.argmin({0})", "jump", 1),
    ("torch.logsumexp({0}, $dims, keepdim=$keep)", "loose", 1),
    ("{0}.mean()", "loose", 1),
    ("torch.prod({0}.clamp(0.9, 1.1), $dim, keepdim=$keep)", "loose", 1),
    ("torch.linalg.vector_norm({0}, 2, $dims, keepdim=$keep)", "loose", 1),
    ("{0}.to(torch.float64).sum(0)", "loose", 1),
    ("{0}.sum(-1, dtype=torch.float32)", "loose", 1),
    ("{0}.any(-1)", "jump", 1),
    ("({0} > 0).sum(0)", "jump", 1),
)
REDUCE_INTEGERS = (
    ("torch.sum({0}, $dims, keepdim=$keep)", "same", 1),
    ("torch.amax({0}, $dims, keepdim=$keep)", "same", 1),
    ("torch.amin({0}, $dims, keepdim=$keep)", "same", 1),
    ("torch.any({0}, $dim, keepdim=$keep)", "same", 1),
    ("torch.all({0}, $dim, keepdim=$keep)", "same", 1),
    ("torch.argmax({0}, $dim, keepdim=$keep)", "same", 1),
    ("torch.prod({0}, $dim, keepdim=$keep)", "same", 1),
    ("torch.max({0}, $dim, keepdim=$keep)", "same", 2),
    ("{0}.sum()", "same", 1),
    ("torch.mean({0}, 0, dtype=torch.float32)", "loose", 1),
)
BLOCKS = (
    "torch.softmax({0}, $d)", "torch.log_softmax({0}, $d)", "F.layer_norm({0}, [$last])", "F.normalize({0}, dim=-1)",
    "{0} - {0}.mean($d, keepdim=True)", "{0} * torch.rsqrt({0}.square().mean($d, keepdim=True) + 1e-5)",
    "({0} - {0}.amax($d, keepdim=True)).exp()", "torch.cumsum({0}, $d)", "{0} + {0}.sum($d, keepdim=True) * 0.01",
)  # fmt: skip
BLOCKS_OF_IMAGES = (
    "F.batch_norm({0}, None, None, training=True)", "F.instance_norm({0})", "F.group_norm({0}, $channels)",
)  # fmt: skip
CREATE = (
    "torch.full_like({0}, 2)", "torch.zeros_like({0})", "torch.ones_like({0}, dtype=torch.float32)",
    "torch.arange($n)", "torch.arange($n, dtype=torch.float32) * 0.5", "torch.full(($n, 3), 1.5)",
    "torch.arange($n) // 3 + torch.arange($n) % 4", "torch.arange($n).unsqueeze(1) >= torch.arange($n)",
    "{0}.new_zeros(3)", "torch.arange(1, 2 * $n, 2)", "torch.tensor(2.5)",
)  # fmt: skip

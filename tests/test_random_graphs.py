"""Random graphs, each pruned at a random plan and proven against the silenced original."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from builder import Builder, pruned

SAMPLES = 48


class Grower:
    """Grows a graph over a pool of tensors: images (N, C, H, W), sequences (N, T, D) and vectors (N, D)."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.g = Builder(opset=int(self.rng.choice([13, 17, 18])), seed=seed)
        self.dynamic = bool(self.rng.random() < 0.4)
        size = int(self.rng.choice([8, 12]))
        channels = self.pick(3, 4)
        shape = ["n", channels, "h", "w"] if self.dynamic and self.rng.random() < 0.5 else [2, channels, size, size]
        if self.dynamic:
            shape[0] = "n"
        self.fully = "h" in shape
        x = self.g.input("x", shape)
        self.pool: dict[str, tuple[int, ...]] = {}  # sizes; 0 where they are dynamic
        self.add(x, (0 if self.dynamic else 2, channels, *((0, 0) if self.fully else (size, size))))
        self.scale = {x: 1}  # of the resolution, where it is dynamic

    def pick(self, *choices: int) -> int:
        return int(self.rng.choice(choices))

    def add(self, name: str, shape: tuple[int, ...]) -> str:
        self.pool[name] = shape
        return name

    def any(self, rank: int) -> str | None:
        names = [n for n, s in self.pool.items() if len(s) == rank]
        return names[-1 - min(int(self.rng.exponential(1.5)), len(names) - 1)] if names else None

    def alike(self, name: str, axis: int | None = None) -> str | None:
        """Another tensor of the same shape, save for one axis."""
        mine = self.pool[name]
        names = [
            n
            for n, s in self.pool.items()
            if len(s) == len(mine)
            and all(a == b for k, (a, b) in enumerate(zip(s, mine, strict=True)) if k != axis)
            and (not self.fully or self.scale.get(n, 1) == self.scale.get(name, 1))
        ]
        return str(self.rng.choice(names)) if names else None

    def keep_scale(self, new: str, old: str, factor: float = 1) -> None:
        self.scale[new] = self.scale.get(old, 1) * factor

    # each step takes what it needs from the pool, and does nothing where there is nothing to take

    def conv(self) -> None:
        x = self.any(4)
        if x is None:
            return
        n, c, h, w = self.pool[x]
        group = self.pick(*(g for g in (1, 1, 2, 3, 4, c) if c % g == 0))
        out = group * self.pick(1, 2, 3) if group > 1 else self.pick(3, 4, 6, 8, 12)
        k = self.pick(1, 3)
        weight = self.g.weight(out, c // group, k, k)
        bias = [self.g.weight(out, scale=0.5)] if self.rng.random() < 0.7 else []
        y = self.g.Conv(x, weight, *bias, group=group, pads=[k // 2] * 4)
        if self.rng.random() < 0.3:
            vectors = [self.rng.uniform(0.5, 1.5, out), self.rng.normal(size=out), self.rng.normal(size=out) * 0.1]
            y = self.g.BatchNormalization(y, *map(self.g.const, vectors), self.g.const(self.rng.uniform(0.5, 2, out)))
        self.keep_scale(y, x)
        self.add(y, (n, out, h, w))

    def transposed_conv(self) -> None:
        x = self.any(4)
        if x is None or self.scale.get(x, 1) > 1:
            return
        n, c, h, w = self.pool[x]
        group = self.pick(*(g for g in (1, 1, 2) if c % g == 0))
        out = self.pick(2, 3)
        y = self.g.ConvTranspose(x, self.g.weight(c, out, 2, 2), group=group, strides=[2, 2])
        self.keep_scale(y, x, 2)
        self.add(y, (n, out * group, 2 * h, 2 * w))

    def activation(self) -> None:
        x = self.any(self.pick(4, 4, 3, 2))
        if x is not None:
            y = self.g.node(str(self.rng.choice(["Relu", "Sigmoid", "Tanh", "Elu", "LeakyRelu", "Softplus", "Erf"])), x)
            self.keep_scale(y, x)
            self.add(y, self.pool[x])

    def add_two(self) -> None:
        x = self.any(self.pick(4, 4, 3, 2))
        other = self.alike(x) if x is not None else None
        if x is not None and other is not None:
            y = self.g.node(str(self.rng.choice(["Add", "Mul", "Sub", "Max"])), x, other)
            self.keep_scale(y, x)
            self.add(y, self.pool[x])

    def concat(self) -> None:
        x = self.any(self.pick(4, 4, 3, 2))
        other = self.alike(x, 1 if len(self.pool[x]) != 3 else 2) if x is not None else None
        if x is None or other is None:
            return
        axis = 1 if len(self.pool[x]) != 3 else 2
        shape = list(self.pool[x])
        shape[axis] += self.pool[other][axis]
        if shape[axis] > 40:
            return
        y = self.g.Concat(x, other, axis=axis if self.rng.random() < 0.5 else axis - len(shape))
        self.keep_scale(y, x)
        self.add(y, tuple(shape))

    def split(self) -> None:
        x = self.any(4)
        if x is None or self.pool[x][1] < 2:
            return
        n, c, h, w = self.pool[x]
        if c % 2 == 0 and self.rng.random() < 0.6:
            options = {"num_outputs": 2} if self.g.opset >= 18 else {}
            parts = self.g.node("Split", x, outputs=2, axis=1, **options)
            sizes = [c // 2, c // 2]
        else:
            first = self.pick(*range(1, c))
            sizes = [first, c - first]
            parts = self.g.node("Split", x, self.g.const(sizes), outputs=2, axis=1)
        for part, size in zip(parts, sizes, strict=True):
            self.keep_scale(part, x)
            self.add(part, (n, size, h, w))

    def slice(self) -> None:
        x = self.any(4)
        if x is None or self.pool[x][1] < 3:
            return
        n, c, h, w = self.pool[x]
        start, end = sorted(self.rng.choice(c + 1, 2, replace=False).tolist())
        y = self.g.Slice(x, self.g.const([start]), self.g.const([end if end < c else 2**40]), self.g.const([1]))
        self.keep_scale(y, x)
        self.add(y, (n, end - start, h, w))

    def gather(self) -> None:
        x = self.any(4)
        if x is None:
            return
        n, c, h, w = self.pool[x]
        order = self.rng.permutation(c) if self.rng.random() < 0.6 else self.rng.integers(-c, c, self.pick(2, 3, 5))
        y = self.g.Gather(x, self.g.const(order), axis=1)
        self.keep_scale(y, x)
        self.add(y, (n, len(order), h, w))

    def pad_channels(self) -> None:
        x = self.any(4)
        if x is None:
            return
        n, c, h, w = self.pool[x]
        before, after = self.pick(0, 1), self.pick(0, 2)
        y = self.g.Pad(x, self.g.const([0, before, 0, 0, 0, after, 0, 0]))
        self.keep_scale(y, x)
        self.add(y, (n, c + before + after, h, w))

    def gate(self) -> None:
        x = self.any(4)
        if x is None:
            return
        c = self.pool[x][1]
        y = self.g.GlobalAveragePool(x) if self.rng.random() < 0.5 else self.mean(x)
        middle = self.pick(2, 3)
        y = self.g.Relu(self.g.Conv(y, self.g.weight(middle, c, 1, 1), self.g.weight(middle)))
        y = self.g.Sigmoid(self.g.Conv(y, self.g.weight(c, middle, 1, 1), self.g.weight(c)))
        y = self.g.Mul(x, y) if self.rng.random() < 0.5 else self.g.Mul(y, x)
        self.keep_scale(y, x)
        self.add(y, self.pool[x])

    def mean(self, x: str) -> str:
        if self.g.opset >= 18:
            return self.g.ReduceMean(x, self.g.const([2, 3]), keepdims=1)
        return self.g.ReduceMean(x, axes=[2, 3], keepdims=1)

    def shuffle(self) -> None:
        x = self.any(4)
        if x is None:
            return
        n, c, h, w = self.pool[x]
        groups = [k for k in (2, 3, 4) if c % k == 0 and c > k]
        if not groups:
            return
        k = self.pick(*groups)
        if self.fully or (n == 0 and self.rng.random() < 0.5):
            sizes = [self.size(x, axis) for axis in range(4)]
            one = self.g.Concat(sizes[0], self.g.const([k]), self.g.const([c // k]), sizes[2], sizes[3], axis=0)
            if self.rng.random() < 0.5:
                each = self.g.Div(sizes[1], self.g.const([k]))
                one = self.g.Concat(sizes[0], self.g.const([k]), each, sizes[2], sizes[3], axis=0)
            two = self.g.Concat(sizes[0], self.g.const([self.pick(c, -1)]), sizes[2], sizes[3], axis=0)
        else:
            one, two = self.g.const([n, k, c // k, h, w]), self.g.const([n or -1, c if n == 0 else -1, h, w])
        y = self.g.Transpose(self.g.Reshape(x, one), perm=[0, 2, 1, 3, 4])
        y = self.g.Reshape(y, two)
        self.keep_scale(y, x)
        self.add(y, (n, c, h, w))

    def size(self, x: str, axis: int) -> str:
        return self.g.Gather(self.g.node("Shape", x), self.g.const([axis]), axis=0)

    def pool_down(self) -> None:
        x = self.any(4)
        if x is None or (not self.fully and self.pool[x][2] < 4) or self.scale.get(x, 1) < 0.3:
            return
        n, c, h, w = self.pool[x]
        if not self.fully and (h % 2 or w % 2):
            return
        op = str(self.rng.choice(["MaxPool", "AveragePool"]))
        y = self.g.node(op, x, kernel_shape=[2, 2], strides=[2, 2])
        self.keep_scale(y, x, 0.5)
        self.add(y, (n, c, h // 2, w // 2))

    def resize(self) -> None:
        x = self.any(4)
        if x is None or self.scale.get(x, 1) > 1:
            return
        n, c, h, w = self.pool[x]
        y = self.g.Resize(x, "", self.g.const(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
        self.keep_scale(y, x, 2)
        self.add(y, (n, c, 2 * h, 2 * w))

    def depth_to_space(self) -> None:
        x = self.any(4)
        if x is None or self.scale.get(x, 1) > 1 or self.pool[x][1] % 4 or self.pool[x][1] < 8:
            return
        n, c, h, w = self.pool[x]
        y = self.g.DepthToSpace(x, blocksize=2, mode=str(self.rng.choice(["DCR", "CRD"])))
        self.keep_scale(y, x, 2)
        self.add(y, (n, c // 4, 2 * h, 2 * w))

    def to_sequence(self) -> None:
        x = self.any(4)
        if x is None:
            return
        n, c, h, w = self.pool[x]
        y = self.g.Transpose(self.g.Reshape(x, self.g.const([0, 0, -1])), perm=[0, 2, 1])
        self.keep_scale(y, x)
        self.add(y, (n, h * w, c))

    def linear(self) -> None:
        x = self.any(3)
        if x is None:
            return
        n, t, d = self.pool[x]
        out = self.pick(4, 6, 8, 12)
        y = self.g.MatMul(x, self.g.weight(d, out, scale=d**-0.5))
        y = self.g.Add(y, self.g.weight(out)) if self.rng.random() < 0.7 else y
        self.keep_scale(y, x)
        self.add(y, (n, t, out))

    def attention(self) -> None:
        x = self.any(3)
        if x is None or self.fully or self.pool[x][2] > 12:
            return
        n, t, d = self.pool[x]
        heads, size = self.pick(2, 3), self.pick(2, 3, 4)

        def project(perm: list[int]) -> str:
            y = self.g.Add(self.g.MatMul(x, self.g.weight(d, heads * size, scale=d**-0.5)), self.g.weight(heads * size))
            return self.g.Transpose(self.g.Reshape(y, self.g.const([0, 0, heads, size])), perm=perm)

        q, k, v = project([0, 2, 1, 3]), project([0, 2, 3, 1]), project([0, 2, 1, 3])
        y = self.g.Transpose(self.g.MatMul(self.g.Softmax(self.g.MatMul(q, k), axis=-1), v), perm=[0, 2, 1, 3])
        y = self.g.Reshape(y, self.g.const([0, 0, heads * size]))
        y = self.g.MatMul(y, self.g.weight(heads * size, d, scale=d**-0.5))
        self.add(self.g.Add(x, y), (n, t, d))

    def layer_norm(self) -> None:
        x = self.any(3)
        if x is None or self.g.opset < 17:
            return
        d = self.pool[x][2]
        y = self.g.LayerNormalization(x, self.g.weight(d), self.g.weight(d), axis=-1)
        self.keep_scale(y, x)
        self.add(y, self.pool[x])

    def recurrent(self) -> None:
        """A recurrent layer over the sequence, in one direction or both."""
        x = self.any(3)
        if x is None or self.pool[x][2] > 16:
            return
        n, t, d = self.pool[x]
        h, ways = self.pick(3, 4), self.pick(1, 2)
        op, gates = {1: ("RNN", 1), 3: ("GRU", 3), 4: ("LSTM", 4)}[self.pick(1, 3, 4)]
        weights = [self.g.weight(ways, gates * h, k) for k in (d, h)] + [self.g.weight(ways, 2 * gates * h)]
        options = {"direction": "bidirectional"} if ways == 2 else {}
        y = self.g.node(op, self.g.Transpose(x, perm=[1, 0, 2]), *weights, hidden_size=h, **options)
        y = self.g.Reshape(self.g.Transpose(y, perm=[2, 0, 1, 3]), self.g.const([0, 0, -1]))
        self.keep_scale(y, x)
        self.add(y, (n, t, ways * h))

    def mix_tokens(self) -> None:
        """Heads and their sizes as letters of an equation."""
        x = self.any(3)
        if x is None:
            return
        n, t, d = self.pool[x]
        h, k = self.pick(2, 3), self.pick(2, 4)
        y = self.g.Einsum(x, self.g.weight(h, d, k, scale=d**-0.5), equation="btd,hdk->bthk")
        y = self.g.Einsum(self.g.Relu(y), self.g.weight(h, k, d, scale=0.3), equation="bthk,hkd->btd")
        self.keep_scale(y, x)
        self.add(self.g.Add(x, y), (n, t, d))
        self.keep_scale(list(self.pool)[-1], x)

    def group_norm(self) -> None:
        """Written as exporters do: InstanceNormalization over groups, then a scale and a shift per channel."""
        x = self.any(4)
        if x is None or self.fully or self.pool[x][0] == 0:
            return
        n, c, h, w = self.pool[x]
        groups = self.pick(*(k for k in (1, 2, 3, c) if c % k == 0))
        y = self.g.Reshape(x, self.g.const([n, groups, -1]))
        y = self.g.InstanceNormalization(y, self.g.const(np.ones(groups)), self.g.const(np.zeros(groups)))
        y = self.g.Mul(self.g.Reshape(y, self.g.const([n, c, h, w])), self.g.weight(c, 1, 1, scale=0.5))
        self.add(self.g.Add(y, self.g.weight(c, 1, 1, scale=0.5)), (n, c, h, w))

    def windows(self) -> None:
        """Partition into windows, a linear layer within them, and back."""
        x = self.any(4)
        if x is None or self.fully or self.pool[x][0] == 0 or any(s % 2 for s in self.pool[x][2:]):
            return
        n, c, h, w = self.pool[x]
        y = self.g.Reshape(x, self.g.const([n, c, h // 2, 2, w // 2, 2]))
        y = self.g.Reshape(self.g.Transpose(y, perm=[0, 2, 4, 3, 5, 1]), self.g.const([n * h * w // 4, 4, c]))
        out = self.pick(3, 4, 6)
        y = self.g.Add(self.g.MatMul(y, self.g.weight(c, out, scale=c**-0.5)), self.g.weight(out))
        y = self.g.Transpose(self.g.Reshape(y, self.g.const([n, h // 2, w // 2, 2, 2, out])), perm=[0, 5, 1, 3, 2, 4])
        self.add(self.g.Reshape(y, self.g.const([n, out, h, w])), (n, out, h, w))

    def to_vector(self) -> None:
        x = self.any(4)
        if x is None:
            return
        n, c, h, w = self.pool[x]
        if self.fully or self.rng.random() < 0.5 or math.prod((c, h, w)) > 600:
            self.add(self.g.Flatten(self.g.GlobalAveragePool(x)), (n, c))
        else:
            self.add(self.g.Flatten(x), (n, c * h * w))

    def gemm(self) -> None:
        x = self.any(2)
        if x is None:
            return
        n, d = self.pool[x]
        out = self.pick(3, 5, 8)
        self.add(self.g.Gemm(x, self.g.weight(out, d), self.g.weight(out), transB=1), (n, out))

    def branches(self) -> None:
        """An If over two ways from one image to another, with a layer or two on each."""
        x = self.any(4)
        if x is None:
            return
        n, c, h, w = self.pool[x]
        out, around, bodies = self.pick(3, 4, 6, c), self.g.nodes, {}
        for branch in ("then_branch", "else_branch"):
            self.g.nodes = []
            y, width = self.g.Neg(x), c
            for wide in (out,) if self.rng.random() < 0.5 else (self.pick(3, 5), out):
                k = self.pick(1, 3)
                y, width = self.g.Conv(y, self.g.weight(wide, width, k, k), pads=[k // 2] * 4), wide
            given = [onnx.helper.make_empty_tensor_value_info(y)]
            bodies[branch] = onnx.helper.make_graph(self.g.nodes, branch, [], given)
        self.g.nodes = around
        condition = self.g.input(self.g.name("condition"), [], onnx.TensorProto.BOOL)
        made = self.g.node("If", condition, **bodies)
        self.keep_scale(made, x)
        self.add(made, (n, out, h, w))

    STEPS = (
        ("conv", 6), ("activation", 5), ("add_two", 3), ("concat", 2), ("split", 2), ("slice", 1), ("gather", 1),
        ("pad_channels", 1), ("gate", 2), ("shuffle", 2), ("pool_down", 1), ("resize", 1), ("depth_to_space", 1),
        ("transposed_conv", 1), ("to_sequence", 1), ("linear", 2), ("attention", 1), ("layer_norm", 2),
        ("to_vector", 1), ("gemm", 2), ("recurrent", 1), ("mix_tokens", 1), ("group_norm", 1), ("windows", 1),
        ("branches", 1),
    )  # fmt: skip

    def grow(self, steps: int) -> onnx.ModelProto:
        """The model after this many steps; its outputs are layers on the last tensors, so that something can go."""
        names, odds = zip(*self.STEPS, strict=True)
        self.conv()
        for _ in range(steps):
            getattr(self, str(self.rng.choice(names, p=np.array(odds) / sum(odds))))()
        outputs = []
        for rank in (4, 3, 2):
            for _ in range(self.pick(0, 1, 1, 2)):
                if (x := self.any(rank)) is None:
                    continue
                d = self.pool[x][1 if rank != 3 else 2]
                if rank == 4:
                    outputs.append(self.g.Conv(x, self.g.weight(3, d, 1, 1)))
                else:
                    outputs.append(self.g.MatMul(x, self.g.weight(d, 3)))
        return self.g.model(*(outputs or [self.g.Relu(list(self.pool)[-1])]))


@pytest.mark.parametrize("seed", range(SAMPLES))
def test_a_random_graph_is_pruned_exactly(seed: int) -> None:
    model = Grower(seed).grow(10 + seed % 20)
    _, _, _, proof = pruned(model, seed)
    assert proof.max_relative_difference < 2e-5


def test_every_step_is_taken_by_some_sample() -> None:
    """No step of the generator lies idle: in some sample it adds nodes."""
    taken: set[str] = set()
    for seed in range(SAMPLES):
        grower = Grower(seed)
        for name, _ in Grower.STEPS:
            step = getattr(grower, name)

            def counted(step=step, name=name, g=grower.g) -> None:
                before = len(g.nodes)
                step()
                if len(g.nodes) > before:
                    taken.add(name)

            setattr(grower, name, counted)
        grower.grow(10 + seed % 20)
    assert taken == {name for name, _ in Grower.STEPS}

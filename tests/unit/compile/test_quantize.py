"""int8 without a model: scales, surgery on small graphs, the dial, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from engine.compile.calibrate import Observed, open_session
from engine.compile.quantize import Int8Config, int8_transform, scheme_of, sums_u8s8_exactly
from engine.compile.quantize_graph import GraphFile, Scheme, insert_qdq, write_together
from engine.compile.quantize_scales import (
    Scale,
    activation_scale,
    fake_quantized,
    quantized_weights,
)
from engine.compile.sensitivity import Group, choose, decibel, noise_of
from engine.compile.tensorrt_quantization import refuse_quantization
from engine.errors import InvalidRequestError, UnsupportedError

ASYMMETRIC = Scheme(signed=False, weight_bits=8, outputs=True)
NARROW = Scheme(signed=False, weight_bits=7, outputs=True)
SYMMETRIC = Scheme(signed=True, weight_bits=8, outputs=False)


# ------------------------------------------------------------------------------ scales


@given(low=st.floats(-100, 0), high=st.floats(0, 100), signed=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_scale_keeps_zero_and_errs_by_half_a_level_within_its_range(
    low: float, high: float, signed: bool
) -> None:
    values = np.linspace(low, high, 1000, dtype=np.float32)
    scale = activation_scale(low, high, values, signed=signed)
    assert fake_quantized(np.zeros(1, np.float32), scale, signed=signed) == 0
    error = np.abs(fake_quantized(values, scale, signed=signed) - values).max()
    assert error <= max(high - low, 1e-6) * (1 / 120 if signed else 1 / 240) + 1e-6
    assert not signed or scale.zero == 0


def test_a_range_is_cut_where_hardly_a_value_is() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    wide = activation_scale(float(values.min()), float(values.max()), values, signed=True)
    scale = activation_scale(float(values.min()), 30.0, values, signed=True)
    assert scale.scale < 1.5 * wide.scale


def test_weights_have_a_scale_for_each_channel_and_keep_to_their_bits() -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((8, 4, 3, 3)).astype(np.float32)
    weights *= np.logspace(-4, 2, 8, dtype=np.float32)[:, None, None, None]
    weights[3] = 0
    for bits, limit in ((8, 127), (7, 63)):
        stored, scales = quantized_weights(weights, 0, bits)
        assert np.abs(stored.astype(int)).max() <= limit
        restored = stored * scales[:, None, None, None]
        error = np.square(restored - weights).sum((1, 2, 3))
        signal = np.square(weights).sum((1, 2, 3))
        assert (error[signal > 0] / signal[signal > 0]).max() < 1e-3
        assert not restored[3].any()


def test_observed_values_give_range_size_and_a_bounded_sample() -> None:
    seen = Observed()
    for i in range(3):
        seen.add(np.full((2, 100, 100), i, np.float32))
    assert (seen.low, seen.high, seen.elements) == (0, 2, 10_000)
    assert 3 * 900 < len(seen.sample) < 3 * 1200


# ------------------------------------------------------------------------------ surgery


def write_pair(folder: Path) -> tuple[Path, Path]:
    """Two graphs on one file of weights: x -> conv -> tokens -> matrix product; and one more."""
    rng = np.random.default_rng(1)
    constants = {
        "conv.w": rng.standard_normal((24, 16, 3, 3)).astype(np.float32) / 12,
        "conv.b": rng.standard_normal(24).astype(np.float32),
        "linear.w": rng.standard_normal((24, 32)).astype(np.float32) / 5,
        "flat": np.array([0, 24, -1], np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["x", "conv.w", "conv.b"], ["c"], "conv", pads=[1] * 4),
        helper.make_node("Reshape", ["c", "flat"], ["f"], "reshape"),
        helper.make_node("Transpose", ["f"], ["t"], "transpose", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["t", "linear.w"], ["y"], "linear"),
    ]
    twice = [helper.make_node("Add", ["y", "y"], ["z"], "add")]
    paths = folder / "part.onnx", folder / "part.adapters.onnx"
    for path, more, output in ((paths[0], [], "y"), (paths[1], twice, "z")):
        graph = helper.make_graph(
            [*nodes, *more],
            "part",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["b", 16, 8, 8])],
            [helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, ["b", 64, 32])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, str(path))
    graphs = [GraphFile(path) for path in paths]
    write_together(graphs, folder / "part.weights")
    return paths


def run(path: Path, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    result: np.ndarray[Any, Any] = open_session(path).run(None, {"x": x})[0]
    return result


def scales_for(path: Path, x: np.ndarray[Any, Any], scheme: Scheme) -> dict[str, Scale]:
    graph = GraphFile(path)
    for name in ("c", "t"):
        graph.model.graph.output.append(
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        )
    probe = path.with_name("probe.onnx")
    graph.save(probe)
    y, c, t = open_session(probe).run(["y", "c", "t"], {"x": x})
    return {
        name: activation_scale(float(v.min()), float(v.max()), v.ravel(), signed=scheme.signed)
        for name, v in {"x": x, "c": c, "t": t, "y": y}.items()
    }


@pytest.mark.parametrize("scheme", [ASYMMETRIC, NARROW, SYMMETRIC], ids=["u8", "7 bit", "s8"])
def test_both_variants_are_quantized_alike_on_one_smaller_file(
    tmp_path: Path, scheme: Scheme
) -> None:
    plain, adapters = write_pair(tmp_path)
    float_bytes = (tmp_path / "part.weights").stat().st_size
    x = np.random.default_rng(2).standard_normal((4, 16, 8, 8)).astype(np.float32)
    exact, scales = run(plain, x), scales_for(plain, x, scheme)

    graphs = [GraphFile(plain), GraphFile(adapters)]
    sites = graphs[0].sites()
    assert [(site.node, site.kind, site.fan_in) for site in sites] == [
        ("conv", "conv", 144),
        ("linear", "matmul", 24),
    ]
    for graph in graphs:
        insert_qdq(graph, sites, scales, scheme)
    write_together(graphs, tmp_path / "part.weights")

    out = run(plain, x)
    assert decibel(float(noise_of(out, exact).mean())) > 30
    np.testing.assert_allclose(run(adapters, x), 2 * out, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "part.weights").stat().st_size < 0.4 * float_bytes
    assert [path.name for path in tmp_path.glob("*.part")] == []


def test_a_mate_of_any_amplitude_changes_nothing(tmp_path: Path) -> None:
    plain, _ = write_pair(tmp_path)
    x = np.random.default_rng(3).standard_normal((1, 16, 8, 8)).astype(np.float32)
    graph = GraphFile(plain)
    insert_qdq(graph, graph.sites(), scales_for(plain, x, ASYMMETRIC), ASYMMETRIC)
    write_together([graph], tmp_path / "part.weights")
    beside = run(plain, np.concatenate([x, 10 * x]))
    np.testing.assert_allclose(beside[:1], run(plain, x), rtol=1e-5, atol=1e-5)


def test_onnx_runtime_fuses_what_is_quantized(tmp_path: Path) -> None:
    """A convolution that is not fused would run in float, and slower than before."""
    import onnxruntime

    from engine.runtime.onnxruntime import set_threads

    plain, _ = write_pair(tmp_path)
    x = np.random.default_rng(3).standard_normal((2, 16, 8, 8)).astype(np.float32)
    graph = GraphFile(plain)
    insert_qdq(graph, graph.sites(), scales_for(plain, x, ASYMMETRIC), ASYMMETRIC)
    write_together([graph], tmp_path / "part.weights")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    set_threads(options, 1)
    onnxruntime.InferenceSession(str(plain), options, providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert {"QLinearConv", "MatMulIntegerToFloat"} <= kinds
    assert not kinds & {"Conv", "MatMul"}


def test_tensorrt_takes_the_symmetric_scheme_and_no_other(tmp_path: Path) -> None:
    for scheme, refused in ((SYMMETRIC, False), (ASYMMETRIC, True)):
        folder = tmp_path / str(refused)
        folder.mkdir()
        plain, _ = write_pair(folder)
        x = np.random.default_rng(3).standard_normal((2, 16, 8, 8)).astype(np.float32)
        graph = GraphFile(plain)
        insert_qdq(graph, graph.sites(), scales_for(plain, x, scheme), scheme)
        write_together([graph], folder / "part.weights")
        if refused:
            with pytest.raises(UnsupportedError):
                refuse_quantization("part", plain)
        else:
            refuse_quantization("part", plain)


# ------------------------------------------------------------------------------ the choice


class Additive:
    """Trials in which the noise of a set is the sum of its parts', as it nearly is in a network."""

    def __init__(self) -> None:
        self.asked = 0

    def noise(self, groups: Sequence[Group]) -> np.ndarray[Any, Any]:
        self.asked += 1
        return np.array([sum(group.noise for group in groups)])


def groups() -> list[Group]:
    rng = np.random.default_rng(0)
    noises = 10 ** rng.uniform(-6, -2, 60)
    saved = rng.uniform(-100, 1000, 60)
    return [Group(0, (), 1000, float(s), float(n)) for n, s in zip(noises, saved, strict=True)]


def test_a_higher_dial_takes_a_part_of_what_a_lower_one_takes() -> None:
    known, taken = groups(), []
    for dial in (10.0, 20.0, 25.0, 30.0, 40.0, 99.0):
        trials = Additive()
        chosen = choose(known, trials, dial)  # type: ignore[arg-type]
        assert decibel(float(trials.noise(chosen)[0])) >= dial
        assert all(group.saved > 0 for group in chosen)
        assert trials.asked < 10
        taken.append({id(group) for group in chosen})
    assert all(more >= less for more, less in pairwise(taken))
    assert len(taken[0]) == sum(group.saved > 0 for group in known)
    assert not taken[-1]


def test_noise_is_told_row_by_row() -> None:
    exact = np.ones((2, 3, 4, 4), np.float32)
    noisy = exact.copy()
    noisy[1] += 0.1
    assert noise_of(noisy, exact) == pytest.approx([0.0, 0.01], rel=1e-5)
    assert decibel(0.01) == pytest.approx(20)


# ------------------------------------------------------------------------------ the dial


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_snr_db", float("nan")),
        ("min_snr_db", -1.0),
        ("min_snr_db", 101.0),
        ("rows", 0),
        ("drawings", ()),
    ],
)
def test_a_bad_dial_is_refused_by_name(field: str, value: object) -> None:
    options: Mapping[str, Any] = {field: value}
    with pytest.raises(InvalidRequestError, match=field) as caught:
        Int8Config(**options)
    assert caught.value.field == field


def test_the_recipe_says_everything_that_decides_the_plan() -> None:
    def recipe(backend: str = "onnxruntime", **changes: Any) -> dict[str, object]:
        return int8_transform(backend, Int8Config(**changes)).recipe

    drawings = Int8Config().drawings
    recipes = [
        recipe(),
        recipe(min_snr_db=31.0),
        recipe(rows=64),
        recipe(drawings=drawings[:2]),
        recipe("tensorrt"),
    ]
    assert all(a != b for i, a in enumerate(recipes) for b in recipes[:i])
    assert recipe() == recipe()


def test_backends_without_int8_are_refused_with_those_that_have_it() -> None:
    with pytest.raises(UnsupportedError, match="onnxruntime, tensorrt"):
        int8_transform("torch")


@pytest.mark.parametrize(
    ("machine", "flags", "exact"),
    [
        ("x86_64", "flags : avx2 avx512_vnni", True),
        ("x86_64", "flags : avx2 avx_vnni", True),
        ("x86_64", "flags : avx2 avx512f", False),
        ("x86_64", None, False),
        ("aarch64", None, True),
    ],
)
def test_weights_have_7_bits_where_products_saturate(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    flags: str | None,
    exact: bool,
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(flags)
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert sums_u8s8_exactly(cpuinfo) is exact
    monkeypatch.setattr("engine.compile.quantize.sums_u8s8_exactly", lambda: exact)
    assert scheme_of("onnxruntime").weight_bits == (8 if exact else 7)
    assert scheme_of("tensorrt") == SYMMETRIC

"""One torch module as an ONNX graph, and the proof that both compute the same.

A translation can be wrong without an error, so a graph is executed by onnxruntime on batches of 1, 2 and 7, and every output
must fulfil |onnx - torch| <= 1e-4 + 1e-5 |torch|, both in float32, or there is no graph. Batches of three sizes, because a
batch axis that was fixed by accident shows in no other way.

The translation is torch's own (`torch.onnx.export` with torch.export underneath), but for two operators that it writes in a
way that cancels or overflows; see `_translations`.
"""

import hashlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vaelab.errors import UsageError
from vaelab.explore.runtime import NEEDED
from vaelab.heap import uncollected

BATCHES = (1, 2, 7)
"""Batch sizes at which a graph is compared with torch."""
ATOL, RTOL = 1e-4, 1e-5
"""|onnx - torch| <= ATOL + RTOL |torch|, in float32."""
OPSET = 20
"""Version of ONNX's operators: the oldest that has all that is used."""
INSTALL = "pip install 'vaelab[explore]'"


@dataclass(frozen=True)
class Graph:
    """An ONNX model that agrees with torch.

    Attributes:
        content: the bytes of an .onnx file.
        inputs: their names.
        outputs: their names.
        error: the largest |onnx - torch| that was found.
    """

    content: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    error: float


class NoGraph(UsageError):
    """A part of a model, `encoder` or `decoder`, that ONNX cannot carry.

    Attributes:
        reason: which part, and why; the message also says what is still possible.
    """

    def __init__(self, part: str, reason: str) -> None:
        self.part, self.given = part, reason
        self.reason = f"the {part} cannot be exported to ONNX: {reason}"
        other = "decoder" if part == "encoder" else "encoder"
        super().__init__(f"{self.reason}; the {other} may be: vaelab export RUN --part {other}")

    def __reduce__(self) -> tuple[type["NoGraph"], tuple[str, str]]:
        return type(self), (self.part, self.given)  # between processes an exception is its arguments


@dataclass(frozen=True)
class Refill:
    """A graph whose weights can be exchanged for those of another model of the same networks.

    The exporter keeps weights as they are or transposed, so they are found by what they hold.

    Attributes:
        content: of the graph.
        held: the tensors of its model, by their names.
        wanted: those of the other model.
    """

    content: bytes
    held: Mapping[str, Tensor]
    wanted: Mapping[str, Tensor]

    def proto(self) -> Any:
        """The graph with the other weights; None where it holds one that cannot be told from another."""
        import onnx
        from onnx import numpy_helper

        found: dict[bytes, np.ndarray] = {}
        for name, tensor in self.held.items():
            other = self.wanted[name].numpy()
            for one, new in ((tensor.numpy(), other), (tensor.numpy().T, other.T)):
                if found.setdefault(_digest(one), new) is not new and not np.array_equal(found[_digest(one)], new):
                    return None
        proto = onnx.load_from_string(self.content)
        for initializer in proto.graph.initializer:
            if (new := found.get(_digest(numpy_helper.to_array(initializer)))) is not None:
                initializer.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(new), initializer.name))
        return proto


def _digest(array: np.ndarray) -> bytes:
    """Of what an array holds, and its shape."""
    return repr((array.shape, array.dtype)).encode() + hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()


def require() -> None:
    """Raises UsageError, with the command to install them, where the packages for ONNX are missing."""
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(f"ONNX export needs the package {name} ({error}): {INSTALL}") from None


def translate(
    module: nn.Module,
    inputs: Sequence[str],
    outputs: Sequence[str],
    given: Callable[[int], tuple[Tensor, ...]],
    facts: Mapping[str, str],
    steps: Sequence[str] = (),
    before: Refill | None = None,
) -> Graph:
    """The graph of a module, after it has agreed with it.

    Args:
        module: in evaluation mode, on the CPU; takes tensors (N, …) and returns a tuple of tensors (N, …).
        inputs: names of what it takes.
        outputs: names of what it returns.
        given: makes what it takes for a batch of N.
        facts: the file's metadata; `part` is the graph's name, too.
        steps: outputs that jump as their inputs cross an edge: one value in 100 may have been rounded to the other side.
        before: a graph that may become this one with other weights; it must agree like any other, or a new one is made.

    Raises:
        NoGraph: something in it has no translation, or the graph disagrees.
    """
    part, batch = facts["part"], torch.export.Dim("N")

    def proven(proto: Any) -> Graph:
        _describe(proto, facts)
        content = proto.SerializeToString(deterministic=True)
        worst = max(_difference(module, content, inputs, outputs, given(n), part, steps) for n in BATCHES)
        return Graph(content, tuple(inputs), tuple(outputs), worst)

    if before is not None and (refilled := before.proto()) is not None:
        with suppress(NoGraph):
            return proven(refilled)
    try:
        with _quietly(), uncollected():  # a quarter of the time was a search for garbage
            program = torch.onnx.export(
                module, given(3), dynamo=True, opset_version=OPSET, verbose=False, external_data=False,
                input_names=list(inputs), output_names=list(outputs), dynamic_shapes=tuple({0: batch} for _ in inputs),
                custom_translation_table=_translations(),
            )  # fmt: skip
    except Exception as error:  # the exporter wraps whatever a network of the user's own runs into
        raise NoGraph(part, f"a network in it has no translation ({_first_line(error)})") from None
    return proven(program.model_proto)  # type: ignore[union-attr]


def run_graph(content: bytes, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What onnxruntime makes of named inputs, on one thread: the outputs by name."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))  # type: ignore[arg-type]


# --- how ---


@contextmanager
def _quietly() -> Iterator[None]:
    """The exporter warns, logs and prints what is for its authors; what goes wrong it raises, too."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Two operators that the exporter writes in a way that cancels or overflows in float32.

    As log(sigmoid(a)) the mass of a grey level far from its logistic is zero, its log -inf; as exp(a) - 1 the mass that a very
    wide logistic gives to one level is lost: 0.03 to 0.42 nats in 64 pixels, half of them with log scales raised by 9.
    """
    from onnxscript import opset20

    op: Any = opset20  # its annotations are for scripts, not for calls

    def log_sigmoid(a: Any) -> Any:
        return op.Neg(op.Softplus(op.Neg(a)))

    def expm1(a: Any) -> Any:
        return op.Mul(op.Tanh(op.Mul(a, op.Constant(value_float=0.5))), op.Add(op.Exp(a), op.Constant(value_float=1.0)))

    return {torch.ops.aten.log_sigmoid.default: log_sigmoid, torch.ops.aten.expm1.default: expm1}


def _describe(proto: Any, facts: Mapping[str, str]) -> None:
    """Put facts into a file, and take out what the exporter tells of the machine: the stack at each node, with paths."""
    proto.ClearField("metadata_props")
    for key in sorted(facts):
        proto.metadata_props.add(key=key, value=facts[key])
    graph = proto.graph
    nodes = [node for function in proto.functions for node in function.node]
    for item in (
        *proto.functions,
        *nodes,
        graph,
        *graph.node,
        *graph.input,
        *graph.output,
        *graph.value_info,
        *graph.initializer,
    ):
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    graph.ClearField("value_info")
    graph.name = facts["part"]


def _difference(
    module: nn.Module,
    content: bytes,
    inputs: Sequence[str],
    outputs: Sequence[str],
    given: tuple[Tensor, ...],
    part: str,
    steps: Sequence[str],
) -> float:
    """The largest |onnx - torch| over all outputs. Raises NoGraph where it is too large."""
    try:
        found = run_graph(content, dict(zip(inputs, (t.numpy() for t in given), strict=True)))
    except Exception as error:  # onnxruntime's have no common class but this
        raise NoGraph(part, f"onnxruntime does not execute it ({_first_line(error)})") from None
    worst = 0.0
    for name, expected in zip(outputs, module(*given), strict=True):
        here = f"its {name} in a batch of {len(given[0])}"
        if found[name].shape != expected.shape:
            raise NoGraph(part, f"{here} has the shape {found[name].shape} and torch's has {tuple(expected.shape)}")
        off = np.abs(found[name] - expected.numpy())
        near = off <= ATOL + RTOL * expected.abs().numpy()  # so written, a NaN fails
        if not (near.mean() >= 0.99 if name in steps else near.all()):
            raise NoGraph(
                part, f"{here} differs from torch's by {off.max():.2g}, more than {ATOL:g} + {RTOL:g} |torch|"
            )
        worst = max(worst, float(off[near].max(initial=0)))
    return worst


def _first_line(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]

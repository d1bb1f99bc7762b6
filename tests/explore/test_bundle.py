"""The bundle: what the page is told is what the library finds."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from vaelab.data.datasets import Dataset, Images
from vaelab.data.protocol import protocol
from vaelab.distributions import closed_form_kl
from vaelab.errors import RunError, UsageError
from vaelab.evaluation import Evaluation, Quantity
from vaelab.evaluation.compare import save
from vaelab.explore import bundle
from vaelab.explore.bundle import Exhibit
from vaelab.explore.graph import run_graph
from vaelab.run import Run


@pytest.fixture
def build(few, run_of):
    """The bundle of models, each in a run folder of its own; and the description of the first."""

    def made(*models, data=None, protocol="dynamic", name="run"):
        shown = [
            Exhibit(f"model {i}", run_of(m, f"{name}-{i}", protocol=protocol, data=data)) for i, m in enumerate(models)
        ]
        built = bundle.build(shown, data or few)
        json.dumps(built.manifest, allow_nan=False)
        return built, built.manifest["runs"][0]

    return made


def images(built):
    about = built.manifest["data"]
    pixels = np.frombuffer(built.pieces["test.u8"], np.uint8).reshape(about["n"], *about["shape"])
    return torch.from_numpy(pixels.astype(np.float32) / np.float32(255))


def floats(built, name):
    return np.frombuffer(built.pieces[name], "<f4").reshape(built.manifest["data"]["n"], -1)


def check_golden(built, described):
    """What torch said of eight codes and one image is what the graphs in the bundle say."""
    golden = described["golden"]
    n = len(golden["z"])
    labels = {"c": np.zeros(n, np.int64)} if described["classes"] else {}
    z = np.array(golden["z"], np.float32)
    assert z.shape == (8, described["latent_dim"])
    empty = np.zeros((n, *built.manifest["data"]["shape"]), np.float32)
    noise = np.full((n, 2, *built.manifest["data"]["shape"]), 0.5, np.float32)
    found = run_graph(built.pieces[described["decoder"]], {"z": z, "x": empty, "u": noise, **labels})
    np.testing.assert_allclose(found["mean"].sum((1, 2, 3)), golden["mean_sum"], atol=1e-4)
    np.testing.assert_allclose(found["log_px"], golden["log_px_zero"], atol=1e-4)
    if described["encoder"]:
        one = golden["image"]
        if labels:
            labels = {"c": np.frombuffer(built.pieces["labels.u8"], np.uint8)[[one]].astype(np.int64)}
        found = run_graph(built.pieces[described["encoder"]], {"x": images(built)[[one]].numpy(), **labels})
        np.testing.assert_allclose(found["mean"][0], golden["mean"], atol=1e-4)
        np.testing.assert_allclose(found["mean"][0], floats(built, described["codes"]["mean"])[one], atol=1e-4)


def test_a_gaussian_of_two_dimensions(build, model, few):
    m = model()
    built, run = build(m)
    x = protocol("dynamic").test_set(few.test.pixels)
    with torch.no_grad():
        q = m.encode(x)
        kl = closed_form_kl(q, m.latent_prior())
    assert torch.equal(images(built), x)
    assert built.pieces["labels.u8"] == bytes(few.test.labels.tolist())
    assert np.array_equal(floats(built, "a/mean.f32"), q.mean.numpy())
    assert np.array_equal(floats(built, "a/log_sigma.f32"), q.log_std.numpy())
    np.testing.assert_allclose(run["rates"], kl.double().mean(0).numpy(), rtol=1e-6)
    assert set(built.pieces) == {
        "test.u8",
        "labels.u8",
        "a/mean.f32",
        "a/log_sigma.f32",
        "a/encoder.onnx",
        "a/decoder.onnx",
    }
    data = built.manifest["data"]
    assert data == {
        "name": "digits", "shape": [1, 8, 8], "classes": list("0123456789"), "n": 60, "pixels": "test.u8",
        "labels": "labels.u8", "binary": True,
    }  # fmt: skip
    assert (run["posterior"], run["likelihood"], run["normalised"], run["classes"]) == (
        "gaussian",
        "bernoulli",
        True,
        0,
    )
    assert (run["latent_dim"], run["kl"], run["components"]) == (2, True, None)
    assert run["prior"] == {"kind": "standard-normal"} and run["encoder_missing"] == run["decoder_missing"] == ""
    check_golden(built, run)


def test_two_runs_share_the_images(build, model, ungraphed):
    built, one = build(model(), model(dim=3))
    other = built.manifest["runs"][1]
    assert [run["key"] for run in (one, other)] == ["a", "b"]
    assert [run["label"] for run in (one, other)] == ["model 0", "model 1"]
    assert (one["encoder"], other["encoder"]) == ("a/encoder.onnx", "b/encoder.onnx")
    assert {"a/encoder.onnx", "b/encoder.onnx", "a/mean.f32", "b/mean.f32"} < set(built.pieces)
    assert len([name for name in built.pieces if name.endswith(".u8")]) == 2


@pytest.mark.parametrize("dim", [1, 4])
def test_any_number_of_dimensions(build, model, dim):
    built, run = build(model(dim=dim))
    assert run["latent_dim"] == dim and len(run["rates"]) == dim
    assert floats(built, "a/mean.f32").shape == (60, dim)
    if dim > 2:
        codes = floats(built, "a/mean.f32").astype(float)
        plane = run["components"]
        axes = np.array(plane["axes"])
        centred = codes - codes.mean(0)
        values, vectors = np.linalg.eigh(centred.T @ centred)
        np.testing.assert_allclose(plane["mean"], codes.mean(0))
        np.testing.assert_allclose(np.abs(axes @ vectors[:, [-1, -2]]), np.eye(2), atol=1e-6)
        np.testing.assert_allclose(plane["share"], values[[-1, -2]] / values.sum())
        assert all(axis[np.abs(axis).argmax()] > 0 for axis in axes)
    check_golden(built, run)


def test_a_laplace_and_a_full_gaussian_have_marginal_deviations(build, model, few, ungraphed):
    x = protocol("dynamic").test_set(few.test.pixels)
    built, run = build(model("Laplace"), model("FullGaussian", dim=3))
    other = built.manifest["runs"][1]
    assert (run["posterior"], other["posterior"]) == ("laplace", "gaussian")
    with torch.no_grad():
        laplace, full = model("Laplace").encode(x), model("FullGaussian", dim=3).encode(x)
    covariance = full.scale_tril @ full.scale_tril.mT
    np.testing.assert_allclose(floats(built, "a/log_sigma.f32"), laplace.std.log(), atol=1e-5)
    np.testing.assert_allclose(
        np.exp(2 * floats(built, "b/log_sigma.f32")), covariance.diagonal(dim1=1, dim2=2), rtol=1e-5
    )
    assert len(run["rates"]) == 2 and (other["kl"], other["rates"]) == (True, None)
    assert (run["codes"]["scale_tril"], other["codes"]["scale_tril"]) == (None, "b/scale_tril.f32")
    assert np.array_equal(floats(built, "b/scale_tril.f32"), full.scale_tril.tril().flatten(1))


def test_a_dirac_is_a_point_without_a_rate(build, model):
    built, run = build(model("Delta"))
    assert (run["posterior"], run["codes"]["log_sigma"], run["kl"], run["rates"]) == ("point", None, False, None)
    assert "a/log_sigma.f32" not in built.pieces
    check_golden(built, run)


def test_a_flow_shows_points_and_says_why(build, model, few):
    m = model("NeuralSpline")
    built, run = build(m)
    assert (run["posterior"], run["encoder"], run["kl"]) == ("none", None, False)
    assert run["encoder_missing"].startswith("the encoder cannot be exported to ONNX: its posterior is a flow")
    assert "--part" not in run["encoder_missing"]
    with torch.no_grad():
        expected = m.encode(protocol("dynamic").test_set(few.test.pixels)).mean
    assert np.array_equal(floats(built, "a/mean.f32"), expected.numpy())
    check_golden(built, run)


def test_a_conditional_model_is_asked_with_labels(build, model, few):
    m = model(classes=10)
    built, run = build(m)
    assert run["classes"] == 10
    with torch.no_grad():
        expected = m.encode(protocol("dynamic").test_set(few.test.pixels), torch.from_numpy(few.test.labels)).mean
    np.testing.assert_allclose(floats(built, "a/mean.f32"), expected, atol=1e-6)
    check_golden(built, run)


def test_another_prior_is_named_and_has_no_rate_of_its_own(build, model, ungraphed):
    from vaelab import priors

    _, run = build(model(prior=lambda: priors.MixtureOfGaussians(2, 3)))
    assert run["prior"]["kind"] == "other" and "mixture of gaussians" in run["prior"]["text"]
    assert (run["kl"], run["rates"]) == (False, None)


def test_grey_levels_are_not_a_likelihood_and_not_binary(build, model, few, ungraphed):
    built, run = build(model(likelihood="GreyCrossEntropy"), protocol="grey")
    assert (run["normalised"], run["likelihood"]) == (False, "grey-cross-entropy")
    assert built.pieces["test.u8"] == few.test.pixels.tobytes()
    assert built.manifest["data"]["binary"] is False


def test_dequantised_images_are_rounded_and_the_codes_are_of_the_rounded_ones(build, model, few, ungraphed):
    m = model(likelihood="Gaussian")
    built, _ = build(m, protocol="dequantised")
    shown = images(built)
    assert (shown - protocol("dequantised").test_set(few.test.pixels)).abs().max() <= 0.5 / 255 + 1e-6
    with torch.no_grad():
        assert np.array_equal(floats(built, "a/mean.f32"), m.encode(shown).mean.numpy())


def test_many_images_are_thinned_evenly(build, model, few, monkeypatch, ungraphed):
    monkeypatch.setattr(bundle, "SHOWN", 20)
    built, _ = build(model("Delta"))
    assert torch.equal(images(built), protocol("dynamic").test_set(few.test.pixels)[::3])
    assert built.pieces["labels.u8"] == bytes(few.test.labels[::3].tolist())
    monkeypatch.setattr(bundle, "PIXELS", 64 * 10 + 63)
    assert torch.equal(images(build(model("Delta"), name="fewer")[0]), images(built)[::2])


def test_data_without_labels(build, model, few, ungraphed):
    plain = Dataset("plain", Images(few.train.pixels), Images(few.test.pixels), None, "")
    built, _ = build(model("Delta"), data=plain)
    assert built.manifest["data"]["labels"] is None and built.manifest["data"]["classes"] is None
    assert "labels.u8" not in built.pieces


def test_the_numbers_are_those_of_the_last_evaluation(build, model, few, run_of, ungraphed):
    run = run_of(model("Delta"))
    shown = [Exhibit("it", run)]
    described = bundle.build(shown, few).manifest["runs"][0]
    assert described["metrics"] == [] and described["metrics_missing"].startswith(
        f"not evaluated: run `vaelab evaluate {run.path}`"
    )
    measured = Evaluation(
        {"rate": Quantity.missing("no density"), "nll": Quantity(128.414, 0.3021, 60), "active_units": Quantity(2.0, None, 60)},
        {"test_images": 60, "density": "log p(x)", "seed": 3, "importance_samples": 5000, "importance_sampled_images": 40},
        np.zeros((60, 2)),
    )  # fmt: skip
    save(run, measured)
    described = bundle.build(shown, few).manifest["runs"][0]
    rows = {row["key"]: row for row in described["metrics"]}
    assert list(rows) == ["nll", "rate", "active_units"] and described["metrics_missing"] == ""
    assert (rows["nll"]["value"], rows["nll"]["se"], rows["nll"]["n"], rows["nll"]["unit"]) == (
        "128.41",
        "0.30",
        60,
        "nats",
    )
    assert (rows["rate"]["value"], rows["rate"]["reason"]) == ("", "no density")
    assert (rows["active_units"]["value"], rows["active_units"]["se"]) == ("2", "")
    assert "protocol 'dynamic'" in described["protocol_text"] and "K = 5,000 on 40" in described["protocol_text"]
    (run.path / "evaluation.json").write_text('{"quantities": {"nll": 3}}')
    described = bundle.build(shown, few).manifest["runs"][0]
    assert described["metrics"] == [] and described["metrics_missing"].startswith(
        "its evaluation cannot be read: run `vael"
    )
    run.save_model(model("Delta").apply(_moved))
    described = bundle.build(shown, few).manifest["runs"][0]
    assert described["metrics"] == [] and "trained again since" in described["metrics_missing"]


def test_a_training_that_was_interrupted_is_said(few, run_of, model, ungraphed):
    run = run_of(model("Delta"))
    shown = [Exhibit("it", run)]
    assert bundle.build(shown, few).manifest["runs"][0]["interrupted"] == ""
    run.configure(replace(run.recipe(), training=replace(run.recipe().training, epochs=30)))
    said = bundle.build(shown, few).manifest["runs"][0]["interrupted"]
    assert said.startswith("training was interrupted after 1 of 30 epochs")


def _moved(part: torch.nn.Module) -> None:
    for parameter in part.parameters(recurse=False):
        parameter.data.add_(0.01)


def test_what_cannot_be_shown(build, model, few, run_of):
    with pytest.raises(UsageError, match="0 runs were given"):
        bundle.build([], few)
    run = run_of(model())
    with pytest.raises(UsageError, match="3 runs were given"):
        bundle.build([Exhibit("x", run)] * 3, few)
    other = run_of(model(likelihood="GreyCrossEntropy"), "grey", protocol="grey")
    with pytest.raises(UsageError, match=r"the protocol is 'dynamic' for .*run' and 'grey' for .*grey'"):
        bundle.build([Exhibit("x", run), Exhibit("y", other)], few)
    shorter = Dataset("digits", few.train, Images(few.test.pixels[:9], few.test.labels[:9]), few.classes, "")
    with pytest.raises(UsageError, match="give the run's own data"):
        bundle.build([Exhibit("x", run)], shorter)
    elsewhere = run_of(model(), "elsewhere", data=shorter)
    with pytest.raises(UsageError, match="the data is 'digits' for"):
        bundle.check([Exhibit("x", run), Exhibit("y", elsewhere)])
    run.weights.unlink()
    with pytest.raises(RunError, match="has not finished"):
        bundle.build([Exhibit("x", run)], few)


def test_codes_that_are_not_finite_are_refused(build, model):
    m = model("Delta")
    with torch.no_grad():
        m.posterior.head.bias.fill_(float("nan"))
    with pytest.raises(UsageError, match=r"the codes of 60 of 60 test images .* are not finite"):
        build(m)


def test_a_decoder_that_is_not_finite_is_left_out_and_says_so(build, model):
    m = model("Delta")
    with torch.no_grad():
        m.likelihood.decoder.phase.fill_(float("nan"))
    _, run = build(m)
    assert run["decoder"] is None and "differs from torch's by nan" in run["decoder_missing"]
    assert run["golden"]["mean_sum"] == [None] * 8


def test_runs_are_called_by_what_tells_them_apart(tmp_path):
    paths = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert bundle.labels([Run(paths[0])]) == ["run"]
    assert bundle.labels([Run(path) for path in paths]) == ["a/run", "b/run"]
    assert bundle.labels([Run(paths[0]), Run(paths[0])]) == ["run", "run"]


def test_the_same_runs_give_the_same_bundle(few, run_of, model, ungraphed):
    shown = [Exhibit("it", run_of(model()))]
    one, other = (bundle.build(shown, few) for _ in range(2))
    assert one == other
    assert replace(one, pieces={}) != replace(other, manifest={})

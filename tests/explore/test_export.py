"""Graphs: what onnxruntime makes of them is what torch makes of the model."""

import logging
import pickle
import sys

import numpy as np
import onnx
import pytest
import torch
from scipy.stats import ks_2samp
from torch import nn

from vaelab import priors
from vaelab.distributions import closed_form_kl
from vaelab.errors import UsageError
from vaelab.explore import export
from vaelab.explore.draws import draw
from vaelab.explore.graph import NoGraph, run_graph
from vaelab.models.vae import VAE

B = 5
NEAR = 1e-4


def labels_of(model, n=B):
    return None if model.classes is None else (torch.arange(n) * 2) % model.classes


def given(model, **tensors):
    c = labels_of(model)
    return {name: t.numpy() for name, t in {**tensors, "c": c}.items() if t is not None}


def near(found, expected):
    assert found.dtype == np.float32 and found.shape == tuple(expected.shape)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=NEAR)


POSTERIORS = {
    "Gaussian": {},
    "Gaussian of one dimension": {"dim": 1},
    "Gaussian of convolutions": {"conv": True, "dim": 3},
    "Gaussian, Laplace prior": {"prior": lambda: priors.Laplace(2)},
    "Laplace": {"posterior": "Laplace"},
    "Laplace, Laplace prior": {"posterior": "Laplace", "prior": lambda: priors.Laplace(2)},
    "FullGaussian": {"posterior": "FullGaussian", "dim": 3},
    "conditional": {"classes": 3},
    "conditional convolutions": {"classes": 3, "conv": True},
    "conditional prior": {"prior": lambda: priors.LabelGaussian(2, 3)},
    "flow of no layers": {"prior": lambda: priors.Flow(2, layers=0)},
}


@pytest.mark.parametrize("family", POSTERIORS)
def test_an_encoder_gives_torchs_posterior(model, few, family):
    m = model(**POSTERIORS[family])
    if isinstance(m.prior, priors.LabelGaussian | priors.Flow):
        with torch.no_grad():
            m.prior.mean.add_(0.7), m.prior.log_std.add_(-0.4)
    x = torch.from_numpy(few.test.pixels[:B]).float() / 255
    graph = export.encoder(m)
    assert graph.inputs == (("x",) if m.classes is None else ("x", "c"))
    full = ["scale_tril"] if family == "FullGaussian" else []
    assert graph.outputs == ("mean", "log_sigma", *full, "kl") and graph.error < NEAR
    found = run_graph(graph.content, given(m, x=x))
    with torch.no_grad():
        q = m.encode(x, labels_of(m))
        kl = closed_form_kl(q, m.latent_prior(labels_of(m)))
        noise = torch.Generator().manual_seed(0)
        drawn = q.rsample(200_000, noise).std(0)
    near(found["mean"], q.mean)
    near(found["kl"], kl)
    if full:
        near(found["scale_tril"], q.scale_tril.tril())
    np.testing.assert_allclose(np.exp(found["log_sigma"]), drawn.numpy(), rtol=0.02)


@pytest.mark.parametrize("prior", [lambda: priors.MixtureOfGaussians(2, 3), lambda: priors.VampPrior((1, 8, 8), 2, 4)])
def test_without_a_closed_form_there_is_no_kl(model, prior):
    assert export.encoder(model(prior=prior)).outputs == ("mean", "log_sigma")


def test_a_dirac_is_a_point(model):
    m = model("Delta")
    graph = export.encoder(m)
    x = torch.rand(B, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert graph.outputs == ("mean",)
    with torch.no_grad():
        near(run_graph(graph.content, {"x": x.numpy()})["mean"], m.encode(x).mean)


LIKELIHOODS = {
    "Bernoulli": {},
    "GreyCrossEntropy": {},
    "ContinuousBernoulli": {},
    "Gaussian": {"scale": "fixed", "std": 0.7},
    "Gaussian per-pixel": {"scale": "per-pixel"},
    "Gaussian optimal": {"scale": "optimal", "std": 0.7},
    "Laplace": {"scale": "shared", "b": 0.7},
    "DiscretisedLogistic": {},
    "DiscretisedLogisticMixture": {"components": 3},
    "Categorical": {},
    "Bernoulli conditional": {"classes": 3, "conv": True},
}


def decoding(m, few):
    """Codes and images that do not belong together, and p(x|z) and log p(x|z) in torch."""
    z = 2 * torch.randn(B, 2, generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(few.test.pixels[:B]).float() / 255
    with torch.no_grad():
        px = m.decode(z.unsqueeze(0), labels_of(m))
        return z, x, px, px.log_prob(x)[0]


@pytest.mark.parametrize("family", LIKELIHOODS)
def test_a_scorer_gives_torchs_likelihood(model, few, family):
    m = model(likelihood=family.split()[0], **LIKELIHOODS[family])
    z, x, px, log_px = decoding(m, few)
    scorer = export.scorer(m)
    u = torch.rand(B, 2, 1, 8, 8)
    found = run_graph(scorer.content, given(m, z=z, x=x, u=u))
    drawn = family != "GreyCrossEntropy"
    assert scorer.outputs == ("mean", "log_px", *(["sample"] if drawn else [])) and scorer.inputs[:3] == ("z", "x", "u")
    near(found["mean"], px.mean[0])
    near(found["log_px"], log_px)
    if drawn:
        off = np.abs(found["sample"] - draw(px, u).detach().numpy())
        assert (off < NEAR).mean() > 0.99 and found["sample"].dtype == np.float32


@pytest.mark.parametrize("family", [name for name in LIKELIHOODS if name != "GreyCrossEntropy"])
def test_a_draw_from_given_noise_is_distributed_as_torchs(model, few, family):
    m = model(likelihood=family.split()[0], **LIKELIHOODS[family])
    n, noise = 4000, torch.Generator().manual_seed(0)
    c = None if m.classes is None else torch.ones(n, dtype=torch.long)
    with torch.no_grad():
        px = m.decode(torch.tensor([0.5, -1.0]).expand(1, n, 2), c)
        here = draw(px, 1 - torch.rand(n, 2, 1, 8, 8, generator=noise))
        there = px.rsample(1, noise)[0, 0]
    assert here is not None and here.unique().numel() > 1
    distance = ks_2samp(here.numpy(), there.numpy(), method="asymp").statistic
    assert np.sqrt(n / 2) * distance.max() < 2.6  # Kolmogorov: 1 pixel in 400,000 is beyond


def test_a_level_far_from_its_logistic_and_a_wide_logistic_keep_their_mass(model, few):
    """Where log(sigmoid) is -inf and exp - 1 is 0 in float32; torch's float64 is the judge."""
    m = model(likelihood="DiscretisedLogistic")
    with torch.no_grad():
        for parameter in m.likelihood.parameters():
            parameter.mul_(2.0)
        m.likelihood.decoder.network.layers[-1].bias[-32:] += 9  # log scales of the lower half
    z, x, px, _ = decoding(m, few)
    found = run_graph(export.scorer(m).content, given(m, z=z, x=x, u=torch.rand(B, 2, 1, 8, 8)))["log_px"]
    assert float(px.log_scale.min()) < -5 and float(px.log_scale[..., 4:, :].min()) > 3
    with torch.no_grad():
        exact = m.double().decode(z.double().unsqueeze(0)).log_prob(x.double())[0]
    np.testing.assert_allclose(found, exact, rtol=1e-6)


@pytest.mark.parametrize(
    ("likelihood", "options", "names"),
    [
        ("Bernoulli", {"classes": 3}, ["logits"]),
        ("Gaussian", {"scale": "shared"}, ["log_std"]),
        ("DiscretisedLogistic", {}, ["weight", "centre", "log_scale"]),
    ],
)
def test_a_decoder_gives_the_parameters_by_their_names(model, few, likelihood, options, names):
    m = model(likelihood=likelihood, **options)
    z, _, px, _ = decoding(m, few)
    decoder = export.decoder(m)
    found = run_graph(decoder.content, given(m, z=z))
    assert decoder.outputs == ("mean", *names) and decoder.inputs[0] == "z"
    near(found["mean"], px.mean[0])
    for name in names:
        parameter = getattr(px, name).detach()
        near(found[name], parameter[0] if parameter.dim() else parameter.expand(px.mean.shape[1:]))


@pytest.mark.parametrize("posterior", ["InverseAutoregressive", "NeuralSpline", "Planar"])
def test_a_flow_has_no_encoder_and_says_what_is_possible(model, posterior):
    m = model(posterior)
    with pytest.raises(NoGraph, match=r"its posterior is a flow.*the decoder may be: .*--part decoder"):
        export.encoder(m)
    assert export.decoder(m).outputs == ("mean", "logits")


class Deceptive(nn.Module):
    """Another network when it is translated than when it is run."""

    in_shape = (1, 8, 8)

    def forward(self, x):
        h = x.flatten(1)[:, :16]
        return h + 0.01 if torch.compiler.is_exporting() else h


class Untranslatable(nn.Module):
    """A network that looks at its values."""

    in_shape = (1, 8, 8)

    def forward(self, x):
        return x.flatten(1)[:, :16] * (2.0 if float(x.sum()) > 1 else 1.0)


def with_encoder(m, network):
    return VAE(network, m.posterior, m.prior, m.likelihood)


def test_a_graph_that_disagrees_with_torch_is_refused(model):
    with pytest.raises(NoGraph, match=r"its mean in a batch of 1 differs from torch's by 0\.0\d+, more than"):
        export.encoder(with_encoder(model(), Deceptive()))


def test_a_network_without_a_translation_is_named_with_its_part(model, capfd, caplog):
    with pytest.raises(NoGraph, match="the encoder cannot be exported to ONNX: a network in it has no transl"):
        export.encoder(with_encoder(model(), Untranslatable()))
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_graph_is_silent_the_same_each_time_and_tells_nothing_of_the_machine(model, capfd):
    one, other = export.encoder(model()), export.encoder(model())
    assert capfd.readouterr() == ("", "")
    assert one == other
    assert b".py" not in one.content and b"site-packages" not in one.content


def another(m):
    """A model of the same networks with other weights."""
    with torch.no_grad():
        for parameter in m.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return m


@pytest.fixture
def translated(monkeypatch):
    """How often torch's exporter was asked."""
    asked, exporter = [], torch.onnx.export

    def counting(*given, **how):
        asked.append(1)
        return exporter(*given, **how)

    monkeypatch.setattr(torch.onnx, "export", counting)
    return asked


@pytest.mark.parametrize("family", ["Gaussian", "conditional convolutions"])
def test_runs_of_the_same_networks_share_one_translation(model, run_of, translated, family):
    how = POSTERIORS[family]
    first, second = run_of(another(model(**how)), "first"), run_of(another(model(**how)), "second")
    made = export.graphs([first, second])
    assert len(translated) == 2  # an encoder and a scorer
    alone = export.graphs([second])
    for part in export.PARTS:
        assert made[second.path][part].content == alone[second.path][part].content
        assert made[second.path][part].content != made[first.path][part].content


def test_runs_of_other_networks_share_none(model, run_of, translated):
    export.graphs([run_of(model(), "one"), run_of(model(dim=3), "other")])
    assert len(translated) == 4


def test_weights_that_cannot_be_told_apart_are_translated_anew(model, translated):
    """Two biases that hold the same, as before training: which is which in the graph nobody knows."""
    m = model()
    with torch.no_grad():
        for name, parameter in m.named_parameters():
            if name.endswith("bias") and parameter.shape == (16,):
                parameter.zero_()
    graph, other = export.encoder(m), another(model())
    assert graph.content != export.encoder(other, like=(graph, m)).content
    assert len(translated) == 2 and export.encoder(other) == export.encoder(other, like=(graph, m))


def test_the_model_is_left_as_it_was(model):
    m = model().train()
    before = {name: t.clone() for name, t in m.state_dict().items()}
    export.scorer(m)
    assert m.training and all(p.requires_grad for p in m.parameters())
    assert all(torch.equal(t, before[name]) for name, t in m.state_dict().items())


def test_the_files_say_what_they_are(vaelab, run_of, model):
    run = run_of(model("FullGaussian", classes=3))
    out = vaelab("export", run.path, "--to", "onnx", "--quiet").ok().out
    for part, inputs in (("encoder", ["x", "c"]), ("decoder", ["z", "c"])):
        path = run.path / "onnx" / f"{part}.onnx"
        assert str(path) in out
        proto = onnx.load(path)
        onnx.checker.check_model(proto)
        assert [i.name for i in proto.graph.input] == inputs
        assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param != ""
        facts = {entry.key: entry.value for entry in proto.metadata_props}
        assert facts["weights"] == export.weights_of(run) and len(facts["weights"]) == 12
        assert (facts["part"], facts["posterior"], facts["image_shape"]) == (part, "FullGaussian", "1 8 8")
        assert (facts["run"], facts["recipe"], facts["protocol"]) == ("run", "vae", "dynamic")
    assert sorted(path.name for path in (run.path / "onnx").iterdir()) == ["decoder.onnx", "encoder.onnx"]


def test_nothing_is_written_unless_all_parts_can_be(vaelab, run_of, model, tmp_path):
    run = run_of(model("Planar"))
    vaelab("export", run.path, "--out", tmp_path / "x", "--quiet").refused(2, "a flow", "--part decoder")
    assert not (tmp_path / "x").exists()
    vaelab("export", run.path, "--part", "decoder", "--out", tmp_path / "x", "--quiet").ok()
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["decoder.onnx"]


def test_bad_input_of_export(vaelab, run_of, model, tmp_path, monkeypatch):
    vaelab("export", tmp_path / "gone", "--quiet").refused(5, "there is no run")
    run = run_of(model("Delta"))
    vaelab("export", run.path, "--to", "coreml", "--quiet").refused(2, "onnx")
    (tmp_path / "file").write_text("mine")
    vaelab("export", run.path, "--out", tmp_path / "file", "--quiet").refused(2, "cannot write to", "another --out")
    with pytest.raises(UsageError, match="unknown part 'decodr'"):
        export.export_run(run, tmp_path / "y", ("decodr",))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    vaelab("export", run.path, "--quiet").refused(2, "onnxscript", "pip install 'vaelab[explore]'")
    run.weights.unlink()
    monkeypatch.undo()
    vaelab("export", run.path, "--quiet").refused(5, "has not finished")


def test_a_part_without_a_graph_says_so_between_processes():
    said = NoGraph("encoder", "it is a poem")
    heard = pickle.loads(pickle.dumps(said))
    assert (str(heard), heard.reason) == (str(said), said.reason)

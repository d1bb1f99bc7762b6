/* What is written about the runs, and the picture of a view that can be kept. */

import { element } from "vaelab/picture";
import { spell } from "vaelab/state";

/** What the header shows: of each group, the first that was measured. */
const HEADLINES = [["nll", "nll_is", "elbo", "cross_entropy_plus_rate"], ["rate"], ["distortion", "cross_entropy"]];

const text = (metric) =>
  metric.value ? `${metric.value.replace("-", "−")}${metric.se ? ` ± ${metric.se}` : ""}` : "n/a";

/** The header's line for each run, the footer, and the table of all numbers. */
export function fillFacts(app, manifest) {
  const facts = document.getElementById("facts");
  for (const { run } of app.models) {
    const shown = HEADLINES.flatMap((keys) => run.metrics.find(({ key, value }) => value && keys.includes(key)) ?? []);
    const missing = run.metrics_missing || "not evaluated";
    const numbers = shown.map((m) =>
      element(
        "span",
        { title: `${m.label}, ${m.n} images` },
        `${m.label} `,
        element("b", {}, text(m)),
        ` ${m.unit ?? ""}`,
      ),
    );
    facts.append(
      element(
        "p",
        {},
        element("b", {}, run.label),
        ...(shown.length ? numbers : [element("span", { class: "absent", title: missing }, missing)]),
        ...(run.interrupted ? [element("span", { class: "flag", title: run.interrupted }, "training was interrupted")] : []),
      ),
    );
  }
  const body = document.getElementById("numbers-body");
  for (const { run } of app.models) {
    const rows = run.metrics.map((m) =>
      element(
        "tr",
        {},
        element("th", { scope: "row" }, m.label),
        element("td", { class: "number" }, m.value ? `${text(m)} ${m.unit ?? ""}` : `n/a: ${m.reason}`),
        element("td", {}, m.n ? `${m.n} images` : ""),
      ),
    );
    body.append(
      element("h3", {}, `${run.label}: ${run.recipe}, run ${run.run}`),
      ...(run.interrupted ? [element("p", { class: "flag" }, `Its ${run.interrupted}.`)] : []),
      ...(run.metrics_missing ? [element("p", {}, `No numbers: ${run.metrics_missing}.`)] : []),
      element("p", {}, `Protocol ${run.protocol}. ${run.protocol_text ?? ""}`),
      element(
        "p",
        {},
        run.prior.kind === "standard-normal" ? "Prior: N(0, I)." : `Prior: ${run.prior.text ?? "not in this page"}.`,
      ),
      ...(run.normalised === false
        ? [element("p", {}, "Its pixels' term is a cross-entropy on grey levels, not a likelihood.")]
        : []),
      element("table", {}, element("tbody", {}, ...rows)),
    );
  }
  const kernels = app.models.some(({ mean }) => mean);
  if (kernels)
    body.append(
      element("h3", {}, "The density"),
      element(
        "p",
        {},
        "The aggregate posterior of the shown test images on the shown plane: one Gaussian an image, widened by half of Scott's rule. No data lives where it falls below its 1 % quantile at the codes, each code left out of its own.",
      ),
    );
  const protocols = [...new Set(app.models.map(({ run }) => run.protocol))].join(", ");
  document.getElementById("foot").textContent =
    `${manifest.data.name}, protocol ${protocols}, ${manifest.data.n} test images shown · vaelab ${manifest.vaelab} · fingerprint ${manifest.fingerprint}`;
}

/** Writes a PNG of the maps and decodings, with what they are. */
export function saveView(app) {
  const scale = 2,
    margin = 16,
    side = 150;
  const { width, height } = app.maps[0];
  const canvas = document.createElement("canvas");
  canvas.width = scale * (app.maps.length * (width + margin) + margin);
  canvas.height = scale * (height + side + 5 * margin + 40);
  const context = canvas.getContext("2d");
  const ink = app.inks();
  const { manifest } = window.__vaelab;
  context.scale(scale, scale);
  context.fillStyle = ink.paper;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = ink.ink;
  context.font = "600 15px system-ui, sans-serif";
  context.fillText(manifest.title, margin, 24);
  context.font = "12px system-ui, sans-serif";
  context.imageSmoothingEnabled = false;
  app.maps.forEach((map, i) => {
    const x = margin + i * (width + margin);
    context.fillText(map.model.label, x, 44);
    for (const layer of [map.base, map.over]) context.drawImage(layer, x, 52, width, height);
    context.strokeStyle = map.hasData ? ink.soft : ink.warn;
    context.strokeRect(x, 52, width, height);
    if (!map.model.decoder) return;
    const [, h, w] = map.model.shape;
    const factor = side / Math.max(h, w);
    context.drawImage(app.panels[i].mean.canvas, x, height + 62, w * factor, h * factor);
    context.fillText(`mean of p(x|z)${map.hasData ? "" : "; no data lives here"}`, x, height + side + 78);
  });
  const z = app
    .position()
    .map((value) => value.toFixed(2))
    .join(", ");
  context.fillStyle = ink.soft;
  context.fillText(`z = (${z}) · ${document.getElementById("foot").textContent}`, margin, height + side + 102);
  canvas.toBlob((blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `explorer-${manifest.fingerprint}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  return spell(app.state);
}

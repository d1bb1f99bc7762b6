/* What stands beside the map: the posterior of the image that goes in, and what z decodes to. */

import { gaussian, laplace, moved, nearest } from "vaelab/latent";
import { element, paint, paintMany } from "vaelab/picture";

const DRAWS = 16;
const NEIGHBOURS = 6;

export const nats = (value) => (Number.isFinite(value) ? value.toFixed(2).replace("-", "−") : "n/a");

/** What −log p(x|z) is called: on grey levels it is a cross-entropy, and not of a likelihood. */
const distortionName = (run) => (run.normalised === false ? "cross-entropy" : "distortion");

const noSample = (run) =>
  run.normalised === false
    ? "no sample: a cross-entropy on grey levels is of no distribution that could be drawn from"
    : `no sample: this page cannot draw from the likelihood ${run.likelihood}; the mean is not a sample`;

const picture = (caption) => {
  const canvas = element("canvas", { role: "img", "aria-label": caption });
  return { canvas, figure: element("figure", {}, canvas, element("figcaption", {}, caption)) };
};

/** The posterior of the shown image under one run: reconstruction, nats and draws. */
export class PosteriorPanel {
  constructor(app, model) {
    Object.assign(this, { app, model, noise: null, result: null });
    this.given = picture("image");
    this.reconstruction = picture("mean of p(x|z)");
    this.draws = element("canvas", { role: "img", "aria-label": `${DRAWS} draws of the posterior, decoded` });
    this.text = element("div", { class: "number", "aria-live": "polite" });
    this.body = element("div", { class: "pair" }, this.given.figure, this.reconstruction.figure, this.text);
    const title = element("h3", {}, `${app.models.length > 1 ? `${model.label}: ` : ""}posterior, in nats`);
    const missing = element("p", { class: "missing" }, model.run.encoder_missing);
    this.node = element(
      "div",
      { class: "posterior" },
      title,
      ...(model.encoder ? [] : [missing]),
      this.body,
      this.draws,
    );
  }

  redraw() {
    this.noise = Array.from({ length: DRAWS }, () =>
      Array.from({ length: this.model.dim }, this.model.run.posterior === "laplace" ? laplace : gaussian),
    );
  }

  /** Encodes the image, and decodes the posterior's mean and draws. Returns what the map draws, or null. */
  async update(pixels, alive) {
    const { model, app } = this;
    const { c } = app.state;
    const q = pixels && (await this.#posterior(pixels, c));
    if (!alive()) return null;
    this.node.hidden = !q && Boolean(model.encoder);
    this.body.hidden = this.draws.hidden = !q;
    if (!q) return (this.result = null);
    if (!this.noise) this.redraw();
    const sigma = q.logSigma && Array.from(q.logSigma, Math.exp);
    const draws = sigma ? this.noise.map((e) => moved({ ...q, sigma }, e)) : [];
    this.result = { ...q, sigma, draws, rate: q.kl ? q.kl.reduce((a, b) => a + b, 0) : null };
    paint(this.given.canvas, model.shape, pixels);
    if (model.decoder) {
      const decoded = await model.decode([q.mean, ...draws], { x: pixels, c, alive });
      if (!decoded) return null;
      const [atMean, ...atDraws] = decoded.logPx;
      this.result.atMean = -atMean;
      this.result.distortion = draws.length ? -atDraws.reduce((a, b) => a + b, 0) / DRAWS : -atMean;
      paint(this.reconstruction.canvas, model.shape, decoded.means[0]);
      this.draws.hidden = !draws.length;
      if (draws.length)
        paintMany(this.draws, model.shape, decoded.means.slice(1), app.models.length > 1 ? DRAWS : DRAWS / 2);
    }
    this.#write();
    return this.result;
  }

  /** q(z|x); without an encoder, the code that a test image has in the bundle. */
  async #posterior(pixels, c) {
    const { model, app } = this;
    if (model.encoder) return model.encode(pixels, c);
    const { index } = app.state.input;
    return model.mean && index !== undefined ? { mean: model.code(index), logSigma: null, kl: null } : null;
  }

  #write() {
    const { run } = this.model;
    const { draws, atMean, distortion, rate } = this.result;
    const point = run.posterior === "point";
    const what = distortionName(run);
    const lines = [];
    if (this.model.decoder) {
      const average = point ? "−log p(x|z) at the code" : `mean of −log p(x|z) over the ${DRAWS} draws below`;
      if (point || draws.length) lines.push([what, nats(distortion), average]);
      if (!point) lines.push(["at q's mean", nats(atMean), "−log p(x|z) at the mean of q(z|x)"]);
    }
    lines.push([
      "rate",
      rate === null ? "n/a" : nats(rate),
      rate === null ? this.#noRate() : "KL(q(z|x) || p(z)), in closed form",
    ]);
    this.text.replaceChildren(
      ...lines.map(([name, value, help]) =>
        element("p", { title: help }, element("span", {}, name), element("b", {}, value)),
      ),
    );
    if (rate === null) this.text.append(element("small", {}, this.#noRate()));
  }

  #noRate() {
    if (this.model.run.posterior === "point") return "a point has no KL to a density";
    return this.model.encoder ? "no closed form for this prior" : "no closed form for this posterior";
  }
}

/** What one run decodes z to, and the codes nearest to z. */
export class DecodingPanel {
  constructor(app, model) {
    Object.assign(this, { app, model });
    this.mean = picture("mean of p(x|z)");
    this.sample = picture("a sample of p(x|z)");
    this.neighbours = element("div", {
      class: "neighbours",
      role: "group",
      "aria-label": `test images with the nearest codes, ${model.label}`,
    });
    this.flag = element("p", { class: "flag" });
    const pictures = element("div", { class: "pictures" }, this.mean.figure, this.sample.figure);
    const title = element("div", { class: "row" }, element("h3", {}, model.label), this.flag);
    this.node = element("div", { class: "decoding" }, title, pictures);
    if (!model.decoder) pictures.replaceChildren(element("p", { class: "missing" }, model.run.decoder_missing));
    else if (!model.draws) this.sample.figure.replaceChildren(element("p", { class: "missing" }, noSample(model.run)));
    if (!model.mean) return;
    this.buttons = Array.from({ length: NEIGHBOURS }, () => {
      const button = element("button", { class: "thumb" }, element("canvas"));
      button.addEventListener("click", () => app.pick(Number(button.dataset.index)));
      return button;
    });
    this.neighbours.append(...this.buttons);
    this.near = element("small", { title: "by the distance of their codes" });
    this.node.append(this.near, this.neighbours);
  }

  /** Shows what z was decoded to, or nothing. */
  show(decoded, hasData) {
    if (decoded) {
      paint(this.mean.canvas, this.model.shape, decoded.means[0]);
      if (this.model.draws) paint(this.sample.canvas, this.model.shape, decoded.samples[0]);
    }
    this.node.classList.toggle("nodata", !hasData);
    const flag = hasData ? "" : "no data here";
    if (this.flag.textContent !== flag) this.flag.textContent = flag;
  }

  /** The test images whose codes are nearest: to the posterior of the image that went in last, else to z. */
  showNeighbours(z, posterior) {
    if (!this.buttons) return;
    const ofImage = posterior && this.app.aboutImage;
    const caption = `test images nearest to ${ofImage ? "your image" : "z"}`;
    if (this.near.textContent !== caption) this.near.textContent = caption;
    const found = nearest(this.model, ofImage ? posterior.mean : z, NEIGHBOURS);
    found.forEach((i, k) => thumb(this.buttons[k], this.app.images, i));
  }
}

/** Lets a thumbnail button show test image `i`. */
export function thumb(button, images, i) {
  if (button.dataset.index === String(i)) return;
  button.dataset.index = String(i);
  button.title = images.title(i);
  button.setAttribute("aria-label", images.title(i));
  paint(button.firstChild, images.shape, images.pixels(i));
}

/** The test images, a page at a time. */
export class Picker {
  constructor(app, node, count) {
    Object.assign(this, { app, first: 0, count: Math.min(count, app.images.n) });
    this.buttons = Array.from({ length: this.count }, () => {
      const button = element("button", { class: "thumb" }, element("canvas"));
      button.addEventListener("click", () => app.pick(Number(button.dataset.index)));
      return button;
    });
    node.append(...this.buttons);
    this.show(0);
  }

  show(first) {
    const { n } = this.app.images;
    this.first = ((first % n) + n) % n;
    this.buttons.forEach((button, k) => thumb(button, this.app.images, (this.first + k) % n));
    this.mark();
  }

  turn = (pages) => this.show(this.first + pages * this.count);

  mark() {
    const chosen = String(this.app.state.input?.index ?? "");
    for (const button of this.buttons) button.setAttribute("aria-pressed", String(button.dataset.index === chosen));
  }
}

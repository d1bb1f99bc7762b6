/* Sliders with their strips, and the film between two pinned points. */

import { quantile, spherical, straight } from "vaelab/latent";
import { element, paintMany } from "vaelab/picture";

const STEPS = 9;
export const FRAMES = 11;
export const DEAD = 0.01; // nats: a dimension of less rate says nothing about x

const subscript = (number) => String(number).replace(/\d/g, (digit) => "₀₁₂₃₄₅₆₇₈₉"[digit]);
/** Dimensions are numbered from 0, as in Python and in evaluation.json. */
export const dimensionName = (d) => `z${subscript(d)}`;

/** Rates of dimension `d`, one for each run that has them. */
export const ratesOf = (models, d) => models.map(({ run }) => run.rates?.[d]).filter((rate) => rate !== undefined);

/** All dimensions up to `dim`, those with most rate first. */
export function byRate(models, dim) {
  const rate = (d) => Math.max(0, ...ratesOf(models, d));
  return Array.from({ length: dim }, (_, d) => d).sort((a, b) => rate(b) - rate(a) || a - b);
}

export function isDead(models, d) {
  const rates = ratesOf(models, d);
  return rates.length > 0 && rates.every((rate) => rate < DEAD);
}

/** A strip of decodings that can be clicked: each frame goes somewhere. */
function strip(label, frames, go) {
  const canvas = element("canvas", { class: "strip", role: "img", "aria-label": label });
  canvas.addEventListener("click", (event) =>
    go(Math.min(frames - 1, Math.floor((event.offsetX / canvas.clientWidth) * frames))),
  );
  return canvas;
}

/** One slider a dimension, with the traversal of each run beside it; where they are many, small and a page at a time. */
export class Sliders {
  constructor(app, node) {
    this.app = app;
    this.rows = byRate(app.models, app.dim).map((d) => this.#row(d));
    node.append(...this.rows.map(({ row }) => row));
    const runs = app.models.length;
    const many = this.rows.length > 4 / runs;
    node.classList.toggle("many", many);
    this.count = many ? (runs > 1 ? 6 : 10) : this.rows.length;
    this.show(0);
  }

  show(first) {
    const { rows, count } = this;
    this.first = first;
    rows.forEach(({ row }, i) => (row.hidden = i < first || i >= first + count));
    document.getElementById("sliders-note").textContent =
      rows.length > count ? `${first + 1}–${Math.min(first + count, rows.length)} of ${rows.length}, most rate first` : "";
    for (const [id, possible] of [
      ["sliders-before", first > 0],
      ["sliders-after", first + count < rows.length],
    ])
      Object.assign(document.getElementById(id), { hidden: rows.length <= count, disabled: !possible });
  }

  turn(pages) {
    this.show(this.first + pages * this.count);
    this.app.update.strips();
  }

  #row(d) {
    const { app } = this;
    const owners = app.models.filter((model) => d < model.dim);
    const reach = Math.ceil(
      Math.max(
        3,
        ...owners
          .filter((m) => m.mean)
          .map((m) =>
            quantile(
              Array.from({ length: m.mean.length / m.dim }, (_, i) => Math.abs(m.mean[i * m.dim + d])),
              0.99,
            ),
          ),
      ),
    );
    const rates = ratesOf(app.models, d);
    const name = dimensionName(d);
    const values = Array.from({ length: STEPS }, (_, k) => -reach + (2 * reach * k) / (STEPS - 1));
    const input = element("input", {
      type: "range",
      min: String(-reach),
      max: String(reach),
      step: "0.01",
      id: `slider-${d}`,
      "aria-label": `${name}, ${rates.map((r) => r.toFixed(2)).join(" and ")} nats of rate`,
    });
    input.addEventListener("input", () => app.setDimension(d, Number(input.value)));
    const value = element("output", { for: `slider-${d}` });
    const strips = owners
      .filter((m) => m.decoder)
      .map((model) => ({
        model,
        canvas: strip(`${model.label}: decodings as ${name} goes from ${-reach} to ${reach}`, STEPS, (k) =>
          app.setDimension(d, values[k]),
        ),
      }));
    const rate = rates.length ? `${rates.map((r) => r.toFixed(2)).join(" | ")} nats` : "rate n/a";
    const dead = isDead(app.models, d);
    const row = element(
      "div",
      { class: dead ? "slider dead" : "slider" },
      element(
        "label",
        { for: `slider-${d}` },
        element("b", {}, name),
        element("small", {}, dead ? `${rate}: dead` : rate),
      ),
      element("div", { class: "range" }, input, value),
      element("div", { class: "strips" }, ...strips.map(({ canvas }) => canvas)),
    );
    return { d, input, value, strips, values, row };
  }

  /** Follows z at once. */
  follow(z) {
    for (const { d, input, value } of this.rows) {
      if (Number(input.value) !== z[d]) input.value = String(z[d]);
      value.textContent = z[d].toFixed(2).replace("-", "−");
    }
  }

  /** Decodes the strips that are shown, around z. */
  async update(z, alive) {
    for (const { d, strips, values } of this.rows.slice(this.first, this.first + this.count))
      for (const { model, canvas } of strips) {
        const codes = values.map((value) => z.map((old, i) => (i === d ? value : old)));
        const decoded = await model.decode(codes, { c: this.app.state.c, alive });
        if (!decoded) return;
        paintMany(canvas, model.shape, decoded.means);
      }
  }
}

/** The film from A to B: straight and spherical, for each run. */
export class Film {
  constructor(app, node) {
    this.app = app;
    this.rows = app.models
      .filter((model) => model.decoder)
      .flatMap((model) =>
        [
          ["straight", straight],
          ["spherical", spherical],
        ].map(([name, between]) => {
          const canvas = strip(`${model.label}: ${name} film from A to B`, FRAMES, (k) =>
            this.#go(between, k / (FRAMES - 1)),
          );
          const note = element("small", { class: "note" });
          const label = app.models.length > 1 ? `${model.label}, ${name}` : name;
          return {
            model,
            between,
            name,
            canvas,
            note,
            row: element("div", { class: "filmstrip" }, element("span", {}, label), canvas, note),
          };
        }),
      );
    node.append(...this.rows.map(({ row }) => row));
    this.frames = {};
  }

  #go(between, t) {
    const { a, b } = this.app.state;
    const z = a && b && between(a, b, t);
    if (z) this.app.setZ(z);
  }

  /** Decodes the frames; without two pins, an empty strip. */
  async update(alive) {
    const { state } = this.app;
    this.frames = {};
    for (const { model, between, name, canvas, note } of this.rows) {
      const ends = state.a && state.b && [state.a, state.b].map((z) => z.slice(0, model.dim));
      const codes = ends ? Array.from({ length: FRAMES }, (_, k) => between(...ends, k / (FRAMES - 1))) : [null];
      const possible = codes.every(Boolean);
      note.textContent = ends && !possible ? "A and B leave no arc about the origin" : "";
      const decoded = possible
        ? await model.decode(codes, { c: state.c, alive })
        : { means: new Array(FRAMES).fill(null) };
      if (!decoded) return;
      if (possible) this.frames[`${model.run.key} ${name}`] = { codes, means: decoded.means };
      paintMany(canvas, model.shape, decoded.means);
    }
  }

  /** Moves z along the straight line for two seconds. */
  play() {
    const { a, b } = this.app.state;
    if (!a || !b) return;
    const start = performance.now();
    const step = (now) => {
      const t = Math.max(0, Math.min(1, (now - start) / 2000));
      this.app.setZ(straight(a, b, t));
      if (t < 1 && this.app.state.b === b) requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }
}

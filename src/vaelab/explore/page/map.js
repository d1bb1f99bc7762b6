/* One latent map: codes, density, prior and grid on one canvas; pointer, posterior, pins and path on another above it. */

import { ellipse, quantile, spherical, straight } from "vaelab/latent";
import { ON_PICTURES, drawCodes, drawDensity, drawGrid, drawNames, drawPrior, drawScales } from "vaelab/layers";
import { element } from "vaelab/picture";

const REACH = 12; // pixels within which a pin is taken hold of
const ROW = 0.34; // half height of the rows of a one-dimensional map, in shares of the canvas

export class LatentMap {
  /** `app` has state, plane, images, atlas, position(), and the actions hover, leave, pin, movePin, look, keys. */
  constructor(app, model) {
    Object.assign(this, { app, model, grid: null, hasData: true });
    this.base = element("canvas", { "aria-hidden": "true" });
    this.over = element("canvas", {
      class: "over",
      tabindex: "0",
      role: "application",
      "aria-label": `latent map of ${model.label}: arrows move z, Enter pins it, plus and minus zoom`,
    });
    this.tag = element("span", { class: "tag", role: "status" });
    this.stack = element("div", { class: "stack" }, this.base, this.over, this.tag);
    this.node = element("figure", { class: "map" }, element("figcaption", {}, model.label), this.stack);
    this.#listen();
  }

  /** Follows a new plane: projects the codes and their density. */
  setPlane(plane, aggregate) {
    this.plane = plane;
    this.aggregate = aggregate;
    if (!aggregate) return;
    this.u = aggregate.u;
    this.v = plane.flat ? this.#rows() : aggregate.v;
    this.contours = plane.flat ? [] : aggregate.contours();
  }

  /** In one dimension each class has its row; codes are spread within it by a fixed rule. */
  #rows() {
    const classes = this.app.images.data.classes?.length ?? 1;
    return Float64Array.from(this.u, (_, i) => {
      const row = this.app.images.label(i) ?? 0;
      return 1 - (2 * (row + 0.2 + 0.6 * ((i * 0.618034) % 1))) / classes;
    });
  }

  /** Where N(0, I) has its centre on the plane. */
  centreOfPrior = () => this.plane.project(new Array(this.model.dim).fill(0));

  /** The window [u, v, half of the smaller side] that holds the prior's 3 sigma and nearly all codes. */
  fitting() {
    const [cu, cv] = this.centreOfPrior();
    let [u0, u1, v0, v1] = [cu - 3.2, cu + 3.2, cv - 3.2, cv + 3.2];
    if (this.aggregate) {
      [u0, u1] = [Math.min(u0, quantile(this.u, 0.005)), Math.max(u1, quantile(this.u, 0.995))];
      if (!this.plane.flat) [v0, v1] = [Math.min(v0, quantile(this.v, 0.005)), Math.max(v1, quantile(this.v, 0.995))];
    }
    return [u0, u1, v0, v1];
  }

  resize() {
    const { clientWidth, clientHeight } = this.stack;
    const ratio = window.devicePixelRatio || 1;
    [this.width, this.height] = [clientWidth, clientHeight];
    for (const canvas of [this.base, this.over])
      [canvas.width, canvas.height] = [Math.round(clientWidth * ratio), Math.round(clientHeight * ratio)];
    this.unit = Math.min(clientWidth, clientHeight) / 2;
    this.follow();
  }

  /** Takes over the view of the state; d3's transform is told, so that its next gesture starts here. */
  follow() {
    const [cu, cv, span] = this.app.view();
    this.scale = this.unit / span;
    this.centre = [cu, cv];
    this.over.__zoom = d3.zoomIdentity
      .translate(this.width / 2 - cu * this.scale, this.height / 2 + cv * this.scale)
      .scale(1 / span);
    this.drawBase();
    this.drawOver();
  }

  x = (u) => this.width / 2 + (u - this.centre[0]) * this.scale;
  y = (v) => this.height * 0.5 - (this.plane.flat ? v * this.height * ROW : (v - this.centre[1]) * this.scale);
  at = (x, y) => [
    this.centre[0] + (x - this.width / 2) / this.scale,
    this.plane.flat ? 0 : this.centre[1] - (y - this.height / 2) / this.scale,
  ];
  pixel = (z) => (([u, v]) => [this.x(u), this.y(v)])(this.plane.project(z));

  #context(canvas) {
    const context = canvas.getContext("2d");
    context.setTransform(canvas.width / this.width, 0, 0, canvas.height / this.height, 0, 0);
    context.clearRect(0, 0, this.width, this.height);
    context.lineWidth = 1;
    return context;
  }

  drawBase() {
    if (!this.width) return;
    const { layers } = this.app.state;
    const context = this.#context(this.base);
    const onGrid = layers.includes("grid") && this.grid;
    const ink = onGrid ? ON_PICTURES : this.app.inks();
    if (onGrid) drawGrid(this, context);
    if (layers.includes("density") && this.aggregate) drawDensity(this, context, ink);
    if (layers.includes("points") && this.aggregate) drawCodes(this, context);
    if (layers.includes("prior")) drawPrior(this, context, ink);
    this.written = [];
    drawScales(this, context, ink);
    drawNames(this, context, ink);
  }

  drawOver() {
    if (!this.width) return;
    const { state, inks, position } = this.app;
    const ink = inks();
    const context = this.#context(this.over);
    context.lineWidth = 2;
    if (state.a && state.b) this.#drawPaths(context, ink);
    if (this.posterior) this.#drawPosterior(context, ink);
    for (const [name, z] of [
      ["A", state.a],
      ["B", state.b],
    ])
      if (z) this.#drawPin(context, ink, name, this.pixel(z.slice(0, this.model.dim)));
    const [x, y] = this.pixel(position().slice(0, this.model.dim));
    for (const [colour, width] of [
      [ink.paper, 5],
      [this.hasData ? ink.ink : ink.warn, 2],
    ]) {
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.beginPath();
      for (const [dx, dy] of [
        [1, 0],
        [-1, 0],
        [0, 1],
        [0, -1],
      ]) {
        context.moveTo(x + 4 * dx, y + 4 * dy);
        context.lineTo(x + 11 * dx, y + 11 * dy);
      }
      context.stroke();
    }
    this.stack.classList.toggle("nodata", !this.hasData);
    const tag = this.hasData ? "" : "no data lives here";
    if (this.tag.textContent !== tag) this.tag.textContent = tag;
  }

  #drawPaths(context, ink) {
    const [a, b] = [this.app.state.a, this.app.state.b].map((z) => z.slice(0, this.model.dim));
    for (const [between, dash] of [
      [straight, []],
      [spherical, [6, 4]],
    ]) {
      context.setLineDash(dash);
      context.strokeStyle = ink.mark;
      context.beginPath();
      for (let t = 0; t <= 40; t++) {
        const z = between(a, b, t / 40);
        if (z) context.lineTo(...this.pixel(z));
      }
      context.stroke();
    }
    context.setLineDash([]);
  }

  #drawPosterior(context, ink) {
    const { mean, sigma, draws } = this.posterior;
    const [x, y] = this.pixel(mean);
    context.fillStyle = context.strokeStyle = ink.mark;
    if (sigma) {
      const { a, b, angle } = ellipse(this.plane.spread(this.posterior));
      for (const width of [1, 2]) {
        context.beginPath();
        context.ellipse(
          x,
          y,
          Math.max(1.5, width * a * this.scale),
          this.plane.flat ? 14 : Math.max(1.5, width * b * this.scale),
          -angle,
          0,
          2 * Math.PI,
        );
        context.globalAlpha = 0.18;
        context.fill();
        context.globalAlpha = 1;
        context.stroke();
      }
      for (const z of draws) context.fillRect(this.pixel(z)[0] - 1.5, this.pixel(z)[1] - 1.5, 3, 3);
    }
    context.lineWidth = 1.5;
    context.strokeRect(x - 7, y - 7, 14, 14); // stays visible where the ellipse is smaller than a pixel
  }

  #drawPin(context, ink, name, [x, y]) {
    context.beginPath();
    context.arc(x, y, this.unit < 130 ? 7 : 9, 0, 2 * Math.PI);
    context.fillStyle = ink.mark;
    context.fill();
    context.fillStyle = ink.paper;
    context.font = `700 ${this.unit < 130 ? 10 : 12}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.fillText(name, x, y + 4);
  }

  #listen() {
    const { app, over } = this;
    const inside = (event) => this.at(...d3.pointer(event, over));
    const held = (event) => {
      const [x, y] = d3.pointer(event, over);
      return ["a", "b"].find(
        (name) =>
          app.state[name] &&
          Math.hypot(...this.pixel(app.state[name].slice(0, this.model.dim)).map((p, i) => p - [x, y][i])) < REACH,
      );
    };
    const fingers = new Set();
    let pin = null,
      moved = false,
      pinched = false; // until all fingers are lifted: what is left of two does not move z
    over.addEventListener("pointerdown", ({ pointerId, pointerType }) => {
      if (pointerType === "touch") pinched = fingers.add(pointerId).size > 1;
    });
    over.addEventListener("pointermove", (event) => {
      if (pin) {
        moved = true;
        app.movePin(pin, ...inside(event));
      } else if (event.pointerType === "touch") {
        if (!pinched) app.rest(...inside(event));
      } else if (!event.buttons) app.hover(...inside(event));
    });
    over.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !(pin = held(event))) return;
      moved = false;
      over.setPointerCapture(event.pointerId);
    });
    for (const name of ["pointerup", "pointercancel"])
      over.addEventListener(name, ({ pointerId }) => {
        pin = null;
        fingers.delete(pointerId);
      });
    over.addEventListener("pointerleave", (event) => event.pointerType !== "touch" && app.leave());
    over.addEventListener("click", (event) => {
      if (!moved && event.detail) app.pin(...inside(event));
      moved = false;
    });
    over.addEventListener("keydown", (event) => app.mapKey(event, this));
    const zoom = d3
      .zoom()
      .scaleExtent([1 / 500, 50])
      .clickDistance(4)
      .filter(
        (event) => event.type === "wheel" || (event.touches ? event.touches.length > 1 : !event.button && !held(event)),
      )
      .on("zoom", ({ transform: t, sourceEvent }) => {
        if (sourceEvent)
          app.look([(this.width / 2 - t.x) / (this.unit * t.k), (t.y - this.height / 2) / (this.unit * t.k), 1 / t.k]);
      });
    d3.select(over).call(zoom).on("dblclick.zoom", null);
  }
}

/** The codes and cells of a grid of about 11 columns over what a map shows; `z` gives the other dimensions. */
export function cells(map, z) {
  const columns = 11;
  const side = map.width / columns;
  const rows = map.plane.flat ? 1 : Math.max(1, Math.floor(map.height / side));
  const top = (map.height - rows * side) / 2;
  return d3.range(columns * rows).map((i) => {
    const [u, v] = map.at(((i % columns) + 0.5) * side, top + (Math.floor(i / columns) + 0.5) * side);
    return { z: map.plane.place(z, u, v), du: side / map.scale, dv: side / map.scale };
  });
}

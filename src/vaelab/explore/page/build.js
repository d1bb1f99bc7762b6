/* The page's parts, made once from the manifest. */

import { installKeys } from "vaelab/keys";
import { LatentMap } from "vaelab/map";
import { Pad } from "vaelab/pad";
import { DecodingPanel, Picker, PosteriorPanel } from "vaelab/panels";
import { fillFacts } from "vaelab/paper";
import { PALETTE, colour, element } from "vaelab/picture";
import { LAYERS, read, rounded, spell } from "vaelab/state";
import { byRate, dimensionName, Film, isDead, ratesOf, Sliders } from "vaelab/traverse";

const byId = (id) => document.getElementById(id);

/** Makes all parts of the page, and the state from its address. */
export function build(app, manifest, images, models) {
  const { data } = manifest;
  Object.assign(app, { images, models });
  const dims = models.map(({ dim }) => dim);
  app.dim = Math.max(...dims);
  app.common = Math.min(...dims);
  app.principal = app.common > 2 && app.common === app.dim && Boolean(models[0].run.components);
  app.classes = Math.max(...models.map(({ run }) => run.classes));
  app.state = readAddress(app);

  const each = (id, Part) => {
    const parts = models.map((model) => new Part(app, model));
    byId(id).append(...parts.map(({ node }) => node));
    return parts;
  };
  app.maps = each("maps", LatentMap);
  app.posteriors = each("posteriors", PosteriorPanel);
  app.panels = each("decodings", DecodingPanel);
  app.sliders = new Sliders(app, byId("sliders"));
  app.film = new Film(app, byId("frames"));
  app.picker = new Picker(app, byId("picker"), models.length > 1 ? 16 : 32);
  app.pad = new Pad(byId("pad"), data.shape, (drawn) => {
    app.state.input = drawn && { drawn: Float32Array.from(drawn) };
    app.update.posterior();
  });
  document.body.classList.toggle("pair-of-runs", models.length > 1);
  byId("input").classList.toggle(
    "closed",
    models.every(({ encoder }) => !encoder),
  );
  for (const [name, text] of Object.entries(LAYERS)) {
    const button = element("button", { "data-layer": name }, text);
    button.addEventListener("click", () => app.toggle(name));
    byId("layers").append(button);
  }
  buildLegend(data);
  buildConditions(app, data);
  buildAxes(app);
  fillFacts(app, manifest);
  const others = models.map(({ run }) => run.prior).filter(({ kind }) => kind !== "standard-normal");
  byId("draw-prior").disabled = others.length > 0;
  if (others.length) byId("draw-prior").title = `no draws of the prior: ${others[0].text}`;
}

/** The state that the address spells; without one, the two dimensions of most rate. */
export function readAddress(app) {
  const state = read(location.hash, {
    dim: app.dim,
    common: app.common,
    area: app.images.shape[1] * app.images.shape[2],
    n: app.images.n,
    classes: Math.max(1, app.classes),
    principal: app.principal,
  });
  if (!location.hash && app.models.every(({ mean }) => mean)) Object.assign(state, firstView(app));
  if (!location.hash.includes("axes=") && app.common > 2) state.axes = byRate(app.models, app.common).slice(0, 2);
  return state;
}

/** Something to look at before the first gesture: an image, and pins at the codes of it and of one of another class. */
function firstView({ images, models, dim, classes }) {
  const other = d3.range(images.n).find((i) => images.label(i) !== images.label(0)) ?? images.n - 1;
  const [largest] = models.filter((model) => model.dim === dim);
  const [a, b] = [0, other].map((i) => rounded(largest.code(i)));
  return { input: { index: 0 }, c: classes ? (images.label(0) ?? 0) : 0, a, b };
}

function buildLegend({ classes }) {
  const swatch = (label) => {
    const dot = element("i");
    dot.style.background = colour(label);
    if (label >= PALETTE.length) dot.style.borderRadius = 0;
    return dot;
  };
  if (classes)
    byId("legend").append(...classes.slice(0, 20).map((name, label) => element("span", {}, swatch(label), name)));
  const title = "the aggregate posterior's density lies below its 1 % quantile at the codes";
  byId("legend").append(element("span", { class: "veil", title }, element("i"), "no data lives here"));
}

function buildConditions(app, { classes }) {
  if (!app.classes) return;
  const select = byId("condition");
  byId("condition-row").hidden = false;
  for (let c = 0; c < app.classes; c++)
    select.append(element("option", { value: String(c) }, classes?.[c] ?? String(c)));
  select.addEventListener("change", () => {
    app.state.c = Number(select.value);
    app.update.posterior();
    app.update.decodings();
  });
}

/** The two choosers of dimensions, in the order of their rates. */
function buildAxes(app) {
  const [across, up] = [byId("across"), byId("up")];
  const order = byRate(app.models, app.common);
  for (const select of [across, up])
    for (const d of order) {
      const rates = ratesOf(app.models, d)
        .map((rate) => rate.toFixed(2))
        .join(" | ");
      const dead = isDead(app.models, d);
      const text = `${dimensionName(d)}${rates && `: ${rates}`}${dead ? " (dead)" : ""}`;
      select.append(element("option", { value: String(d), class: dead ? "dead" : "" }, text));
    }
  if (app.principal) across.append(element("option", { value: "principal" }, "principal plane"));
  byId("across-row").hidden = byId("up-row").hidden = app.common < 2;
  const choose = (changed) => {
    const x = Number(across.value),
      y = up.value === "" ? -1 : Number(up.value);
    const other = order.find((d) => d !== Number(changed.value));
    if (across.value === "principal") app.state.axes = "principal";
    else app.state.axes = x !== y && y >= 0 ? [x, y] : changed === across ? [x, other] : [other, y];
    app.state.view = null;
    app.update.plane();
    app.update.view();
    app.update.decodings();
  };
  for (const select of [across, up]) select.addEventListener("change", () => choose(select));
}

/** Connects buttons, keys, the window's size and its address. */
export function connect(app) {
  const actions = {
    clear: () => app.pad.empty(),
    resample: app.resample,
    previous: () => app.picker.turn(-1),
    following: () => app.picker.turn(1),
    "sliders-before": () => app.sliders.turn(-1),
    "sliders-after": () => app.sliders.turn(1),
    fit: app.fit,
    hole: app.goToHole,
    "draw-prior": app.samplePrior,
    unpin: app.unpin,
    save: app.save,
    link: app.copyLink,
    theme: app.switchTheme,
    play: app.play,
    "help-open": app.openHelp,
    "numbers-open": app.openNumbers,
  };
  for (const [id, action] of Object.entries(actions)) byId(id).addEventListener("click", action);
  installKeys(app, byId("help-body"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", app.update.theme);
  new ResizeObserver(() => {
    app.maps.forEach((map) => map.resize());
    app.update.grid();
  }).observe(byId("maps"));
  addEventListener("hashchange", () => {
    if (location.hash.slice(1) === spell(app.state)) return;
    app.state = readAddress(app);
    app.update.everything();
  });
}

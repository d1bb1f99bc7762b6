/* The explorer: one state; every gesture changes it, and what depends on it follows. */

import { build, connect } from "vaelab/build";
import { installFollowers } from "vaelab/follow";
import { installGestures } from "vaelab/gestures";
import { idle, Model } from "vaelab/model";
import { Images } from "vaelab/picture";
import { BundleError, manifest as readManifest, piece, runtime } from "vaelab/source";
import { spell } from "vaelab/state";
import { dimensionName, ratesOf } from "vaelab/traverse";

const byId = (id) => document.getElementById(id);
const timings = { hover: [], load: 0 };
const seen = { ready: false, error: null, manifest: null, selfTest: null };
const app = { state: null, models: [], hovered: null };

/** A copy in which typed arrays are plain ones. */
const plain = (value) =>
  JSON.parse(JSON.stringify(value ?? null, (_, part) => (ArrayBuffer.isView(part) ? Array.from(part) : part)));

/** What can be read of the page from outside: by tests, and by the curious in the console. */
window.__vaelab = Object.freeze({
  get ready() {
    return seen.ready;
  },
  get error() {
    return seen.error;
  },
  get manifest() {
    return seen.manifest;
  },
  get selfTest() {
    return seen.selfTest;
  },
  get timings() {
    return structuredClone(timings);
  },
  requests: () => performance.getEntriesByType("resource").map(({ name }) => name),
  state: () => plain({ ...app.state, z: app.position(), view: app.view() }),
  address: () => spell(app.state),
  input: () => app.pixels && Array.from(app.pixels),
  posteriors: () => plain(app.posteriors.map(({ result }) => result)),
  decodings: () => plain(app.decodings),
  frames: () => plain(app.film.frames),
  grid: () => plain(app.maps.map(({ grid }) => grid?.map(({ z, mean }) => ({ z, mean })) ?? null)),
  words: (run) => plain(app.maps[run].written),
  pixel: (run, z) => app.maps[run].pixel(z),
  hasData: (run, z) => app.maps[run].aggregate.hasData(...app.plane.project(z)),
  settled: () => app.settled(),
  decode: async (run, z, x = null, c = 0) => {
    const { means, logPx } = await app.models[run].decode([z], { x, c });
    return plain({ mean: means[0], logPx: logPx[0] });
  },
  encode: async (run, x, c = 0) => plain(await app.models[run].encode(x, c)),
});

/** Ends with one sentence on the page. */
function fail(error) {
  seen.error =
    error instanceof BundleError
      ? error.message
      : `This page cannot be shown in this browser: ${error?.message ?? error}.`;
  document.documentElement.dataset.state = "failed";
  byId("failure").textContent = seen.error;
}

/** A sentence above the page that does not stop it; "" takes it away. */
function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

app.position = () => app.hovered ?? app.state.z;

/** The shown window, the same on every map: [u, v, half of the smaller side]; by default it holds all that any map has. */
app.view = () => {
  if (app.state.view) return app.state.view;
  const windows = app.maps.map((map) => map.fitting());
  const [u0, v0] = [0, 2].map((i) => Math.min(...windows.map((w) => w[i])));
  const [u1, v1] = [1, 3].map((i) => Math.max(...windows.map((w) => w[i])));
  const { width, height, unit } = app.maps[0];
  const span = unit * Math.max((u1 - u0) / width, app.plane.flat ? 0 : (v1 - v0) / height);
  return [(u0 + u1) / 2, (v0 + v1) / 2, span];
};

/** Colours of the canvases, read once for each theme. */
app.inks = () => {
  const style = getComputedStyle(document.documentElement);
  app.ink ??= Object.fromEntries(
    ["ink", "soft", "paper", "mark", "warn"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]),
  );
  return app.ink;
};

app.axisName = (i) => {
  if (app.state.axes === "principal") {
    const share = app.models[0].run.components.share[i];
    return `principal ${i + 1} (${(100 * share).toFixed(0)} % of variance)`;
  }
  const d = app.state.axes[i];
  const rates = ratesOf(app.models, d)
    .map((rate) => rate.toFixed(2))
    .join(" | ");
  return `${dimensionName(d)}${rates && ` (${rates} nats)`}`;
};

async function start() {
  const manifest = (seen.manifest = await readManifest());
  const { data } = manifest;
  document.title = byId("title").textContent = manifest.title;
  const images = new Images(data, await piece(data.pixels), data.labels ? await piece(data.labels) : null);
  const ort = await runtime();
  const models = await Promise.all(manifest.runs.map((run) => Model.load(ort, run, data)));
  document.documentElement.dataset.state = "shown";
  installFollowers(app, timings);
  installGestures(app, notice);
  build(app, manifest, images, models);
  app.update.everything();
  connect(app);
  await idle();
  seen.selfTest = [];
  for (const model of models) seen.selfTest.push(...(await model.selfTest(images)));
  if (seen.selfTest.length)
    notice(`The networks in this page do not give what torch gave: ${seen.selfTest[0]}. Do not trust its numbers.`);
  timings.load = performance.now();
  seen.ready = true;
}

addEventListener("unhandledrejection", ({ reason }) =>
  seen.ready ? notice(`Something went wrong: ${reason?.message ?? reason}.`) : fail(reason),
);
start().catch(fail);

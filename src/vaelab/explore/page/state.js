/*
 * What a view is, and how the address spells it: #z=…&axes=…&view=…&a=…&b=…&x=…&c=…&layers=…
 *
 * Codes are kept to 1e-4, so that the address restores them exactly. `z` has the dimensions of the largest run; a run
 * reads its own first ones. `input` is {index} of a test image, or {drawn: pad} with values of k/15.
 */

export const LAYERS = { points: "codes", digits: "as images", density: "density", prior: "prior", grid: "grid" };
const SHOWN = ["points", "density", "prior"];

const round = (value) => Math.round(value * 1e4) / 1e4;
export const rounded = (z) => z.map(round);

export function initial(dim) {
  return {
    axes: dim > 1 ? [0, 1] : [0],
    z: new Array(dim).fill(0),
    view: null,
    a: null,
    b: null,
    input: null,
    c: 0,
    layers: [...SHOWN],
    theme: "",
  };
}

/** The state as the part of an address after the #. */
export function spell(state) {
  const parts = {
    z: state.z.join(),
    axes: state.axes === "principal" ? "principal" : state.axes.join(),
  };
  if (state.view) parts.view = state.view.map(round).join();
  if (state.a) parts.a = state.a.join();
  if (state.b) parts.b = state.b.join();
  if (state.input) parts.x = state.input.drawn ? `drawn:${pack(state.input.drawn)}` : String(state.input.index);
  if (state.c) parts.c = String(state.c);
  if (state.layers.join() !== SHOWN.join()) parts.layers = state.layers.join();
  if (state.theme) parts.theme = state.theme;
  return Object.entries(parts)
    .map(([key, value]) => `${key}=${value}`)
    .join("&");
}

/** The inverse of `spell`: parts that are not understood keep their initial value. */
export function read(hash, { dim, common, area, n, classes, principal }) {
  const state = initial(dim);
  if (common < 2) state.axes = [0];
  const given = Object.fromEntries(
    hash
      .replace(/^#/, "")
      .split("&")
      .map((part) => part.split(/=(.*)/s).slice(0, 2)),
  );
  const numbers = (text, length) => {
    const values = text?.split(",").map(Number);
    return text && values.length === length && values.every(Number.isFinite) ? values : null;
  };
  state.z = numbers(given.z, dim) ?? state.z;
  state.a = numbers(given.a, dim);
  state.b = state.a && numbers(given.b, dim);
  const view = numbers(given.view, 3);
  if (view && view[2] > 0) state.view = view;
  const axes = numbers(given.axes, 2);
  if (given.axes === "principal" && principal) state.axes = "principal";
  else if (axes?.every((d) => Number.isInteger(d) && d >= 0 && d < common) && axes[0] !== axes[1]) state.axes = axes;
  const drawn = given.x?.startsWith("drawn:") ? unpack(given.x.slice(6), area) : null;
  const index = /^\d+$/.test(given.x ?? "") ? Number(given.x) : -1;
  if (drawn) state.input = { drawn };
  else if (index >= 0 && index < n) state.input = { index };
  if (/^\d+$/.test(given.c ?? "") && Number(given.c) < classes) state.c = Number(given.c);
  if (given.layers !== undefined)
    state.layers = Object.keys(LAYERS).filter((name) => given.layers.split(",").includes(name));
  if (["light", "dark"].includes(given.theme)) state.theme = given.theme;
  return state;
}

/** A pad of values k/15 as text, two pixels a byte. */
function pack(pad) {
  const bytes = new Uint8Array(Math.ceil(pad.length / 2));
  pad.forEach((value, i) => (bytes[i >> 1] |= Math.round(15 * value) << (4 * (i & 1))));
  return btoa(String.fromCharCode(...bytes))
    .replaceAll("+", "-")
    .replaceAll("/", "_")
    .replaceAll("=", "");
}

function unpack(text, area) {
  try {
    const bytes = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
    if (bytes.length !== Math.ceil(area / 2)) return null;
    return Float32Array.from({ length: area }, (_, i) => ((bytes.charCodeAt(i >> 1) >> (4 * (i & 1))) & 15) / 15);
  } catch {
    return null;
  }
}

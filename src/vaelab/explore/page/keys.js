/* Gestures and keys: the table that the help shows is the one that the keyboard obeys. */

import { element } from "vaelab/picture";

const GESTURES = [
  ["move over a map", "decode z under the pointer, at once, in every run"],
  ["click a map", "pin A, then B; later the nearer pin moves"],
  ["drag a pin, drag the map, wheel", "move the pin, pan, zoom"],
  ["touch", "one finger moves z, two fingers zoom and pan, a tap pins"],
  ["arrows on a map", "move z (Shift: in larger steps)"],
  ["Enter on a map", "pin z"],
  ["+ and − on a map", "zoom"],
  ["arrows and Space on the draw pad", "move the pen; lower or lift it (Delete: empty pad)"],
];

/** Key, what it does, and which action of the app. */
const KEYS = [
  ["f", "all codes in view; again: the prior's 3 sigma", "fit"],
  ["g", "grid of decodings over the window", "toggleGrid"],
  ["t", "codes as tiny images", "toggleDigits"],
  ["d", "density of the aggregate posterior", "toggleDensity"],
  ["h", "to the largest hole among the codes", "goToHole"],
  ["n", "a draw of the prior", "samplePrior"],
  ["r", "new draws of the posterior", "resample"],
  ["[", "the test image before", "pickPrevious"],
  ["]", "the test image after", "pickNext"],
  ["v", "play the film from A to B", "play"],
  ["x", "remove the pins", "unpin"],
  ["s", "save a picture of this view", "save"],
  ["l", "copy the address of this view", "copyLink"],
  ["m", "light or dark", "switchTheme"],
  ["?", "this help", "openHelp"],
];

export function installKeys(app, list) {
  for (const [keys, what] of [...GESTURES, ...KEYS]) list.append(element("dt", {}, keys), element("dd", {}, what));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (event.target.matches("select, input:not([type=range]), textarea")) return;
    const action = KEYS.find(([key]) => key === event.key.toLowerCase())?.[2];
    if (!action) return;
    event.preventDefault();
    app[action]();
  });
}

/** Keys on a focused map. */
export function mapKey(app, map, event) {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
  const [u, v, span] = app.view();
  if (step) {
    const length = (span / 40) * (event.shiftKey ? 5 : 1);
    const [u0, v0] = app.plane.project(app.state.z);
    app.rest(u0 + step[0] * length, v0 + step[1] * length);
    app.keepInView(map);
  } else if (event.key === "Enter") app.pin(...app.plane.project(app.state.z));
  else if (event.key === "+" || event.key === "=") app.look([u, v, span / 1.25]);
  else if (event.key === "-") app.look([u, v, span * 1.25]);
  else return;
  event.preventDefault();
}

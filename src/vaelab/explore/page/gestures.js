/* What pointer, buttons and keys do: each changes the state, and says what is to follow. */

import { mapKey } from "vaelab/keys";
import { gaussian } from "vaelab/latent";
import { saveView } from "vaelab/paper";
import { LAYERS, rounded, spell } from "vaelab/state";

const byId = (id) => document.getElementById(id);

export function installGestures(app, notice) {
  const { update } = app;
  const placed = (u, v) => rounded(app.plane.place(app.state.z, u, v));

  function toggle(name) {
    const { layers } = app.state;
    const chosen = Object.keys(LAYERS).filter((layer) => (layer === name) !== layers.includes(layer));
    app.state.layers =
      chosen.includes("digits") && !chosen.includes("points") && name === "digits" ? ["points", ...chosen] : chosen;
    update.layers();
  }

  const turn = (by) => app.pick(((app.state.input?.index ?? (by > 0 ? -1 : 0)) + by + app.images.n) % app.images.n);

  Object.assign(app, {
    mapKey: (event, map) => mapKey(app, map, event),

    /** The pointer passes: shown, not kept. */
    hover: (u, v) => {
      app.arrived = performance.now();
      app.hovered = placed(u, v);
      update.position();
    },
    leave: () => {
      app.hovered = app.arrived = null;
      update.position();
    },

    setZ: (z) => {
      app.hovered = null;
      app.aboutImage = false;
      app.state.z = rounded(z);
      update.position();
      update.strips();
      if (app.dim > 2 || app.plane.flat) update.grid();
      update.address();
    },
    rest: (u, v) => app.setZ(app.plane.place(app.state.z, u, v)),
    setDimension: (d, value) => app.setZ(app.state.z.map((old, i) => (i === d ? value : old))),

    /** Pins A, then B; after that the nearer of the two moves. */
    pin: (u, v) => {
      const { a, b } = app.state;
      const away = (pin) => Math.hypot(...app.plane.project(pin).map((p, i) => p - [u, v][i]));
      const z = placed(u, v);
      app.movePin(!a ? "a" : !b || away(b) <= away(a) ? "b" : "a", u, v);
      app.setZ(z);
    },
    movePin: (name, u, v) => {
      app.state[name] = placed(u, v);
      update.pins();
    },
    unpin: () => {
      app.state.a = app.state.b = null;
      update.pins();
    },

    look: (view) => {
      app.state.view = view && rounded(view);
      update.view();
    },
    /** All codes; from there, the prior's three sigmas. */
    fit: () => {
      const [u, v] = app.plane.project(new Array(app.dim).fill(0));
      app.look(app.state.view ? null : [u, v, 3.2]);
    },
    keepInView: (map) => {
      const [x, y] = map.pixel(app.state.z.slice(0, map.model.dim));
      if (x < 0 || y < 0 || x > map.width || y > map.height)
        app.look([...app.plane.project(app.state.z), app.view()[2]]);
    },

    toggle,
    toggleGrid: () => toggle("grid"),
    toggleDigits: () => toggle("digits"),
    toggleDensity: () => toggle("density"),

    pick: (index) => {
      app.state.input = { index };
      if (app.classes) {
        app.state.c = app.images.label(index) ?? app.state.c;
        byId("condition").value = String(app.state.c);
        update.decodings();
      }
      update.posterior();
    },
    pickPrevious: () => turn(-1),
    pickNext: () => turn(1),
    resample: () => {
      app.posteriors.forEach((panel) => panel.redraw());
      update.posterior();
    },

    samplePrior: () => {
      if (!byId("draw-prior").disabled) app.setZ(Array.from({ length: app.dim }, gaussian));
    },
    /** Goes to the hole of one map, then of the other. */
    goToHole: () => {
      const maps = app.maps.filter(({ aggregate }) => aggregate);
      if (!maps.length) return;
      app.holes = ((app.holes ?? -1) + 1) % maps.length;
      app.rest(...maps[app.holes].aggregate.hole(app.plane.project(new Array(app.dim).fill(0)), 2));
    },

    play: () => app.film.play(),
    save: () => saveView(app),
    copyLink: async () => {
      const address = `${location.href.split("#")[0]}#${spell(app.state)}`;
      try {
        await navigator.clipboard.writeText(address);
        notice("The address of this view is copied.");
      } catch {
        notice(`The address of this view: ${address}`);
      }
      setTimeout(() => notice(""), 5000);
    },
    switchTheme: () => {
      const dark = app.state.theme ? app.state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      app.state.theme = dark ? "light" : "dark";
      update.theme();
    },
    openHelp: () => byId("help").showModal(),
    openNumbers: () => byId("numbers").showModal(),
  });
}

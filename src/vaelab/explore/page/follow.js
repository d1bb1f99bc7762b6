/*
 * What follows from the state, and when.
 *
 * A hover is decoded in the frame in which it arrives; where a decoding is still under way, only the newest place waits.
 * Strips, grid, film and draws are decoded in small batches when nothing else happens, and dropped when they are stale.
 */

import { Aggregate, Plane } from "vaelab/latent";
import { cells } from "vaelab/map";
import { later } from "vaelab/model";
import { asSeen } from "vaelab/pad";
import { element, tile } from "vaelab/picture";
import { spell } from "vaelab/state";
import { dimensionName } from "vaelab/traverse";

const byId = (id) => document.getElementById(id);

/** Gives the app `update`: one function for each thing that follows from the state. */
export function installFollowers(app, timings) {
  const jobs = new Set();
  let queued = false,
    again = false;

  /** Work of which only the newest call counts; `app.settled()` says whether any is left. */
  function job(name, work, wait) {
    jobs.add(name);
    later(
      name,
      async (alive) => {
        await work(alive);
        if (alive()) jobs.delete(name);
      },
      wait,
    );
  }

  function position() {
    if (app.busy) again = true;
    else if (!queued) {
      queued = true;
      requestAnimationFrame(showPosition);
    }
  }

  async function showPosition() {
    queued = false;
    app.busy = true;
    const { arrived } = app;
    const z = app.position();
    try {
      app.decodings = await Promise.all(
        app.models.map((model) => model.decoder && model.decode([z], { c: app.state.c, u: () => 1 - Math.random() })),
      );
      const where = app.plane.project(z);
      app.maps.forEach((map, i) => {
        map.hasData = !map.aggregate || map.aggregate.hasData(...where);
        app.panels[i].show(app.decodings[i], map.hasData);
        app.panels[i].showNeighbours(z, app.hovered ? null : map.posterior);
        map.drawOver();
      });
      app.sliders.follow(z);
      byId("where").replaceChildren(...whereIs(z));
      if (arrived) timings.hover.push(performance.now() - arrived);
      if (app.arrived === arrived) app.arrived = null;
    } finally {
      app.busy = false;
    }
    if (again) {
      again = false;
      position();
    }
  }

  /** z in words: all of a short one, else the shown dimensions. */
  function whereIs(z) {
    const number = (value) => value.toFixed(2).replace("-", "−");
    if (z.length === 1) return [`z = ${number(z[0])}`];
    if (z.length <= 4) return [`z = (${z.map(number).join(", ")})`];
    const { axes } = app.state;
    if (axes === "principal") return [`principal plane at (${app.plane.project(z).map(number).join(", ")})`];
    const others = element("small", {}, `the sliders set the other ${z.length - 2} dimensions`);
    return [axes.map((d) => `${dimensionName(d)} = ${number(z[d])}`).join(", "), others];
  }

  function address() {
    job(
      "address",
      async () => {
        try {
          history.replaceState(null, "", `#${spell(app.state)}`);
        } catch {
          // an embedding page may forbid it; the Link button still gives the address
        }
      },
      150,
    );
  }

  const strips = () => job("strips", (alive) => app.sliders.update(app.state.z, alive));
  const film = () => job("film", (alive) => app.film.update(alive));

  function grid() {
    if (!app.state.layers.includes("grid")) return;
    job("grid", async (alive) => {
      for (const map of app.maps) {
        if (!map.model.decoder) continue;
        const planned = cells(map, app.state.z);
        const decoded = await map.model.decode(
          planned.map(({ z }) => z),
          { c: app.state.c, alive },
        );
        if (!decoded) return;
        map.grid = planned.map((cell, i) => ({
          ...cell,
          mean: decoded.means[i],
          image: tile(map.model.shape, decoded.means[i]),
        }));
        map.drawBase();
      }
    });
  }

  function posterior() {
    const { images, state } = app;
    const { input } = state;
    app.aboutImage = Boolean(input);
    app.pixels = input && (input.drawn ? asSeen(input.drawn, images.data) : images.pixels(input.index));
    app.pad.show(app.pixels ?? new Float32Array(images.size), images.shape[0]);
    const drawn = `your drawing${images.data.binary ? ", as bits" : ""}`;
    byId("pad-note").textContent = !input
      ? "draw here, or choose a test image"
      : input.drawn
        ? drawn
        : images.title(input.index);
    app.picker.mark();
    job(
      "posterior",
      async (alive) => {
        for (const [i, panel] of app.posteriors.entries()) {
          const result = await panel.update(app.pixels, alive);
          if (!alive()) return;
          app.maps[i].posterior = result;
          app.maps[i].drawOver();
          if (!app.hovered) app.panels[i].showNeighbours(app.state.z, result);
        }
      },
      0,
    );
    address();
  }

  /** The plane of the state's axes: every map projects its codes anew. */
  function plane() {
    const { axes } = app.state;
    const { components } = app.models[0].run;
    app.plane = axes === "principal" ? new Plane(components.mean, components.axes) : Plane.ofDimensions(axes, app.dim);
    for (const map of app.maps) map.setPlane(app.plane, map.model.mean ? new Aggregate(map.model, app.plane) : null);
    byId("across").value = axes === "principal" ? "principal" : String(axes[0]);
    byId("up").value = String(axes[1]);
    byId("up-row").hidden = axes.length < 2 || axes === "principal";
  }

  function pins() {
    const both = Boolean(app.state.a && app.state.b);
    byId("play").disabled = !both;
    byId("unpin").disabled = !app.state.a;
    byId("film-note").hidden = both;
    app.maps.forEach((map) => map.drawOver());
    film();
    address();
  }

  function layers() {
    for (const button of byId("layers").children)
      button.setAttribute("aria-pressed", String(app.state.layers.includes(button.dataset.layer)));
    app.maps.forEach((map) => map.drawBase());
    grid();
    address();
  }

  function theme() {
    document.documentElement.dataset.theme = app.state.theme;
    app.ink = null;
    app.maps.forEach((map) => [map.drawBase(), map.drawOver()]);
    address();
  }

  /** What depends on the view only. */
  function view() {
    app.maps.forEach((map) => map.follow());
    grid();
    address();
  }

  /** What depends on what the networks say. */
  function decodings() {
    position();
    strips();
    film();
    grid();
    address();
  }

  /** The whole state, as after loading. */
  function everything() {
    if (app.state.input?.drawn) app.pad.take(app.state.input.drawn);
    if (app.classes) byId("condition").value = String(app.state.c);
    plane();
    app.maps.forEach((map) => map.resize());
    theme();
    layers();
    pins();
    decodings();
    posterior();
  }

  app.settled = () => !app.busy && !queued && jobs.size === 0;
  app.update = {
    position,
    strips,
    film,
    grid,
    posterior,
    plane,
    pins,
    layers,
    theme,
    view,
    decodings,
    everything,
    address,
  };
}

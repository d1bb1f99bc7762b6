/* The layers of a map that stay while the pointer moves. Each is given the map, which says where things are, and a context. */

import { PALETTE, colour, sprites } from "vaelab/picture";

/** Inks that are read on a grid of dark pictures, whatever the theme. */
export const ON_PICTURES = { ink: "#ffffff", soft: "#dddddd", paper: "#000000", warn: "#f0a23c" };

/** Writes words where they fit into the map and none stand yet: what is more important is written first. */
function write(map, context, ink, words, x, y, { align = "center", size = 11, weight = 400 } = {}) {
  context.font = `${weight} ${size}px system-ui, sans-serif`;
  context.textAlign = align;
  const { width } = context.measureText(words);
  const left = x - width * { left: 0, center: 0.5, right: 1 }[align];
  const box = { words, left: left - 3, top: y - size, right: left + width + 3, bottom: y + 3 };
  const outside = box.left < 0 || box.top < 0 || box.right > map.width || box.bottom > map.height;
  const taken = map.written.some(
    (other) =>
      other.left < box.right && box.left < other.right && other.top < box.bottom && box.top < other.bottom,
  );
  if (outside || taken) return;
  map.written.push(box);
  context.strokeStyle = ink.paper;
  context.lineWidth = 3;
  context.strokeText(words, x, y);
  context.fillText(words, x, y);
  context.lineWidth = 1;
}

/** Names and ticks of the axes, along the edges. */
export function drawScales(map, context, ink) {
  const { app, width, height } = map;
  context.fillStyle = ink.soft;
  write(map, context, ink, app.axisName(0), width - 6, height - 7, { align: "right" });
  if (!map.plane.flat) write(map, context, ink, app.axisName(1), 6, 13, { align: "left" });
  const ticks = (from, to, length) => d3.ticks(Math.min(from, to), Math.max(from, to), Math.max(2, length / 90));
  const text = (tick) => String(tick).replace("-", "−");
  for (const tick of ticks(map.at(0, 0)[0], map.at(width, 0)[0], width)) {
    context.fillRect(map.x(tick), height - 4, 1, 4);
    if (map.x(tick) > 24) write(map, context, ink, text(tick), map.x(tick), height - 7);
  }
  if (map.plane.flat) return;
  for (const tick of ticks(map.at(0, 0)[1], map.at(0, height)[1], height)) {
    context.fillRect(0, map.y(tick), 4, 1);
    if (map.y(tick) < height - 24) write(map, context, ink, text(tick), 7, map.y(tick) + 4, { align: "left" });
  }
}

/** The prior's sigmas, and each class's name at its codes' median. */
export function drawNames(map, context, ink) {
  const { images, state } = map.app;
  context.fillStyle = ink.ink;
  if (state.layers.includes("prior") && map.model.run.prior.kind === "standard-normal") {
    const [cu, cv] = map.centreOfPrior();
    for (const sigma of [3, 2, 1]) {
      const [x, y] = map.plane.flat ? [map.x(cu + sigma), 29] : [map.x(cu), map.y(cv + sigma)];
      if (y > 0) write(map, context, ink, `${sigma}σ`, x, Math.max(y - 3, 12), { weight: 600 });
    }
  }
  const { classes } = images.data;
  if (!state.layers.includes("points") || !map.aggregate || !images.labels || classes.length > 20) return;
  const middle = (values) => d3.rollup(d3.range(values.length), (own) => d3.median(own, (i) => values[i]), images.label);
  const [across, up] = [middle(map.u), middle(map.v)];
  for (const label of [...across.keys()].sort(d3.ascending))
    write(map, context, ink, images.name(label), map.x(across.get(label)), map.y(up.get(label)) + 5, {
      size: 14,
      weight: 600,
    });
}

/** The decodings of a grid over the window. */
export function drawGrid(map, context) {
  context.imageSmoothingEnabled = false;
  context.globalAlpha = 0.9;
  for (const { z, image, du, dv } of map.grid) {
    const [x, y] = map.pixel(z);
    const w = du * map.scale,
      h = map.plane.flat ? w : dv * map.scale;
    context.drawImage(image, x - w / 2, y - h / 2, w, h);
  }
  context.globalAlpha = 1;
}

/** The density's contours, and a veil over where there is no data. */
export function drawDensity(map, context, ink) {
  if (map.plane.flat) return drawCurves(map, context, ink);
  const place = new DOMMatrix([map.scale, 0, 0, -map.scale, map.x(0), map.y(0)]);
  map.contours.forEach((shape, i) => {
    const path = new Path2D();
    path.addPath(shape, place);
    context.strokeStyle = context.fillStyle = i ? ink.ink : ink.warn;
    if (!i) {
      const outside = new Path2D(path);
      outside.rect(-1e4, -1e4, 3e4, 3e4);
      context.globalAlpha = 0.13;
      context.fill(outside, "evenodd");
    }
    context.globalAlpha = i ? 0.05 : 1;
    if (i) context.fill(path, "evenodd");
    context.globalAlpha = i ? 0.3 : 0.9;
    context.setLineDash(i ? [] : [5, 3]);
    context.stroke(path);
  });
  context.setLineDash([]);
  context.globalAlpha = 1;
}

/** One dimension: the density along the lower edge, and bands where there is no data. */
function drawCurves(map, context, ink) {
  const steps = d3.range(0, map.width + 2, 2);
  const densities = steps.map((x) => map.aggregate.at(map.at(x, 0)[0], 0));
  const top = Math.max(...densities, 0.4);
  context.globalAlpha = 0.13;
  context.fillStyle = ink.warn;
  steps.forEach((x, i) => densities[i] < map.aggregate.floor && context.fillRect(x, 0, 2, map.height));
  context.globalAlpha = 0.8;
  context.strokeStyle = ink.ink;
  context.beginPath();
  steps.forEach((x, i) => context.lineTo(x, map.height - 20 - (densities[i] / top) * map.height * 0.15));
  context.stroke();
  context.globalAlpha = 1;
}

/** The circles of one, two and three standard deviations of N(0, I); lines in one dimension. */
export function drawPrior(map, context, ink) {
  if (map.model.run.prior.kind !== "standard-normal") return;
  const [cu, cv] = map.centreOfPrior();
  context.strokeStyle = ink.ink;
  context.lineWidth = 1.5;
  context.setLineDash([2, 4]);
  for (const sigma of [1, 2, 3]) {
    context.beginPath();
    if (map.plane.flat)
      for (const side of [-sigma, sigma]) {
        context.moveTo(map.x(cu + side), 0);
        context.lineTo(map.x(cu + side), map.height);
      }
    else context.arc(map.x(cu), map.y(cv), sigma * map.scale, 0, 2 * Math.PI);
    context.stroke();
  }
  context.setLineDash([]);
  context.lineWidth = 1;
}

/** The codes of the test images, as dots or as the images themselves. */
export function drawCodes(map, context) {
  const { images, state } = map.app;
  const zoomed = Math.sqrt(map.scale / 50);
  const asImages = state.layers.includes("digits");
  const atlas = asImages && (map.app.atlas ??= sprites(images)); // 0.2 s of 2000 images: not before they are asked for
  const size = asImages ? Math.min(40, Math.max(11, 13 * zoomed)) : Math.min(4.5, Math.max(1.6, 2.1 * zoomed));
  context.globalAlpha = asImages ? 0.95 : 0.65;
  for (let i = 0; i < map.u.length; i++) {
    const x = map.x(map.u[i]),
      y = map.y(map.v[i]);
    if (x < -20 || y < -20 || x > map.width + 20 || y > map.height + 20) continue;
    if (asImages) {
      context.drawImage(
        atlas.canvas,
        ...atlas.at(i),
        atlas.width,
        atlas.height,
        x - size / 2,
        y - size / 2,
        size,
        size,
      );
      continue;
    }
    const label = images.label(i);
    context.fillStyle = colour(label);
    context.beginPath();
    if ((label ?? 0) < PALETTE.length) context.arc(x, y, size, 0, 2 * Math.PI);
    else context.rect(x - size, y - size, 2 * size, 2 * size);
    context.fill();
  }
  context.globalAlpha = 1;
}

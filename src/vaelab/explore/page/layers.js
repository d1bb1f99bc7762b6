/* The layers of a map that stay while the pointer moves. Each is given the map, which says where things are, and a context. */

import { colour, sprites } from "vaelab/picture";

/** Inks that are read on a grid of dark pictures, whatever the theme. */
export const ON_PICTURES = { ink: "#ffffff", soft: "#dddddd", paper: "#000000", warn: "#f0a23c" };

/** Ticks and names of the axes, along the edges. */
export function drawScales(map, context, ink) {
  const { app, width, height } = map;
  context.fillStyle = ink.soft;
  context.strokeStyle = ink.paper;
  context.lineWidth = 3;
  context.font = "11px system-ui, sans-serif";
  const write = (...words) => {
    context.strokeText(...words);
    context.fillText(...words);
  };
  const scales = [
    [width, (s) => map.at(s, 0)[0], "x"],
    [height, (s) => map.at(0, s)[1], "y"],
  ].slice(0, map.plane.flat ? 1 : 2);
  for (const [length, value, axis] of scales) {
    const across = axis === "x";
    const name = app.axisName(across ? 0 : 1);
    const room = across ? context.measureText(name).width + 40 : 24;
    const ends = [value(0), value(length)].sort((a, b) => a - b);
    for (const tick of d3.ticks(...ends, Math.max(2, length / 90))) {
      const place = across ? map.x(tick) : map.y(tick);
      context.textAlign = across ? "center" : "left";
      context.fillRect(across ? place : 0, across ? height - 4 : place, across ? 1 : 4, across ? 4 : 1);
      if (place > 24 && place < length - room)
        write(String(tick).replace("-", "−"), across ? place : 7, across ? height - 7 : place + 4);
    }
    context.textAlign = across ? "right" : "left";
    write(name, across ? width - 6 : 6, across ? height - 7 : 13);
  }
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
  const [cu, cv] = map.plane.project(new Array(map.model.dim).fill(0));
  context.fillStyle = ink.ink;
  context.font = "600 11px system-ui, sans-serif";
  context.textAlign = "center";
  for (const sigma of [1, 2, 3]) {
    context.strokeStyle = ink.ink;
    context.lineWidth = 1.5;
    context.setLineDash([2, 4]);
    context.beginPath();
    if (map.plane.flat)
      for (const side of [-sigma, sigma]) {
        context.moveTo(map.x(cu + side), 0);
        context.lineTo(map.x(cu + side), map.height);
      }
    else context.arc(map.x(cu), map.y(cv), sigma * map.scale, 0, 2 * Math.PI);
    context.stroke();
    context.setLineDash([]);
    const place = [map.x(cu + (map.plane.flat ? sigma : 0)), map.plane.flat ? 26 : map.y(cv + sigma) - 3];
    context.strokeStyle = ink.paper;
    context.lineWidth = 3;
    context.strokeText(`${sigma}σ`, ...place);
    context.fillText(`${sigma}σ`, ...place);
  }
  context.lineWidth = 1;
}

/** The codes of the test images, as dots or as the images themselves, and each class's name at its median. */
export function drawCodes(map, context, ink) {
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
    if ((label ?? 0) < 10) context.arc(x, y, size, 0, 2 * Math.PI);
    else context.rect(x - size, y - size, 2 * size, 2 * size);
    context.fill();
  }
  context.globalAlpha = 1;
  if (!images.labels || images.data.classes.length > 20) return;
  context.font = "600 14px system-ui, sans-serif";
  context.textAlign = "center";
  context.lineWidth = 4;
  for (let label = 0; label < images.data.classes.length; label++) {
    const own = d3.range(map.u.length).filter((i) => images.label(i) === label);
    if (!own.length) continue;
    const x = map.x(d3.median(own, (i) => map.u[i])),
      y = map.y(d3.median(own, (i) => map.v[i])) + 5;
    context.strokeStyle = ink.paper;
    context.fillStyle = ink.ink;
    context.strokeText(images.name(label), x, y);
    context.fillText(images.name(label), x, y);
  }
  context.lineWidth = 1;
}

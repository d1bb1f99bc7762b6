/* Arrays to pixels: images keep their values (255 times what the network said), without smoothing. */

/** Petroff's ten (arXiv 2107.02270), chosen to stay apart for colour-blind readers; classes past ten change the marker too. */
export const PALETTE = [
  "#3f90da",
  "#ffa90e",
  "#bd1f01",
  "#94a4a2",
  "#832db6",
  "#a96b59",
  "#e76300",
  "#b9ac70",
  "#717581",
  "#92dadd",
];

export const colour = (label) => (label === null ? PALETTE[0] : PALETTE[label % PALETTE.length]);

/** The test images of the bundle: bytes (N·C·H·W) and labels. */
export class Images {
  constructor(data, bytes, labels) {
    Object.assign(this, { data, bytes, labels, n: data.n, shape: data.shape });
    this.size = data.shape.reduce((a, b) => a * b, 1);
  }

  /** Image `i` as the model sees it, in [0, 1]. */
  pixels = (i) => Float32Array.from(this.bytes.subarray(i * this.size, (i + 1) * this.size), (byte) => byte / 255);
  label = (i) => (this.labels ? this.labels[i] : null);
  name = (label) => this.data.classes?.[label] ?? String(label);
  title = (i) => `test image ${i}` + (this.labels ? `, ${this.name(this.label(i))}` : "");
}

function raster([channels, height, width], pixels) {
  const image = new ImageData(width, height);
  const area = width * height;
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = Math.round(255 * pixels[(channels < 3 ? 0 : c) * area + i]);
    image.data[4 * i + 3] = 255;
  }
  return image;
}

/** Paints one image (C·H·W) at its own size; CSS enlarges the canvas. */
export function paint(canvas, shape, pixels) {
  if (canvas.width !== shape[2] || canvas.height !== shape[1]) [canvas.width, canvas.height] = [shape[2], shape[1]];
  canvas.getContext("2d").putImageData(raster(shape, pixels), 0, 0);
}

/** Paints images side by side, a pixel apart, `columns` in a row. */
export function paintMany(canvas, shape, images, columns = images.length) {
  const [, height, width] = shape;
  canvas.width = columns * (width + 1) - 1;
  canvas.height = Math.ceil(images.length / columns) * (height + 1) - 1;
  const context = canvas.getContext("2d");
  images.forEach((pixels, i) => {
    if (pixels)
      context.putImageData(raster(shape, pixels), (i % columns) * (width + 1), Math.floor(i / columns) * (height + 1));
  });
}

/** A canvas of one image, for drawing it elsewhere. */
export function tile(shape, pixels) {
  const canvas = document.createElement("canvas");
  paint(canvas, shape, pixels);
  return canvas;
}

/** All test images in one canvas, ink in their label's colour on nothing (images of colours as they are), and where each lies. */
export function sprites(images) {
  const [channels, height, width] = images.shape;
  const columns = Math.ceil(Math.sqrt(images.n));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [columns * width, columns * height];
  const context = canvas.getContext("2d");
  for (let i = 0; i < images.n; i++) {
    const image = raster(images.shape, images.pixels(i));
    if (channels < 3) {
      const ink = d3.rgb(colour(images.label(i)));
      for (let p = 0; p < image.data.length; p += 4) {
        image.data[p + 3] = image.data[p];
        [image.data[p], image.data[p + 1], image.data[p + 2]] = [ink.r, ink.g, ink.b];
      }
    }
    context.putImageData(image, (i % columns) * width, Math.floor(i / columns) * height);
  }
  return { canvas, width, height, at: (i) => [(i % columns) * width, Math.floor(i / columns) * height] };
}

/** An element with attributes and children; texts are escaped by the browser. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes))
    if (key in made && typeof value !== "string") made[key] = value;
    else made.setAttribute(key, value);
  made.append(...children);
  return made;
}

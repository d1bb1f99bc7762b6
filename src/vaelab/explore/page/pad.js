/* The draw pad: an image of the data's own size, drawn with the pointer or with a pen moved by the arrow keys. */

import { paint } from "vaelab/picture";

export class Pad {
  /** `changed(values)` is called with H·W values k/15 after each stroke of the pen; null when the pad is emptied. */
  constructor(canvas, [, height, width], changed) {
    Object.assign(this, { canvas, height, width, changed });
    this.values = new Float32Array(height * width);
    this.breadth = Math.max(0.6, Math.min(height, width) / 24);
    this.pen = { x: width / 2, y: height / 2, down: false, shown: false };
    this.show(this.values, 1);
    this.#listen();
  }

  /** Shows an image (C·H·W); the pad's own drawing, if it is another one, starts anew with the next stroke. */
  show(pixels, channels) {
    this.shown = { pixels, channels };
    paint(this.canvas, [channels, this.height, this.width], pixels);
    if (!this.pen.shown) return;
    const context = this.canvas.getContext("2d");
    context.fillStyle = this.pen.down ? "#ffa90e" : "#3f90da";
    context.fillRect(Math.floor(this.pen.x), Math.floor(this.pen.y), 1, 1);
  }

  /** Takes over a drawing, as from the address. */
  take(values) {
    this.values = Float32Array.from(values);
  }

  empty() {
    this.values.fill(0);
    this.changed(null);
  }

  /** Inks all pixels near the segment; a pixel's ink falls off over the last pixel of the pen's width. */
  #stroke(x0, y0, x1, y1) {
    const length = (x1 - x0) ** 2 + (y1 - y0) ** 2;
    for (let y = 0; y < this.height; y++)
      for (let x = 0; x < this.width; x++) {
        const t = length
          ? Math.max(0, Math.min(1, ((x + 0.5 - x0) * (x1 - x0) + (y + 0.5 - y0) * (y1 - y0)) / length))
          : 0;
        const away = Math.hypot(x + 0.5 - x0 - t * (x1 - x0), y + 0.5 - y0 - t * (y1 - y0));
        const ink = Math.max(0, Math.min(1, this.breadth + 0.5 - away));
        const i = y * this.width + x;
        this.values[i] = Math.max(this.values[i], Math.round(15 * ink) / 15);
      }
    this.changed(this.values);
  }

  #listen() {
    let last = null;
    const place = (event) => {
      const box = this.canvas.getBoundingClientRect();
      return [
        ((event.clientX - box.left) / box.width) * this.width,
        ((event.clientY - box.top) / box.height) * this.height,
      ];
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      this.canvas.setPointerCapture(event.pointerId);
      last = place(event);
      this.#stroke(...last, ...last);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!last) return;
      const next = place(event);
      this.#stroke(...last, ...next);
      last = next;
    });
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, () => (last = null));
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    for (const [name, shown] of [
      ["focus", true],
      ["blur", false],
    ])
      this.canvas.addEventListener(name, () => {
        this.pen.shown = shown && this.canvas.matches(":focus-visible");
        this.pen.down = false;
        this.show(this.shown.pixels, this.shown.channels);
      });
  }

  #key(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const { pen } = this;
    if (event.key === "Delete" || event.key === "Backspace") this.empty();
    else if (event.key === " ") {
      pen.down = !pen.down;
      if (pen.down) this.#stroke(pen.x, pen.y, pen.x, pen.y);
      else this.show(this.shown.pixels, this.shown.channels);
    } else if (step) {
      const from = [pen.x, pen.y];
      pen.x = Math.max(0, Math.min(this.width - 1, pen.x + step[0]));
      pen.y = Math.max(0, Math.min(this.height - 1, pen.y + step[1]));
      if (pen.down) this.#stroke(...from, pen.x, pen.y);
      else this.show(this.shown.pixels, this.shown.channels);
    } else return;
    event.preventDefault();
  }
}

/** A drawing (H·W, values k/15) as the model sees it (C·H·W): in every channel, and as bits where the model sees bits. */
export function asSeen(drawn, data) {
  const [channels] = data.shape;
  const pixels = new Float32Array(channels * drawn.length);
  for (let c = 0; c < channels; c++)
    drawn.forEach((value, i) => (pixels[c * drawn.length + i] = data.binary ? Number(value >= 0.5) : value));
  return pixels;
}

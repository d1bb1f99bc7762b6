/* The two networks of a run, behind one queue: sessions of one thread answer one question at a time. */

import { BundleError, floats, piece } from "vaelab/source";

const BATCH = 12; // decodings at once: a hover never waits for more than these
let tail = Promise.resolve();

const inTurn = (work) => (tail = tail.then(work, work));

/** Resolves when the browser has nothing better to do. */
export const idle = () =>
  new Promise((done) => (window.requestIdleCallback ? requestIdleCallback(done, { timeout: 150 }) : setTimeout(done)));

const versions = new Map();

/** Runs `work(alive)` a little later, once; a newer call of the same name makes the older one stale. */
export function later(name, work, wait = 60) {
  const version = (versions.get(name) ?? 0) + 1;
  versions.set(name, version);
  const alive = () => versions.get(name) === version;
  setTimeout(() => alive() && work(alive), wait);
}

export class Model {
  /** A run of the manifest with its codes and networks. */
  static async load(ort, run, data) {
    const open = async (name, what) => {
      if (!name) return null;
      const bytes = await piece(name);
      try {
        return await ort.InferenceSession.create(bytes, {
          executionProviders: ["wasm"],
          graphOptimizationLevel: "all",
        });
      } catch (error) {
        throw new BundleError(
          `The ${what} of ${run.label} (${name}) cannot be read: make the page again with vaelab explore.`,
        );
      }
    };
    const model = new Model(ort, run, data);
    model.encoder = await open(run.encoder, "encoder");
    model.decoder = await open(run.decoder, "decoder");
    model.mean = run.codes?.mean ? await floats(run.codes.mean) : null;
    model.logSigma = run.codes?.log_sigma ? await floats(run.codes.log_sigma) : null;
    model.scaleTril = run.codes?.scale_tril ? await floats(run.codes.scale_tril) : null;
    return model;
  }

  constructor(ort, run, data) {
    Object.assign(this, { ort, run, label: run.label, dim: run.latent_dim, shape: data.shape });
    this.size = data.shape.reduce((a, b) => a * b, 1);
    this.decoded = 0;
  }

  /** The mean of code `i` of the shown test images, as a plain array (D). */
  code = (i) => Array.from(this.mean.subarray(i * this.dim, (i + 1) * this.dim));

  /** The posterior's spread at code `i`: sigma (D) and, of a full covariance L L^T, `tril`, the rows of L (D·D). */
  spread(i) {
    const part = (values, size) => values && values.subarray(i * size, (i + 1) * size);
    const logSigma = part(this.logSigma, this.dim);
    return { sigma: logSigma && Array.from(logSigma, Math.exp), tril: part(this.scaleTril, this.dim ** 2) };
  }

  /** Whether p(x|z) can be drawn from. */
  get draws() {
    return Boolean(this.decoder?.outputNames.includes("sample"));
  }

  /**
   * p(x|z) at codes: the means and a draw of each, arrays (C·H·W), and log p(x|z) in nats, one each.
   * `x` is one image for all codes (zeros where it does not matter), `c` the label of a conditional model, `u` gives the
   * numbers in (0, 1] that the draws are made of (without it all are 1/2: where nobody looks at them).
   */
  async decode(codes, { x = null, c = 0, u = null, alive = () => true } = {}) {
    const out = { means: [], logPx: [], samples: [] };
    for (let start = 0; start < codes.length; start += BATCH) {
      if (start) await idle();
      if (!alive()) return null;
      const part = codes.slice(start, start + BATCH);
      const n = part.length;
      const z = new Float32Array(n * this.dim);
      part.forEach((code, i) => z.set(code.slice(0, this.dim), i * this.dim));
      const pixels = new Float32Array(n * this.size);
      if (x) for (let i = 0; i < n; i++) pixels.set(x, i * this.size);
      const noise = u ? Float32Array.from({ length: 2 * n * this.size }, u) : new Float32Array(2 * n * this.size).fill(0.5);
      const answer = await this.#ask(
        this.decoder,
        { z: [z, [n, this.dim]], x: [pixels, [n, ...this.shape]], u: [noise, [n, 2, ...this.shape]] },
        n,
        c,
      );
      for (let i = 0; i < n; i++) {
        out.means.push(answer.mean.subarray(i * this.size, (i + 1) * this.size));
        out.logPx.push(answer.log_px[i]);
        if (answer.sample) out.samples.push(answer.sample.subarray(i * this.size, (i + 1) * this.size));
      }
    }
    this.decoded += codes.length;
    return out;
  }

  /**
   * q(z|x) of one image (C·H·W): mean, log sigma (absent for a point) and KL in nats (absent without a closed form), (D)
   * each; `tril` as in `spread`.
   */
  async encode(x, c = 0) {
    const answer = await this.#ask(this.encoder, { x: [Float32Array.from(x), [1, ...this.shape]] }, 1, c);
    const { log_sigma: logSigma = null, scale_tril: tril = null, kl = null } = answer;
    return { mean: Array.from(answer.mean), logSigma, tril, kl };
  }

  async #ask(session, inputs, n, c) {
    const feeds = {};
    for (const [name, [values, dims]] of Object.entries(inputs))
      if (session.inputNames.includes(name)) feeds[name] = new this.ort.Tensor("float32", values, dims);
    if (session.inputNames.includes("c"))
      feeds.c = new this.ort.Tensor("int64", new BigInt64Array(n).fill(BigInt(c)), [n]);
    const answer = await inTurn(() => session.run(feeds));
    return Object.fromEntries(Object.entries(answer).map(([name, tensor]) => [name, tensor.data]));
  }

  /** Compares the networks with what torch gave for the bundle; the sentences that say where they differ. */
  async selfTest(images) {
    const { golden } = this.run;
    const wrong = [];
    const check = (what, given, expected) => {
      if (!(Math.abs(given - expected) <= 1e-3 + 1e-4 * Math.abs(expected)))
        wrong.push(`${this.label}: ${what} is ${given} here and ${expected} in torch`);
    };
    if (golden?.z && this.decoder)
      for (const [i, z] of golden.z.entries()) {
        const { means, logPx } = await this.decode([z], { c: golden.c?.[i] ?? 0 });
        check(
          `decoding ${i + 1}`,
          means[0].reduce((a, b) => a + b, 0),
          golden.mean_sum[i],
        );
        check(`log p(0|z) ${i + 1}`, logPx[0], golden.log_px_zero[i]);
      }
    if (golden?.mean && this.encoder) {
      const { mean } = await this.encode(images.pixels(golden.image), images.label(golden.image) ?? 0);
      mean.forEach((value, d) =>
        check(`code of test image ${golden.image}, dimension ${d}`, value, golden.mean[d]),
      );
    }
    return wrong;
  }
}

/*
 * The geometry and the density of the latent space.
 *
 * A plane is two orthonormal directions through an origin; codes keep what lies across it. The aggregate posterior
 * q(z) = mean over images of q(z|x) is, on the plane, a mixture of one Gaussian per shown image: its mean and covariance
 * are the posterior's, projected. The shown images are a sample of the data, so each Gaussian is widened by a kernel of
 * width h (half of Scott's rule): without it a model whose sigmas vanish would have no density between its own codes.
 * A place has no data where this density falls below its 1 % quantile at the codes, each code left out of its own.
 */

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * (b[i] ?? 0), 0);

export class Plane {
  /** `rows`: one or two orthonormal directions (D); with one, the second coordinate is always 0. */
  constructor(origin, rows) {
    Object.assign(this, { origin, rows, flat: rows.length < 2 });
  }

  /** The plane of the raw dimensions `dims` (one or two) of `dim`. */
  static ofDimensions(dims, dim) {
    const unit = (d) => Array.from({ length: dim }, (_, i) => Number(i === d));
    return new Plane(new Array(dim).fill(0), dims.map(unit));
  }

  project(z) {
    const from = z.map((value, i) => value - this.origin[i]);
    return [dot(this.rows[0], from), this.flat ? 0 : dot(this.rows[1], from)];
  }

  /** The point with coordinates (u, v) that keeps of `z` what lies across the plane. */
  place(z, u, v) {
    const [u0, v0] = this.project(z);
    return z.map((value, i) => value + (u - u0) * this.rows[0][i] + (this.flat ? 0 : (v - v0) * this.rows[1][i]));
  }

  /** Variances and covariance (uu, vv, uv) on the plane, of independent dimensions (`sigma`) or of L L^T (`tril`: L). */
  spread({ sigma, tril }) {
    const through = (row) =>
      sigma.map((s, j) => (tril ? sigma.reduce((sum, _, i) => sum + row[i] * tril[i * sigma.length + j], 0) : row[j] * s));
    const [a, b] = this.rows.map(through);
    return this.flat ? [dot(a, a), 0, 0] : [dot(a, a), dot(b, b), dot(a, b)];
  }
}

/** Half axes and angle of the ellipse of one standard deviation of a covariance (uu, vv, uv). */
export function ellipse([uu, vv, uv]) {
  const middle = (uu + vv) / 2;
  const apart = Math.hypot((uu - vv) / 2, uv);
  return {
    a: Math.sqrt(Math.max(middle + apart, 0)),
    b: Math.sqrt(Math.max(middle - apart, 0)),
    angle: Math.atan2(2 * uv, uu - vv) / 2,
  };
}

export function quantile(values, share) {
  const sorted = Float64Array.from(values).sort();
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

/** The aggregate posterior of a run's shown images on a plane. */
export class Aggregate {
  constructor(model, plane) {
    const n = model.mean.length / model.dim;
    this.n = n;
    this.flat = plane.flat;
    this.u = new Float64Array(n);
    this.v = new Float64Array(n);
    for (let i = 0; i < n; i++) [this.u[i], this.v[i]] = plane.project(model.code(i));
    this.h =
      0.5 *
      n ** (plane.flat ? -1 / 5 : -1 / 6) *
      Math.max(1e-6, Math.min(...[this.u, this.v].slice(0, plane.flat ? 1 : 2).map(deviation)));
    this.parts = Array.from({ length: n }, (_, i) => {
      const [uu, vv, uv] = model.logSigma ? plane.spread(model.spread(i)) : [0, 0, 0];
      return this.#component(uu + this.h ** 2, plane.flat ? 1 / (2 * Math.PI) : vv + this.h ** 2, uv);
    });
    const stride = Math.max(1, Math.floor(n / 600));
    this.atCodes = [];
    for (let i = 0; i < n; i += stride) this.atCodes.push(this.at(this.u[i], this.v[i], i));
    this.floor = quantile(this.atCodes, 0.01);
  }

  #component(uu, vv, uv) {
    const det = uu * vv - uv * uv;
    return {
      p: vv / det,
      q: -uv / det,
      r: uu / det,
      height: 1 / (2 * Math.PI * Math.sqrt(det) * this.n),
      reach: 5 * Math.sqrt(Math.max(uu, vv)),
    };
  }

  /** The density at (u, v), without the component `skip`. In one dimension v is 0. */
  at(u, v, skip = -1) {
    let sum = 0;
    for (let i = 0; i < this.n; i++) {
      const du = u - this.u[i],
        dv = v - this.v[i],
        { p, q, r, height } = this.parts[i];
      const exponent = p * du * du + 2 * q * du * dv + r * dv * dv;
      if (exponent < 60 && i !== skip) sum += height * Math.exp(-exponent / 2);
    }
    return sum;
  }

  hasData = (u, v) => this.at(u, v) >= this.floor;

  /** Paths, in latent units, around where the density exceeds its quantiles at the codes; the first one is the 1 % one. */
  contours() {
    const size = 160;
    const [u0, u1] = this.#reached(this.u);
    const [v0, v1] = this.#reached(this.v);
    const grid = new Float64Array(size * size),
      du = (u1 - u0) / size,
      dv = (v1 - v0) / size;
    for (let i = 0; i < this.n; i++) {
      const { p, q, r, height, reach } = this.parts[i];
      const column = (u) => Math.min(size - 1, Math.max(0, Math.floor((u - u0) / du)));
      const row = (v) => Math.min(size - 1, Math.max(0, Math.floor((v - v0) / dv)));
      for (let y = row(this.v[i] - reach); y <= row(this.v[i] + reach); y++)
        for (let x = column(this.u[i] - reach); x <= column(this.u[i] + reach); x++) {
          const a = u0 + (x + 0.5) * du - this.u[i],
            b = v0 + (y + 0.5) * dv - this.v[i];
          grid[y * size + x] += height * Math.exp(-(p * a * a + 2 * q * a * b + r * b * b) / 2);
        }
    }
    const levels = [this.floor, ...[0.1, 0.25, 0.5, 0.75].map((share) => quantile(this.atCodes, share))];
    return d3
      .contours()
      .size([size, size])
      .thresholds(levels)(grid)
      .map((shape) => {
        const path = new Path2D();
        for (const ring of shape.coordinates.flat()) {
          ring.forEach(([x, y], i) => path[i ? "lineTo" : "moveTo"](u0 + x * du, v0 + y * dv));
          path.closePath();
        }
        return path;
      });
  }

  /** From the lowest to the highest coordinate, and three deviations of that component further. */
  #reached(values) {
    const ends = (sign) => Array.from(values, (value, i) => value + sign * 0.6 * this.parts[i].reach);
    return [Math.min(...ends(-1)), Math.max(...ends(1))];
  }

  /** The centre of the largest disc without codes whose centre lies within `radius` of (cu, cv). */
  hole([cu, cv], radius) {
    let best = [cu, cv],
      widest = -1;
    const steps = 40;
    for (let y = this.flat ? 0 : -steps; y <= (this.flat ? 0 : steps); y++)
      for (let x = -steps; x <= steps; x++) {
        if (x * x + y * y > steps * steps) continue;
        const u = cu + (x / steps) * radius,
          v = cv + (y / steps) * radius;
        let nearest = Infinity;
        for (let i = 0; i < this.n; i++) nearest = Math.min(nearest, (u - this.u[i]) ** 2 + (v - this.v[i]) ** 2);
        if (nearest > widest) [widest, best] = [nearest, [u, v]];
      }
    return best;
  }
}

const deviation = (values) => {
  const middle = values.reduce((a, b) => a + b, 0) / values.length;
  return Math.sqrt(values.reduce((sum, value) => sum + (value - middle) ** 2, 0) / values.length);
};

/** Indices of the `k` codes nearest to z (D), in all its dimensions. */
export function nearest(model, z, k) {
  const found = [];
  for (let i = 0, n = model.mean.length / model.dim; i < n; i++) {
    let distance = 0;
    for (let d = 0; d < model.dim; d++) distance += (model.mean[i * model.dim + d] - z[d]) ** 2;
    if (found.length < k || distance < found[k - 1].distance) {
      found.splice(found.length < k ? found.length : k - 1, 1, { i, distance });
      found.sort((a, b) => a.distance - b.distance);
    }
  }
  return found.map(({ i }) => i);
}

/** A point at share t of the straight line from a to b. */
export const straight = (a, b, t) => a.map((value, i) => (1 - t) * value + t * b[i]);

/** A point at share t of the arc from a to b about the origin; null where a and b leave no arc (one is 0, or in D = 1). */
export function spherical(a, b, t) {
  const lengths = Math.sqrt(dot(a, a) * dot(b, b));
  if (!lengths || a.length < 2) return null;
  const angle = Math.acos(Math.max(-1, Math.min(1, dot(a, b) / lengths)));
  if (Math.PI - angle < 1e-6) return null;
  if (angle < 1e-6) return straight(a, b, t);
  return a.map((value, i) => (Math.sin((1 - t) * angle) * value + Math.sin(t * angle) * b[i]) / Math.sin(angle));
}

/** mean + L e, of a posterior with independent dimensions (`sigma`) or a full covariance (`tril`: L, lower triangular). */
export const moved = ({ mean, sigma, tril }, e) =>
  mean.map((value, d) =>
    tril ? e.slice(0, d + 1).reduce((sum, noise, j) => sum + tril[d * e.length + j] * noise, value) : value + sigma[d] * e[d],
  );

/** One draw of N(0, 1) (Box & Muller 1958). */
export const gaussian = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());

/** One draw of the Laplace distribution of mean 0 and standard deviation 1, by its inverse distribution function. */
export function laplace() {
  const u = Math.random() - 0.5;
  return (-Math.sign(u) * Math.log(1 - 2 * Math.abs(u))) / Math.SQRT2;
}

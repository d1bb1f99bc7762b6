/* Convolutions between large images x (images, c, h, w) and small ones y (images, n, p, q), with weights w (n, c, kh, kw):

       down      y[n, p, q] = sum of w[n, c, i, j] x[c, p sh - ph + i, q sw - pw + j]
       up        the same sum the other way, from y to x
       weights   dw = the sum of y x over images and positions

   A convolution is down; its gradients are up and weights. A transposed convolution is up; its gradients are down and weights.
   Float32 in and out, products of bfloat16 with float32 sums.

   Up is a convolution of step 1 too. What a window of y of ceil(kh / sh) by ceil(kw / sw) numbers touches in x are the sh sw
   numbers of one cell (Shi et al. 2016, arXiv 1609.07009): its features are the c numbers of each place in the cell, and each
   number of x is written once.

   Everything is read from an image in bfloat16 with its zeros around it, 16 windows at a time: a processor's gather of 32 bits
   brings two neighbours of a row, which is the pair that the products read. So windows have an even width, the last column with
   weight zero where it is not the kernel's. */

#include "tiles.h"

typedef struct {
    long images, c, h, w, n, p, q, kh, kw, sh, sw, ph, pw;
} Shape;

typedef struct {
    long channels, height, width;  /* of what is read */
    long features, rows, columns;  /* of what is written */
    long taps_h, taps_w;           /* of a window, its width even */
    long step_h, step_w;           /* from window to window */
    long down, across;             /* windows in an image */
    long top, left;                /* zeros before an image */
    long cell_h, cell_w;           /* what a window writes of each feature */
    long off_top, off_left;        /* of the first cell, outside */
} Windows;

static inline Windows windows_down(const Shape *s) {
    return (Windows){s->c,  s->h,  s->w, s->n, s->p,  s->q,  s->kh, (s->kw + 1) / 2 * 2,
                     s->sh, s->sw, s->p, s->q, s->ph, s->pw, 1,     1,
                     0,     0};
}

static inline Windows windows_up(const Shape *s) {
    long th = (s->kh + s->sh - 1) / s->sh, tw = ((s->kw + s->sw - 1) / s->sw + 1) / 2 * 2;
    return (Windows){s->n,  s->p,  s->q, s->c, s->h, s->w, th, tw, 1, 1, (s->h - 1 + s->ph) / s->sh + 1,
                     (s->w - 1 + s->pw) / s->sw + 1, th - 1, tw - 1, s->sh, s->sw, s->ph, s->pw};
}

static inline long padded_height(const Windows *v) { return (v->down - 1) * v->step_h + v->taps_h; }
static inline long padded_width(const Windows *v) { return (v->across - 1) * v->step_w + v->taps_w; }
static inline long padded(const Windows *v) { return up(v->channels * padded_height(v) * padded_width(v)); }
static inline long depth(const Windows *v) { return up(v->channels * v->taps_h * v->taps_w); }
static inline long count(const Windows *v) { return v->down * v->across; }
static inline long results(const Windows *v) { return up(v->features * v->cell_h * v->cell_w); }

/* An image in bfloat16 among its zeros, which are there already. */
static void pad(const Windows *v, const float *x, bf16 *out) {
    long height = padded_height(v), width = padded_width(v);
    long rows = least(v->height, height - v->top), columns = least(v->width, width - v->left);
    for (long c = 0; c < v->channels; c++)
        for (long i = 0; i < rows; i++) {
            const float *row = x + (c * v->height + i) * v->width;
            bf16 *to = out + (c * height + v->top + i) * width + v->left;
            for (long j = 0; j < columns; j += 16) {
                __mmask16 inside = first16(columns - j);
                __m256i both = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(inside, row + j));
                _mm256_mask_storeu_epi16(to + j, inside, both);
            }
        }
}

/* Where each window begins in a padded channel, 0 for those that fill up to 32. */
static void begins(const Windows *v, int *at) {
    long width = padded_width(v);
    for (long t = 0; t < up(count(v)); t++)
        at[t] = t < count(v) ? (int)(t / v->across * v->step_h * width + t % v->across * v->step_w) : 0;
}

/* 16 windows as a panel of B. */
static inline void gather(const Windows *v, const bf16 *image, const int *at, bf16 *out) {
    long height = padded_height(v), width = padded_width(v);
    __m512i index = _mm512_loadu_si512(at);
    bf16 *end = out + depth(v) * HALF;
    for (long c = 0; c < v->channels; c++)
        for (long i = 0; i < v->taps_h; i++)
            for (long j = 0; j < v->taps_w; j += 2, out += 32)
                _mm512_storeu_si512(out, _mm512_i32gather_epi32(index, image + (c * height + i) * width + j, 2));
    for (; out < end; out += 32) _mm512_storeu_si512(out, _mm512_setzero_si512());
}

/* The 32 results from r of the windows from t, into an image. */
static inline void write(const Windows *v, const float *sums, const float *bias, long r, long t, const int *cells, float *to) {
    long all = v->features * v->cell_h * v->cell_w;
    int straight = v->cell_h == 1 && v->cell_w == 1 && v->across == v->columns && v->down == v->rows;
    for (int half = 0; half < 2 && t + half * HALF < count(v); half++) {
        long first = t + half * HALF;
        __mmask16 inside = first16(count(v) - first);
        __m512i row = _mm512_loadu_si512(cells + 2 * first), column = _mm512_loadu_si512(cells + 2 * first + HALF);
        for (long k = r; k < least(r + SIDE, all); k++) {
            long feature = k % v->features, place = k / v->features;
            __m512 sum = _mm512_load_ps(sums + (k - r) * SIDE + half * HALF);
            float *plane = to + feature * v->rows * v->columns;
            if (bias) sum = _mm512_add_ps(sum, _mm512_set1_ps(bias[feature]));
            if (straight) {
                _mm512_mask_storeu_ps(plane + first, inside, sum);
                continue;
            }
            __m512i i = _mm512_add_epi32(row, _mm512_set1_epi32((int)(place / v->cell_w)));
            __m512i j = _mm512_add_epi32(column, _mm512_set1_epi32((int)(place % v->cell_w)));
            __mmask16 there = _mm512_mask_cmplt_epu32_mask(inside, i, _mm512_set1_epi32((int)v->rows));
            there = _mm512_mask_cmplt_epu32_mask(there, j, _mm512_set1_epi32((int)v->columns));
            __m512i index = _mm512_add_epi32(_mm512_mullo_epi32(i, _mm512_set1_epi32((int)v->columns)), j);
            _mm512_mask_i32scatter_ps(plane, there, index, sum, 4);
        }
    }
}

/* The row and column of each window's cell in what is written: 16 rows, 16 columns, 16 rows ... */
static void places(const Windows *v, int *cells) {
    for (long t = 0; t < up(count(v)); t++) {
        int *to = cells + t / HALF * 2 * HALF + t % HALF;
        to[0] = (int)(t / v->across * v->cell_h - v->off_top);
        to[HALF] = (int)(t % v->across * v->cell_w - v->off_left);
    }
}

/* The weights of result k, in the order of a window's numbers. */
static void weights_of(const Shape *s, const Windows *v, int upwards, const float *w, long k, float *row, bf16 *out) {
    long feature = k % v->features, place = k / v->features, i0 = place / v->cell_w, j0 = place % v->cell_w;
    memset(row, 0, (size_t)depth(v) * sizeof(float));
    float *to = row;
    for (long c = 0; c < v->channels && place < v->cell_h * v->cell_w; c++) {
        const float *kernel = w + (upwards ? c * s->c + feature : feature * s->c + c) * s->kh * s->kw;
        for (long i = 0; i < v->taps_h; i++)
            for (long j = 0; j < v->taps_w; j++, to++) {
                long a = upwards ? i0 + (v->taps_h - 1 - i) * s->sh : i, b = upwards ? j0 + (v->taps_w - 1 - j) * s->sw : j;
                if (a < s->kh && b < s->kw) *to = kernel[a * s->kw + b];
            }
    }
    for (long i = 0; i < depth(v); i += 32)
        _mm512_storeu_si512(out + i, narrow(_mm512_loadu_ps(row + i), _mm512_loadu_ps(row + i + 16)));
}

/* Numbers of scratch, in bfloat16: what threads share, and what each has. */
static inline long room_shared(const Windows *v) { return results(v) * depth(v) + 6 * up(count(v)); }
static inline long room_own(const Windows *v) { return padded(v) + SIDE * depth(v); }

static void convolve(const Shape *s, const Windows *v, int upwards, const float *x, const float *w, const float *b, float *y,
                     bf16 *scratch, int threads) {
    bf16 *kernels = scratch;
    int *at = (int *)(kernels + results(v) * depth(v)), *cells = at + up(count(v));
    long k = depth(v), own = room_own(v);
    begins(v, at);
    places(v, cells);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long part = 0; part < threads; part++) {
        float *row = (float *)(scratch + room_shared(v) + part * own);
        for (long r = part; r < results(v); r += threads) weights_of(s, v, upwards, w, r, row, kernels + r * k);
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long part = 0; part < threads; part++) {
        float sums[SIDE * SIDE] __attribute__((aligned(64)));
        bf16 *image = scratch + room_shared(v) + part * own, *left = image + padded(v), *right = left + HALF * k;
        memset(image, 0, (size_t)padded(v) * sizeof(bf16));
        begin_tiles();
        for (long m = s->images * part / threads; m < s->images * (part + 1) / threads; m++) {
            pad(v, x + m * v->channels * v->height * v->width, image);
            float *to = y + m * v->features * v->rows * v->columns;
            for (long t = 0; t < count(v); t += SIDE) {
                gather(v, image, at + t, left);
                if (t + HALF < count(v)) gather(v, image, at + t + HALF, right);
                for (long r = 0; r < results(v); r += SIDE) {
                    block(kernels + r * k, k, left, t + HALF < count(v) ? right : left, k, sums);
                    write(v, sums, b, r, t, cells, to);
                }
            }
        }
        end_tiles();
    }
}

void convolution_down(const float *x, const float *w, const float *b, float *y, const Shape *s, bf16 *scratch, int threads) {
    Windows v = windows_down(s);
    convolve(s, &v, 0, x, w, b, y, scratch, threads);
}

void convolution_up(const float *y, const float *w, const float *b, float *x, const Shape *s, bf16 *scratch, int threads) {
    Windows v = windows_up(s);
    convolve(s, &v, 1, y, w, b, x, scratch, threads);
}

/* Sums over images are taken in `groups` parts, as many as there are for 16 tasks: by the shape alone, so that no number of
   threads changes them. A task reads `run` images at a time. */
static inline long groups(const Shape *s, const Windows *v) {
    long wanted = 16 / (depth(v) / SIDE);
    return wanted < 1 ? 1 : least(wanted, s->images);
}
static inline long run(const Shape *s) {
    long wanted = 2048 / up(s->p * s->q);
    return wanted < 1 ? 1 : least(wanted, s->images);
}

/* Of a row of A, not a power of two, whose rows would all fall into the same few lines of a cache. */
static inline long row_length(const Shape *s) { return run(s) * up(s->p * s->q) + SIDE; }

static inline long room_weights(const Shape *s, const Windows *v) {
    return s->images * (padded(v) + up(s->n) * up(s->p * s->q)) + 2 * groups(s, v) * depth(v) * up(s->n) + up(count(v)) * 2;
}

/* 32 rows of A from row k: numbers of the windows, of an image's windows one after the other. */
static inline void gather_rows(const Windows *v, const bf16 *image, const int *at, long k, bf16 *out, long stride) {
    const __m512i low = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22,
                                         20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(1)), zero = _mm512_setzero_si512();
    long height = padded_height(v), width = padded_width(v), taps = v->taps_h * v->taps_w;
    for (long r = k; r < k + SIDE; r += 2, out += 2 * stride) {
        long c = r / taps, i = r % taps / v->taps_w, j = r % v->taps_w;
        const bf16 *from = image + (c * height + i) * width + j;
        for (long t = 0; t < count(v); t += SIDE) {
            __m512i a = zero, b = zero;
            if (c < v->channels) {
                a = _mm512_mask_i32gather_epi32(zero, first16(count(v) - t), _mm512_loadu_si512(at + t), from, 2);
                b = _mm512_mask_i32gather_epi32(zero, first16(count(v) - t - HALF), _mm512_loadu_si512(at + t + HALF), from, 2);
            }
            _mm512_storeu_si512(out + t, _mm512_permutex2var_epi16(a, low, b));
            _mm512_storeu_si512(out + stride + t, _mm512_permutex2var_epi16(a, high, b));
        }
    }
}

/* dw += the sum over images and positions of y x. */
void convolution_weights(const float *x, const float *y, float *dw, const Shape *s, bf16 *scratch, int threads) {
    Windows v = windows_down(s);
    long k = depth(&v), n = up(s->n), positions = up(s->p * s->q), all = s->images * positions, taps = v.taps_h * v.taps_w;
    long parts = groups(s, &v), length = row_length(s);
    bf16 *images = scratch, *results = images + s->images * padded(&v);
    float *partial = (float *)(results + n * all);
    int *at = (int *)(partial + parts * k * n);
    bf16 *own = scratch + room_weights(s, &v);
    begins(&v, at);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long m = 0; m < s->images; m++) {
        memset(images + m * padded(&v), 0, (size_t)padded(&v) * sizeof(bf16));
        pad(&v, x + m * s->c * s->h * s->w, images + m * padded(&v));
        for (long j = 0; j < n; j += HALF)
            panel(y + (m * s->n + j) * s->p * s->q, s->n - j, s->p * s->q, results + j * all + m * positions * HALF);
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long part = 0; part < threads; part++) {
        float sums[SIDE * SIDE] __attribute__((aligned(64)));
        bf16 *rows = own + part * SIDE * length;
        begin_tiles();
        for (long task = part; task < parts * k / SIDE; task += threads) {
            long group = task % parts, first = task / parts * SIDE;
            float *to = partial + (group * k + first) * n;
            memset(to, 0, (size_t)(SIDE * n) * sizeof(float));
            long end = s->images * (group + 1) / parts;
            for (long m = s->images * group / parts; m < end; m += run(s)) {
                long here = least(run(s), end - m);
                for (long i = 0; i < here; i++)
                    gather_rows(&v, images + (m + i) * padded(&v), at, first, rows + i * positions, length);
                for (long j = 0; j < n; j += SIDE) {
                    const bf16 *left = results + j * all + m * positions * HALF;
                    block(rows, length, left, left + HALF * all, here * positions, sums);
                    put(sums, 1, SIDE, n, 0, j, to);
                }
            }
        }
        end_tiles();
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long f = 0; f < s->n; f++)
        for (long c = 0; c < s->c; c++)
            for (long i = 0; i < s->kh; i++)
                for (long j = 0; j < s->kw; j++) {
                    const float *from = partial + (c * taps + i * v.taps_w + j) * n + f;
                    float sum = 0;
                    for (long g = 0; g < parts; g++) sum += from[g * k * n];
                    dw[((f * s->c + c) * s->kh + i) * s->kw + j] += sum;
                }
}

/* db += the sums of images (images, channels, size) over images and positions. */
void convolution_bias(const float *x, float *db, long images, long channels, long size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long c = 0; c < channels; c++) {
        double all = 0;
        for (long m = 0; m < images; m++) {
            const float *from = x + (m * channels + c) * size;
            __m512 sum = _mm512_setzero_ps();
            for (long j = 0; j < size; j += 16) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first16(size - j), from + j));
            all += _mm512_reduce_add_ps(sum);
        }
        db[c] += (float)all;
    }
}

/* Numbers of scratch that any of these needs. */
void convolution_room(const Shape *s, long *room, int threads) {
    Windows down = windows_down(s), upwards = windows_up(s);
    long a = room_shared(&down) + threads * room_own(&down), b = room_shared(&upwards) + threads * room_own(&upwards);
    long c = room_weights(s, &down) + threads * SIDE * row_length(s);
    *room = a > b ? a > c ? a : c : b > c ? b : c;
}

/* Convolutions between large images x (images, c, h, w) and small ones y (images, n, p, q), with weights w (n, c, kh, kw):

       down      y[n, p, q] = sum of w[n, c, i, j] x[c, p sh - ph + i, q sw - pw + j]
       up        the same sum the other way, from y to x
       weights   dw = the sum of y x over images and positions

   A convolution is down; its gradients are up and weights. A transposed convolution is up; its gradients are down and weights.
   Float32 in and out, products of bfloat16 with float32 sums.

   Up is a convolution of step 1 too. What a window of y of ceil(kh / sh) by ceil(kw / sw) numbers touches in x are the sh sw
   numbers of one cell (Shi et al. 2016, arXiv 1609.07009): its features are the c numbers of each place in the cell, and each
   number of x is written once.

   The products read pairs of numbers, of 16 windows at a time. So an image becomes planes of pairs, one for each channel, two
   columns of a window, and row modulo the step: in it the pairs of all windows follow each other, and so they do one row of
   the window further, a line later. Windows have an even width, the last column with weight zero where it is not the
   kernel's. */

#include "rows.h"

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
static inline long depth(const Windows *v) { return up(v->channels * v->taps_h * v->taps_w); }
static inline long count(const Windows *v) { return v->down * v->across; }
static inline long results(const Windows *v) { return up(v->features * v->cell_h * v->cell_w); }

/* Pairs in a plane, and in a channel's planes. */
static inline long plane(const Windows *v) { return (padded_height(v) + v->step_h - 1) / v->step_h * v->across; }
static inline long planes(const Windows *v) { return plane(v) * v->step_h * (v->taps_w / 2); }

/* Numbers of scratch, in bfloat16: n channels among their zeros, and their pairs, each with what is read after their end. */
static inline long room_padded(const Windows *v, long n) { return up(n * padded_height(v) * padded_width(v) + 2 * SIDE); }
static inline long room_pairs(const Windows *v, long n) { return up(2 * (n * planes(v) + SIDE)); }

/* An image's first n channels in bfloat16, among zeros that are there already. */
static inline void pad(const Windows *v, const float *x, long n, bf16 *out) {
    long height = padded_height(v), width = padded_width(v), rows = least(v->height, height - v->top);
    long columns = least(v->width, width - v->left);
    out += v->top * width + v->left;
    for (long c = 0; c < n; c++, x += v->height * v->width, out += height * width)
        for (long i = 0; i < rows; i++)
            for (long j = 0; j < columns; j += 16) {
                __mmask16 inside = first16(columns - j);
                __m256i row = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(inside, x + i * v->width + j));
                _mm256_mask_storeu_epi16(out + i * width + j, inside, row);
            }
}

/* The planes of n channels of images whose rows fit a register: no padded copy, and the lines of zeros are there already. */
static inline int narrow_rows(const Windows *v) { return v->width <= SIDE && v->across <= HALF && v->taps_w <= HALF; }

static void as_narrow_pairs(const Windows *v, const float *x, long n, int *to) {
    __m512i from[HALF / 2];
    __mmask32 there[HALF / 2];
    for (long half = 0; half < v->taps_w / 2; half++) {
        uint16_t columns[SIDE];
        there[half] = 0;
        for (long t = 0; t < SIDE; t++) {
            long column = t / 2 * v->step_w + 2 * half + t % 2 - v->left;
            columns[t] = (uint16_t)column;
            there[half] |= (__mmask32)(column >= 0 && column < v->width) << t;
        }
        from[half] = _mm512_loadu_si512(columns);
    }
    __mmask16 low = first16(v->width), high = first16(v->width - HALF), inside = first16(v->across);
    long rows = least(v->height, padded_height(v) - v->top), size = plane(v), half_size = size * v->step_h;
    for (long c = 0; c < n; c++, x += v->height * v->width, to += planes(v)) {
        long phase = v->top % v->step_h, line = v->top / v->step_h * v->across;
        for (long i = 0; i < rows; i++) {
            const float *row = x + i * v->width;
            __m512i all = narrow(_mm512_maskz_loadu_ps(low, row), _mm512_maskz_loadu_ps(high, row + HALF));
            int *pair = to + phase * size + line;
            for (long half = 0; half < v->taps_w / 2; half++, pair += half_size)
                _mm512_mask_storeu_epi32(pair, inside, _mm512_maskz_permutexvar_epi16(there[half], from[half], all));
            if (++phase == v->step_h) phase = 0, line += v->across;
        }
    }
}

/* The planes of n channels. */
static void as_pairs(const Windows *v, const float *x, long n, bf16 *padded, int *to) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i neighbours = _mm512_add_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(0x10001)),
                                                _mm512_set1_epi32(0x10000)); /* (0, 1), (1, 2), (2, 3) ... */
    const __m512i index = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)v->step_w));
    long height = padded_height(v), width = padded_width(v), across = v->across, step = v->step_w;
    if (narrow_rows(v)) {
        as_narrow_pairs(v, x, n, to);
        return;
    }
    pad(v, x, n, padded);
    for (long c = 0; c < n; c++, padded += height * width)
        for (long half = 0; half < v->taps_w / 2; half++)
            for (long phase = 0; phase < v->step_h; phase++, to += plane(v)) {
                int *line = to;
                for (long i = phase; i < height; i += v->step_h, line += across) {
                    const bf16 *from = padded + i * width + 2 * half;
                    for (long j = 0; j < across; j += 16, from += 16 * step) {
                        __mmask16 inside = first16(across - j);
                        __m512i both = step == 1   ? _mm512_permutexvar_epi16(neighbours, _mm512_loadu_si512(from))
                                       : step == 2 ? _mm512_loadu_si512(from)
                                                   : _mm512_mask_i32gather_epi32(index, inside, index, from, 2);
                        _mm512_mask_storeu_epi32(line + j, inside, both);
                    }
                }
            }
}

/* Where in the pairs the first window's are, for each two of its numbers. */
static void begins(const Windows *v, int *at) {
    for (long c = 0; c < v->channels; c++)
        for (long i = 0; i < v->taps_h; i++)
            for (long half = 0; half < v->taps_w / 2; half++)
                *at++ = (int)(c * planes(v) + (half * v->step_h + i % v->step_h) * plane(v) + i / v->step_h * v->across);
}

/* 16 windows from t as a panel of B. */
static inline void gather(const Windows *v, const int *from, const int *at, long t, bf16 *out) {
    long n = v->channels * v->taps_h * v->taps_w / 2, k = depth(v) / 2;
    for (long i = 0; i < n; i++) _mm512_storeu_si512(out + i * 32, _mm512_loadu_si512(from + at[i] + t));
    for (long i = n; i < k; i++) _mm512_storeu_si512(out + i * 32, _mm512_setzero_si512());
}

/* An image from its results, which lie by rows of up(count) windows. */
static void finish(const Windows *v, const float *sums, const float *bias, float *to) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i index = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)v->cell_w));
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    long length = up(count(v)), next = v->features * length;
    int straight = v->cell_h == 1 && v->cell_w == 1 && v->across == v->columns && v->down == v->rows;
    for (long f = 0; f < v->features; f++, to += v->rows * v->columns) {
        __m512 start = _mm512_set1_ps(bias ? bias[f] : 0.0f);
        for (long t = 0; straight && t < count(v); t += 16)
            _mm512_mask_storeu_ps(to + t, first16(count(v) - t), _mm512_add_ps(start, _mm512_load_ps(sums + f * length + t)));
        long place_h = v->off_top % v->cell_h, line = v->off_top / v->cell_h;
        for (long i = 0; !straight && i < v->rows; i++) {
            const float *from = sums + (place_h * v->cell_w * v->features + f) * length + line * v->across;
            if (++place_h == v->cell_h) place_h = 0, line++;
            for (long j = 0; j < v->across; j += 16) {
                long column = j * v->cell_w - v->off_left;
                if (v->cell_w == 2) {
                    __m512 a = _mm512_add_ps(start, _mm512_maskz_loadu_ps(first16(v->across - j), from + j));
                    __m512 b = _mm512_add_ps(start, _mm512_maskz_loadu_ps(first16(v->across - j), from + next + j));
                    for (int half = 0; half < 2; half++, column += 16) {
                        __mmask16 inside = first16(v->columns - column) & ~first16(-column);
                        _mm512_mask_storeu_ps(to + i * v->columns + column, inside,
                                              _mm512_permutex2var_ps(a, half ? high : low, b));
                    }
                    continue;
                }
                for (long place = 0; place < v->cell_w; place++, column++) {
                    __m512i there = _mm512_add_epi32(index, _mm512_set1_epi32((int)column));
                    __mmask16 inside = _mm512_mask_cmplt_epu32_mask(first16(v->across - j), there,
                                                                    _mm512_set1_epi32((int)v->columns));
                    __m512 sum = _mm512_maskz_loadu_ps(first16(v->across - j), from + place * next + j);
                    _mm512_mask_i32scatter_ps(to + i * v->columns, inside, there, _mm512_add_ps(start, sum), 4);
                }
            }
        }
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
static inline long room_shared(const Windows *v) { return (results(v) + 1) * depth(v); }
static inline long room_own(const Windows *v) {
    return room_padded(v, v->channels) + room_pairs(v, v->channels) + SIDE * depth(v) + 2 * results(v) * up(count(v));
}

static void convolve(const Shape *s, const Windows *v, int upwards, const float *x, const float *w, const float *b, float *y,
                     bf16 *scratch, int threads) {
    bf16 *kernels = scratch;
    int *at = (int *)(kernels + results(v) * depth(v));
    long k = depth(v), length = up(count(v));
    begins(v, at);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long part = 0; part < threads; part++) {
            float *row = (float *)(scratch + room_shared(v) + part * room_own(v));
            for (long r = part; r < results(v); r += threads) weights_of(s, v, upwards, w, r, row, kernels + r * k);
        }
#pragma omp for schedule(static)
        for (long part = 0; part < threads; part++) {
            bf16 *padded = scratch + room_shared(v) + part * room_own(v), *own = padded + room_padded(v, v->channels);
            bf16 *left = own + room_pairs(v, v->channels), *right = left + HALF * k;
            float *sums = (float *)(right + HALF * k);
            memset(padded, 0, (size_t)(left - padded) * sizeof(bf16));
            begin_tiles();
            for (long m = s->images * part / threads; m < s->images * (part + 1) / threads; m++) {
                as_pairs(v, x + m * v->channels * v->height * v->width, v->channels, padded, (int *)own);
                for (long t = 0; t < count(v); t += SIDE) {
                    gather(v, (int *)own, at, t, left);
                    gather(v, (int *)own, at, t + HALF, right);
                    for (long r = 0; r < results(v); r += SIDE)
                        block((Rows){kernels + r * k, k, 0}, (Panels){left, HALF * k, 0, 1}, k, COARSE, sums + r * length + t, length);
                }
                finish(v, sums, b, y + m * v->features * v->rows * v->columns);
            }
            end_tiles();
        }
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
    return s->images * up(s->n) * up(s->p * s->q) + 2 * groups(s, v) * depth(v) * up(s->n) + depth(v);
}
/* Channels that 32 rows of A read. */
static inline long most(const Windows *v) { return least(v->channels, (SIDE - 2) / (v->taps_h * v->taps_w) + 2); }
static inline long room_task(const Shape *s, const Windows *v) {
    return room_padded(v, most(v)) + room_pairs(v, most(v)) + SIDE * row_length(s);
}

/* 32 rows of A, or as many as there are: numbers of the windows, of an image's windows one after the other. */
static inline void gather_rows(const Windows *v, const int *first, const int *at, long rows, bf16 *out, long stride) {
    const __m512i low = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22,
                                         20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(1));
    for (long r = 0; r < SIDE; r += 2, out += 2 * stride)
        for (long t = 0; t < count(v); t += SIDE) {
            long n = r < rows ? count(v) - t : 0;
            const int *from = first + (n ? at[r / 2] + t : 0);
            __m512i a = _mm512_maskz_loadu_epi32(first16(n), from);
            __m512i b = _mm512_maskz_loadu_epi32(first16(n - HALF), from + HALF);
            _mm512_storeu_si512(out + t, _mm512_permutex2var_epi16(a, low, b));
            _mm512_storeu_si512(out + stride + t, _mm512_permutex2var_epi16(a, high, b));
        }
}

/* dw += the sum over images and positions of y x. */
void convolution_weights(const float *x, const float *y, float *dw, const Shape *s, bf16 *scratch, int threads) {
    Windows v = windows_down(s);
    long k = depth(&v), n = up(s->n), positions = up(s->p * s->q), all = s->images * positions, taps = v.taps_h * v.taps_w;
    long parts = groups(s, &v), length = row_length(s);
    bf16 *down = scratch;
    float *partial = (float *)(down + n * all);
    int *at = (int *)(partial + parts * k * n);
    begins(&v, at);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long m = 0; m < s->images; m++)
            for (long j = 0; j < n; j += HALF)
                panel(y + (m * s->n + j) * s->p * s->q, s->n - j, s->p * s->q, down + j * all + m * positions * HALF,
                      COARSE, 0);
#pragma omp for schedule(static)
        for (long part = 0; part < threads; part++) {
            float sums[SIDE * SIDE] __attribute__((aligned(64)));
            bf16 *padded = scratch + room_weights(s, &v) + part * room_task(s, &v), *own = padded + room_padded(&v, most(&v));
            bf16 *rows = own + room_pairs(&v, most(&v));
            memset(padded, 0, (size_t)(rows - padded) * sizeof(bf16));
            begin_tiles();
            for (long task = part; task < parts * k / SIDE; task += threads) {
                long group = task % parts, first = task / parts * SIDE, here = least(SIDE, v.channels * taps - first);
                long c = first / taps, channels = (first + here - 1) / taps + 1 - c;
                float *to = partial + (group * k + first) * n;
                memset(to, 0, (size_t)(SIDE * n) * sizeof(float));
                long end = s->images * (group + 1) / parts;
                for (long m = s->images * group / parts; m < end; m += run(s)) {
                    long several = least(run(s), end - m);
                    for (long i = 0; i < several; i++) {
                        as_pairs(&v, x + ((m + i) * s->c + c) * s->h * s->w, channels, padded, (int *)own);
                        gather_rows(&v, (int *)own - c * planes(&v), at + first / 2, here, rows + i * positions, length);
                    }
                    for (long j = 0; j < n; j += SIDE) {
                        const bf16 *left = down + j * all + m * positions * HALF;
                        block((Rows){rows, length, 0}, (Panels){left, HALF * all, 0, 1}, several * positions, COARSE, sums, SIDE);
                        put(sums, 1, 0, SIDE, n, 0, j, to);
                    }
                }
            }
            end_tiles();
        }
#pragma omp for schedule(static)
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
    long c = room_weights(s, &down) + threads * room_task(s, &down);
    *room = a > b ? a > c ? a : c : b > c ? b : c;
}

/* The products of convolutions, see `convolution.h`.

   Up is a convolution of step 1 too. What a window of y of ceil(kh / sh) by ceil(kw / sw) numbers touches in x are the sh sw
   numbers of one cell (Shi et al. 2016, arXiv 1609.07009): its features are the c numbers of each place in the cell, and each
   number of x is written once. */

#include <omp.h>

#include "convolution.h"
#include "windows.h"

/* An image from its results, which lie by rows of up(count) windows, and what follows. `at` is where it begins in y, `plane` has
   room for one of its features; returns the sums of the squares of what it holds then. */
static __m512 finish(const Windows *v, const float *sums, Forward then, Gate gate, float *y, long at, float *plane) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i index = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)v->cell_w));
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    long length = up(count(v)), next = v->features * length, size = v->rows * v->columns;
    __m512 squares = _mm512_setzero_ps();
    int straight = v->cell_h == 1 && v->cell_w == 1 && v->across == v->columns && v->down == v->rows;
    for (long f = 0; f < v->features; f++, at += size) {
        __m512 start = _mm512_set1_ps(then.start ? then.start[f] : 0.0f);
        long place_h = v->off_top % v->cell_h, line = v->off_top / v->cell_h;
        for (long i = 0; !straight && i < v->rows; i++) {
            const float *from = sums + (place_h * v->cell_w * v->features + f) * length + line * v->across;
            if (++place_h == v->cell_h) place_h = 0, line++;
            for (long j = 0; j < v->across; j += 16) {
                long column = j * v->cell_w - v->off_left;
                if (v->cell_w == 2) {
                    __m512 a = _mm512_maskz_loadu_ps(first16(v->across - j), from + j);
                    __m512 b = _mm512_maskz_loadu_ps(first16(v->across - j), from + next + j);
                    for (int half = 0; half < 2 && column < v->columns; half++, column += 16) {
                        __mmask16 inside = first16(v->columns - column) & ~first16(-column);
                        _mm512_mask_storeu_ps(plane + i * v->columns + column, inside,
                                              _mm512_permutex2var_ps(a, half ? high : low, b));
                    }
                    continue;
                }
                for (long place = 0; place < v->cell_w; place++, column++) {
                    __m512i there = _mm512_add_epi32(index, _mm512_set1_epi32((int)column));
                    __mmask16 inside = _mm512_mask_cmplt_epu32_mask(first16(v->across - j), there,
                                                                    _mm512_set1_epi32((int)v->columns));
                    __m512 sum = _mm512_maskz_loadu_ps(first16(v->across - j), from + place * next + j);
                    _mm512_mask_i32scatter_ps(plane + i * v->columns, inside, there, sum, 4);
                }
            }
        }
        const float *from = straight ? sums + f * length : plane;
        for (long t = 0; t < size; t += 16) {
            __mmask16 inside = first16(size - t);
            __m512 sum = _mm512_add_ps(start, _mm512_maskz_loadu_ps(inside, from + t));
            sum = activated(then.activation, sum, then.slopes + at + t, inside);
            sum = gated(gate.activation, sum, gate.from + at + t, inside);
            squares = _mm512_mask3_fmadd_ps(sum, sum, squares, inside);
            _mm512_mask_storeu_ps(y + at + t, inside, sum);
        }
    }
    return squares;
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
    return room_padded(v, v->channels) + room_pairs(v, v->channels) + SIDE * depth(v) + 2 * results(v) * up(count(v)) +
           2 * up(v->rows * v->columns);
}

static void convolve(const Shape *s, const Windows *v, int upwards, const float *from, const float *w, Forward then, Gate gate,
                     float *to, double *read, double *written, bf16 *scratch, bf16 *alone) {
    bf16 *kernels = scratch, *padded = alone, *own = padded + room_padded(v, v->channels);
    int *at = (int *)(kernels + results(v) * depth(v));
    long k = depth(v), length = up(count(v)), size = v->channels * v->height * v->width;
    bf16 *left = own + room_pairs(v, v->channels), *right = left + HALF * k;
    float *sums = (float *)(right + HALF * k), *plane = sums + results(v) * length;
    __m512 squares = _mm512_setzero_ps(), others = squares;
#pragma omp for schedule(static) nowait
    for (long r = 0; r < results(v); r++) weights_of(s, v, upwards, w, r, (float *)left, kernels + r * k);
#pragma omp single
    begins(v, at);
    memset(padded, 0, (size_t)(left - padded) * sizeof(bf16));
    begin_tiles();
#pragma omp for schedule(static) nowait
    for (long m = 0; m < s->images; m++) {
        squares = _mm512_add_ps(squares, as_pairs(v, from + m * size, v->channels, padded, (int *)own));
        for (long t = 0; t < count(v); t += SIDE) {
            gather(v, (int *)own, at, t, left);
            gather(v, (int *)own, at, t + HALF, right);
            for (long r = 0; r < results(v); r += SIDE)
                block((Rows){kernels + r * k, k, 0}, (Panels){left, HALF * k, 0, 1}, k, COARSE, sums + r * length + t, length);
        }
        others = _mm512_add_ps(others, finish(v, sums, then, gate, to, m * v->features * v->rows * v->columns, plane));
    }
    end_tiles();
    double sum = _mm512_reduce_add_ps(squares), other = _mm512_reduce_add_ps(others);
    if (read) {
#pragma omp atomic
        *read += sum;
    }
    if (written) {
#pragma omp atomic
        *written += other;
    }
#pragma omp barrier
}

void convolution_shared(const Shape *s, int upwards, const float *from, const float *w, Forward then, Gate gate, float *to,
                        double *read, double *written, bf16 *scratch, bf16 *alone) {
    Windows v = upwards ? windows_up(s) : windows_down(s);
    convolve(s, &v, upwards, from, w, then, gate, to, read, written, scratch, alone);
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

void convolution_weights_shared(const Shape *s, const float *x, const float *y, float *dw, int add, double *squares,
                                bf16 *scratch, bf16 *alone) {
    Windows v = windows_down(s);
    long k = depth(&v), n = up(s->n), positions = up(s->p * s->q), all = s->images * positions, taps = v.taps_h * v.taps_w;
    long parts = groups(s, &v), length = row_length(s);
    bf16 *down = scratch, *padded = alone, *own = padded + room_padded(&v, most(&v)), *rows = own + room_pairs(&v, most(&v));
    float *partial = (float *)(down + n * all), sums[SIDE * SIDE] __attribute__((aligned(64)));
    int *at = (int *)(partial + parts * k * n);
#pragma omp for schedule(static) nowait
    for (long m = 0; m < s->images; m++)
        for (long j = 0; j < n; j += HALF)
            panel(y + (m * s->n + j) * s->p * s->q, s->n - j, s->p * s->q, down + j * all + m * positions * HALF, COARSE, 0);
#pragma omp single
    begins(&v, at);
    memset(padded, 0, (size_t)(rows - padded) * sizeof(bf16));
    begin_tiles();
#pragma omp for schedule(static)
    for (long task = 0; task < parts * k / SIDE; task++) {
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
                put(sums, 1, (Gate){IDENTITY, 0}, SIDE, n, 0, j, to);
            }
        }
    }
    end_tiles();
#pragma omp for schedule(static)
    for (long f = 0; f < s->n; f++) {
        double total = 0;
        float *to = dw + f * s->c * s->kh * s->kw;
        for (long c = 0; c < s->c; c++)
            for (long i = 0; i < s->kh; i++)
                for (long j = 0; j < s->kw; j++, to++) {
                    const float *from = partial + (c * taps + i * v.taps_w + j) * n + f;
                    float sum = add ? *to : 0;
                    for (long g = 0; g < parts; g++) sum += from[g * k * n];
                    *to = sum;
                    total += (double)sum * sum;
                }
        if (squares) squares[f] = total;
    }
}

void convolution_bias_shared(const float *x, float *db, int add, double *squares, long images, long channels, long size) {
#pragma omp for schedule(static)
    for (long c = 0; c < channels; c++) {
        double all = add ? db[c] : 0;
        for (long m = 0; m < images; m++) {
            const float *from = x + (m * channels + c) * size;
            __m512 sum = _mm512_setzero_ps();
            for (long j = 0; j < size; j += 16) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first16(size - j), from + j));
            all += _mm512_reduce_add_ps(sum);
        }
        db[c] = (float)all;
        if (squares) squares[c] = (double)db[c] * db[c];
    }
}

void convolution_room(const Shape *s, long *rooms) {
    Windows down = windows_down(s), upwards = windows_up(s);
    long shared[3] = {room_shared(&down), room_shared(&upwards), room_weights(s, &down)};
    long each[3] = {room_own(&down), room_own(&upwards), room_task(s, &down)};
    rooms[0] = rooms[1] = 0;
    for (int i = 0; i < 3; i++) {
        if (shared[i] > rooms[0]) rooms[0] = shared[i];
        if (each[i] > rooms[1]) rooms[1] = each[i];
    }
}

/* The same, each in a parallel region of its own. b may be null; dw and db are added to. */
void convolution(const Shape *s, int upwards, const float *from, const float *w, const float *b, float *to, bf16 *scratch,
                 int threads) {
    long rooms[2];
    convolution_room(s, rooms);
#pragma omp parallel num_threads(threads)
    convolution_shared(s, upwards, from, w, (Forward){b, IDENTITY, 0}, (Gate){IDENTITY, 0}, to, 0, 0, scratch,
                       scratch + rooms[0] + omp_get_thread_num() * rooms[1]);
}

void convolution_weights(const float *x, const float *y, float *dw, const Shape *s, bf16 *scratch, int threads) {
    long rooms[2];
    convolution_room(s, rooms);
#pragma omp parallel num_threads(threads)
    convolution_weights_shared(s, x, y, dw, 1, 0, scratch, scratch + rooms[0] + omp_get_thread_num() * rooms[1]);
}

void convolution_bias(const float *x, float *db, long images, long channels, long size, int threads) {
#pragma omp parallel num_threads(threads)
    convolution_bias_shared(x, db, 1, 0, images, channels, size);
}

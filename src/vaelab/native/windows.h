/* The windows of images, as what products read.

   The products read pairs of numbers, of 16 windows at a time. So an image becomes planes of pairs, one for each channel, two
   columns of a window, and row modulo the step: in it the pairs of all windows follow each other, and so they do one row of
   the window further, a line later. Windows have an even width, the last column with weight zero where it is not the
   kernel's. */

#ifndef WINDOWS_H
#define WINDOWS_H

#include "convolution.h"

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

/* An image's first n channels in bfloat16, among zeros that are there already. Adds to the sums of their squares. */
static inline void pad(const Windows *v, const float *x, long n, bf16 *out, __m512 *squares) {
    long height = padded_height(v), width = padded_width(v), rows = least(v->height, height - v->top);
    long columns = least(v->width, width - v->left);
    out += v->top * width + v->left;
    for (long c = 0; c < n; c++, x += v->height * v->width, out += height * width)
        for (long i = 0; i < rows; i++)
            for (long j = 0; j < columns; j += 16) {
                __mmask16 inside = first16(columns - j);
                __m512 row = _mm512_maskz_loadu_ps(inside, x + i * v->width + j);
                *squares = _mm512_fmadd_ps(row, row, *squares);
                _mm256_mask_storeu_epi16(out + i * width + j, inside, (__m256i)_mm512_cvtneps_pbh(row));
            }
}

/* The planes of n channels of images whose rows fit a register: no padded copy, and the lines of zeros are there already. */
static inline int narrow_rows(const Windows *v) { return v->width <= SIDE && v->across <= HALF && v->taps_w <= HALF; }

static inline __m512 as_narrow_pairs(const Windows *v, const float *x, long n, int *to) {
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
    __m512 squares = _mm512_setzero_ps();
    __mmask16 low = first16(v->width), high = first16(v->width - HALF), inside = first16(v->across);
    long rows = least(v->height, padded_height(v) - v->top), size = plane(v), half_size = size * v->step_h;
    for (long c = 0; c < n; c++, x += v->height * v->width, to += planes(v)) {
        long phase = v->top % v->step_h, line = v->top / v->step_h * v->across;
        for (long i = 0; i < rows; i++) {
            const float *row = x + i * v->width;
            __m512 a = _mm512_maskz_loadu_ps(low, row), b = _mm512_maskz_loadu_ps(high, row + HALF);
            squares = _mm512_fmadd_ps(a, a, _mm512_fmadd_ps(b, b, squares));
            __m512i all = narrow(a, b);
            int *pair = to + phase * size + line;
            for (long half = 0; half < v->taps_w / 2; half++, pair += half_size)
                _mm512_mask_storeu_epi32(pair, inside, _mm512_maskz_permutexvar_epi16(there[half], from[half], all));
            if (++phase == v->step_h) phase = 0, line += v->across;
        }
    }
    return squares;
}

/* The planes of n channels. Returns the sums of their squares. */
static inline __m512 as_pairs(const Windows *v, const float *x, long n, bf16 *padded, int *to) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i neighbours = _mm512_add_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(0x10001)),
                                                _mm512_set1_epi32(0x10000)); /* (0, 1), (1, 2), (2, 3) ... */
    const __m512i index = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)v->step_w));
    long height = padded_height(v), width = padded_width(v), across = v->across, step = v->step_w;
    if (narrow_rows(v)) return as_narrow_pairs(v, x, n, to);
    __m512 squares = _mm512_setzero_ps();
    pad(v, x, n, padded, &squares);
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
    return squares;
}

/* Where in the pairs the first window's are, for each two of its numbers. */
static inline void begins(const Windows *v, int *at) {
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

#endif

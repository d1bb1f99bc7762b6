/* The windows of images, as what products read.

   Up is a convolution of step 1 too. What a window of y of ceil(kh / sh) by ceil(kw / sw) numbers touches in x are the sh sw
   numbers of one cell (Shi et al. 2016, arXiv 1609.07009): its features are the c numbers of each place in the cell, and each
   number of x is written once.

   An image becomes planes, one for each row and column modulo the step: in them, what a place of the windows reads follows each
   other from window to window, and so it does for any other place, somewhere else. Window (i, j) is number i pitch + j, and what
   is between the rows is computed too, and not used. Products read pairs of channels where those are summed, and rows of one
   channel where windows are. */

#ifndef WINDOWS_H
#define WINDOWS_H

#include "convolution.h"

typedef struct {
    long channels, height, width;  /* of what is read */
    long features, rows, columns;  /* of what is written */
    long taps_h, taps_w;           /* of a window */
    long step_h, step_w;           /* from window to window, at most HALF */
    long down, across;             /* windows in an image */
    long top, left;                /* zeros before an image */
    long cell_h, cell_w;           /* what a window writes of each feature */
    long off_top, off_left;        /* of the first cell, outside */
} Windows;

static inline Windows windows_down(const Shape *s) {
    return (Windows){s->c, s->h, s->w, s->n, s->p, s->q, s->kh, s->kw, s->sh, s->sw, s->p, s->q, s->ph, s->pw, 1, 1, 0, 0};
}

static inline Windows windows_up(const Shape *s) {
    long th = (s->kh + s->sh - 1) / s->sh, tw = (s->kw + s->sw - 1) / s->sw;
    return (Windows){s->n,  s->p,  s->q, s->c, s->h, s->w, th, tw, 1, 1, (s->h - 1 + s->ph) / s->sh + 1,
                     (s->w - 1 + s->pw) / s->sw + 1, th - 1, tw - 1, s->sh, s->sw, s->ph, s->pw};
}

static inline long taps(const Windows *v) { return v->taps_h * v->taps_w; }
static inline long padded_height(const Windows *v) { return (v->down - 1) * v->step_h + v->taps_h; }
static inline long padded_width(const Windows *v) { return (v->across - 1) * v->step_w + v->taps_w; }
static inline long pairs_of(const Windows *v) { return (v->channels + 1) / 2; }

/* Numbers in a row of a plane. The zeros after a row are those before the next, where both are there, and no windows are lost. */
static inline long pitch(const Windows *v) {
    long after = padded_width(v) - v->left - v->width, shared = v->step_w == 1 && after > 0 ? least(after, v->left) : 0;
    shared = least(shared, v->taps_w - 1);
    return (padded_width(v) + v->step_w - 1) / v->step_w - shared;
}
static inline long plane(const Windows *v) { return (padded_height(v) + v->step_h - 1) / v->step_h * pitch(v); }
/* Those of a channel, or a pair, and zeros: what is read after them must not be another's, which may be no number. */
static inline long planes(const Windows *v) { return plane(v) * v->step_h * v->step_w + SIDE + v->left; }

/* Windows of an image, and what is between their rows. */
static inline long count(const Windows *v) { return (v->down - 1) * pitch(v) + v->across; }

/* Where in the planes place (i, j) of window 0 is. */
static inline long place_at(const Windows *v, long i, long j) {
    return (i % v->step_h * v->step_w + j % v->step_w) * plane(v) + i / v->step_h * pitch(v) + j / v->step_w;
}

/* Which of 16 columns from column j on go to which plane, and where in its rows they begin. */
typedef struct {
    __mmask16 from[HALF], to[HALF];
    long at[HALF];
} Split;

static inline Split split(const Windows *v, long j, long columns) {
    Split s = {0};
    for (long lane = least(HALF, columns - j) - 1; lane >= 0; lane--) {
        long column = v->left + j + lane, phase = column % v->step_w;
        s.from[phase] |= (__mmask16)(1 << lane);
        s.to[phase] = (__mmask16)(s.to[phase] << 1 | 1);
        s.at[phase] = phase * plane(v) + column / v->step_w;
    }
    return s;
}

/* An image's planes, among zeros that are there already: of each two channels as pairs, in 32 bits, or of each channel in 16.
   Returns the sums of its squares. */
static inline __attribute__((always_inline)) __m512 as_planes(const Windows *v, const float *x, const int paired, void *out) {
    long size = v->height * v->width, rows = least(v->height, padded_height(v) - v->top);
    long columns = least(v->width, padded_width(v) - v->left), length = plane(v), each = planes(v), line_length = pitch(v);
    __m512 squares = _mm512_setzero_ps();
    for (long j = 0; j < columns; j += 16) {
        const Split s = split(v, j, columns);
        for (long c = 0; c < v->channels; c += 1 + paired) {
            __mmask16 one = first16(columns - j), two = paired && c + 1 < v->channels ? one : 0;
            const float *row = x + c * size + j;
            long phase_h = v->top % v->step_h, line = v->top / v->step_h * line_length;
            for (long i = 0; i < rows; i++, row += v->width) {
                long at = c / (1 + paired) * each + phase_h * v->step_w * length + line;
                __m512 a = _mm512_maskz_loadu_ps(one, row);
                __m512 b = paired ? _mm512_maskz_loadu_ps(two, row + size) : _mm512_setzero_ps();
                squares = _mm512_fmadd_ps(a, a, _mm512_fmadd_ps(b, b, squares));
                __m512i both = paired ? pairs(a, b) : (__m512i)a;
                for (long phase = 0; phase < v->step_w; phase++) {
                    __m512i part = v->step_w == 1 ? both : _mm512_maskz_compress_epi32(s.from[phase], both);
                    if (paired)
                        _mm512_mask_storeu_epi32((int *)out + at + s.at[phase], s.to[phase], part);
                    else
                        _mm256_mask_storeu_epi16((bf16 *)out + at + s.at[phase], s.to[phase],
                                                 (__m256i)_mm512_cvtneps_pbh((__m512)part));
                }
                if (++phase_h == v->step_h) phase_h = 0, line += line_length;
            }
        }
    }
    return squares;
}

/* Which of each 16 windows are some of the image's, and how many there were before. */
static inline void which(const Windows *v, __mmask16 *some, int *before) {
    int found = 0;
    for (long t = 0; t < up(count(v)); t += 16) {
        *some = 0;
        *before++ = found;
        for (long lane = 0; lane < 16; lane++) {
            long window = t + lane;
            if (window % pitch(v) < v->across && window / pitch(v) < v->down) *some |= (__mmask16)(1 << lane), found++;
        }
        some++;
    }
}

/* 16 channels of an image of windows (channels, down, across), zeros where there are fewer, as the columns of a panel of B. */
static inline void as_windows(const float *y, long channels, long size, long windows, const __mmask16 *some, const int *before,
                              bf16 *out) {
    for (long t = 0; t < windows; t += 32, out += 32 * HALF) {
        __m512i r[16];
        long at = t / 16;
        for (long c = 0; c < 16; c++) {
            const float *from = y + c * size;
            __mmask16 there = c < channels ? 0xffff : 0;
            r[c] = narrow(_mm512_maskz_expandloadu_ps(some[at] & there, from + before[at]),
                          _mm512_maskz_expandloadu_ps(some[at + 1] & there, from + before[at + 1]));
        }
        transpose(r);
        for (long c = 0; c < 16; c++) _mm512_storeu_si512(out + c * 32, r[c]);
    }
}

#endif

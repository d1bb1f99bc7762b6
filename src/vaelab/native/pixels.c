#include "pixels.h"

void bernoulli_shared(const float *logits, const float *x, float *log_p, float *residual, float scale, double *size, long rows,
                      long images, long pixels) {
    double total = 0;
#pragma omp for schedule(static) nowait
    for (long r = 0; r < rows; r++) {
        const float *l = logits + r * pixels, *image = x + r % images * pixels;
        Score s = score_begin();
        __m512 squares = _mm512_setzero_ps();
        for (long j = 0; j < pixels; j += 16) {
            __mmask16 inside = first16(pixels - j);
            __m512 rest = score_add(&s, _mm512_maskz_loadu_ps(inside, l + j), _mm512_maskz_loadu_ps(inside, image + j),
                                    inside);
            rest = _mm512_mul_ps(_mm512_set1_ps(scale), rest);
            squares = _mm512_mask3_fmadd_ps(rest, rest, squares, inside);
            if (residual) _mm512_mask_storeu_ps(residual + r * pixels + j, inside, rest);
        }
        log_p[r] = score_end(&s);
        total += _mm512_reduce_add_ps(squares);
    }
    if (size) {
#pragma omp atomic
        *size += total;
    }
#pragma omp barrier
}

void scores_shared(const Pixels *p, float *log_p, long m, long n) {
    long strips = up(n) / SIDE, last = (strips - 1) * up(m);
#pragma omp for schedule(static) nowait
    for (long r = 0; r < m; r++) {
        double sum = 0;
        for (long at = r; at <= last + r; at += 2 * up(m)) /* products of up to 64 factors */
            sum += at < last ? (double)p->linear[at] + p->linear[at + up(m)] - logf(p->product[at] * p->product[at + up(m)])
                             : (double)p->linear[at] - logf(p->product[at]);
        log_p[r] = (float)sum;
    }
}

void bernoulli(const float *logits, const float *x, float *log_p, float *residual, long rows, long images, long pixels,
               int threads) {
#pragma omp parallel num_threads(threads)
    bernoulli_shared(logits, x, log_p, residual, 1.0f, 0, rows, images, pixels);
}

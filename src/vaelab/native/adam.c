/* Adam on flat float32 weights, in one pass over them, and the sum of the squares of the gradient. */

#include "adam.h"

/* The weights are `parts` one after the other, of `sizes`, with `multiples` of the learning rate. The gradient is cleared where it
   will be added to. */
void adam(float *w, float *g, float *m, float *v, const long *sizes, const float *multiples, long parts, const Adam *a, int clear,
          int threads) {
#pragma omp parallel num_threads(threads)
    {
        unsigned control = begin_flushing();
        for (long p = 0, begin = 0; p < parts; begin += sizes[p], p++) {
#pragma omp for schedule(static) nowait
            for (long r = 0; r < (sizes[p] + RUN - 1) / RUN; r++) {
                long i = begin + r * RUN, n = least(RUN, sizes[p] - r * RUN);
                adam_run(a, multiples[p], g + i, w + i, m + i, v + i, n);
                if (clear) memset(g + i, 0, n * sizeof *g);
            }
        }
        end_flushing(control);
    }
}

/* The sum of squares, by way of the sums of each run of `chunk` numbers, so that it does not depend on the number of threads. */
double squares(const float *x, double *sums, long n, long chunk, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long c = 0; c < (n + chunk - 1) / chunk; c++) {
        long end = least((c + 1) * chunk, n);
        __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        for (long i = c * chunk; i < end; i += 64)
            for (int h = 0; h < 4; h++) {
                __m512 v = _mm512_maskz_loadu_ps(first16(end - i - 16 * h), x + i + 16 * h);
                sum[h] = _mm512_fmadd_ps(v, v, sum[h]);
            }
        sums[c] = (double)_mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1])) + _mm512_reduce_add_ps(_mm512_add_ps(sum[2], sum[3]));
    }
    double total = 0;
    for (long c = 0; c < (n + chunk - 1) / chunk; c++) total += sums[c];
    return total;
}

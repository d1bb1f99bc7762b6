/* Adam on flat float32 weights, in one pass over them, and the sum of the squares of the gradient. */

#include "adam.h"

#define RUN 4096 /* numbers that a thread updates before it clears their gradient */

/* The weights are `parts` one after the other, of `sizes`, with `multiples` of the learning rate. The gradient is cleared where it will be added to. */
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
        long end = (c + 1) * chunk < n ? (c + 1) * chunk : n;
        float lane[64] = {0};
        long i = c * chunk;
        for (; i + 64 <= end; i += 64)
            for (int j = 0; j < 64; j++) lane[j] += x[i + j] * x[i + j];
        for (; i < end; i++) lane[0] += x[i] * x[i];
        double sum = 0;
        for (int j = 0; j < 64; j++) sum += lane[j];
        sums[c] = sum;
    }
    double total = 0;
    for (long c = 0; c < (n + chunk - 1) / chunk; c++) total += sums[c];
    return total;
}

/* Adam on flat float32 weights, in one pass over them: `vaelab.optim` says what the arguments are.

       m = beta1 m + rest1 g      v = beta2 v + rest2 g^2      w -= rate (of_m m + of_g g) / (sqrt(v) / root + eps)

   where g is scale times the gradient, rest = 1 - beta, root = sqrt(1 - beta2^t), and of_m, of_g hold the correction of m's
   bias, and Nesterov's look ahead. The gradient is cleared where it will be added to. */

#include "tiles.h"

void adam(float *restrict w, float *restrict g, float *restrict m, float *restrict v, const long *sizes, const float *rates,
          long parts, float scale, float beta1, float rest1, float beta2, float rest2, float of_m, float of_g, float root,
          float eps, int clear, int threads) {
#pragma omp parallel num_threads(threads)
    {
        unsigned control = begin_flushing();
        for (long p = 0, begin = 0; p < parts; begin += sizes[p], p++) {
            const float rate = rates[p], unroot = 1 / root;
#pragma omp for simd schedule(static) nowait
            for (long i = begin; i < begin + sizes[p]; i++) {
                float gradient = scale * g[i];
                m[i] = beta1 * m[i] + rest1 * gradient;
                v[i] = beta2 * v[i] + rest2 * gradient * gradient;
                w[i] -= rate * (of_m * m[i] + of_g * gradient) / (sqrtf(v[i]) * unroot + eps);
                if (clear) g[i] = 0;
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

/* The products of a linear layer, in bfloat16 (`linear.c`) and in float32 (`exact.c`).

   x (m, k), w (n, k), b (n), y and its gradient dy (m, n), all by rows. Forward: y = x w' + b. Backward: dw += dy' x,
   db += the sums of dy over rows, dx = dy w; each of the three may be null.

   All threads of a parallel region call these together, and none goes on before all are done. */

#ifndef LINEAR_H
#define LINEAR_H

#include "tiles.h"

void linear_forward_shared(const float *x, const float *w, const float *b, float *y, long m, long n, long k, bf16 *scratch);
void linear_backward_shared(const float *x, const float *w, const float *dy, float *dw, float *db, float *dx, long m, long n,
                            long k, bf16 *scratch, int threads);
void exact_forward_shared(const float *x, const float *w, const float *b, float *y, long m, long n, long k, float *scratch);
void exact_backward_shared(const float *x, const float *w, const float *dy, float *dw, float *db, float *dx, long m, long n,
                           long k);

#endif

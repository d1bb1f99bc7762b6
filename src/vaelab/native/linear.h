/* The products of a linear layer. x (m, k), w (n, k), b (n), y and its gradient dy (m, n), all float32 by rows.

   `parts` is COARSE, products of bfloat16 numbers with float32 sums, or more (`tiles.h`); FULL is for forward, FINE for backward.
   All threads of a parallel region call these together, and none goes on before all are done. */

#ifndef LINEAR_H
#define LINEAR_H

#include "tiles.h"

/* y = x w' + b, b or null */
void linear_forward_shared(const float *x, const float *w, const float *b, float *y, long m, long n, long k, int parts,
                           bf16 *scratch);

/* dw = dy' x and db = the sums of dy over rows, or += where `add`; dx = dy w. Each of the three may be null. `squares`, or
   null, is given the sums of squares of dw and db, in up(n) / 32 and up(n) / 16 parts. */
void linear_backward_shared(const float *x, const float *w, const float *dy, float *dw, float *db, float *dx, long m, long n,
                            long k, int parts, int add, double *squares, bf16 *scratch, int threads);

#endif

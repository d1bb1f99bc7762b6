/* The products of a linear layer, of bfloat16 numbers with float32 sums. x (m, k), w (n, k), b (n), y and its gradient dy (m, n),
   all float32 by rows.

   All threads of a parallel region call the first two together, and none goes on before all are done. Scratch, in bfloat16
   numbers:

                       of all threads     of each alone
       forward         up(m) up(k)        32 up(k)
       input           up(m) up(n)
       rows                               32 up(m) */

#ifndef LINEAR_H
#define LINEAR_H

#include "activations.h"

/* From a kept panel of depth K to the next: not a power of two, whose lines would all fall into the same few of a cache. */
static inline long apart(long k) { return HALF * up(k) + SIDE; }

/* What forward keeps for the way back, as panels of B: x with K = m, and w with K = n; each null or room for a panel for each 16
   of up(k). */
typedef struct {
    bf16 *inputs, *weights;
} Kept;

/* y = x w', and what follows. Adds the sum of the squares of x to *size, if there is one, in any order. */
void linear_forward_shared(const float *x, const float *w, Forward then, float *y, long m, long n, long k, Kept kept,
                           double *size, bf16 *scratch, bf16 *alone);

/* dx = dy w through the gate, w as kept. Adds the sum of the squares of dx to *size, as above. */
void linear_input_shared(const float *dy, const bf16 *weights, Gate gate, float *dx, long m, long n, long k, double *size,
                         bf16 *scratch);

/* The 32 rows of dw = dy' x from row 32 t, or += where `add`, x as kept: dw has their place, or is null. db likewise, the sums of
   dy over rows. Of one thread; returns the sum of the squares of both. */
double linear_rows(const float *dy, const bf16 *inputs, float *dw, float *db, long m, long n, long k, long t, int add,
                   bf16 *alone);

#endif

/* The products of a linear layer in float32, for what must not be rounded: layers that read codes, and those that give the
   parameters of a posterior. x (m, k), w (n, k), b (n), y and its gradient dy (m, n), all by rows.

   All threads of a parallel region call the first two together; `turns` are those of ROWS rows, which are shared between the
   threads as those of images are everywhere, so that they stay with their thread. */

#ifndef EXACT_H
#define EXACT_H

#include "activations.h"
#include "turns.h"

#define ROWS 8 /* of a product at a time */

/* y = x w', and what follows. `alone` is each thread's own, up(n) k numbers. */
void exact_forward_shared(const float *x, const float *w, Forward then, float *y, long m, long n, long k, float *alone,
                          Turns *turns);

/* dx = dy w through the gate. Adds the sum of the squares of dx to *size, in any order. */
void exact_input_shared(const float *dy, const float *w, Gate gate, float *dx, long m, long n, long k, double *size, Turns *turns);

/* The rows of dw = dy' x from row ROWS t, dw has their place, or is null; db likewise, the sums of dy over rows. Of one thread;
   returns the sum of the squares of both. */
double exact_rows(const float *dy, const float *x, float *dw, float *db, long m, long n, long k, long t);

#endif

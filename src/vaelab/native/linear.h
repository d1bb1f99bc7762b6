/* The products of a linear layer, of bfloat16 numbers with float32 sums. x (m, k), w (n, k), b (n), y and its gradient dy (m, n),
   all float32 by rows.

   Those that end in `shared` are called together by all threads of a parallel region, and none goes on before all are done; sums of
   squares are added where there is room for them, in any order. `turns` are those of strips of 32 outputs, or inputs. */

#ifndef LINEAR_H
#define LINEAR_H

#include "activations.h"
#include "pixels.h"
#include "turns.h"

/* From a kept panel of depth K to the next: not a power of two, whose lines would all fall into the same few of a cache. */
static inline long apart(long k) { return HALF * up(k) + SIDE; }

/* What forward keeps for the way back, as panels of B: x with K = m, and w with K = n; each null or room for a panel for each 16
   of up(k). */
typedef struct {
    bf16 *inputs, *weights;
} Kept;

/* x as columns of B (up(m) up(k) numbers), and as it is kept. Adds the squares of x to *size. */
void linear_read_shared(const float *x, long m, long k, bf16 *columns, bf16 *inputs, double *size);

/* y = x w', and what follows. With `pixels` that is the logits of pixels, which are scored and not written, and the squares of their
   gradient are added to *slope. `alone` is each thread's own, 32 up(k) numbers. */
void linear_forward_shared(const bf16 *columns, const float *w, Forward then, const Pixels *pixels, float *y, double *slope,
                           long m, long n, long k, bf16 *weights, bf16 *alone, Turns *turns);

/* dy as rows of A, (up(m), up(n)). */
void linear_turn_shared(const float *dy, long m, long n, bf16 *rows);

/* dx = dy w through the gate, w as kept. Adds the squares of dx to *size. */
void linear_input_shared(const bf16 *rows, const bf16 *weights, Gate gate, float *dx, long m, long n, long k, double *size,
                         Turns *turns);

/* Of one thread: the 32 columns of dy from column 32 t as rows of A (32, up(m)); with them the 32 rows of dw = dy' x from row 32 t,
   or += where `add`, x as kept, and dw where they begin; db likewise, the sums of dy over rows. The last two return the sums of
   their squares. */
void linear_across(const float *dy, long m, long n, long t, bf16 *across);
double linear_rows(const bf16 *across, const bf16 *inputs, float *dw, long m, long n, long k, long t, int add);
double linear_bias(const float *dy, float *db, long m, long n, long t, int add);

#endif

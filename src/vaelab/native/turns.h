/* Who takes which piece of a loop. Each thread has some of its own, the same at each step, since what it has read or written there
   is near its core; and one that has none left takes the last of another's, so that none waits for a core that other programs use
   too. What a piece gives must not depend on who takes it. */

#ifndef TURNS_H
#define TURNS_H

#include <stdint.h>

/* A thread's pieces that are left: from the upper half on to before the lower one. Each in lines of its own. */
typedef struct {
    uint64_t left, apart[15];
} Turns;

/* Pieces 0 to count - 1 to all threads, before they begin. */
static inline void deal(Turns *turns, long count, int threads) {
    for (long t = 0; t < threads; t++) {
        uint64_t first = (uint64_t)(count * t / threads), end = (uint64_t)(count * (t + 1) / threads);
        turns[t].left = first << 32 | end;
    }
}

/* The next of one's own pieces, or the last of another's; -1 where there is none. */
static inline long piece_of(Turns *whose, int own) {
    uint64_t left = __atomic_load_n(&whose->left, __ATOMIC_RELAXED);
    for (;;) {
        uint64_t first = left >> 32, end = left & 0xffffffff;
        if (first >= end) return -1;
        uint64_t then = own ? left + ((uint64_t)1 << 32) : left - 1;
        if (__atomic_compare_exchange_n(&whose->left, &left, then, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
            return (long)(own ? first : end - 1);
    }
}

/* One's own as long as there are some, then those of the next threads. */
static inline long next_piece(Turns *turns, int threads, int me) {
    long piece = piece_of(turns + me, 1);
    for (int other = 1; piece < 0 && other < threads; other++) piece = piece_of(turns + (me + other) % threads, 0);
    return piece;
}

#endif

/* Who takes which piece of a loop. Each thread has some of its own, the same at each step, since what it has read or written there
   is near its core; and one that has none left takes the last of another's, so that none waits for a core that other programs use
   too. What a piece gives must not depend on who takes it. */

#ifndef TURNS_H
#define TURNS_H

#include <omp.h>
#include <stdint.h>

/* A thread's pieces that are left: from the upper half on to before the lower one. Each in lines of its own. */
typedef struct {
    uint64_t left;
    long threads; /* that were dealt to; there may be fewer in the end, if OpenMP has no more */
    uint64_t apart[14];
} Turns;

/* Pieces 0 to count - 1 to all threads, before they begin. */
static inline void deal(Turns *turns, long count, int threads) {
    for (long t = 0; t < threads; t++) {
        turns[t].threads = threads;
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

/* The calling thread's own. */
static inline long own_piece(Turns *turns) { return piece_of(turns + omp_get_thread_num(), 1); }

/* Its own as long as there are some, then those of all others. */
static inline long next_piece(Turns *turns) {
    long me = omp_get_thread_num(), threads = turns->threads, piece = own_piece(turns);
    for (long other = 1; piece < 0 && other < threads; other++) piece = piece_of(turns + (me + other) % threads, 0);
    return piece;
}

/* The turns of another loop, which were dealt to as many threads and lie behind these. */
static inline Turns *turns_after(Turns *turns, long loops) { return turns + loops * turns->threads; }

#endif

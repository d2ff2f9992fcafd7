// SPDX-License-Identifier: MIT
// What the schedule needs of OpenMP, for ThreadSanitizer: it sees POSIX threads, but not how GNU's OpenMP waits, and
// would take every region for a race. tests/races.py loads this before libgomp.
//
// A loop with a dynamic schedule may give any iteration to any thread. Here chance decides, anew for each loop, and no
// thread ever waits for another within one: whatever two iterations share without a right to, they are soon on two
// threads, and nothing has put one before the other.
//
// RACE=twice gives each iteration to two threads, RACE=early hides from ThreadSanitizer that the threads of a region
// have ended before the next begins: two defects of a schedule, which must be found.
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

void AnnotateIgnoreSyncBegin(const char *file, int line);  // ThreadSanitizer's
void AnnotateIgnoreSyncEnd(const char *file, int line);

enum { MOST_THREADS = 64 };

typedef struct team {
    void (*body)(void *);
    void *data;
    int threads, twice, early;
    uint64_t seed;
    pthread_barrier_t *barrier;
} team;

typedef struct member {
    team *team;
    int thread;
    long next, last;  // iterations of the loop that are still to be dealt
} member;

static _Thread_local member self;
static uint64_t regions;

static void *run(void *argument)
{
    self = *(member *)argument;
    self.team->body(self.team->data);
    return NULL;
}

void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags)
{
    const char *race = getenv("RACE");
    team of = {
        .body = body, .data = data, .threads = threads, .seed = __atomic_add_fetch(&regions, 1, __ATOMIC_RELAXED)};
    pthread_t ids[MOST_THREADS];
    member members[MOST_THREADS];
    const member outer = self;
    (void)flags;
    if (threads < 1 || threads > MOST_THREADS) abort();
    of.twice = race && !strcmp(race, "twice");
    of.early = race && !strcmp(race, "early");
    of.barrier = malloc(sizeof *of.barrier);
    if (!of.barrier || pthread_barrier_init(of.barrier, NULL, threads)) abort();
    for (unsigned i = 0; i < threads; i++) {
        members[i] = (member){.team = &of, .thread = i};
        if (i > 0 && pthread_create(&ids[i], NULL, run, &members[i])) abort();
    }
    run(&members[0]);
    if (of.early) AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
    for (unsigned i = 1; i < threads; i++) pthread_join(ids[i], NULL);
    if (of.early) {
        AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
    } else {  // a thread that has not ended may still use it
        pthread_barrier_destroy(of.barrier);
        free(of.barrier);
    }
    self = outer;
}

void GOMP_barrier(void)
{
    if (self.team) pthread_barrier_wait(self.team->barrier);
}

static int is_mine(long iteration)
{
    uint64_t z = (self.team->seed << 32) + iteration;  // splitmix64
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    const int threads = self.team->threads, owner = (z ^ z >> 31) % threads;
    // not the last one: its thread writes the loop's variable back
    const int twice = self.team->twice && iteration + 1 < self.last;
    return self.thread == owner || (twice && self.thread == (owner + 1) % threads);
}

_Bool GOMP_loop_nonmonotonic_dynamic_next(long *first, long *last)
{
    while (self.next < self.last && !is_mine(self.next)) self.next++;
    *first = self.next;
    *last = ++self.next;
    return *first < self.last;
}

_Bool GOMP_loop_nonmonotonic_dynamic_start(long first, long last, long step, long chunk, long *mine, long *end)
{
    if (!self.team || step != 1 || chunk != 1) abort();
    self.next = first;
    self.last = last;
    return GOMP_loop_nonmonotonic_dynamic_next(mine, end);
}

void GOMP_loop_end_nowait(void) {}

int omp_get_thread_num(void)
{
    return self.thread;
}

int omp_get_num_threads(void)
{
    return self.team ? self.team->threads : 1;
}

int omp_in_parallel(void)
{
    return self.team != NULL;
}

// SPDX-License-Identifier: MIT
// What fastbn needs of OpenMP, for ThreadSanitizer: it sees POSIX threads, but not how GNU's OpenMP waits, and
// would take every region for a race. tests/races.py loads this before libgomp.
//
// A thread takes the next task of some (fastbn_take_next), and any may get it. Here chance decides, anew for each
// region, and a thread waits for another at barriers only: whatever two tasks share without a right to, they are soon
// on two threads, and nothing has put one before the other.
//
// Defects of a schedule, which must be found: RACE=twice gives each task to two threads; RACE=early hides from
// ThreadSanitizer that the threads of a region have ended before the next begins, RACE=unordered that they have waited
// for each other within it.
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

// ThreadSanitizer's
void AnnotateIgnoreSyncBegin(const char *file, int line);
void AnnotateIgnoreSyncEnd(const char *file, int line);
int64_t __tsan_atomic64_fetch_add(volatile int64_t *p, int64_t by, int order);

enum { MOST_THREADS = 64 };

typedef struct team {
    void (*body)(void *);
    void *data;
    int threads, twice, early, unordered;
    uint64_t seed;
    pthread_barrier_t *barrier;
} team;

// What has been dealt by a counter.
typedef struct dealt {
    const char *counter;
    int64_t next;
} dealt;

typedef struct member {
    team *team;
    int thread;
    dealt dealt[3 * MOST_THREADS];  // three steps in a region
    long next, end;                 // of a loop
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
    of.unordered = race && !strcmp(race, "unordered");
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
    if (!self.team) return;
    if (self.team->unordered) AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
    pthread_barrier_wait(self.team->barrier);
    if (self.team->unordered) AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
}

static int is_mine(const char *counter, int64_t task)
{
    uint64_t z = (self.team->seed << 32) + ((uintptr_t)counter << 8) + task;  // splitmix64
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    const int threads = self.team->threads, owner = (z ^ z >> 31) % threads;
    return self.thread == owner || (self.team->twice && self.thread == (owner + 1) % threads);
}

// These two are in the place of the schedule's own, which a debug build exports.
int64_t fastbn_arrive(char *counter)
{
    const int order = self.team->unordered ? __ATOMIC_RELAXED : __ATOMIC_ACQ_REL;
    return __tsan_atomic64_fetch_add((int64_t *)counter, 1, order) + 1;
}

int64_t fastbn_take_next(char *counter)
{
    dealt *d = self.dealt;
    while (d->counter && d->counter != counter) d++;
    d->counter = counter;
    while (!is_mine(counter, d->next)) d->next++;
    return d->next++;
}

// A loop with schedule(dynamic, 1), of which a region has one at most.
bool GOMP_loop_nonmonotonic_dynamic_next(long *first, long *last)
{
    while (self.next < self.end && !is_mine((const char *)self.team, self.next)) self.next++;
    *first = self.next++;
    *last = self.next;
    return *first < self.end;
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long *first, long *last)
{
    if (!self.team || step != 1 || chunk != 1) abort();
    self.next = start;
    self.end = end;
    return GOMP_loop_nonmonotonic_dynamic_next(first, last);
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

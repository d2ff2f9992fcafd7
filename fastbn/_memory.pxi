# SPDX-License-Identifier: MIT
# Memory of large results. The system hands out fresh pages one fault at a time, which takes longer than to fill them;
# so blocks that arrays have freed are kept, up to a limit, and serve the next results.
#
# NumPy asks our handler for memory (NEP 49), but only while `empty_like` and `empty` make an array: no other array of
# the process is concerned. An array remembers its handler, so its block comes back here, from whatever thread and
# however late.
#
# A block is a mapping of its own, so that giving it up returns it to the system: a page for the header, then the data,
# at the start of a huge page if they fill some.

from cpython.pycapsule cimport PyCapsule_New
from libc.string cimport memcpy, memset, strcpy

ctypedef void (*ForkHandler)() noexcept nogil


cdef extern from * nogil:
    """
    #include <pthread.h>
    #include <sys/mman.h>
    #include <unistd.h>

    static pthread_mutex_t fastbn_memory_mutex = PTHREAD_MUTEX_INITIALIZER;
    static void fastbn_memory_lock(void) { pthread_mutex_lock(&fastbn_memory_mutex); }
    static void fastbn_memory_unlock(void) { pthread_mutex_unlock(&fastbn_memory_mutex); }

    static char *fastbn_map(size_t size)
    {
        void *place = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        return place == MAP_FAILED ? NULL : (char *)place;
    }

    static void fastbn_unmap(char *place, size_t size)
    {
        if (size)
            munmap(place, size);
    }

    static void fastbn_advise_huge(char *place, size_t size)
    {
    #ifdef MADV_HUGEPAGE
        madvise(place, size, MADV_HUGEPAGE); /* only advice: where there are none, nothing happens */
    #else
        (void)place, (void)size;
    #endif
    }

    static size_t fastbn_page(void) { return (size_t)sysconf(_SC_PAGESIZE); }
    """
    void fastbn_memory_lock()
    void fastbn_memory_unlock()
    char *fastbn_map(size_t size)
    void fastbn_unmap(char *place, size_t size)
    void fastbn_advise_huge(char *place, size_t size)
    size_t fastbn_page()
    int pthread_atfork(ForkHandler prepare, ForkHandler parent, ForkHandler child)


cdef enum:
    # Smaller arrays are left to NumPy: the C library recycles those as fast, larger ones rarely (measured).
    POOLED_BYTES = 64 << 10
    # From here on the C library (glibc) has no memory to recycle either: it maps every block. So if nothing is kept,
    # new memory of ours costs no more, and begins at a line of the cache, as stores past the caches want it.
    MAPPED_BYTES = 32 << 20
    # Where huge pages are asked for, and how large they are (on machines other than x86 a harmless alignment).
    HUGE_FROM = 4 << 20
    HUGE_PAGE = 2 << 20


cdef struct Block:  # the header
    size_t capacity  # bytes of data
    Block *newer
    Block *older


cdef struct Pool:
    size_t page
    size_t limit
    size_t idle  # bytes of data in the blocks that no array uses
    int64_t blocks, hits, misses
    Block *newest  # idle blocks in the order in which they were freed
    Block *oldest


cdef Pool pool
memset(&pool, 0, sizeof(pool))
pool.page = fastbn_page()


cdef inline size_t round_up(size_t size, size_t unit) noexcept nogil:
    return (size + unit - 1) // unit * unit


cdef inline char *data_of(Block *block) noexcept nogil:
    return <char *>block + pool.page


cdef inline Block *block_of(void *data) noexcept nogil:
    return <Block *>(<char *>data - pool.page)


# ----------------------------------------------------------------------------------------------------
# idle blocks; under the lock

cdef void insert(Block *block) noexcept nogil:
    block.newer = NULL
    block.older = pool.newest
    if pool.newest != NULL:
        pool.newest.newer = block
    else:
        pool.oldest = block
    pool.newest = block
    pool.idle += block.capacity
    pool.blocks += 1


cdef void remove(Block *block) noexcept nogil:
    if block.newer != NULL:
        block.newer.older = block.older
    else:
        pool.newest = block.older
    if block.older != NULL:
        block.older.newer = block.newer
    else:
        pool.oldest = block.newer
    pool.idle -= block.capacity
    pool.blocks -= 1


cdef void shrink(size_t limit) noexcept nogil:
    """Return blocks to the system, the oldest first."""
    cdef Block *block
    while pool.idle > limit:
        block = pool.oldest
        remove(block)
        unmap(block)


cdef Block *find(size_t size) noexcept nogil:
    """The smallest idle block that fits without wasting more than a quarter; of equal ones the newest, which may still
    be in the caches."""
    cdef Block *best = NULL
    cdef Block *block = pool.newest
    while block != NULL:
        if block.capacity == size:
            return block
        if size < block.capacity <= size + size // 4 and (best == NULL or block.capacity < best.capacity):
            best = block
        block = block.older
    return best


# ----------------------------------------------------------------------------------------------------
# blocks

cdef void unmap(Block *block) noexcept nogil:
    fastbn_unmap(<char *>block, pool.page + block.capacity)


cdef Block *map_block(size_t capacity) noexcept nogil:
    cdef size_t unit = HUGE_PAGE if capacity >= HUGE_FROM else pool.page, whole = capacity + unit
    cdef char *place = fastbn_map(whole)
    cdef char *data
    cdef Block *block
    if place == NULL:
        return NULL
    data = <char *>round_up(<size_t>place + pool.page, unit)
    block = block_of(data)
    fastbn_unmap(place, <char *>block - place)
    fastbn_unmap(data + capacity, place + whole - (data + capacity))
    if capacity >= HUGE_FROM:
        fastbn_advise_huge(data, capacity)
    block.capacity = capacity
    return block


cdef void *take_block(void *context, size_t size) noexcept nogil:
    cdef size_t capacity = round_up(max(size, 1), HUGE_PAGE if size >= HUGE_FROM else pool.page)
    cdef Block *block
    if capacity < size or capacity > <size_t>1 << 62:
        return NULL
    fastbn_memory_lock()
    block = find(capacity)
    if block != NULL:
        remove(block)
        pool.hits += 1
    else:
        pool.misses += 1
    fastbn_memory_unlock()
    if block == NULL:
        block = map_block(capacity)
    if block == NULL:  # what is kept may be what is missing
        give_up_idle()
        block = map_block(capacity)
    return NULL if block == NULL else data_of(block)


cdef void free_block(void *context, void *data, size_t size) noexcept nogil:
    cdef Block *block
    if data == NULL:
        return
    block = block_of(data)
    fastbn_memory_lock()
    if POOLED_BYTES <= block.capacity <= pool.limit:
        insert(block)
        shrink(pool.limit)
        block = NULL
    fastbn_memory_unlock()
    if block != NULL:
        unmap(block)


cdef void *take_zeroed_block(void *context, size_t count, size_t size) noexcept nogil:
    cdef void *data
    if size and count > (<size_t>-1) // size:
        return NULL
    data = take_block(context, count * size)
    if data != NULL:
        memset(data, 0, count * size)
    return data


cdef void *resize_block(void *context, void *data, size_t size) noexcept nogil:
    """For `ndarray.resize`, when nothing else uses the array."""
    cdef void *moved
    if data != NULL and block_of(data).capacity // 2 <= size <= block_of(data).capacity:
        return data
    moved = take_block(context, size)
    if moved != NULL and data != NULL:
        memcpy(moved, data, min(size, block_of(data).capacity))
        free_block(context, data, 0)
    return moved


cdef void give_up_idle() noexcept nogil:
    fastbn_memory_lock()
    shrink(0)
    fastbn_memory_unlock()


cdef void give_up_idle_in_child() noexcept nogil:
    """A forked child shares these pages with its parent: to write to them would copy them first."""
    shrink(0)
    fastbn_memory_unlock()


pthread_atfork(fastbn_memory_lock, fastbn_memory_unlock, give_up_idle_in_child)


# ----------------------------------------------------------------------------------------------------
# NumPy

cdef cnp.PyDataMem_Handler handler
memset(&handler, 0, sizeof(handler))
strcpy(handler.name, b"fastbn")
handler.version = 1
handler.allocator.malloc = take_block
handler.allocator.calloc = take_zeroed_block
handler.allocator.realloc = resize_block
handler.allocator.free = free_block
cdef object handler_capsule = PyCapsule_New(&handler, b"mem_handler", NULL)


cdef extern from "numpy/arrayobject.h":
    # `dtype` is taken over: it needs a reference of its own.
    object PyArray_NewLikeArray(cnp.ndarray like, cnp.NPY_ORDER order, cnp.dtype dtype, int subok)


cdef object begin(int64_t nbytes):
    """If the next array of this thread is large, let NumPy ask us for its memory; returns whom it has asked so far."""
    cdef bint ours = nbytes >= (POOLED_BYTES if pool.limit > 0 else MAPPED_BYTES)
    return cnp.PyDataMem_SetHandler(handler_capsule) if ours else None


cdef int end(object asked) except -1:
    if asked is not None:
        cnp.PyDataMem_SetHandler(asked)
    return 0


def empty_like(cnp.ndarray array, cnp.dtype dtype=None):
    if dtype is None:
        dtype = array.descr
    asked = begin(cnp.PyArray_SIZE(array) * cnp.PyDataType_ELSIZE(dtype))
    try:
        Py_INCREF(dtype)
        return PyArray_NewLikeArray(array, cnp.NPY_KEEPORDER, dtype, 0)
    finally:
        end(asked)


def empty(tuple shape, cnp.dtype dtype):
    cdef int64_t size = cnp.PyDataType_ELSIZE(dtype)
    for extent in shape:
        size *= extent
    asked = begin(size)
    try:
        return numpy.empty(shape, dtype)
    finally:
        end(asked)


def cache_info():
    fastbn_memory_lock()
    cdef Pool now = pool
    fastbn_memory_unlock()
    return now.limit, now.idle, now.blocks, now.hits, now.misses


def set_cache_limit(size_t limit):
    fastbn_memory_lock()
    pool.limit = limit
    shrink(limit)
    fastbn_memory_unlock()


def empty_cache():
    give_up_idle()

/* SPDX-License-Identifier: Apache-2.0 */
/* Threads that read and write overlapping ranges of one medium: each read must see the last write
 * that was submitted before it, whatever order the medium answers in. */
#include "check.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

enum {
    LONGEST = 6, /* blocks a transfer */
    SUBMITTERS = 4,
    ROUNDS = 1500, /* a submitter */
};

struct slot {
    int busy, op;
    uint32_t first, blocks;
    uint32_t expected[LONGEST]; /* stamp of each block, as of the submission */
    char *memory;               /* head-major: all blocks of head 0, then of head 1 */
};

/* `lock` makes the order of submission the order in which the model changes. */
struct stress {
    glue_queue *queue;
    pthread_mutex_t lock;
    uint32_t stamps[BLOCKS]; /* what each block holds once everything submitted is done */
    uint32_t next_stamp;
    struct slot slots[SLOTS + 1]; /* one more than the queue takes, so that it does fill up */
    uint32_t under_way, reads_seen;
    uint32_t depth, command_bytes; /* the queue's limits */
};

struct worker {
    struct stress *stress;
    unsigned seed;
};

static uint32_t stamp_at(uint32_t stamp, uint32_t head)
{
    return stamp * HEADS + head;
}

static void fill_run(char *memory, uint32_t value)
{
    for (size_t i = 0; i < RUN; i += sizeof value)
        memcpy(memory + i, &value, sizeof value);
}

static int run_holds(const char *memory, uint32_t value)
{
    for (size_t i = 0; i < RUN; i += sizeof value)
        if (memcmp(memory + i, &value, sizeof value))
            return 0;
    return 1;
}

static char *run_of(const struct slot *slot, uint32_t block, uint32_t head)
{
    return slot->memory + ((size_t)head * slot->blocks + block) * RUN;
}

static uint32_t pieces_of(const struct slot *slot, glue_piece pieces[2])
{
    uint32_t split = slot->blocks > 2 ? slot->blocks / 2 : slot->blocks;
    uint64_t address = (uint64_t)(uintptr_t)slot->memory, head_stride = (uint64_t)slot->blocks * RUN;
    pieces[0] = (glue_piece){(uint64_t)slot->first * BLOCK, address, head_stride, RUN, RUN, HEADS, split, 0, 0};
    pieces[1] = (glue_piece){((uint64_t)slot->first + split) * BLOCK,
                             address + (uint64_t)split * RUN,
                             head_stride,
                             RUN,
                             RUN,
                             HEADS,
                             slot->blocks - split,
                             0,
                             0};
    return split == slot->blocks ? 1 : 2;
}

static void verify_slot(struct stress *stress, struct slot *slot)
{
    stress->reads_seen++;
    for (uint32_t block = 0; block < slot->blocks; block++)
        for (uint32_t head = 0; head < HEADS; head++)
            CHECK(run_holds(run_of(slot, block, head), stamp_at(slot->expected[block], head)));
}

static void take_completions(struct stress *stress, int64_t timeout_ns)
{
    glue_completion done[8];
    int count = glue_reap(stress->queue, done, 8, 1, timeout_ns);
    CHECK(count >= 0);
    pthread_mutex_lock(&stress->lock);
    for (int i = 0; i < count; i++) {
        struct slot *slot = &stress->slots[done[i].tag];
        CHECK(slot->busy && done[i].result == (int64_t)slot->blocks * BLOCK);
        if (slot->op == GLUE_READ)
            verify_slot(stress, slot);
        slot->busy = 0;
        stress->under_way--;
    }
    pthread_mutex_unlock(&stress->lock);
}

static struct slot *free_slot(struct stress *stress)
{
    for (uint32_t i = 0; i <= SLOTS; i++)
        if (!stress->slots[i].busy)
            return &stress->slots[i];
    return NULL;
}

/* The slot's blocks as they must be read, or as the write leaves them. */
static void prepare_slot(struct stress *stress, struct slot *slot, unsigned *seed)
{
    slot->op = rand_r(seed) % 2 ? GLUE_WRITE : GLUE_READ;
    slot->blocks = 1 + (uint32_t)rand_r(seed) % LONGEST;
    slot->first = (uint32_t)rand_r(seed) % (BLOCKS - slot->blocks + 1);
    for (uint32_t block = 0; block < slot->blocks; block++) {
        slot->expected[block] =
            slot->op == GLUE_WRITE ? ++stress->next_stamp : stress->stamps[slot->first + block];
        for (uint32_t head = 0; head < HEADS; head++)
            fill_run(run_of(slot, block, head),
                     slot->op == GLUE_WRITE ? stamp_at(slot->expected[block], head) : UINT32_MAX);
    }
}

/* 1 submitted, 0 the queue or the slots are full. */
static int submit_random(struct stress *stress, unsigned *seed)
{
    glue_piece pieces[2];
    pthread_mutex_lock(&stress->lock);
    struct slot *slot = free_slot(stress);
    int accepted = 0;
    if (slot) {
        prepare_slot(stress, slot, seed);
        uint32_t count = pieces_of(slot, pieces);
        accepted = glue_submit(stress->queue, slot->op, (uint64_t)(slot - stress->slots), pieces, count);
        CHECK(accepted == 0 || accepted == 1);
        slot->busy = accepted;
        stress->under_way += (uint32_t)accepted;
    }
    if (accepted && slot->op == GLUE_WRITE)
        memcpy(&stress->stamps[slot->first], slot->expected, slot->blocks * sizeof slot->expected[0]);
    pthread_mutex_unlock(&stress->lock);
    return accepted;
}

static int tune(struct stress *stress, unsigned *seed)
{
    uint32_t depth = 1 + (uint32_t)rand_r(seed) % stress->depth;
    uint32_t pages = 1 + (uint32_t)rand_r(seed) % (stress->command_bytes / 4096);
    return glue_queue_tune(stress->queue, depth, pages * 4096);
}

static void *submitter(void *argument)
{
    struct worker *worker = argument;
    for (int round = 0; round < ROUNDS;) {
        int accepted = submit_random(worker->stress, &worker->seed);
        round += accepted;
        if (!accepted || rand_r(&worker->seed) % 4 == 0)
            take_completions(worker->stress, accepted ? 0 : 1000000);
        if (rand_r(&worker->seed) % 16 == 0)
            CHECK(!tune(worker->stress, &worker->seed));
    }
    return NULL;
}

static void zero_medium(struct stress *stress)
{
    char *zeros = aligned_alloc(4096, BLOCK);
    CHECK(zeros);
    for (uint32_t block = 0; block < BLOCKS; block++) {
        stress->stamps[block] = 0;
        fill_run(zeros, stamp_at(0, 0));
        fill_run(zeros + RUN, stamp_at(0, 1));
        CHECK(run_one(stress->queue, GLUE_WRITE, plain_piece((uint64_t)block * BLOCK, zeros, BLOCK)).result == BLOCK);
    }
    free(zeros);
}

static void run_workers(struct stress *stress)
{
    pthread_t threads[SUBMITTERS];
    struct worker workers[SUBMITTERS];
    for (unsigned i = 0; i < SUBMITTERS; i++) {
        workers[i] = (struct worker){stress, 17 * i + 1};
        CHECK(!pthread_create(&threads[i], NULL, submitter, &workers[i]));
    }
    for (unsigned i = 0; i < SUBMITTERS; i++)
        pthread_join(threads[i], NULL);
    while (stress->under_way)
        take_completions(stress, 30000000000);
}

static void stress_queue(const glue_options *options)
{
    struct stress *stress = calloc(1, sizeof *stress);
    CHECK(stress);
    stress->queue = queue_of(options);
    glue_queue_options(stress->queue, &stress->depth, &stress->command_bytes);
    pthread_mutex_init(&stress->lock, NULL);
    for (uint32_t i = 0; i <= SLOTS; i++)
        CHECK((stress->slots[i].memory = aligned_alloc(4096, LONGEST * BLOCK)) != NULL);
    zero_medium(stress);
    run_workers(stress);
    glue_stats stats;
    glue_queue_stats(stress->queue, &stats);
    CHECK(stress->reads_seen > ROUNDS);
    CHECK(stats.max_in_flight <= options->queue_depth && stats.read_bytes && stats.write_bytes);
    CHECK(glue_queue_close(stress->queue) == 0);
    for (uint32_t i = 0; i <= SLOTS; i++)
        free(stress->slots[i].memory);
    pthread_mutex_destroy(&stress->lock);
    free(stress);
}

static int case_order(void)
{
    glue_options options = options_of("mem");
    stress_queue(&options);
    return 0;
}

static int case_reorder(void)
{
    glue_options options = options_of("mem");
    options.flags = GLUE_REORDER;
    options.seed = 42;
    options.latency_ns = 20000;
    stress_queue(&options);
    return 0;
}

/* a real file ----------------------------------------------------------------------------------- */

static int skip(const char *name, const char *why)
{
    printf("%s: skipped: %s\n", name, why);
    return SKIP;
}

static int direct_file(const char **why)
{
    char name[4096];
    const char *folder = getenv("TMPDIR");
    snprintf(name, sizeof name, "%s/queue_test.XXXXXX", folder ? folder : "/tmp");
    int fd = mkostemp(name, O_DIRECT);
    *why = fd < 0 ? "O_DIRECT is refused in TMPDIR" : NULL;
    if (fd < 0)
        return -1;
    unlink(name);
    CHECK(ftruncate(fd, BLOCKS * BLOCK) == 0);
    return fd;
}

static void register_on(const glue_options *options)
{
    int kind, error;
    uint64_t size = 4u << 20;
    char *memory = glue_memory_alloc(&size, 0, &kind, &error);
    CHECK(memory);
    glue_queue *queue = queue_of(options);
    glue_stats stats;
    int64_t registered = run_one(queue, GLUE_REGISTER, plain_piece(0, memory, size)).result;
    CHECK(registered == 0 || registered == 1); /* 0 where RLIMIT_MEMLOCK is small */
    glue_queue_stats(queue, &stats);
    CHECK(stats.registered == (registered ? 4 : 0));
    memset(memory, 5, BLOCK);
    CHECK(run_one(queue, GLUE_WRITE, plain_piece(0, memory, BLOCK)).result == BLOCK);
    CHECK(run_one(queue, GLUE_READ, plain_piece(0, memory + BLOCK, BLOCK)).result == BLOCK);
    CHECK(!memcmp(memory, memory + BLOCK, BLOCK));
    CHECK(run_one(queue, GLUE_UNREGISTER, plain_piece(0, memory, 1)).result == 0);
    glue_queue_stats(queue, &stats);
    CHECK(stats.registered == 0);
    CHECK(run_one(queue, GLUE_READ, plain_piece(0, memory + 2 * BLOCK, BLOCK)).result == BLOCK);
    CHECK(!memcmp(memory, memory + 2 * BLOCK, BLOCK));
    glue_completion past = run_one(queue, GLUE_READ, plain_piece(BLOCKS * BLOCK, memory, BLOCK));
    CHECK(past.result == -ENODATA && past.offset == BLOCKS * BLOCK);
    CHECK(run_one(queue, GLUE_FLUSH, (glue_piece){0}).result == 0);
    CHECK(glue_queue_close(queue) == 0);
    glue_memory_free(memory, size);
}

static int case_posix(void)
{
    const char *why = NULL;
    int fd = direct_file(&why);
    if (fd < 0)
        return skip("posix", why);
    glue_options options = options_of("posix");
    options.fds = &fd;
    register_on(&options);
    stress_queue(&options);
    options.flags = GLUE_WORKERS;
    stress_queue(&options);
    options.queue_depth = 1;
    stress_queue(&options);
    close(fd);
    return 0;
}

static int case_uring(void)
{
    const char *why = NULL;
    if (!strstr(glue_engines(), "uring"))
        return skip("uring", "built without liburing");
    int fd = direct_file(&why), error = 0;
    if (fd < 0)
        return skip("uring", why);
    glue_options options = options_of("uring");
    options.fds = &fd;
    glue_queue *queue = glue_queue_open(&options, &error);
    if (!queue && (error == -EPERM || error == -ENOSYS)) {
        close(fd);
        return skip("uring", "the kernel refuses a ring");
    }
    CHECK(queue && glue_queue_close(queue) == 0);
    register_on(&options);
    stress_queue(&options);
    options.flags = GLUE_WORKERS;
    stress_queue(&options);
    glue_file_facts facts;
    glue_cached cached;
    CHECK(glue_file_facts_of(fd, &facts) == 0 && facts.size == BLOCKS * BLOCK && facts.is_regular);
    CHECK(glue_cached_pages(fd, &cached) == 0);
    close(fd);
    return 0;
}

int main(int argc, char **argv)
{
    static const struct test_case cases[] = {
        {"order", case_order}, {"reorder", case_reorder}, {"posix", case_posix}, {"uring", case_uring},
        {NULL, NULL}};
    return run_cases(cases, argc, argv);
}
